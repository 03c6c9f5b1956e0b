"""The folder of a run under way: what is durable is what the journal names, and one process holds it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from awqkit.checkpoint import run_state
from awqkit.checkpoint.run_state import KEPT_ATTRIBUTE, RunState
from awqkit.errors import CheckpointError, OutputError

PRINT = {"recipe": {"bits": 4, "seed": 0}, "text": "sha256:1"}


class _Stopped(Exception):
    """Stands for whatever may end a run."""


def _open(tmp_path: Path, fingerprint: dict[str, Any] = PRINT, **choices: Any) -> RunState:
    return RunState(tmp_path / "out", fingerprint, **choices)


def _stopped_with(tmp_path: Path, *names: str) -> None:
    with pytest.raises(_Stopped), _open(tmp_path) as state:
        for number, name in enumerate(names):
            state.save(name, {"x": torch.full((2,), float(number))})
            state.record(files=[name], blocks=number + 1, told=f"{number + 1} of 9 blocks are done")
        raise _Stopped


def test_what_is_recorded_is_there_again_and_what_is_no_longer_needed_is_gone(tmp_path: Path) -> None:
    _stopped_with(tmp_path, "one.safetensors", "two.safetensors")
    with _open(tmp_path) as state:
        assert state.journal["blocks"] == 2
        assert state.load("two.safetensors")["x"].tolist() == [1.0, 1.0]
        assert [file.name for file in (state.folder / "state").iterdir()] == ["two.safetensors"]
        with pytest.raises(OutputError, match=r"damaged .*one.safetensors cannot be read.*--restart"):
            state.load("one.safetensors")
        state.complete()
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_but_not_recorded_is_not_durable(tmp_path: Path) -> None:
    with pytest.raises(_Stopped) as caught, _open(tmp_path) as state:
        state.save("one.safetensors", {"x": torch.zeros(2)})
        raise _Stopped
    assert not hasattr(caught.value, KEPT_ATTRIBUTE)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_last_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(OutputError, match="disk full") as caught, _open(tmp_path) as state:
        state.save("one.safetensors", {"x": torch.zeros(2)})
        state.record(files=["one.safetensors"], blocks=1, told="1 of 9 blocks are done")
        monkeypatch.setattr(run_state, "sync_file", full)
        state.save("two.safetensors", {"x": torch.ones(2)})
        state.record(files=["two.safetensors"], blocks=2, told="2 of 9 blocks are done")
    assert "1 of 9 blocks are done; the same command goes on" in getattr(caught.value, KEPT_ATTRIBUTE)
    monkeypatch.undo()
    with _open(tmp_path) as state:
        assert state.journal["blocks"] == 1
        assert state.load("one.safetensors")["x"].tolist() == [0.0, 0.0]


def test_what_cannot_end_otherwise_is_thrown_away(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError), _open(tmp_path) as state:
        state.record(blocks=1)
        raise CheckpointError("damaged")
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    with _open(tmp_path) as state:
        state.save("one.safetensors", {"whole": whole, "again": whole, "row": whole[1], "turned": whole.t()})
        found = state.load("one.safetensors")
    assert torch.equal(found["again"], whole)
    assert torch.equal(found["row"], whole[1])
    assert torch.equal(found["turned"], whole.t())


def test_the_lock_names_its_owner_and_a_lost_note_is_no_harm(tmp_path: Path) -> None:
    with _open(tmp_path) as state:
        with pytest.raises(OutputError, match=r"another run is writing there \(process \d+ on .*, since \d{4}-"):
            _open(tmp_path).__enter__()
        (state.folder / "owner.json").write_text("{")
        with pytest.raises(OutputError, match="it does not say which"):
            _open(tmp_path, restart=True).__enter__()


def test_differences_are_named_briefly(tmp_path: Path) -> None:
    _stopped_with(tmp_path, "one.safetensors")
    other = {"recipe": {"bits": 3, "seed": 0}, "text": "sha256:2"}
    with pytest.raises(
        OutputError, match="it was another one: bits was 4, is 3; text has changed; repeat it as it was"
    ):
        _open(tmp_path, other).__enter__()
    with _open(tmp_path, other, restart=True) as state:
        assert state.journal == {}
        assert list((state.folder / "state").iterdir()) == []


def test_a_journal_of_another_version_is_not_believed(tmp_path: Path) -> None:
    _stopped_with(tmp_path, "one.safetensors")
    file = tmp_path / ".out.awqkit" / "journal.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 0}))
    with pytest.raises(OutputError, match="is of another awqkit"):
        _open(tmp_path).__enter__()


def test_where_a_file_system_knows_no_locks_a_run_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(run_state.FileLock, "acquire", unknown)
    _stopped_with(tmp_path, "one.safetensors")
    with _open(tmp_path) as state:
        assert state.journal["blocks"] == 1
