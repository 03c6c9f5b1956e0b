"""Where calibration and evaluation text comes from: a file, the builtin text, or a hub dataset.

    books.txt       UTF-8 text, documents separated by <|endoftext|>
    chats.jsonl     one JSON object a line, with `text` or with chat `messages`
    builtin         text found on any machine, see builtin.py
    org/dataset     a dataset of the Hugging Face hub, `name` or `name:configuration`, its split `train`

Text goes out exactly as it came in. A chat needs the tokenizer's template, which comes in as a function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from awqkit.calibration.builtin import builtin_documents
from awqkit.errors import CalibrationError

BUILTIN = "builtin"
DOCUMENT_SEPARATOR = "<|endoftext|>"
MAX_HUB_DOCUMENTS = 4096  # streamed, so a dataset of any size costs only this many; plenty for 128 rows of 2048
FILE_SUFFIXES = (".txt", ".jsonl")

RenderChat = Callable[[list[dict[str, Any]]], str]


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts in file order. label: what to call their source in summaries and messages."""

    label: str
    texts: tuple[str, ...]


def read_documents(
    source: str, *, render_chat: RenderChat | None = None, exclude: frozenset[str] = frozenset()
) -> Documents:
    """The documents of `source`.

    render_chat: chat messages to text; None where the tokenizer has no chat template.
    exclude: names of standard library modules that the builtin text must not contain.
    Raises CalibrationError for anything that cannot be used, naming the file and, in .jsonl, the line.
    """
    if source == BUILTIN:
        return Documents(BUILTIN, tuple(builtin_documents(exclude)))
    path = Path(source).expanduser()
    if path.exists() or _looks_like_path(source):
        texts = _read_file(path, render_chat)
    else:
        texts = _texts_of(_stream_hub(source), source, "document", render_chat)
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"{source}: no text found in it; give a source with text, or `{BUILTIN}`")
    return Documents(source, tuple(text for text in texts if text.strip()))


def _looks_like_path(source: str) -> bool:
    """A hub name is `name` or `org/name`; whatever is more than that was meant as a file."""
    marked = source.startswith((".", "/", "~")) or source.endswith(("/", *FILE_SUFFIXES))
    return marked or "\\" in source or source.count("/") > 1


def _read_file(path: Path, render_chat: RenderChat | None) -> list[str]:
    if not path.exists():
        raise CalibrationError(f"{path}: no such file; give a .txt or .jsonl file, `{BUILTIN}` or a hub dataset's name")
    if path.is_dir():
        raise CalibrationError(f"{path}: is a folder; give one .txt or .jsonl file in it")
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise CalibrationError(f"{path}: only .txt and .jsonl files are read; convert it, or rename plain text to .txt")
    text = _decode(path)
    if path.suffix.lower() == ".txt":
        return text.split(DOCUMENT_SEPARATOR)
    return _texts_of(_json_lines(text, path), str(path), "line", render_chat)


def _decode(path: Path) -> str:
    """The file's text; line ends of all kinds become a newline, a byte order mark is left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); convert it to UTF-8"
        ) from error
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}); check the file's permissions") from error
    if "\0" in text:
        raise CalibrationError(f"{path}: has NUL bytes, so it is a binary file; give UTF-8 text")
    if not text.strip():
        raise CalibrationError(f"{path}: the file is empty; give a file with text, or `{BUILTIN}`")
    return text


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # split("\n"), not splitlines(): JSON strings may hold U+2028 and its like unescaped
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(
                f"{path}: line {number} is not JSON ({error.msg}); each line must be one JSON object"
            ) from error


def _texts_of(records: Iterable[tuple[int, Any]], source: str, unit: str, render_chat: RenderChat | None) -> list[str]:
    """The text of each numbered record, from its `text` or its `messages`."""
    texts = []
    for number, record in records:
        where = f"{source}: {unit} {number}"
        if isinstance(record, dict) and isinstance(record.get("text"), str):
            texts.append(record["text"])
        elif isinstance(record, dict) and _is_chat(record.get("messages")):
            texts.append(_render(record["messages"], where, render_chat))
        else:
            raise CalibrationError(
                f'{where} has neither "text" (a string) nor "messages" (a list of objects with "role"); '
                "every one needs one of them"
            )
    return texts


def _is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and all(isinstance(m, dict) and "role" in m for m in messages)


def _render(messages: list[dict[str, Any]], where: str, render_chat: RenderChat | None) -> str:
    if render_chat is None:
        raise CalibrationError(
            f'{where} is a chat, but the tokenizer has no chat template; give documents with "text" instead'
        )
    try:
        return render_chat(messages)
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise CalibrationError(f"{where}: the tokenizer's chat template refused it ({_one_line(error)})") from error


def _stream_hub(source: str) -> Iterator[tuple[int, Any]]:
    """The first documents of a hub dataset, numbered from 1."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"{source}: no such file, and reading a hub dataset needs a package: pip install 'awqkit[datasets]'"
        ) from error
    name, _, configuration = source.partition(":")
    try:
        stream = load_dataset(name, configuration or None, split="train", streaming=True)
        yield from enumerate(islice(stream, MAX_HUB_DOCUMENTS), start=1)
    except Exception as error:  # offline, unknown name, missing configuration: no common class in `datasets`
        raise CalibrationError(
            f"{source}: no such file, and as a hub dataset it cannot be read ({_one_line(error)}); "
            f"check the name and the network, or use `{BUILTIN}`"
        ) from error


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
