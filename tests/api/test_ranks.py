"""Several ranks, started by torchrun, write the bytes of one process; one that dies ends a run that then goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_model, token_rows
from transformers import AutoConfig, AutoModelForCausalLM

import awqkit.pipeline.run as pipeline_run
from awqkit import Recipe, RunOptions, compare, quantize
from awqkit.cli.main import main
from awqkit.errors import UsageError
from awqkit.pipeline import search_block

BLOCKS, ROWS = 4, token_rows(18, 24)
CHOICES = {"group_size": 32, "bits": 3, "format": "compressed-tensors"}
EXPERTS = {
    "model_type": "qwen3_moe", "vocab_size": 192, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip
RECIPES = {
    "fast": Recipe.preset("fast", **CHOICES),
    "balanced": Recipe.preset("balanced", **CHOICES, generated=0.2),
    "best": Recipe.preset("best", **CHOICES, generated=0.2, tuning_epochs=1),
    "experts": Recipe.preset("fast", **CHOICES),
    "experts-balanced": Recipe.preset("balanced", **CHOICES, generated=0.0, tuning_epochs=0),
    "experts-chunks": Recipe.preset("balanced", **CHOICES, generated=0.0, tuning_epochs=0),
}
IMPORTS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
# A rank of one launch: the runs that are named, one after the other; "NAME!" kills rank 1 after the third block.
SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = TESTS
import test_ranks
from awqkit.cli.failure import report_failure
from awqkit.cli.signals import unwind_on_signals
import awqkit.pipeline.run as pipeline_run
step = pipeline_run.quantize_block
def dying(context, *rest):
    found = step(context, *rest)  # with the first rank, which by then is done with the block before
    if context.index == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return found
with unwind_on_signals():
    try:
        for name in sys.argv[2:]:
            if name.endswith("!"):
                pipeline_run.quantize_block = dying
            test_ranks.run(Path(sys.argv[1]), name.rstrip("!"), Path(sys.argv[1]) / "ranks")
    except BaseException as error:
        sys.exit(report_failure(error, "awqkit quantize"))
"""


def run(folder: Path, name: str, outs: Path) -> Any:
    """One run of a recipe, made durable after every block; the larger linears of these small models are cut.

    Of "chunks" the first rank finds room for three of four experts.
    """
    search_block.ROWS_WORTH_SHARING = 64
    room = 3 if "chunks" in name and os.environ.get("RANK", "0") == "0" else None
    pipeline_run.fitting_experts = lambda *given: room
    source = folder / ("mixture" if "experts" in name else "source")
    options = RunOptions(device="cpu", save_every=0)
    return quantize(source, outs / name, RECIPES[name.partition("-again")[0]], calibration=ROWS, options=options)


def _contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name != "awqkit-timings.json"}


def _launch(folder: Path, ranks: int, *names: str) -> subprocess.CompletedProcess[str]:
    script = folder / "rank.py"
    script.write_text(f"TESTS = {IMPORTS!r}\n{SCRIPT}", encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, str(script), str(folder), *names],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, and beside them what one process makes of them, with one thread as every rank has."""
    folder, threads = tmp_path_factory.mktemp("ranks"), torch.get_num_threads()
    save_tiny(tiny_model("llama", num_hidden_layers=BLOCKS), folder / "source")
    torch.manual_seed(0)
    choices = dict(EXPERTS)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(choices.pop("model_type"), **choices))
    model.to(torch.bfloat16).save_pretrained(folder / "mixture")
    for outs in ("alone", "ranks"):
        (folder / outs).mkdir()
    torch.set_num_threads(1)
    large, fitting = search_block.ROWS_WORTH_SHARING, pipeline_run.fitting_experts
    try:
        for name in RECIPES:
            run(folder, name, folder / "alone")
    finally:
        torch.set_num_threads(threads)
        search_block.ROWS_WORTH_SHARING, pipeline_run.fitting_experts = large, fitting
    return folder


def test_two_ranks_then_four_write_the_bytes_of_one_and_go_on_where_one_was_killed(folder: Path) -> None:
    two = _launch(folder, 2, "fast", "experts", "experts-chunks", "best", "balanced!")
    assert two.returncode != 0
    assert two.stderr.count(f"2 of {BLOCKS} blocks are done; the same command goes on from there") == 1, two.stderr
    for name in ("fast", "experts", "experts-chunks", "best"):
        assert _contents(folder / "ranks" / name) == _contents(folder / "alone" / name), name
    journal = json.loads((folder / "ranks" / ".balanced.awqkit" / "journal.json").read_text())
    assert journal["blocks"] == 2
    four = _launch(folder, 4, "balanced", "experts-balanced", "experts-chunks-again", "best-again")
    assert four.returncode == 0, four.stderr
    for name in ("balanced", "experts-balanced"):
        assert _contents(folder / "ranks" / name) == _contents(folder / "alone" / name), name
    for name in ("best", "experts-chunks"):
        assert _contents(folder / "ranks" / f"{name}-again") == _contents(folder / "alone" / name), name


def test_what_is_refused_is_told_once_and_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    done = _launch(tmp_path, 2, "fast")
    assert done.returncode != 0
    assert done.stderr.count("awqkit: error:") == 1
    assert "source" in next(line for line in done.stderr.splitlines() if "awqkit: error:" in line)
    assert not list((tmp_path / "ranks").iterdir())


def test_what_runs_in_one_process_is_refused_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["inspect", "nowhere"]) == 2
    assert "inspect runs in one process" in capsys.readouterr().err
    with pytest.raises(UsageError, match="without torchrun"):
        compare("nowhere", "builtin")
    monkeypatch.setenv("RANK", "1")
    assert main(["inspect", "nowhere"]) == 2
    assert capsys.readouterr() == ("", "")
