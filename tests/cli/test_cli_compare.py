"""`awqkit compare`: what the api is asked, what is printed, what is saved, and what is refused at once."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from awqkit.api.contenders import METHODS
from awqkit.events import BlockFinished, TaskAdvanced, TaskFinished, TaskStarted
from awqkit.options import RunOptions
from awqkit.recipe import PER_CHANNEL


@dataclass(frozen=True)
class FakeRow:
    method: str
    bits: int
    bits_per_weight: float
    text: str
    perplexity: float
    kl: float | None = None
    top1_agreement: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class FakeComparison:
    rows: tuple[FakeRow, ...]
    windows: dict[str, int]
    tokens_per_window: int = 512
    shared_seconds: dict[str, float] = field(default_factory=lambda: {"observe": 5.12, "evaluate": 17.73})
    seconds: float = 61.27

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


FOUND = FakeComparison(
    (
        FakeRow("fp", 16, 16.0, "far.txt", 10.7391),
        FakeRow("rtn", 4, 4.1562, "far.txt", 10.8738, 0.0205, 0.9222, 0.093),
        FakeRow("balanced", 4, 4.1562, "far.txt", 10.8031, 0.0123, 0.9403, 20.75),
        FakeRow("smoothquant", 8, 8.0521, "far.txt", 10.7262, 0.0009, 0.99, 5.4),
        FakeRow("fp", 16, 16.0, "near.txt", 8.0),
    ),
    {"far.txt": 32, "near.txt": 7},
)


@pytest.fixture
def asked(api: Any, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The calls of the fake `compare` that stands in the api's place."""
    calls: list[SimpleNamespace] = []

    def compare(model: str, text: list[str], *, emit: Any, **choices: Any) -> FakeComparison:
        calls.append(SimpleNamespace(model=model, text=text, **choices))
        for event in (
            TaskStarted("block", 2),
            TaskAdvanced("block", 0, "rtn, 4 bits: round"),
            BlockFinished(0, 2, 4.2, None, None, 3),
            BlockFinished(1, 2, 4.0, None, None, 0),
            TaskFinished("block"),
        ):
            emit(event)
        return FOUND

    module = ModuleType("awqkit.api.compare")
    module.compare = compare
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_flags_are_passed_on(awqkit, asked):
    flags = (
        "--text far.txt --text near.txt --methods fp,rtn,balanced --bits 4,3 --group-size 64 --windows 9 "
        "--calibration mine.txt --samples 8 --seq-len 64 --seed 5 --device cpu"
    )
    assert awqkit("compare", "MODEL", *flags.split()).code == 0
    (call,) = asked
    assert (call.model, call.text) == ("MODEL", ["far.txt", "near.txt"])
    assert (call.methods, call.bits, call.group_size, call.windows) == (("fp", "rtn", "balanced"), (4, 3), 64, 9)
    assert (call.calibration, call.samples, call.seq_len, call.seed) == ("mine.txt", 8, 64, 5)
    assert call.options == RunOptions(device="cpu")


def test_the_defaults_are_those_of_a_run(awqkit, asked):
    assert awqkit("compare", "MODEL", "--text", "far.txt").code == 0
    (call,) = asked
    assert (call.methods, call.bits, call.group_size, call.windows) == (METHODS, (4,), None, 32)
    assert (call.calibration, call.samples, call.seq_len, call.seed) == ("builtin", 128, 512, 0)


def test_other_words_for_numbers(awqkit, asked):
    flags = "--text far.txt --group-size channel --windows all --bits 4,4,8 --methods rtn,rtn"
    assert awqkit("compare", "MODEL", *flags.split()).code == 0
    (call,) = asked
    assert (call.group_size, call.windows, call.bits, call.methods) == (PER_CHANNEL, None, (4, 8), ("rtn",))


def test_a_table_for_every_text(awqkit, asked):
    outcome = awqkit("compare", "MODEL", "--text", "far.txt")
    assert outcome.out.splitlines()[:11] == [
        "far.txt: 32 windows of 512 tokens",
        "-" * 69,
        "method       bits  bits/w  perplexity       KL  / rtn  top-1  seconds",
        "-" * 69,
        "fp             16   16.00      10.739        -      -      -        -",
        "rtn             4    4.16      10.874  0.02050  1.000  92.2%      0.1",
        "balanced        4    4.16      10.803  0.01230  0.600  94.0%     20.8",
        "smoothquant     8    8.05      10.726  0.00090      -  99.0%      5.4",
        "-" * 69,
        "",
        "near.txt: 7 windows of 512 tokens",
    ]
    assert "Shared by several: observe 5.1," in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert outcome.err.splitlines()[:2] == ["block 0/2", "block 1/2  4.2 s  3 fell back  left 0:00"]


def test_quiet_prints_the_tables_alone(awqkit, asked):
    outcome = awqkit("compare", "MODEL", "--text", "far.txt", "--quiet")
    assert outcome.err == ""
    assert "Shared" not in outcome.out
    assert set(outcome.out.splitlines()[-1]) == {"-"}


def test_rows_and_page_are_saved(awqkit, asked):
    outcome = awqkit("compare", "MODEL", "--text", "far.txt", "--json", "rows.json", "--report", "page.html")
    assert outcome.code == 0
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["fp", "rtn", "balanced", "smoothquant", "fp"]
    assert rows[2]["kl"] == 0.0123
    page = Path("page.html").read_text()
    assert "Methods compared" in page
    assert "balanced" in page
    assert "Wrote the report to page.html." in outcome.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--text t.txt --methods fp,blanced", "argument --methods: 'blanced' is not one of fp, "),
        ("--text t.txt --methods fp,blanced", "(did you mean balanced?)"),
        ("--text t.txt --bits 4,9", "argument --bits: '9' is not one of 2, 3, 4, 8"),
        ("--text t.txt --bits four", "argument --bits: 'four' is not one of 2, 3, 4, 8"),
        ("--text t.txt --windows 0", "argument --windows: '0' is not a whole number of at least 1"),
        ("", "the following arguments are required: --text"),
        ("--text t.txt --report here.txt", "--report here.txt: is not the name of a page; give one that ends in .html"),
        ("--text t.txt --json no/rows.json", "--json no/rows.json: there is no folder no"),
    ],
)
def test_wrong_use_is_one_line_and_no_work(awqkit, asked, words, line):
    outcome = awqkit("compare", "MODEL", *words.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert line in outcome.err
    assert outcome.err.startswith("awqkit compare: error: ")
    assert outcome.err.count("\n") == 1
    assert asked == []
