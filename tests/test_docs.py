"""What the documents name exists: files of the package, tests, decision records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "decisions").glob("*.md")])


def named(pattern: str) -> list[str]:
    """What the architecture document names between backticks and matches `pattern`."""
    return [word for word in re.findall(r"`([^`]+)`", ARCHITECTURE) if re.fullmatch(pattern, word)]


def test_every_test_that_holds_an_invariant_exists() -> None:
    tests = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    functions = {name for path in tests.values() for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))}
    files, names = named(r"(tests/\S+/)?test_\w+\.py|tests/\S+\.py"), named(r"test_\w+")
    assert len(files) > 5
    assert len(names) > 10
    assert not [file for file in files if Path(file).name not in tests]
    assert not [name for name in names if name not in functions]


def test_every_file_of_the_code_map_exists() -> None:
    sources = {path.relative_to(ROOT / "src" / "awqkit").as_posix() for path in (ROOT / "src").rglob("*.py")}
    known = sources | {path.rpartition("/")[2] for path in sources}
    modules = [name for name in named(r"(\w+/)*\w+\.py") if not name.startswith(("tests/", "benchmarks/", "test_"))]
    assert len(modules) > 20
    assert not [name for name in modules if name.removeprefix("pipeline/") not in known and name not in known]


def test_every_file_of_the_package_has_its_part_in_the_code_map() -> None:
    parts = {path.name for path in (ROOT / "src" / "awqkit").iterdir() if (path / "__init__.py").exists()}
    assert not [part for part in parts if f"**`{part}/`**" not in ARCHITECTURE]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (document.parent / link).exists()]
