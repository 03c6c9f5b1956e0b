"""The example of a document runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_example_of_a_plain_module_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plain-modules.md").read_text("utf-8"), re.DOTALL)
    found: dict[str, object] = {"__name__": "example"}
    exec(code, found)
    assert found["logits"].shape == (1, 32, 256)
    assert (tmp_path / "OUT" / "config.json").exists()
