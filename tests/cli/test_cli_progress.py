"""What a log and a terminal show of a long run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as RichConsole

from awqkit.cli.console import print_error, size_text, table
from awqkit.cli.progress import Pace, PlainProgress, TerminalProgress, clock_text
from awqkit.events import BlockFinished, Caution, Notice, TaskAdvanced, TaskFinished, TaskStarted


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (113, "1:53"), (3600, "1:00:00"), (7384, "2:03:04")]
)
def test_clock_text(seconds, text):
    assert clock_text(seconds) == text


def test_time_left_counts_down_between_steps():
    pace = Pace(total=10, started=0.0)
    assert pace.seconds_left(3.0) is None
    pace.done, pace.heard = 2.0, 4.0
    assert pace.seconds_left(4.0) == 16.0
    assert pace.seconds_left(9.0) == 11.0
    assert pace.seconds_left(99.0) == 0.0


def test_a_log_gets_one_line_per_block():
    lines, clock = [], Clock()
    progress = PlainProgress(lines.append, clock)
    progress(Notice("128 rows"))
    progress(Caution("tensor parallelism of 8 would not load"))
    progress(TaskStarted("block", 30))
    for index in range(3):
        for step in range(4):
            progress(TaskAdvanced("block", index + step / 4, "search"))
        clock.seconds += 60.0
        progress(BlockFinished(index, 30, 60.0, 0.0123, 0.0061, index))
    assert lines == [
        "128 rows",
        "caution: tensor parallelism of 8 would not load",
        "block 0/30",
        "block 1/30  60.0 s  output error 0.0123 -> 0.0061  left 29:00",
        "block 2/30  60.0 s  output error 0.0123 -> 0.0061  1 fell back  left 28:00",
        "block 3/30  60.0 s  output error 0.0123 -> 0.0061  2 fell back  left 27:00",
    ]


@pytest.mark.parametrize(
    ("step_seconds", "between", "last"),
    [
        (0.01, [f"window {i}/8  left 0:00" for i in (2, 4, 6)], "window 8/8  0.1 s"),
        (11, [f"window {i}/8  left {clock_text(11 * (8 - i))}" for i in range(1, 8)], "window 8/8  88.0 s"),
    ],
)
def test_a_log_gets_a_line_for_every_quarter_or_ten_seconds(step_seconds, between, last):
    written, clock = [], Clock()
    progress = PlainProgress(written.append, clock)
    progress(TaskStarted("window", 8))
    for done in range(1, 9):
        clock.seconds += step_seconds
        progress(TaskAdvanced("window", done))
    progress(TaskFinished("window"))
    assert written == ["window 0/8", *between, last]


def screen(events, *, width=80, encoding="utf-8"):
    """What a terminal of `width` columns shows after `events`, without colors."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = RichConsole(file=stream, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    clock = Clock()
    progress = TerminalProgress(console, clock)
    for event in events:
        progress(event)
        clock.seconds += 1.0
    with console.capture() as capture:
        console.print(progress._progress.get_renderable())
    return capture.get().rstrip("\n")


def test_a_terminal_shows_loading_until_work_begins():
    assert "loading" in screen([])
    working = screen([TaskStarted("block", 3), TaskFinished("block")])
    assert "working" in working
    assert "block" not in working


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_shows_one_line_that_fits(width):
    detail = "channel scales of self_attn.q_proj, self_attn.k_proj and others that read this input"
    line = screen([TaskStarted("block", 30), TaskAdvanced("block", 2.5, detail)], width=width)
    assert "\n" not in line
    assert len(line.rstrip()) <= width - 4  # room for the ^C that a terminal echoes
    assert "block  3/30" in line
    assert "left 0:10" in line
    assert "channel " in line


def test_a_terminal_without_utf8_gets_ascii():
    line = screen([TaskStarted("block", 30), TaskAdvanced("block", 2.5, "rounding " * 20)], encoding="ascii")
    assert line.isascii()


def test_output_that_the_encoding_cannot_hold_becomes_ascii(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stderr", stream)
    print_error("KL(a ‖ b) 0.2 → 0.1 … 漢")
    assert stream.buffer.getvalue() == b"KL(a || b) 0.2 -> 0.1 ... ?\n"


def test_table_and_sizes():
    assert table(("a", "bb"), [("xyz", "1"), ("x", "22")]).splitlines() == [
        "-------",
        "a    bb",
        "-------",
        "xyz   1",
        "x    22",
        "-------",
    ]
    assert [size_text(size) for size in (12, 1200, 3_200_000, 5_678_000_000)] == [
        "12 B",
        "1.20 kB",
        "3.20 MB",
        "5.68 GB",
    ]


def test_time_left_counts_the_steps_of_this_run_alone():
    pace = Pace(total=10, started=0.0, done=6.0, heard=0.0, begun_with=6.0)
    assert pace.seconds_left(1.0) is None
    pace.done, pace.heard = 7.0, 5.0
    assert pace.seconds_left(5.0) == 15.0
