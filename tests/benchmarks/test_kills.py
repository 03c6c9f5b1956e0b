"""What the benchmark of killed runs compares."""

from __future__ import annotations

from pathlib import Path

import kills


def test_files_that_are_not_the_same_in_both_are_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "same").write_bytes(b"a")
        (folder / "awqkit-timings.json").write_text(folder.name)
    assert kills._differing(first, second) == []
    (second / "same").write_bytes(b"b")
    (first / "more").touch()
    assert kills._differing(first, second) == ["more", "same"]


def test_blocks_of_a_run_that_kept_nothing_are_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert kills._blocks_kept(out) == 0
    (tmp_path / ".out.awqkit").mkdir()
    (tmp_path / ".out.awqkit" / "journal.json").write_text('{"blocks": 3}')
    assert kills._blocks_kept(out) == 3
