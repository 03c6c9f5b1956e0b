"""Every kind of source, and one clear line for everything that cannot be used."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from awqkit.calibration import sources
from awqkit.calibration.sources import read_documents
from awqkit.errors import CalibrationError


def refused(source, **arguments) -> str:
    with pytest.raises(CalibrationError) as caught:
        read_documents(str(source), **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def render(messages) -> str:
    return "".join(f"[{message['role']}]{message['content']}" for message in messages)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_text_without_separator_is_one_document_unchanged(tmp_path):
    path = tmp_path / "a b.txt"
    path.write_text("  one\n\ntwo é \n", encoding="utf-8")
    documents = read_documents(str(path))
    assert documents.texts == ("  one\n\ntwo é \n",)
    assert documents.label == str(path)


def test_text_is_split_at_separators_and_empty_documents_do_not_count(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n<|endoftext|>\ntwo<|endoftext|>\n<|endoftext|>", encoding="utf-8")
    assert read_documents(str(path)).texts == ("one\n", "\ntwo")


def test_byte_order_mark_and_line_ends_are_normalized(tmp_path):
    path = tmp_path / "a.TXT"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_documents(str(path)).texts == ("one\ntwo",)


def test_jsonl_takes_text_and_chats(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "one\u2028two"}, ensure_ascii=False)
    path.write_text(f"{line}\n\n{json.dumps({'messages': CHAT})}\n", encoding="utf-8")
    assert read_documents(str(path), render_chat=render).texts == ("one\u2028two", "[user]hi[assistant]hello")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"abc\0def", "NUL bytes"),
        (b"abc\xff", "not UTF-8 text (byte 3 is 0xff)"),
        (b"<|endoftext|>\n", "no text found"),
    ],
)
def test_unusable_text_files(tmp_path, content, expected):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    message = refused(path)
    assert str(path) in message and expected in message


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ('{"text": "a"}\n\n{"prompt": "b"}\n', 'line 3 has neither "text"'),
        ('{"text": 5}\n', 'line 1 has neither "text"'),
        ('"a"\n', 'line 1 has neither "text"'),
        ('{"messages": []}\n', 'line 1 has neither "text"'),
        ('{"messages": ["hi"]}\n', 'line 1 has neither "text"'),
        ('{"text": ""}\n', "no text found"),
    ],
)
def test_unusable_jsonl_files(tmp_path, content, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    message = refused(path, render_chat=render)
    assert str(path) in message and expected in message


def test_chat_needs_a_template(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"messages": CHAT})
    assert "line 2 is a chat, but the tokenizer has no chat template" in refused(path)


def test_chat_that_the_template_refuses(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": CHAT})

    def refuse(messages):
        raise ValueError("roles must alternate\nsomewhere")

    assert "line 1: the tokenizer's chat template refused it (ValueError: roles must alternate)" in refused(
        path, render_chat=refuse
    )


def test_paths_that_cannot_be_read(tmp_path):
    assert "no such file" in refused(tmp_path / "missing.txt")
    assert "no such file" in refused("missing.jsonl")
    assert "no such file" in refused("./missing")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "a.csv").write_text("a")
    assert "only .txt and .jsonl" in refused(tmp_path / "a.csv")


def test_builtin_leaves_modules_out(monkeypatch):
    monkeypatch.setattr(sources, "builtin_documents", lambda exclude: [f"without {sorted(exclude)}"])
    documents = read_documents("builtin", exclude=frozenset({"heapq"}))
    assert documents == sources.Documents("builtin", ("without ['heapq']",))


def use_datasets(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_hub_dataset_is_streamed_up_to_a_limit(monkeypatch):
    taken = []

    def load_dataset(name, configuration, *, split, streaming):
        assert (name, configuration, split, streaming) == ("org/name", "raw", "train", True)
        return (taken.append(number) or {"text": f"text {number}"} for number in range(10**9))

    use_datasets(monkeypatch, load_dataset)
    monkeypatch.setattr(sources, "MAX_HUB_DOCUMENTS", 3)
    assert read_documents("org/name:raw").texts == ("text 0", "text 1", "text 2")
    assert taken == [0, 1, 2]


def test_hub_dataset_of_chats(monkeypatch):
    use_datasets(monkeypatch, lambda name, configuration, **_: iter([{"messages": CHAT}]))
    assert read_documents("chats", render_chat=render).texts == ("[user]hi[assistant]hello",)
    assert "chats: document 1 is a chat" in refused("chats")


def test_hub_dataset_without_a_known_column(monkeypatch):
    use_datasets(monkeypatch, lambda name, configuration, **_: iter([{"prompt": "a"}]))
    assert 'org/name: document 1 has neither "text"' in refused("org/name")


def test_hub_that_cannot_be_reached(monkeypatch):
    def load_dataset(name, configuration, **_):
        raise ConnectionError("no route\nto host")

    use_datasets(monkeypatch, load_dataset)
    message = refused("org/name")
    assert "ConnectionError: no route)" in message and "check the name and the network" in message


def test_hub_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'awqkit[datasets]'" in refused("org/name")
