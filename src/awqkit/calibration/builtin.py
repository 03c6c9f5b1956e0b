"""Text that is found on any machine: the running Python's standard library and its documentation.

Three kinds of documents, in turn:

    topics      the language reference that `help()` shows, from pydoc_data: prose with tables and examples
    docstrings  those of every second module: shorter prose
    sources     the first lines of the modules between: program text with comments

A model of natural language is calibrated best on prose, a model of code on code, and the library is nine
tenths code. So each module gives either its docstrings or its source, and at most `MAX_SOURCE_CHARS` of the
latter: a little more prose than code, some 2.5 million characters in all, and no module dominates. Files
are read, nothing is imported.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from awqkit.errors import CalibrationError

MAX_SOURCE_CHARS = 6000
MIN_DOCSTRING_CHARS = 200  # less is a line that says what the module is for
MIN_TOTAL_CHARS = 100_000  # about 25 000 tokens: with less, the library is not really there

# Installed programs, tables of numbers, compiled modules, and the topics, which are read as prose.
NOT_TEXT = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "lib-dynload", "pydoc_data"})
# Text, but of little use or missing from many installations.
NOT_LIBRARY = frozenset({"test", "tests", "idlelib", "lib2to3", "turtledemo"})
# Of this machine, not of Python: the text would differ for no good reason.
_BUILD_SETTINGS = ("config-", "_sysconfigdata")
_INSIDE = ("body", "handlers", "orelse", "finalbody", "cases")  # where a statement holds others, in the order of fields


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """One source file of the standard library. name: dotted, as it is imported."""

    name: str
    path: Path


def stdlib_folder() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def module_files(folder: Path | None = None, skip: frozenset[str] = NOT_TEXT | NOT_LIBRARY) -> list[ModuleFile]:
    """The library's source files, sorted by path; nothing inside a folder named in `skip`."""
    folder = stdlib_folder() if folder is None else folder
    found = []
    for parent, folders, names in os.walk(folder):
        # pruned on the way down: site-packages may hold ten times as many files as the library
        folders[:] = [name for name in folders if name not in skip and not name.startswith(_BUILD_SETTINGS)]
        sources = (name for name in names if name.endswith(".py") and not name.startswith(_BUILD_SETTINGS))
        found.extend((Path(parent, name).relative_to(folder)).as_posix() for name in sources)
    return [ModuleFile(_dotted(path), folder / path) for path in sorted(found)]


def read_source(file: ModuleFile) -> str:
    """The file's text, or "" where it cannot be read as UTF-8."""
    try:
        return file.path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def belongs_to(name: str, modules: Iterable[str]) -> bool:
    """Whether the dotted `name` is one of `modules` or lies inside one that is a package."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def module_sources(names: Iterable[str]) -> list[str]:
    """The whole sources of the named standard library modules, in the order of `names`.

    Raises CalibrationError for a module whose source is not there.
    """
    files = module_files()
    documents = []
    for name in names:
        texts = [read_source(file) for file in files if belongs_to(file.name, (name,))]
        if not any(texts):
            raise CalibrationError(
                f"no source of module {name} in {stdlib_folder()}; install the full Python standard library"
            )
        documents.extend(text for text in texts if text)
    return documents


def topics(folder: Path | None = None) -> list[str]:
    """The documentation topics of `help()`, sorted by name; empty where this Python came without them."""
    path = (stdlib_folder() if folder is None else folder) / "pydoc_data" / "topics.py"
    tree = _parse(read_source(ModuleFile("pydoc_data.topics", path)))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            texts = ast.literal_eval(node.value)
            return [texts[name] for name in sorted(texts)]
    return []


def builtin_documents(exclude: frozenset[str] = frozenset()) -> list[str]:
    """The builtin calibration text: topics, docstrings and sources in turn, the same on every call.

    exclude: names of modules to leave out, a package with all that is in it.
    Raises CalibrationError where this Python has next to no sources.
    """
    files = [file for file in module_files() if not belongs_to(file.name, exclude)]
    prose = (text for file in files[::2] if len(text := _docstrings(read_source(file))) >= MIN_DOCSTRING_CHARS)
    sources = (_head(text) for file in files[1::2] if (text := read_source(file)))
    documents = list(_in_turn(topics(), prose, sources))
    found = sum(map(len, documents))
    if found < MIN_TOTAL_CHARS:
        raise CalibrationError(
            f"the builtin text needs the Python standard library, but {stdlib_folder()} has only {found} "
            "characters of source; pass --calibration with a text file"
        )
    return documents


def _in_turn(*streams: Iterable[str]) -> Iterator[str]:
    """One of each as long as they last."""
    return (text for text in chain.from_iterable(zip_longest(*streams)) if text is not None)


def _docstrings(source: str) -> str:
    """Every docstring of a module, outer ones before inner ones."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in _statements(_parse(source)) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The tree and what it holds in the order of `ast.walk`, expressions left out: seven eighths of all nodes."""
    waiting = deque[ast.AST]([tree])
    while waiting:
        node = waiting.popleft()
        for name in _INSIDE:
            waiting.extend(getattr(node, name, ()))
        yield node


def _head(source: str) -> str:
    """Whole lines from the start, at most MAX_SOURCE_CHARS of them."""
    if len(source) <= MAX_SOURCE_CHARS:
        return source
    return source[: source.rfind("\n", 0, MAX_SOURCE_CHARS) + 1]


def _parse(source: str) -> ast.Module:
    """The syntax tree; an empty one for what this Python cannot parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # escapes in the library's own strings
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return ast.parse(source)
        except SyntaxError:
            return ast.Module(body=[], type_ignores=[])


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
