"""Calibration text that cannot be used is refused in one line that says where and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from awqkit import quantize as quantize_model
from awqkit.errors import CalibrationError


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "text.txt: the file is empty; give a file with text"),
        (b"  \n<|endoftext|>\n", "text.txt: no text found in it; give a source with text"),
        (bytes(range(256)), "text.txt: not UTF-8 text (byte 128 is 0x80); convert it to UTF-8"),
        (b"GGUF\0\0\1text", "text.txt: has NUL bytes, so it is a binary file; give UTF-8 text"),
    ],
)
def test_a_file_without_text(refused, place, content, line):
    place.text.write_bytes(content)
    assert refused().startswith(line)


def test_too_little_text_says_how_many_tokens_are_needed(refused, place):
    place.text.write_text("A few words only.")
    line = refused()
    assert line.startswith("text.txt: 7 tokens found, but 4 rows of 32 tokens need 124 beside their start tokens; ")
    assert line.endswith("give more text, or a smaller --samples or --seq-len")


@pytest.mark.parametrize("name", ["no.txt", "./no", "some/where/else"])
def test_a_file_that_is_missing(refused, name):
    assert refused("--calibration", name).startswith(f"{Path(name)}: no such file; give a .txt or .jsonl file")


def test_a_folder(refused):
    assert refused("--calibration", "model") == "model: is a folder; give one .txt or .jsonl file in it"


def test_a_file_of_another_kind(refused, place):
    (place.root / "book.pdf").write_bytes(b"%PDF")
    assert refused("--calibration", "book.pdf").startswith("book.pdf: only .txt and .jsonl files are read")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "a"}\n{"text": \n', "c.jsonl: line 2 is not JSON (Expecting value); each line must be one JSON"),
        ('{"text": "a"}\n{"body": "b"}\n', 'c.jsonl: line 2 has neither "text" (a string) nor "messages"'),
        ('{"text": 7}\n', 'c.jsonl: line 1 has neither "text" (a string) nor "messages"'),
        (
            '{"messages": [{"role": "user", "content": "Hi"}]}\n',
            "c.jsonl: line 1 is a chat, but the tokenizer has no chat template; give documents with",
        ),
    ],
)
def test_a_jsonl_file_with_a_bad_line(refused, place, content, line):
    (place.root / "c.jsonl").write_text(content)
    assert refused("--calibration", "c.jsonl").startswith(line)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], "an empty list of token rows"),
        ([[1, 2, 3], []], "row 1 of the token ids is empty"),
        ([[1, 4096]], "token id 4096 lies outside the model's vocabulary of 4096"),
        ([[1, -1]], "token id -1 lies outside the model's vocabulary of 4096"),
    ],
)
def test_token_rows_that_cannot_be_used(place, rows, found):
    before = place.contents()
    with pytest.raises(CalibrationError, match=found):
        quantize_model("model", "out", calibration=rows)
    assert place.contents() == before
