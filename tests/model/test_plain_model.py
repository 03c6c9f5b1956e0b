"""A plain module as the model layer sees it: none of its weights is copied, and its own forward is followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_modules import Block, Gpt, Tower, gpt_logits, with_random_weights
from torch import Tensor, nn

from awqkit.checkpoint.tensor_source import HeldTensors
from awqkit.errors import ModelError
from awqkit.model.block_calls import run_block
from awqkit.model.plain_model import PlainModel, plain_runnable, plain_tensors
from awqkit.model.skeleton import Skeleton

CPU = torch.device("cpu")
IDS = torch.arange(3, 23).reshape(2, 10)


def skeleton_of(plain: PlainModel) -> Skeleton:
    return Skeleton(plain, HeldTensors(plain_tensors(plain.module)))


def streamed(skeleton: Skeleton) -> Tensor:
    """The logits, block by block."""
    (started,) = skeleton.start([(IDS, None)], CPU)
    hidden = started.hidden
    with torch.no_grad(), skeleton.head(CPU) as head:
        for index, call in enumerate(started.calls):
            hidden = run_block(skeleton.load_block(index, CPU), hidden, call)
            skeleton.release_block(index)
        return head(IDS, hidden, None)


class Stacked(nn.Module):
    """Blocks in an nn.Sequential that calls them, logits in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layers, self.say = nn.Embedding(192, 64), nn.Sequential(Block(), Block()), nn.Linear(64, 192)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.say(self.layers(self.words(ids)))}


PLAIN = {
    "by-its-path": lambda: PlainModel(with_random_weights(Gpt()), "transformer.h", run=gpt_logits),
    "found": lambda: PlainModel(with_random_weights(Gpt()), run=gpt_logits),
    "paths": lambda: PlainModel(with_random_weights(Tower()), ("ground", "first")),
    "sequential": lambda: PlainModel(with_random_weights(Stacked()), "layers"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_block_by_block_it_computes_what_it_computes_as_a_whole(kind: str) -> None:
    plain = PLAIN[kind]()
    skeleton = skeleton_of(plain)
    assert torch.allclose(streamed(skeleton), whole_logits(plain), atol=1e-4, rtol=1e-4)
    assert skeleton.vocabulary_size == 192 and skeleton.missing() == []
    assert torch.allclose(streamed(skeleton), whole_logits(plain), atol=1e-4, rtol=1e-4)


def whole_logits(plain: PlainModel) -> Tensor:
    plain.module.eval()
    with torch.no_grad():
        given = plain.module(IDS) if plain.run is None else plain.run(plain.module, IDS)
    return given["logits"] if isinstance(given, dict) else getattr(given, "logits", given)


def test_no_weight_is_held_twice_and_a_tied_one_is_there_once() -> None:
    module = with_random_weights(Gpt())
    tensors, runnable = plain_tensors(module), plain_runnable(PlainModel(module))
    assert all(value.device.type == "meta" for value in runnable.module.parameters())
    assert runnable.module.lm_head.weight is runnable.module.transformer.wte.weight
    assert tensors["transformer.wte.weight"] is module.lm_head.weight
    assert "lm_head.weight" not in tensors and "transformer.h.0.attn.bias" in tensors
    source = HeldTensors(tensors)
    read = source.read("transformer.wpe.weight")
    assert torch.equal(read, module.transformer.wpe.weight)
    assert read.data_ptr() != module.transformer.wpe.weight.data_ptr()


def test_buffers_that_are_not_stored_are_made_by_the_copy_alone() -> None:
    module = Tower()
    assert "angle" not in plain_tensors(module)
    runnable = plain_runnable(PlainModel(module, ("ground", "first")))
    assert torch.equal(runnable.module.angle, module.angle)
    assert runnable.module.angle.data_ptr() != module.angle.data_ptr()


def test_what_follows_the_last_block_runs_until_calls_are_known_and_then_only_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skeleton, calls = skeleton_of(PLAIN["paths"]()), []
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        calls.append(self.out_features)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    list(skeleton.start([(IDS, None)] * 4, CPU))
    assert calls.count(192) <= 2 and not skeleton._blocks[1]._forward_hooks


def test_what_keeps_a_module_from_being_copied_is_said() -> None:
    module = Tower()
    module.held = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(ModelError, match=r"its structure cannot be copied \(copy\.deepcopy: RuntimeError"):
        plain_runnable(PlainModel(module, ("ground", "first")))


def test_a_forward_that_fails_behind_its_blocks_is_told_when_logits_are_asked_for() -> None:
    def run(module: Any, ids: Tensor) -> Any:
        given = module(ids)
        raise KeyError(f"no loss in {type(given).__name__}")

    skeleton = skeleton_of(PlainModel(with_random_weights(Tower()), ("ground", "first"), run=run))
    (started,) = skeleton.start([(IDS, None)], CPU)
    with skeleton.head(CPU) as head, pytest.raises(ModelError, match=r"Tower cannot be run: KeyError: 'no loss in"):
        head(IDS, started.hidden, None)
