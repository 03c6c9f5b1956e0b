"""What was decided, per fold, linear and block: JSON-able values without tensors.

No choice is silent. A kept linear, a refused fold and every fallback is one of these, with its reason.
Errors named `*_error` of a linear are relative: output error ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖², weight error ‖W−Ŵ‖² / ‖W‖².
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# Where histograms count; a value counts at the nearest point, one outside at the first or last.
ALPHA_POINTS = tuple(step / 20 for step in range(21))  # those that the search tries
CLIP_POINTS = tuple(0.5 + step / 40 for step in range(21))  # those that the search tries
LOG2_SCALE_POINTS = tuple(step / 8 for step in range(-40, 41))  # eighths of an octave
SALIENT_CHANNEL_SHARES = (0.001, 0.01, 0.05, 0.1)
ENOUGH_TOKENS = 4  # of an expert, a channel: the sampling error of H, √(channels ÷ tokens) of it, is then a half


@dataclass(frozen=True, slots=True)
class AlphaSummary:
    """The channel-scale search of one fold in a few numbers.

    num_units: search units. num_identity: units that stayed at s = 1. families: units won by each family.
    alpha_min, alpha_median, alpha_max: over the units that were scaled, None where none was.
    scale_min, scale_max: the extremes of the s that the search chose.
    counts: scaled units by their alpha, at `ALPHA_POINTS`.
    """

    num_units: int
    num_identity: int
    families: dict[str, int]
    alpha_min: float | None
    alpha_median: float | None
    alpha_max: float | None
    scale_min: float
    scale_max: float
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ScaleSummary:
    """The final s of one fold as a distribution over its channels: see `numerics.scale_summary`.

    Shares are of the fold's channels and relative to the mean. log2_counts: channels by log2 s, at `LOG2_SCALE_POINTS`.
    """

    mean: float
    min: float
    max: float
    std: float
    max_over_mean: float
    share_above_5x: float
    share_above_2x: float
    share_below_half: float
    log2_counts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FoldDecision:
    """One place where a channel scale could be absorbed, and what became of it.

    proof_error: largest relative change of the block's output under random powers of two.
    error_nearest, error_chosen: row-weighted errors of all consumers, relative to the first; None without a search.
    fallback: why s = 1 was restored, or why the fold was not used at all; None where s is in use.
    scale: the final s, or what it would have been where a fallback restored 1; None without a search.
    kept_columns: how columns of consumers in full precision (a router) are stored: "exact", times powers of two, or
    "rounded", times any s, where the other consumers gain more by that than those lose; None where there are none.
    """

    producer: str
    kind: str
    consumers: tuple[str, ...]
    num_channels: int
    proof_error: float | None
    alpha: AlphaSummary | None = None
    error_nearest: float | None = None
    error_chosen: float | None = None
    fallback: str | None = None
    scale: ScaleSummary | None = None
    kept_columns: str | None = None


@dataclass(frozen=True, slots=True)
class LinearDecision:
    """One quantized linear: errors of plain rounding at s = 1 and of what was chosen.

    clip_mean: mean share of the groups' range that was kept, 1 without clip.
    fallback: why a choice was undone for this linear, or None.
    clip_counts: both ends of all groups by the share that was kept, at `CLIP_POINTS`; empty without clip.
    saliency: (share of the input channels, share of plain rounding's output error that the most salient of them
    carry), see `numerics.saliency`; empty without calibration. propagation: the strength β that was used.
    tokens: calibration tokens that the linear of an expert met; None where that is every one.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    output_error_nearest: float | None
    output_error: float | None
    weight_error_nearest: float
    weight_error: float
    clip_mean: float = 1.0
    fallback: str | None = None
    clip_counts: tuple[int, ...] = ()
    saliency: tuple[tuple[float, float], ...] = ()
    propagation: float = 0.0
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class KeptDecision:
    """One linear that stays in full precision, and why."""

    name: str
    shape: tuple[int, int]
    reason: str


@dataclass(frozen=True, slots=True)
class BlockDecision:
    """One block: its folds and linears, and the check on held-out rows.

    held_out_error_nearest, held_out_error: ‖Y−Ŷ‖² / ‖Y−X‖² of the block's output (X its input) on rows that the
    search did not see, for plain rounding and for what was chosen; None without calibration.
    fallback: why the whole block went back to plain rounding, or None.
    """

    index: int
    path: str
    folds: tuple[FoldDecision, ...]
    linears: tuple[LinearDecision, ...]
    kept: tuple[KeptDecision, ...]
    held_out_error_nearest: float | None = None
    held_out_error: float | None = None
    fallback: str | None = None

    @property
    def num_fallbacks(self) -> int:
        """How many choices of this block were undone or refused."""
        parts = [self.fallback, *(fold.fallback for fold in self.folds), *(linear.fallback for linear in self.linears)]
        return sum(reason is not None for reason in parts)


@dataclass(frozen=True, slots=True)
class TuningDecision:
    """Tuning of group scales and gains on the whole model.

    held_out_kl_before, held_out_kl: nats per token on held-out rows, None without any. fallback: why it was undone.
    """

    epochs: float
    held_out_kl_before: float | None
    held_out_kl: float | None
    fallback: str | None = None


@dataclass(frozen=True, slots=True)
class CalibrationSummary:
    """Which text was read and how much of it was used; nothing is dropped in silence.

    generated_rows, generated_held_out_rows: beside `rows` and `held_out_rows`, written by the model itself.
    not_generated: why it wrote none although the Recipe asks for some. checked_rows: how many of all that are held out
    the checks took.
    """

    source: str
    documents_found: int
    documents_used: int
    tokens_found: int
    rows: int
    held_out_rows: int
    tokens_per_row: int
    start_tokens: tuple[int, ...]
    tokens_used: int
    generated_rows: int = 0
    generated_held_out_rows: int = 0
    not_generated: str | None = None
    checked_rows: int = 0

    @property
    def tokens_left(self) -> int:
        """Text tokens that no row took."""
        return self.tokens_found - self.tokens_used


def block_decision_of(content: dict[str, Any]) -> BlockDecision:
    """The BlockDecision that `as_json` gave `content` for."""
    folds, linears, kept = ([dict(entry) for entry in content[key]] for key in ("folds", "linears", "kept"))
    for fold in folds:
        fold["consumers"] = tuple(fold["consumers"])
        if fold["alpha"] is not None:
            fold["alpha"] = AlphaSummary(**{**fold["alpha"], "counts": tuple(fold["alpha"]["counts"])})
        if fold["scale"] is not None:
            fold["scale"] = ScaleSummary(**{**fold["scale"], "log2_counts": tuple(fold["scale"]["log2_counts"])})
    for linear in linears:
        linear["shape"], linear["clip_counts"] = tuple(linear["shape"]), tuple(linear["clip_counts"])
        linear["saliency"] = tuple((channels, error) for channels, error in linear["saliency"])
    for entry in kept:
        entry["shape"] = tuple(entry["shape"])
    made = {
        "folds": tuple(FoldDecision(**fold) for fold in folds),
        "linears": tuple(LinearDecision(**linear) for linear in linears),
        "kept": tuple(KeptDecision(**entry) for entry in kept),
    }
    return BlockDecision(**{**content, **made})


_PLAIN = (str, int, float, type(None))


def as_json(decision: Any) -> Any:
    """A Decision, or a container of them, as JSON-able dicts, lists and numbers."""
    if isinstance(decision, _PLAIN):
        return decision
    if dataclasses.is_dataclass(decision) and not isinstance(decision, type):
        return {field.name: as_json(getattr(decision, field.name)) for field in dataclasses.fields(decision)}
    if isinstance(decision, dict):
        return {key: as_json(value) for key, value in decision.items()}
    if isinstance(decision, list | tuple):
        return [as_json(value) for value in decision]
    return decision
