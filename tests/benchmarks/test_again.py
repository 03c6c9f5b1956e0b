"""All GPU figures again: places on GPUs, time that runs out, and that no row of the ablation is forgotten."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import again
import pytest
from ablation import ABLATION

SCRIPT = """
import json, os, sys, time
from pathlib import Path
word, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
time.sleep(60 if word == "slow" else 0)
result = {"gpu": os.environ["CUDA_VISIBLE_DEVICES"], "threads": os.environ["OMP_NUM_THREADS"]}
Path(options["--results"], options["--name"] + ".json").write_text(json.dumps(result))
print("said", word)
raise SystemExit(word == "bad")
"""


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, commands: dict[str, str], *arguments: str) -> int:
    (folder / "row.py").write_text(SCRIPT)
    monkeypatch.setattr(again, "SCRIPTS", folder)
    monkeypatch.setattr(again, "COMMANDS", commands)
    monkeypatch.setattr(sys, "argv", ["again.py", "--results", str(folder / "out"), *arguments])
    try:
        again.main()
    except SystemExit as left:
        return int(left.code)
    return 0


def test_commands_are_spread_over_the_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = dict.fromkeys("abcd", "row.py good")
    assert run(monkeypatch, tmp_path, commands, "--gpus", "2", "--each", "2") == 0
    gpus = [json.loads((tmp_path / f"out/{name}-gpu.json").read_text())["gpu"] for name in "abcd"]
    assert gpus == ["0", "1", "0", "1"]
    assert (tmp_path / "out/a-gpu.log").read_text() == "said good\n"


def test_what_failed_and_what_the_time_did_not_suffice_for_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {"wrong": "row.py bad", "long": "row.py slow", "later": "row.py good"}
    assert run(monkeypatch, tmp_path, commands, "--seconds", "2") == 1
    said = capsys.readouterr().out
    assert "wrong: exit status 1" in said
    assert said.splitlines()[-3:] == ["failed: wrong", "stopped: long", "not begun: later"]


def test_every_row_of_the_ablation_is_measured_by_some_command() -> None:
    words = {word for command in again.COMMANDS.values() for word in command.split()}
    assert [name for name in ABLATION if name not in words and name != "balanced-propagation-0.5"] == []
