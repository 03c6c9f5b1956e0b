"""The search of a block: what is replayed on a GPU is made of what a graph can hold, and chooses the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contexts import GROUP, run_on, token_rows, written
from tiny_models import NUM_BLOCKS, save_tiny, tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from awqkit import Recipe, RunOptions, quantize
from awqkit.events import Event, Notice
from awqkit.kernels import replay
from awqkit.kernels.replay import Replays, WaitingRefused
from awqkit.numerics import descent, gptq

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
RECIPES = {
    "fast": Recipe.preset("fast", group_size=GROUP),
    "balanced": Recipe.preset("balanced", group_size=GROUP, generated=0.0, tuning_epochs=0),
    "symmetric": Recipe.preset(
        "balanced", group_size=GROUP, generated=0.0, tuning_epochs=0, format="compressed-tensors", symmetric=True,
        propagation=0.0,
    ),
    "best": Recipe.preset("best", group_size=GROUP, generated=0.0, tuning_epochs=0),
}  # fmt: skip
_LOOKS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.new_tensor, torch.tensor}


class _LooksRefused(TorchFunctionMode):
    """What a CPU does without an operator, where a GPU would wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _LOOKS, func
        return func(*args, **(kwargs or {}))


def _in_one_launch(body: Callable[..., Any]) -> Callable[..., Any]:
    """The columns of a block, which are one launch on a GPU: their reference may look."""

    @wraps(body)
    def unwatched(*given: Any) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return body(*given)

    return unwatched


@pytest.mark.parametrize(("recipe", "family"), [("fast", "llama"), ("balanced", "llama"), ("symmetric", "qwen2")])
def test_a_graph_can_hold_what_is_replayed(
    recipe: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, met = tiny_model(family), list[Any]()
    expected = run_on(model, tmp_path, RECIPES[recipe], out="expected")

    def captured(self: Replays, function: Callable[..., Any], *given: Any) -> Callable[[], Any]:
        tensors: list[Tensor] = []
        met.append(replay._alike(function, replay._taken_apart(given, tensors), tensors))
        with _LooksRefused(), WaitingRefused():
            result = function(*given)
        return lambda: result

    monkeypatch.setattr(Replays, "begin", captured)
    monkeypatch.setattr(gptq, "round_block", _in_one_launch(gptq.round_block))
    monkeypatch.setattr(descent, "descend_block", _in_one_launch(descent.descend_block))
    found = run_on(model, tmp_path, RECIPES[recipe])
    assert {key[0].__name__ for key in met} == {"best_of_families", "rounded_linear", "plain_weight"}
    assert len(set(met)) <= len(met) / NUM_BLOCKS  # blocks call them alike, and so do some linears of a block
    assert found.report.blocks == expected.report.blocks
    tensors = written(expected.directory)
    assert all(torch.equal(each, tensors[name]) for name, each in written(found.directory).items())


def test_what_stood_in_the_way_of_a_graph_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Replays, function: Callable[..., Any], *given: Any) -> Callable[[], Any]:
        self.why_not = "an operator waits"
        return partial(function, *given)

    monkeypatch.setattr(Replays, "begin", refused)
    told = list[Event]()
    run_on(tiny_model("llama"), tmp_path, RECIPES["fast"], emit=told.append)
    assert [each.text for each in told if isinstance(each, Notice) and "CUDA graphs" in each.text] == [
        "some of the searches went without CUDA graphs, slower and with the same result: an operator waits"
    ]


@needs_cuda
@pytest.mark.parametrize("recipe", RECIPES)
def test_on_a_gpu_a_replayed_search_chooses_the_same(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, let_go = [], Replays.let_go
    monkeypatch.setattr(Replays, "let_go", lambda self: (captured.append(self.num_captured), let_go(self)))
    save_tiny(tiny_model("llama"), tmp_path / "source")
    found = []
    for most in (replay.MOST_VALUES, 0):
        monkeypatch.setattr(replay, "MOST_VALUES", most)
        found.append(
            quantize(
                tmp_path / "source", tmp_path / f"out-{most}", RECIPES[recipe], calibration=token_rows(36, 24),
                options=RunOptions(device="cuda"),
            )
        )  # fmt: skip
    assert captured[0] >= 4 and captured[-1] == 0
    assert found[0].report.blocks == found[1].report.blocks
    tensors = written(found[1].directory)
    assert all(torch.equal(each, tensors[name]) for name, each in written(found[0].directory).items())
