"""The builtin text: the same every time, without what is excluded, and on a bare Python too."""

from __future__ import annotations

import ast

import pytest

from awqkit.calibration import builtin
from awqkit.calibration.builtin import builtin_documents, module_files, module_sources, read_source, topics
from awqkit.errors import CalibrationError


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return builtin_documents()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of our own, which a test fills."""
    monkeypatch.setattr(builtin, "stdlib_folder", lambda: tmp_path)
    return tmp_path


def add(folder, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_text_is_deterministic_and_enough_for_the_defaults(documents):
    assert documents == builtin_documents()
    # 128 + 16 rows of 2048 tokens, even at 5 characters a token
    assert sum(map(len, documents)) > 144 * 2048 * 5


def test_prose_and_source_are_in_balance():
    files = module_files()
    prose = sum(map(len, topics())) + sum(len(builtin._docstrings(read_source(f))) for f in files[::2])
    source = sum(len(builtin._head(read_source(f))) for f in files[1::2])
    assert 0.5 < prose / source < 2


def test_only_the_library_itself_is_read():
    names = {file.name for file in module_files()}
    assert {"heapq", "json", "json.decoder"} <= names
    unwanted = {"test", "tests", "site-packages", "idlelib", "encodings", "pydoc_data"}
    assert not any(unwanted.intersection(name.split(".")) for name in names)
    assert [file.path for file in module_files()] == [file.path for file in module_files()]


def test_excluded_modules_are_absent(library, monkeypatch):
    monkeypatch.setattr(builtin, "MIN_TOTAL_CHARS", 10)
    for name in ["a.py", "b.py", "bc.py", "package/__init__.py", "package/inner.py", "z.py"]:
        add(library, name, f'"""Docstring of {name}. {"x" * 300}"""\nVALUE = 1\n')
    text = "".join(builtin_documents(frozenset({"b", "package"})))
    assert all(f"Docstring of {name}." in text for name in ["a.py", "bc.py", "z.py"])
    assert not any(f"Docstring of {name}" in text for name in ["b.py", "package"])


def test_docstrings_are_found_in_the_order_of_the_whole_tree() -> None:
    source = '"m"\nif 1:\n class A:\n  "a"\n  def f(self, x=lambda: 0):\n   "f"\n   def g(): "g"\n'
    source += 'try:\n def h(): "h"\nexcept E:\n def i(): "i"\nelse:\n async def j(): "j"\nfinally:\n def k(): "k"\n'
    source += 'match x:\n case 1:\n  def l(): "l"\nwith y:\n for z in w:\n  def n(): "n"\n else:\n  def o(): "o"\n'
    tree = ast.parse(source)
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found, expected = (
        [node.name for node in nodes if isinstance(node, kinds)]
        for nodes in (builtin._statements(tree), ast.walk(tree))
    )
    assert found == expected
    assert len(expected) == 10 and builtin._docstrings(source).split() == ["m", *map(str.lower, expected)]


def test_no_module_gives_both_its_docstrings_and_its_source(library, monkeypatch):
    monkeypatch.setattr(builtin, "MIN_TOTAL_CHARS", 10)
    for name in "ab":
        add(library, f"{name}.py", f'"""{name * 300}"""\nVALUE = 1\n')
    assert builtin_documents() == ["a" * 300, '"""' + "b" * 300 + '"""\nVALUE = 1\n']


def test_long_sources_end_at_a_line(library):
    head = builtin._head("x = 1\n" * 5000)
    assert len(head) <= builtin.MAX_SOURCE_CHARS and head.endswith("x = 1\n")


def test_a_library_without_topics_will_do(library, monkeypatch):
    monkeypatch.setattr(builtin, "MIN_TOTAL_CHARS", 10)
    add(library, "a.py", '"""' + "a" * 300 + '"""\n')
    add(library, "broken.py", "def (:\n")
    (library / "latin.py").write_bytes(b"# \xe9\n")
    assert topics() == []
    assert builtin_documents()[0] == "a" * 300


def test_topics_are_sorted_by_name(library):
    add(library, "pydoc_data/topics.py", 'topics = {"b": "second", "a": "first"}\n')
    assert topics() == ["first", "second"]


def test_a_python_without_sources_is_refused(library):
    with pytest.raises(CalibrationError, match=r"has only 0 characters of source; pass --calibration"):
        builtin_documents()


def test_module_sources_are_whole_and_in_order(library):
    for name in ["a.py", "p/__init__.py", "p/inner.py"]:
        add(library, name, f"# {name}\n" * 3000)
    texts = module_sources(["p", "a"])
    assert [text.splitlines()[0] for text in texts] == ["# p/__init__.py", "# p/inner.py", "# a.py"]
    assert all(text.count("\n") == 3000 for text in texts)
    with pytest.raises(CalibrationError, match="no source of module missing"):
        module_sources(["missing"])
