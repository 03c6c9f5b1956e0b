"""A real vLLM on CPU loads what awqkit writes, agrees with `awqkit.load`, and serves it: `make test-vllm`.

vLLM lives in an environment of its own: AWQKIT_VLLM_PYTHON names its interpreter (relative to the
checkout, or absolute), and `tools/vllm_check.py` runs there. The text is held out: it was
written for this test and is not in CPython.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = Path(__file__).with_name("held_out.txt")
POSITIONS = 160  # fits the 256 positions that vllm_check.py gives the engine
W8A8 = """\
method = "rtn"
format = "compressed-tensors"
bits = 8
group_size = -1
symmetric = true
activations = "int8"
"""


@dataclass(frozen=True)
class Bounds:
    """How far |Δ log p| of vLLM (16-bit arithmetic) may be from float32: a correct reader's, doubled.

    A dense bf16 model of this size shows mean 0.016, max 0.065; a misread one, mean 1.1 to 1.4. W8A8 rounds its inputs
    too, and a difference of 16-bit arithmetic can move one of them to the next code. For bf16 vLLM has another 4-bit
    kernel where the CPU has AMX, which rounds more: mean 0.037 to 0.049, max 0.36, where the usual one has 0.014, 0.076
    on the same machine.
    """

    mean: float
    largest: float


HAS_AMX = Path("/proc/cpuinfo").exists() and "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
BF16 = Bounds(0.1, 0.75) if HAS_AMX else Bounds(0.03, 0.15)
FP16, BYTES = Bounds(0.005, 0.03), Bounds(0.08, 0.5)
_SEARCHED = ("--group-size", "128", "--samples", "16", "--seq-len", "256")
_PACKED = ("--method", "rtn", "--format", "compressed-tensors")
# name -> flags of `awqkit quantize`, and the bounds
CASES: dict[str, tuple[tuple[str, ...], Bounds]] = {
    "bfloat16": ((*_SEARCHED, "--dtype", "bfloat16"), BF16),
    "float16": ((*_SEARCHED, "--dtype", "float16"), FP16),
    "packed asymmetric g64": ((*_PACKED, "--group-size", "64"), BF16),
    "packed symmetric g128": ((*_PACKED, "--symmetric", "--group-size", "128"), BF16),
    "packed symmetric channel": ((*_PACKED, "--symmetric", "--group-size", "channel"), BF16),
    "w8a8": (("--recipe", "{folder}/w8a8.toml"), BYTES),
}


@pytest.fixture(scope="module")
def vllm_python() -> Path:
    named = os.environ.get("AWQKIT_VLLM_PYTHON")
    if not named:
        pytest.skip("AWQKIT_VLLM_PYTHON is not set: run `make test-vllm`, which builds the environment it names")
    python = ROOT / named
    assert python.exists(), f"AWQKIT_VLLM_PYTHON names {python}, which does not exist"
    return python


@pytest.fixture(scope="module")
def checkpoints(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model, quantized by the command line in each of the CASES."""
    from awqkit.demo.model import embedded_model

    made, folder = {}, tmp_path_factory.mktemp("checkpoints")
    (folder / "w8a8.toml").write_text(W8A8, encoding="utf-8")
    for name, (flags, _) in CASES.items():
        made[name] = folder / f"demo {name}"
        quantize = [sys.executable, "-m", "awqkit", "quantize", str(embedded_model()), str(made[name])]
        run([*quantize, *(flag.format(folder=folder) for flag in flags)])
    return made


def run(command: list[str]) -> None:
    """Run `command`; its output becomes the failure message."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert done.returncode == 0, f"{command} ended with code {done.returncode}\n{done.stdout[-6000:]}"


def vllm_check(python: Path, verb: str, checkpoint: Path, option: tuple[str, str], out: Path) -> dict:
    """What `tools/vllm_check.py` wrote, run by vLLM's own interpreter."""
    run(
        [
            str(python),
            str(ROOT / "tools" / "vllm_check.py"),
            verb,
            str(checkpoint),
            *option,
            "--out",
            str(out),
        ]
    )
    return json.loads(out.read_text(encoding="utf-8"))


def record(name: str, figures: dict) -> None:
    """Add the figures of one case to the file that AWQKIT_VLLM_RESULTS names, if it names one."""
    if named := os.environ.get("AWQKIT_VLLM_RESULTS"):
        file = ROOT / named
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.write_text(json.dumps({**found, name: figures}, indent=1) + "\n", encoding="utf-8")


def held_out_tokens(checkpoint: Path) -> list[int]:
    """The first token ids of the held-out text, by the checkpoint's own tokenizer."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(checkpoint)(HELD_OUT.read_text(encoding="utf-8"))["input_ids"]
    assert len(ids) > POSITIONS
    return ids[: POSITIONS + 1]


@torch.no_grad()
def float32_logprobs(checkpoint: Path, tokens: list[int]) -> list[float]:
    """log p of each token but the first, by `awqkit.load` in float32."""
    import awqkit

    logits = awqkit.load(checkpoint, dtype=torch.float32)(torch.tensor([tokens])).logits[0, :-1].float()
    following = torch.tensor(tokens[1:])[:, None]
    return torch.log_softmax(logits, dim=-1).gather(1, following)[:, 0].tolist()


@pytest.mark.parametrize("name", CASES)
def test_vllm_gives_the_log_probabilities_of_our_own_reader(
    name: str, vllm_python: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint, bounds = checkpoints[name], CASES[name][1]
    tokens = held_out_tokens(checkpoint)
    reference = float32_logprobs(checkpoint, tokens)
    (tmp_path / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")

    given = ("--tokens", str(tmp_path / "tokens.json"))
    answer = vllm_check(vllm_python, "logprobs", checkpoint, given, tmp_path / "answer.json")

    difference = [abs(a - b) for a, b in zip(answer["logprobs"], reference, strict=True)]
    mean, largest = sum(difference) / len(difference), max(difference)
    print(f"{name}: |d log p| mean {mean:.4f}, max {largest:.4f} over {len(difference)} positions")
    record(name, {"mean": mean, "max": largest, "positions": len(difference), **answer["versions"]})
    vocabulary = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    assert sum(reference) / len(reference) > 1 - math.log(vocabulary), "the model guesses: agreement means nothing"
    assert mean <= bounds.mean and largest <= bounds.largest


def test_vllm_serve_answers_a_completion_request(
    vllm_python: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    given = ("--prompt", "import csv\nfrom collections import")
    answer = vllm_check(vllm_python, "serve", checkpoints["bfloat16"], given, tmp_path / "answer.json")

    (choice,) = answer["choices"]
    assert answer["model"] == "checkpoint"
    assert answer["usage"]["completion_tokens"] >= 1
    assert choice["text"].strip(), f"the server answered with no text: {answer}"
