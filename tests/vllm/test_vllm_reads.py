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
QUANTIZE = ("--group-size", "128", "--samples", "16", "--seq-len", "256")


@dataclass(frozen=True)
class Bounds:
    """How far |Δ log p| of vLLM (16-bit arithmetic) may be from float32: a correct reader's, doubled.

    A dense bf16 model of this size shows mean 0.016, max 0.065; a misread one, mean 1.1 to 1.4.
    """

    mean: float
    largest: float


BOUNDS = {"bfloat16": Bounds(0.03, 0.15), "float16": Bounds(0.005, 0.03)}


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
    """The embedded model, quantized by the command line in both dtypes that a checkpoint can have."""
    from awqkit.demo.model import embedded_model

    made = {}
    for dtype in BOUNDS:
        made[dtype] = tmp_path_factory.mktemp("checkpoints") / f"demo {dtype}"
        quantize = [sys.executable, "-m", "awqkit", "quantize", str(embedded_model()), str(made[dtype])]
        run([*quantize, "--dtype", dtype, *QUANTIZE])
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


def record(dtype: str, figures: dict) -> None:
    """Add the figures of one dtype to the file that AWQKIT_VLLM_RESULTS names, if it names one."""
    if named := os.environ.get("AWQKIT_VLLM_RESULTS"):
        file = ROOT / named
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.write_text(json.dumps({**found, dtype: figures}, indent=1) + "\n", encoding="utf-8")


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


@pytest.mark.parametrize("dtype", BOUNDS)
def test_vllm_gives_the_log_probabilities_of_our_own_reader(
    dtype: str, vllm_python: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint, bounds = checkpoints[dtype], BOUNDS[dtype]
    tokens = held_out_tokens(checkpoint)
    reference = float32_logprobs(checkpoint, tokens)
    (tmp_path / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")

    given = ("--tokens", str(tmp_path / "tokens.json"))
    answer = vllm_check(vllm_python, "logprobs", checkpoint, given, tmp_path / "answer.json")

    difference = [abs(a - b) for a, b in zip(answer["logprobs"], reference, strict=True)]
    mean, largest = sum(difference) / len(difference), max(difference)
    print(f"{dtype}: |d log p| mean {mean:.4f}, max {largest:.4f} over {len(difference)} positions")
    record(dtype, {"mean": mean, "max": largest, "positions": len(difference), **answer["versions"]})
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
