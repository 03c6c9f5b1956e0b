"""A report built by hand: six blocks of seven linears and four folds, with a fallback of each kind."""

from __future__ import annotations

import json
import math
from typing import Any

from awqkit.decisions import (
    ALPHA_POINTS,
    CLIP_POINTS,
    LOG2_SCALE_POINTS,
    SALIENT_CHANNEL_SHARES,
    AlphaSummary,
    BlockDecision,
    CalibrationSummary,
    FoldDecision,
    KeptDecision,
    LinearDecision,
    ScaleSummary,
)
from awqkit.recipe import Recipe
from awqkit.report.report import Report

NUM_BLOCKS = 6
LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
FOLDS = {
    "input_layernorm": LINEARS[:3],
    "post_attention_layernorm": LINEARS[4:6],
    "self_attn.v_proj": LINEARS[3:4],
    "mlp.up_proj": LINEARS[6:],
}
FOLD_UNDONE = "scaling raised the consumers' error (1.3e-03 > 1.2e-03): s = 1 restored"
BLOCK_UNDONE = "held-out rows were worse than with plain rounding: block rounded plainly"
LINEAR_UNDONE = "clip and rounding raised the output error under this scale: nearest rounding kept"
TIMINGS = {"seconds": 63.5, "stages": {"read": 0.5, "prove": 3.0, "observe": 20.0, "search": 38.0, "write": 2.0}}
COMPARISON = [
    {"method": "fp", "bits": 16, "bits_per_weight": 16.0, "perplexity": 19.6, "kl": None, "top1_agreement": None,
     "seconds": None},
    *(
        {"method": method, "bits": bits, "bits_per_weight": bits + 0.25, "perplexity": 19.6 + 30 * kl, "kl": kl,
         "top1_agreement": 1 - kl, "seconds": 100 * kl}
        for bits, worse in ((4, 1), (3, 4))
        for method, kl in (("rtn", 0.15 * worse), ("awq", 0.08 * worse), ("balanced", 0.04 * worse))
    ),
]  # fmt: skip


def sample_report(*, model: str = "sample-135M") -> dict[str, Any]:
    """The content of awqkit.json, as it comes back from the file."""
    report = Report(
        model=model,
        recipe=Recipe.preset("fast", group_size=64),
        group_size=64,
        stored_dtype="bfloat16",
        device="cpu",
        versions={"awqkit": "0.1.0", "torch": "2.13.0"},
        calibration=CalibrationSummary("text.txt", 9, 9, 5000, 8, 1, 256, (1,), 2304),
        blocks=tuple(_block(index) for index in range(NUM_BLOCKS)),
        source_bytes=269_000_000,
        written_bytes=98_500_000,
        packed_bytes=55_000_000,
        quantized_weights=100_000_000,
        dropped={},
        cautions=("tensor parallelism of 8 would not load this checkpoint",),
    )
    return json.loads(json.dumps(report.to_json()))


def _block(index: int) -> BlockDecision:
    path = f"model.layers.{index}"
    whole = BLOCK_UNDONE if index == 4 else None
    return BlockDecision(
        index=index,
        path=path,
        folds=tuple(_fold(index, number, name, whole) for number, name in enumerate(FOLDS)),
        linears=tuple(_linear(f"{path}.{name}", index, number) for number, name in enumerate(LINEARS)),
        kept=(KeptDecision("model.layers.0.mlp.router", (8, 64), "matches --ignore"),) if index == 0 else (),
        held_out_error_nearest=0.02,
        held_out_error=0.015,
        fallback=whole,
    )


def _fold(block: int, number: int, name: str, whole: str | None) -> FoldDecision:
    alpha = [0] * len(ALPHA_POINTS)
    alpha[6], alpha[10] = 1, 2
    spread = [0] * len(LOG2_SCALE_POINTS)
    middle = len(spread) // 2
    spread[middle - 4 : middle + 5] = [1, 4, 9, 14, 15, 12, 6, 2, 1]
    return FoldDecision(
        producer=name,
        kind="norm" if name.endswith("norm") else "rows",
        consumers=FOLDS[name],
        num_channels=64,
        proof_error=0.0,
        alpha=AlphaSummary(4, 1, {"duo": 2, "importance": 1}, 0.3, 0.5, 0.5, 0.6, 2.0, tuple(alpha)),
        error_nearest=1.2e-3,
        error_chosen=0.9e-3,
        fallback=whole or (FOLD_UNDONE if (block, number) == (2, 1) else None),
        scale=ScaleSummary(1.0 + block / 10, 0.5, 2.0 + block, 0.3, 2.0, 0.01, 0.05, 0.02, tuple(spread)),
    )


def _linear(name: str, block: int, number: int) -> LinearDecision:
    wave = math.exp(0.3 * math.sin(block + number))
    clip = [0] * len(CLIP_POINTS)
    clip[15], clip[18], clip[20] = 10, 60, 30
    return LinearDecision(
        name=name,
        shape=(128, 64),
        bits=4,
        group_size=64,
        output_error_nearest=5e-3 * wave,
        output_error=3e-3 * wave,
        weight_error_nearest=1.0e-2,
        weight_error=1.2e-2 if number % 2 else 0.9e-2,
        clip_mean=0.94,
        fallback=LINEAR_UNDONE if (block, number) == (1, 3) else None,
        clip_counts=tuple(clip),
        saliency=tuple((share, min(1.0, 3 * share * wave)) for share in SALIENT_CHANNEL_SHARES),
    )
