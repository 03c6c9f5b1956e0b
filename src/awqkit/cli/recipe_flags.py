"""The flags of `awqkit quantize` that become a Recipe, together with the recipe file."""

from __future__ import annotations

import argparse
from typing import Any

from awqkit.cli.arguments import Parser, dtype_of, one_of, share, whole_number
from awqkit.recipe import (
    AUTO,
    DEFAULT_GROUP_SIZES,
    DEFAULT_QUALITY,
    FORMAT_NAMES,
    PER_CHANNEL,
    STORED_DTYPES,
    Recipe,
    read_recipe_file,
)

QUALITIES = ("fast", "balanced", "best")
METHODS = ("rtn", "gptq", "awq", "smoothquant")
IMPORTANCES = ("square", "mean-abs", "conditional")
ALPHA_SEARCHES = ("group", "layer")
# Recipe field (or preset choice) and its flag. The destination has the field's name; None there means "not given".
RECIPE_FLAGS = {
    **{
        field: f"--{field}"
        for field in ("quality", "method", "format", "bits", "symmetric", "dtype", "ignore", "folds")
    },
    **{
        field: f"--{field}" for field in ("importance", "clip", "rounds", "calibration", "samples", "generated", "seed")
    },
    "group_size": "--group-size",
    "alpha_search": "--alpha-search",
    "smooth_alpha": "--smooth-alpha",
    "propagation": "--propagate",
    "seq_len": "--seq-len",
    "all_experts": "--all-experts",
}


def add_recipe_options(parser: Parser) -> None:
    """Add the groups of flags that say what is written, from what everybody asks to what few do."""
    _add_method_options(parser)
    _add_checkpoint_options(parser)
    _add_calibration_options(parser)
    _add_advanced_options(parser)


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The Recipe of a command line: the recipe file's keys, then the flags, key by key. Raises UsageError.

    `quality` and `method` exclude each other, so either one given as a flag drops both of the file's.
    """
    choices = {} if args.recipe is None else dict(read_recipe_file(args.recipe))
    flags: dict[str, Any] = {key: getattr(args, key) for key in RECIPE_FLAGS if getattr(args, key) is not None}
    if "quality" in flags or "method" in flags:
        choices.pop("quality", None)
        choices.pop("method", None)
    return Recipe.from_choices({**choices, **flags})


def unused_flags(args: argparse.Namespace, recipe: Recipe) -> list[str]:
    """One sentence for each kind of flag that this recipe does not look at."""
    reads = {
        ("alpha_search", "importance"): (
            recipe.scales_channels and recipe.channel_scale == "search",
            "searches no channel scales",
        ),
        ("smooth_alpha",): (recipe.channel_scale == "smooth", "does not smooth activations"),
        ("rounds",): (bool(recipe.refinement), "refines no codes"),
        ("calibration", "generated"): (recipe.needs_calibration, "looks at no text"),
    }
    sentences = []
    for fields, (is_read, reason) in reads.items():
        given = [RECIPE_FLAGS[field] for field in fields if getattr(args, field) is not None]
        if given and not is_read:
            sentences.append(f"{' and '.join(given)} not used: {recipe.name} {reason}")
    return sentences


def _add_checkpoint_options(parser: Parser) -> None:
    default = Recipe.preset(DEFAULT_QUALITY)
    group = parser.add_argument_group("the checkpoint")
    group.add_argument(
        "--format", type=one_of(*FORMAT_NAMES), metavar="FORMAT",
        help=f"{' or '.join(FORMAT_NAMES)}, which also holds 2, 3 and 8 bits and one group a row "
        f"(default: {default.format}; compressed-tensors for smoothquant)",
    )  # fmt: skip
    group.add_argument(
        "--bits",
        type=whole_number(1),
        metavar="N",
        help=f"bits per weight: 2, 3, 4 or 8 (default: {default.bits}; 8 for smoothquant)",
    )
    first, *smaller = DEFAULT_GROUP_SIZES
    group.add_argument(
        "--group-size", type=_group_size, metavar="N",
        help=f"input channels that share a scale, or channel: one scale a row (default: {first}, or the larger of "
        f"{' and '.join(map(str, smaller))} that divides every input where {first} does not)",
    )  # fmt: skip
    grid = group.add_mutually_exclusive_group()
    grid.add_argument(
        "--symmetric",
        dest="symmetric",
        action="store_const",
        const=True,
        help="zero point fixed in the middle",
    )
    grid.add_argument(
        "--asymmetric", dest="symmetric", action="store_const", const=False,
        help="a zero point for every group (default, except for smoothquant)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", type=dtype_of(*STORED_DTYPES), metavar="DTYPE",
        help="bfloat16 or float16, for what is not packed (default: the model's; float32 becomes bfloat16)",
    )  # fmt: skip
    group.add_argument(
        "--ignore", action="append", metavar="GLOB",
        help="keep linears whose full module path matches; may be given several times; replaces a recipe "
        "file's list (lm_head is always kept)",
    )  # fmt: skip


def _add_method_options(parser: Parser) -> None:
    group = parser.add_argument_group("the method (a preset or a textbook method, not both)")
    group.add_argument(
        "--quality", type=one_of(*QUALITIES), metavar=_braces(QUALITIES),
        help="preset. fast: channel scales of two families, clipping, nearest rounding. balanced: scales for what "
        "GPTQ leaves over, then GPTQ, descent, refit, propagation and a little tuning. best: more rounds, errors weighted "
        "by what they cost in the model's own loss, group scales tuned; several times slower (default: "
        f"{DEFAULT_QUALITY})",
    )  # fmt: skip
    group.add_argument(
        "--method", type=one_of(*METHODS), metavar=_braces(METHODS),
        help="as published. rtn: round to nearest; gptq: no scales, no clipping; awq: scales as in the AWQ paper, and "
        "clipping; smoothquant: 8-bit weights and activations",
    )  # fmt: skip


def _add_calibration_options(parser: Parser) -> None:
    default = Recipe.preset(DEFAULT_QUALITY)
    group = parser.add_argument_group("the calibration text")
    group.add_argument(
        "--calibration", metavar="TEXT",
        help="a .txt file (documents separated by <|endoftext|>), a .jsonl file with text or chat messages, "
        f"a hub dataset, or builtin: text found on any machine (default: {default.calibration})",
    )  # fmt: skip
    for flag, value, meaning in (
        ("--samples", default.samples, "rows of text"),
        ("--seq-len", default.seq_len, "tokens per row"),
        ("--seed", default.seed, "of the choice of rows"),
    ):
        group.add_argument(flag, type=whole_number(0), metavar="N", help=f"{meaning} (default: {value})")
    group.add_argument(
        "--generated", type=share, metavar="SHARE",
        help="rows that the model writes itself, beside each row of text: 0.5 makes half as many more (default: "
        f"{default.generated:g}, {Recipe.preset('best').generated:g} for best, 0 for fast and the methods)",
    )  # fmt: skip
    group.add_argument(
        "--all-experts", action="store_const", const=True,
        help="of a mixture of experts: every expert learns from every token, in as many runs as that takes (default: "
        "from the tokens that its router sends to it)",
    )  # fmt: skip


def _add_advanced_options(parser: Parser) -> None:
    default = Recipe.preset(DEFAULT_QUALITY)
    group = parser.add_argument_group("advanced: parts of the method")
    group.add_argument(
        "--propagate", dest="propagation", type=_propagation, metavar="SHARE",
        help="of the errors that earlier linears made, how much the later ones correct: off, 0 to 1, or auto: "
        f"chosen for each input on rows held out (default: {default.propagation})",
    )  # fmt: skip
    group.add_argument(
        "--folds", type=one_of("on", "off"), metavar="{on,off}",
        help="off: scale no channels, and do not look where that could be done; clipping, rounding and refinement "
        f"stay (default: {default.folds})",
    )  # fmt: skip
    clip = group.add_mutually_exclusive_group()
    clip.add_argument(
        "--clip", dest="clip", action="store_const", const="ends",
        help="search how far to clip both ends of each group's range (default for the presets and awq)",
    )  # fmt: skip
    clip.add_argument("--no-clip", dest="clip", action="store_const", const="none", help="keep the full range")
    group.add_argument(
        "--importance", type=one_of(*IMPORTANCES), metavar=_braces(IMPORTANCES),
        help="of a channel in the search of scales: E[x^2], AutoAWQ's (E|x|)^2, or the variance given the columns "
        f"that GPTQ rounds later, which wants propagation (default: {default.importance}, mean-abs for fast and awq)",
    )  # fmt: skip
    group.add_argument(
        "--alpha-search", type=one_of(*ALPHA_SEARCHES), metavar=_braces(ALPHA_SEARCHES),
        help=f"one alpha per group, or one per layer as in the paper (default: {default.alpha_search})",
    )  # fmt: skip
    group.add_argument(
        "--smooth-alpha", type=share, metavar="A",
        help="smoothquant: how much of the difficulty weights take over, 0 to 1 (default: searched)",
    )  # fmt: skip
    group.add_argument(
        "--rounds", type=whole_number(0), metavar="N",
        help=f"of descent and refit (default: {default.rounds}, {Recipe.preset('best').rounds} for best)",
    )  # fmt: skip


def _group_size(text: str) -> int:
    return PER_CHANNEL if text == "channel" else whole_number(1)(text)


def _propagation(text: str) -> float | str:
    if text in ("off", AUTO):
        return AUTO if text == AUTO else 0.0
    try:
        return share(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not off, auto or a number from 0 to 1") from error


def _braces(choices: tuple[str, ...]) -> str:
    return f"{{{','.join(choices)}}}"
