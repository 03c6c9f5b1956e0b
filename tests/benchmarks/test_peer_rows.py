"""Peers get exactly the rows that they are given, and what is missing is one line, not an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peer_rows import PEERS, NotRun, PeerRun, named_peers, not_asked, run_peer
from safetensors.torch import load_file
from tiny_models import save_tiny, tiny_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "peers"))
from peer_protocol import Task, codes_of, dequantized, write_checkpoint

ROWS = [[5, 6, 7], [8, 9, 10]]


def interpreter(tmp_path: Path, body: str) -> str:
    """An executable that stands for an environment's Python: it gets the arguments that a peer's script would get."""
    path = tmp_path / "python"
    code = f"import json, sys\nfrom pathlib import Path\n{body}\n"
    # through sh: a shebang cannot name an interpreter in a folder with spaces
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" - "$@" <<\'CODE\'\n{code}CODE\n')
    path.chmod(0o755)
    return str(path)


def run(python: str, out: Path, **choices: float) -> PeerRun | NotRun:
    return run_peer("llmcompressor-awq", python, Path("model"), ROWS, 4, 64, "cpu", out, **choices)


def test_a_peer_is_given_its_task_and_its_result_is_returned(tmp_path: Path) -> None:
    body = """
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert Path(sys.argv[1]).is_file()
words["rows"] = json.loads(Path(words["--rows"]).read_text())
result = {"seconds": 1.5, "peak_device_bytes": None, "versions": {"tool": "1"}, "notes": json.dumps(words)}
Path(words["--json"]).write_text(json.dumps(result))
"""
    done = run(interpreter(tmp_path, body), tmp_path / "out")
    assert isinstance(done, PeerRun)
    assert (done.folder, done.seconds, done.versions) == (tmp_path / "out" / "checkpoint", 1.5, {"tool": "1"})
    given = json.loads(done.notes)
    assert given["rows"] == ROWS
    asked = [given[word] for word in ("--model", "--bits", "--group-size", "--method", "--device", "--out")]
    assert asked == ["model", "4", "64", "awq", "cpu", str(done.folder)]


def test_a_missing_interpreter_is_one_line(tmp_path: Path) -> None:
    done = run(str(tmp_path / "nowhere"), tmp_path / "out")
    assert isinstance(done, NotRun)
    assert "no interpreter" in done.reason
    assert "--peer llmcompressor-awq=PYTHON" in done.reason


@pytest.mark.parametrize("body", ["import no_such_tool", "print('no_such_tool gave up')"])
def test_a_missing_tool_or_result_is_its_last_line_and_never_an_older_result(tmp_path: Path, body: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("{}")
    done = run(interpreter(tmp_path, body), tmp_path / "out")
    assert isinstance(done, NotRun)
    assert "no_such_tool" in done.reason
    assert "\n" not in done.reason


def test_a_peer_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    done = run(interpreter(tmp_path, "import time; time.sleep(30)"), tmp_path / "out", limit_seconds=0.5)
    assert isinstance(done, NotRun)
    assert "not finished" in done.reason


def test_a_tool_name_stands_for_all_its_rows() -> None:
    chosen = named_peers(["llmcompressor=a", "autoround=b", "llmcompressor-awq=c"])
    assert chosen == {
        "llmcompressor-gptq": "a", "llmcompressor-awq": "c", "llmcompressor-awq-gptq": "a", "autoround": "b",
    }  # fmt: skip
    assert [line.split(":")[0] for line in not_asked(chosen)] == ["gptqmodel", "autoawq"]
    for word in ("autoround", "autoround=", "other=python"):
        with pytest.raises(ValueError, match="expected NAME=PYTHON"):
            named_peers([word])


def test_every_peer_has_its_script() -> None:
    scripts = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
    assert all((scripts / peer.script).is_file() for peer in PEERS.values())


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_are_read_back_from_a_weight_rounded_to_bfloat16(bits: int) -> None:
    chance = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (8, 64), generator=chance)
    scale = torch.rand(8, 2, generator=chance) + 0.01
    zero = torch.randint(0, 2**bits, (8, 2), generator=chance)
    exact = dequantized(codes, scale, zero)
    assert torch.equal(exact[:, 32:], (codes[:, 32:] - zero[:, 1:]) * scale[:, 1:])
    assert torch.equal(codes_of(exact.bfloat16(), scale, zero, bits), codes.float())
    with pytest.raises(ValueError, match="not on the grid"):
        codes_of(exact + 0.3 * scale.repeat_interleave(32, dim=1), scale, zero, bits)


def test_the_written_checkpoint_has_every_value_of_the_tool_in_float32(tmp_path: Path) -> None:
    model = tiny_model("llama")
    source = save_tiny(model, tmp_path / "original")
    (source / "tokenizer.json").write_text("{}")
    linear = "model.layers.0.mlp.up_proj.weight"
    found = {name: value + 1 for name, value in model.state_dict().items()}
    task = Task(source, torch.tensor(ROWS), tmp_path / "out", 4, 64, "awq", "cpu", tmp_path / "result.json")
    write_checkpoint(task, {linear: found[linear] + 1}, found)
    written, original = load_file(task.out / "model.safetensors"), load_file(source / "model.safetensors")
    assert written.keys() == original.keys()
    for name, value in written.items():
        expected = found[name].float() + (1 if name == linear else 0)
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)
    assert json.loads((task.out / "config.json").read_text())["dtype"] == "float32"
    assert (task.out / "tokenizer.json").is_file()
    with pytest.raises(KeyError):
        write_checkpoint(task, {}, {linear: found[linear]})
