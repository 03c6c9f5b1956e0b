"""What is settled before a run: the group size, and which linears stay in full precision."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_contexts import CPU, block_context
from tiny_models import WeightsOf, tiny_model

from awqkit import Recipe
from awqkit.errors import FormatError, UsageError
from awqkit.formats.format import FORMATS
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.plan import choose_group_size, discover_block, make_probe, plan_run


def _shapes(*columns: int) -> dict[str, tuple[int, int]]:
    return {f"m.linear{index}": (8, value) for index, value in enumerate(columns)}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [((256, 384), 128), ((256, 192), 64), ((256, 96), 32), ((4096, 14336), 128), ((256, 100), 32), ((576, 1536), 64)],
)
def test_without_a_wish_the_largest_size_that_divides_every_input_is_taken(
    columns: tuple[int, ...], expected: int
) -> None:
    assert choose_group_size(None, _shapes(*columns)) == expected


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_looking_for_folds_holds_no_weight_of_the_block(family: str) -> None:
    """Of a large model they are gigabytes, which Python's collector may leave where they are for the whole run."""
    model = tiny_model(family)
    skeleton, made = Skeleton(model.config, WeightsOf(model)), []
    load = skeleton.load_block

    def loaded(index: int, device: torch.device) -> torch.nn.Module:
        block = load(index, device)
        made.extend(weakref.ref(value) for value in block.parameters())
        return block

    skeleton.load_block = loaded  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        discover_block(skeleton, make_probe(skeleton, CPU), 0, CPU)
        assert made
        assert not any(each() is not None for each in made)
    finally:
        gc.enable()


def test_a_size_that_was_asked_for_is_taken_or_refused_with_the_sizes_that_would_do() -> None:
    assert choose_group_size(64, _shapes(256, 192)) == 64
    assert choose_group_size(16, _shapes(256, 48)) == 16
    with pytest.raises(FormatError) as refused:
        choose_group_size(128, _shapes(256, 192))
    message = str(refused.value)
    assert "\n" not in message
    for part in ("128", "192 inputs of m.linear1", "--group-size 64 or 32"):
        assert part in message
    with pytest.raises(FormatError, match="--ignore"):
        choose_group_size(64, _shapes(256, 100))


def _kept(family: str, ignore: tuple[str, ...]) -> dict[str, str]:
    context = block_context(tiny_model(family), recipe=Recipe(group_size=32, ignore=ignore))
    return {name: plan.keep for name, plan in context.block_plan.linears.items() if plan.keep is not None}


def test_nothing_is_kept_without_a_reason() -> None:
    assert _kept("llama", ()) == {}


def test_a_linear_that_readers_would_keep_with_one_outside_the_blocks_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of AWQ look for an entry inside a path, so an output head called `up` hides every `up_proj`."""
    model = tiny_model("llama")
    skeleton, awq = Skeleton(model.config, WeightsOf(model)), FORMATS["awq"]
    monkeypatch.setattr(skeleton, "linears_outside_blocks", lambda: ["up"])
    for written, expected in ((awq, {"mlp.up_proj", "mlp.gate_proj"}), (FORMATS["compressed-tensors"], set())):
        plan = plan_run(
            skeleton, Recipe(group_size=32), torch.bfloat16, CPU,
            written.why_not_held, written.fused_partners, written.why_shadowed,
        )  # fmt: skip
        reasons = {name: linear.keep for name, linear in plan.blocks[0].linears.items() if linear.keep is not None}
        assert set(reasons) == expected
    assert "contains up," in awq.why_shadowed("model.layers.0.mlp.up_proj", ["lm_head", "up"])


def test_an_ignored_linear_keeps_the_parts_that_servers_fuse_it_with() -> None:
    kept = _kept("llama", ("*.v_proj",))
    assert set(kept) == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    assert kept["self_attn.v_proj"] == "matches --ignore"
    assert "fuse it with" in kept["self_attn.q_proj"]
    assert set(_kept("llama", ("model.layers.0.mlp.up_proj",))) == {"mlp.gate_proj", "mlp.up_proj"}
    assert set(_kept("llama", ("*.o_proj",))) == {"self_attn.o_proj"}


def test_a_glob_for_another_block_keeps_nothing_here() -> None:
    assert _kept("llama", ("model.layers.1.*",)) == {}


def test_ignoring_everything_is_wrong_use() -> None:
    with pytest.raises(UsageError, match="nothing is left to quantize"):
        _kept("llama", ("*",))


def test_what_the_format_cannot_hold_is_kept_with_the_formats_reason() -> None:
    model = tiny_model("llama")

    def no_wide_input(rows: int, columns: int, group_size: int) -> str | None:
        return "too wide" if columns > 64 else None

    skeleton = Skeleton(model.config, WeightsOf(model))
    plan = plan_run(skeleton, Recipe(group_size=32), torch.bfloat16, CPU, no_wide_input, lambda paths: [])
    kept = {linear.name: linear.keep for linear in plan.linears if linear.keep}
    assert kept == {f"model.layers.{index}.mlp.down_proj": "too wide" for index in (0, 1)}


def test_plans_carry_the_recipe() -> None:
    recipe = Recipe(group_size=32, bits=3, symmetric=True, clip="shared")
    plan = block_context(tiny_model("llama"), recipe=recipe).block_plan.linears["mlp.down_proj"]
    assert (plan.name, plan.shape) == ("model.layers.0.mlp.down_proj", (64, 96))
    assert (plan.bits, plan.group_size, plan.symmetric, plan.clip) == (3, 32, True, "shared")
    assert plan.stored_dtype == torch.bfloat16
