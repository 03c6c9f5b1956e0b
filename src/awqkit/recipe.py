"""The Recipe: every choice that changes the bytes of the checkpoint, as one frozen value.

A method is not a class. It is a choice in five slots: channel scale, grid, rounding, refinement, propagation.

    Recipe.preset("fast")       channel scales from two families, two-ended clip, nearest rounding
    Recipe.preset("balanced")   the same weighted by conditional variance, GPTQ, descent and refit, propagation
    Recipe.preset("best")       two rounds of descent and refit, end-loss sensitivity, tuning, more of its own text
    Recipe.method("rtn")        round to nearest, nothing else; needs no calibration text
    Recipe.method("awq")        the AWQ paper's scale family, two-ended clip
    Recipe.method("gptq")       GPTQ as published: act-order, mean damping, no clip
    Recipe.method("smoothquant")   SmoothQuant: 8-bit weights and activations
"""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awqkit.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_QUALITY = "balanced"
DEFAULT_GROUP_SIZES = (128, 64, 32)  # tried in this order when no size is asked for

FORMAT_NAMES = ("awq", "compressed-tensors")

_CHOICES: dict[str, tuple[str, ...]] = {
    "folds": ("on", "off"),
    "channel_scale": ("none", "search", "smooth"),
    "importance": ("square", "mean-abs", "conditional"),
    "error_weight": ("moment", "conditional"),
    "alpha_search": ("group", "layer"),
    "clip": ("none", "shared", "ends"),
    "rounding": ("nearest", "gptq"),
    "column_order": ("energy", "moment"),
    "damping": ("own", "mean"),
    "sensitivity": ("none", "end-loss"),
    "tuning": ("groups", "rows"),
    "format": FORMAT_NAMES,
    "activations": ("none", "int8"),
}
SCALE_FAMILIES = ("importance", "duo")
REFINEMENTS = ("descent", "refit")
PER_CHANNEL = -1  # group size: one group a row
AUTO = "auto"
STORED_DTYPES = ("bfloat16", "float16")

_FAST: dict[str, Any] = {"channel_scale": "search", "scale_families": ("importance", "duo"), "clip": "ends"}
_BALANCED: dict[str, Any] = {
    **_FAST,
    "importance": "conditional",
    "error_weight": "conditional",
    "rounding": "gptq",
    "refinement": ("descent", "refit"),
    "rounds": 1,
    "propagation": 0.5,
    "generated": 0.125,
    "generated_weight": 2.0,
    "tuning": "rows",
    "tuning_epochs": 0.25,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "fast": _FAST,
    "balanced": _BALANCED,
    "best": {
        **_BALANCED,
        "rounds": 2,
        "sensitivity": "end-loss",
        "generated": 0.5,
        "generated_weight": 1.0,
        "tuning": "groups",
        "tuning_epochs": 4,
    },
}
_TEXTBOOK: dict[str, Any] = {"channel_scale": "none", "clip": "none"}
_METHODS: dict[str, dict[str, Any]] = {
    "rtn": _TEXTBOOK,
    "gptq": {**_TEXTBOOK, "rounding": "gptq", "column_order": "moment", "damping": "mean", "damp_ratio": 0.01},
    "awq": {"channel_scale": "search", "scale_families": ("importance",), "clip": "ends"},
    "smoothquant": {
        "channel_scale": "smooth",
        "clip": "none",
        "bits": 8,
        "group_size": PER_CHANNEL,
        "symmetric": True,
        "activations": "int8",
        "format": "compressed-tensors",
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All choices that the written bytes depend on, for one model, calibration text and device kind.

    name: the preset or method that it was made from, for people; "custom" where it was made field by field.
    bits: 2 to 8; the format may hold fewer.
    group_size: input channels that share one scale; None takes the largest of 128, 64, 32 that divides every linear,
        −1 one group per row.
    symmetric: zero point fixed in the middle of the code range.
    activations: "none", or "int8": inputs rounded to 8 bits per token at run time as well (W8A8).
    folds: "on", or "off": no channel is scaled, and nobody looks where it could be.
    channel_scale: "none", "search" (per fold, alpha on 21 points of [0, 1]: AWQ, Lin 2023, section 3.2), or "smooth"
        (SmoothQuant, Xiao 2022, section 4: activations and weights share the difficulty).
    smooth_alpha: SmoothQuant's migration strength, None to search it on the same 21 points.
    scale_families: which forms of s take part in the search, see `numerics.channel_scale`.
    importance: "mean-abs" (E|x|)², the statistic of the AWQ paper; "square" E[x²] (measured worse, docs/log.md); or
        "conditional", the variance given the columns that are rounded later, see `numerics.rounding_metric`.
    error_weight: what scale and clip search weigh errors with: "moment" H, or "conditional" variance.
    alpha_search: "group" (each search unit its own alpha) or "layer" (one alpha, judged on the full gram).
    clip: "none", "shared" (one ratio for both ends of the range), "ends" (each end its own ratio).
    rounding: "nearest" or "gptq".
    column_order: order of GPTQ's columns: "energy" H_jj · mean W_ij², or "moment" H_jj (act-order).
    damping, damp_ratio: what is added to H before it is factorised: a share of each channel's "own" H_jj, or of the
        "mean".
    refinement, rounds: "descent" over codes and "refit" of the grid, in this order, so many times.
    propagation: how much of the correction for errors of earlier linears is made, 0 … 1, or "auto": per linear input,
        on rows held out.
    sensitivity: "none", or "end-loss": errors weighted by the gradients of the model's own loss, across rows and
        tokens.
    tuning: what is tuned together on the whole model's KL beside folded gains: the scales of "groups", or one factor
        for the whole of each of a weight's "rows", which needs no gradient as large as the weight.
    tuning_epochs: passes over the calibration rows for that; a half visits every second step's rows, 0 none.
    dtype: the dtype of everything that is not packed; None keeps the source's, and turns float32 into bfloat16.
    ignore: globs on full module paths; a linear that matches stays in full precision.
    calibration: path of a .txt or .jsonl file, "builtin", or the name of a hub dataset.
    samples, seq_len, seed: calibration rows, tokens per row, and the seed that chooses them.
    all_experts: whether every expert learns from every calibration token, and not from those that its router sends.
    generated: rows that the model writes itself, beside each of `samples`; 0.5 makes half as many more.
    generated_weight: what a token of those counts in every H, where one of the text counts 1.
    """

    name: str = "custom"
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    activations: str = "none"
    folds: str = "on"
    channel_scale: str = "search"
    smooth_alpha: float | None = None
    scale_families: tuple[str, ...] = SCALE_FAMILIES
    importance: str = "mean-abs"
    error_weight: str = "moment"
    alpha_search: str = "group"
    clip: str = "ends"
    rounding: str = "nearest"
    column_order: str = "energy"
    damping: str = "own"
    damp_ratio: float = 0.05
    refinement: tuple[str, ...] = ()
    rounds: int = 0
    propagation: float | str = 0.0
    sensitivity: str = "none"
    tuning: str = "groups"
    tuning_epochs: float = 0
    format: str = "awq"
    dtype: str | None = None
    ignore: tuple[str, ...] = ()
    calibration: str = "builtin"
    samples: int = 128
    generated: float = 0.0
    generated_weight: float = 1.0
    seq_len: int = 512
    all_experts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            _one_of(field, getattr(self, field), choices)
        unknown = [family for family in self.scale_families if family not in SCALE_FAMILIES]
        if unknown or (self.channel_scale == "search" and not self.scale_families):
            raise UsageError(f"scale_families is {self.scale_families}; it takes one or more of {SCALE_FAMILIES}")
        if set(self.refinement) - set(REFINEMENTS):
            raise UsageError(f"refinement is {self.refinement}; it takes {REFINEMENTS} or a part of them")
        if self.folds == "off" and self.channel_scale == "smooth":
            raise UsageError("folds is off, and smoothquant is nothing but scales that folds absorb: drop one of them")
        if self.dtype is not None:
            _one_of("dtype", self.dtype, STORED_DTYPES)
        _whole("bits", self.bits, 2, 8)
        if self.group_size is not None and self.group_size != PER_CHANNEL:
            _whole("group_size", self.group_size, 8, 1 << 20)
        _whole("rounds", self.rounds, 0, 64)
        _number("tuning_epochs", self.tuning_epochs, 0, 1000)
        _share("damp_ratio", self.damp_ratio)
        if self.smooth_alpha is not None:
            _share("smooth_alpha", self.smooth_alpha)
        if self.propagation != AUTO:
            _share("propagation", self.propagation, f" or {AUTO!r}")
        _share("generated", self.generated)
        _number("generated_weight", self.generated_weight, 0, 1000)
        _whole("samples", self.samples, 1, 1 << 24)
        _whole("seq_len", self.seq_len, 8, 1 << 20)
        _whole("seed", self.seed, 0, (1 << 63) - 1)

    @classmethod
    def preset(cls, quality: str, **overrides: Any) -> Recipe:
        """The preset `quality` ("fast", "balanced", "best") with single fields replaced. Raises UsageError."""
        _one_of("quality", quality, tuple(_PRESETS))
        return _build({"name": quality, **_PRESETS[quality], **overrides})

    @classmethod
    def method(cls, method: str, **overrides: Any) -> Recipe:
        """The method `method` ("rtn", "gptq", "awq", "smoothquant") with fields replaced. Raises UsageError."""
        _one_of("method", method, tuple(_METHODS))
        return _build({"name": method, **_METHODS[method], **overrides})

    @classmethod
    def from_choices(cls, choices: Mapping[str, Any]) -> Recipe:
        """A Recipe from flat keys: `quality` or `method` (not both) and any fields. Raises UsageError."""
        rest = dict(choices)
        quality, method = rest.pop("quality", None), rest.pop("method", None)
        if quality is not None and method is not None:
            raise UsageError(
                f"quality {quality!r} and method {method!r} were both given: "
                "a preset and a textbook method exclude each other, drop one"
            )
        if method is not None:
            return cls.method(method, **rest)
        return cls.preset(DEFAULT_QUALITY if quality is None else quality, **rest)

    @property
    def needs_calibration(self) -> bool:
        """Whether any choice looks at activations."""
        searches = self.scales_channels or self.clip != "none" or self.rounding != "nearest"
        refines = self.rounds > 0 and bool(self.refinement)
        return searches or refines or self.propagates or self.sensitivity != "none" or self.tuning_epochs > 0

    @property
    def scales_channels(self) -> bool:
        """Whether channel scales are chosen."""
        return self.folds == "on" and self.channel_scale != "none"

    @property
    def looks_across_groups(self) -> bool:
        """Whether any step asks how channels of different groups go together: else H's blocks on the diagonal do."""
        plain = self.rounding == "nearest" and self.rounds == 0 and self.error_weight == "moment"
        searches = self.channel_scale != "smooth" and self.alpha_search == "group" and self.importance != "conditional"
        return not (plain and searches and self.sensitivity == "none" and not self.propagates)

    @property
    def looks_at_tokens(self) -> bool:
        """Whether any step asks for tokens themselves, beside their sums: what rounds inputs, token by token."""
        return self.activations != "none" or self.channel_scale == "smooth"

    @property
    def needs_logits(self) -> bool:
        """Whether what follows the last block is run, too."""
        return self.sensitivity != "none" or self.tuning_epochs > 0

    @property
    def own_text(self) -> tuple[float, float]:
        """How much text of the model's own is learned from, and what it counts."""
        return self.generated, self.generated_weight if self.generated else 1.0

    @property
    def propagates(self) -> bool:
        """Whether a second stream runs through the quantized blocks."""
        return self.propagation == AUTO or self.propagation > 0

    def ignores(self, module_path: str) -> bool:
        """Whether a glob of `ignore` matches the full module path, case-sensitively."""
        return any(fnmatch.fnmatchcase(module_path, pattern) for pattern in self.ignore)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }


def read_recipe_file(path: Path) -> dict[str, Any]:
    """The flat keys of a TOML recipe file, for `Recipe.from_choices`. Raises UsageError with file and key."""
    try:
        choices = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"recipe {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path}: not a TOML file ({error})") from error
    known = {field.name for field in dataclasses.fields(Recipe)} - {"name"} | {"quality", "method"}
    for key in choices:
        if key not in known:
            raise UsageError(f"recipe {path}: unknown key {key!r}; known keys are {', '.join(sorted(known))}")
    return choices


def _build(fields: dict[str, Any]) -> Recipe:
    known = {field.name for field in dataclasses.fields(Recipe)}
    for key in fields:
        if key not in known:
            raise UsageError(f"unknown recipe field {key!r}; known fields are {', '.join(sorted(known))}")
    for key in ("ignore", "scale_families", "refinement"):
        if key in fields:
            value = fields[key]
            fields[key] = (value,) if isinstance(value, str) else tuple(value)
    return Recipe(**fields)


def _one_of(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{field} is {value!r}; it takes one of {', '.join(choices)}")


def _whole(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{field} is {value!r}; it takes a whole number from {low} to {high}")


def _number(field: str, value: object, low: int, high: int, also: str = "") -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{field} is {value!r}; it takes a number from {low} to {high}{also}")


def _share(field: str, value: object, also: str = "") -> None:
    _number(field, value, 0, 1, also)
