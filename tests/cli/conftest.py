"""A fake `awqkit.api`, so that these tests load no model and no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from awqkit.cli.main import main
from awqkit.events import BlockFinished, Event, Notice, TaskFinished, TaskStarted

EVENTS: tuple[Event, ...] = (
    Notice("group size 64"),
    TaskStarted("block", 2),
    BlockFinished(0, 2, 4.2, 0.0123, 0.0061, 0),
    BlockFinished(1, 2, 4.0, None, None, 3),
    TaskFinished("block"),
)


class FakeReport:
    def __str__(self) -> str:
        return "the report → text"

    def to_json(self) -> dict[str, Any]:
        return {"blocks": 2}


@dataclass(frozen=True)
class FakeRow:
    method: str
    bits_per_weight: float
    perplexity: float
    kl: float | None
    top1_agreement: float | None
    seconds: float | None


@dataclass
class FakeApi:
    """Calls that arrived, and what the next one does instead of working."""

    calls: list[SimpleNamespace] = field(default_factory=list)
    fails: Callable[[], None] = lambda: None

    def quantize(
        self, model: Any, out: Any, recipe: Any = None, *, options: Any, report_page: Any, emit: Any
    ) -> SimpleNamespace:
        self._record(model=model, out=out, recipe=recipe, options=options, report_page=report_page, emit=emit)
        Path(out).mkdir(exist_ok=True)
        (Path(out) / "model.safetensors").write_bytes(bytes(1500))
        return SimpleNamespace(directory=Path(out), report=FakeReport(), seconds=12.34)

    def evaluate(self, model: Any, text: Any, *, options: Any, emit: Any, **choices: Any) -> SimpleNamespace:
        self._record(model=model, text=text, options=options, emit=emit, **choices)
        referenced = choices["reference"] is not None
        scores = {
            "perplexity": 12.34567,
            "kl": 0.0123 if referenced else None,
            "top1_agreement": 0.934 if referenced else None,
            "tokens": 1024,
            "windows": 2,
        }
        return SimpleNamespace(**scores, to_json=lambda: scores)

    def demo(self, model: str, out: Any, *, options: Any, emit: Any) -> SimpleNamespace:
        self._record(model=model, out=out, options=options, emit=emit)
        rows = (
            FakeRow("fp", 16, 13.87, None, None, None),
            FakeRow("rtn", 4.1562, 15.2, 0.0912, 0.84, 1.2),
            FakeRow("balanced", 4.1562, 14.3, 0.0312, 0.9, 8.25),
        )
        Path(out).mkdir(exist_ok=True)
        (Path(out) / "model.safetensors").write_bytes(bytes(1500))
        return SimpleNamespace(
            rows=rows, directory=Path(out), report_page=Path(f"{out}-report.html"), model=Path("source")
        )

    def _record(self, *, emit: Callable[[Event], None], **values: Any) -> None:
        self.calls.append(SimpleNamespace(**values))
        self.fails()
        for event in EVENTS:
            emit(event)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeApi:
    """The fake in place of the three api modules; the current directory is an empty one."""
    fake = FakeApi()
    for verb in ("quantize", "evaluate", "demo"):
        module = ModuleType(f"awqkit.api.{verb}")
        setattr(module, verb, getattr(fake, verb))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    return fake


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def awqkit(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command line in this process: `awqkit("quantize", "MODEL", "OUT")`."""

    def run(*words: str) -> Outcome:
        code = main(words)
        return Outcome(code, *capsys.readouterr())

    return run
