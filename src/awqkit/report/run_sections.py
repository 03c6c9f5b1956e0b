"""The sections about one run's errors and searches, from the content of awqkit.json; plain text, see `sections.py`."""

from __future__ import annotations

from collections.abc import Sequence

from awqkit.decisions import ENOUGH_TOKENS
from awqkit.report.analysis import ClipRow, Json, alpha_rows, clip_rows, linears_by_type, scale_rows, short_names
from awqkit.report.error_figures import ERROR_LEGEND, error_keys, error_panels, ratio_maps
from awqkit.report.figures import LegendEntry, number, percent, percent_label
from awqkit.report.search_figures import SALIENCY_COLORS, alpha_bars, clip_bars, saliency_dots, scale_panels
from awqkit.report.sections import MOST_ROWS, PAIR, PANELS, Section, Table

RAMP = ("¼ ×", "½ ×", "as plain rounding", "2 ×", "4 ×")  # of `error_figures.RATIO_LIMIT`


def error_section(report: Json) -> Section:
    """Every linear from plain rounding to what was written."""
    before, after = error_keys(report)
    linears = [linear for block in report["blocks"] for linear in block["linears"]]
    better = sum(linear[after] < linear[before] for linear in linears)
    if after == "output_error":
        what = "Output error is ‖X(W−Ŵ)ᵀ‖² ÷ ‖XWᵀ‖² over the calibration tokens: how far a linear's output moves. "
    else:
        what = "No calibration text was read, so these are weight errors, ‖W−Ŵ‖² ÷ ‖W‖². "
    return Section(
        name="errors",
        title="Error of every linear",
        lead=(f"{what}It is lower than plain rounding's for {better} of {len(linears)} linears.",),
        figures=tuple(error_panels(report)),
        arrangement=PANELS,
        legend=ERROR_LEGEND,
        tables=(_linear_table(linears, after),),
    )


def experts_section(report: Json) -> Section | None:
    """How many calibration tokens met the experts; None where there are none."""
    rows, details = [], []
    for block in report["blocks"]:
        linears = [linear for linear in block["linears"] if linear.get("tokens") is not None]
        if not linears:
            continue
        met = sorted(linear["tokens"] for linear in linears)
        few = sum(linear["tokens"] < ENOUGH_TOKENS * linear["shape"][1] for linear in linears)
        counts = (len(met), met[0], met[len(met) // 2], met[-1], few)
        rows.append((str(block["index"]), *(f"{count:,}" for count in counts)))
        details += [(linear["name"], f"{linear['tokens']:,}") for linear in linears]
    if not rows:
        return None
    columns = ("block", "linears of experts", "fewest tokens", "median", "most", f"below {ENOUGH_TOKENS} a channel")
    return Section(
        name="experts",
        title="Calibration tokens per expert",
        lead=(
            "An expert is judged by the tokens that its router sends to it. Where those are fewer than "
            f"{ENOUGH_TOKENS} for each input channel, its statistics are drawn towards the mean of all experts, the "
            "more the fewer they are.",
        ),
        tables=(
            Table("", columns, tuple(rows)),
            Table("Every linear", ("linear", "tokens"), tuple(details[:MOST_ROWS]), folded=True),
        ),
    )


def ratio_section(report: Json) -> Section | None:
    """Output error and weight error side by side; None where no text was read."""
    linears = [linear for block in report["blocks"] for linear in block["linears"]]
    if error_keys(report)[1] != "output_error":
        return None
    raised = sum(linear["weight_error"] > linear["weight_error_nearest"] for linear in linears)
    lowered = sum(
        linear["weight_error"] > linear["weight_error_nearest"]
        and linear["output_error"] < linear["output_error_nearest"]
        for linear in linears
    )
    return Section(
        name="weights",
        title="Output error and weight error",
        lead=(
            "Each cell is the error as written, as a multiple of plain rounding's. A good method may move the weights "
            f"further from the original and the outputs closer to it: here weight error rose in {raised} of "
            f"{len(linears)} linears, and in {lowered} of those {raised} output error fell all the same.",
        ),
        figures=tuple(ratio_maps(report)),
        arrangement=PAIR,
        ramp=RAMP,
    )


def scale_section(report: Json) -> Section | None:
    """The channel scales by type of fold; None where none was searched."""
    rows = scale_rows(report)
    if not rows:
        return None
    names = short_names(row.fold for row in rows)
    readers = short_names(consumer for row in rows for consumer in row.consumers)
    listed = tuple(
        (
            names[row.fold],
            ", ".join(readers[consumer] for consumer in row.consumers),
            f"{row.in_use} of {row.found}",
            *(number(value) for value in (row.mean, row.min, row.max, row.std, row.max_over_mean)),
            *(percent(share) for share in (row.share_above_5x, row.share_above_2x, row.share_below_half)),
        )
        for row in rows
    )
    columns = (
        "fold",
        "read by",
        "in use",
        "mean",
        "min",
        "max",
        "std",
        "max ÷ mean",
        "> 5 × mean",
        "> 2 × mean",
        "< ½ mean",
    )
    return Section(
        name="scales",
        title="Channel scales",
        lead=(
            "Weight columns are multiplied by s before they are rounded, and their input is divided by it. The panels "
            "show where s lies, by the part of a block that absorbs the division; at 1 it changes nothing.",
        ),
        figures=tuple(scale_panels(rows)),
        arrangement=PANELS,
        tables=(Table("", columns, listed, text_columns=2),),
    )


def search_section(report: Json) -> Section | None:
    """Alpha and clip; None where neither was searched."""
    alphas, clips = alpha_rows(report), clip_rows(report)
    figures = tuple(figure for figure in (alpha_bars(alphas), clip_bars(clips)) if figure is not None)
    if not figures:
        return None
    lead = []
    if any(sum(row.counts) for row in alphas):
        units, identity = sum(row.units for row in alphas), sum(row.identity for row in alphas)
        lead.append(
            "α balances activations against weights: s grows with the importance of a channel to the power of α. "
            f"{identity} of {units} search units stayed at s\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}1."
        )
    if any(sum(row.counts) for row in clips):
        lead.append(
            "Clip gives up the ends of a group's range for a finer step. Each end of each group keeps its own share, "
            "and the whole range (100 %) where nothing less is better."
        )
    return Section(
        name="search",
        title="α and clip",
        lead=tuple(lead),
        figures=figures,
        arrangement=PAIR,
        tables=_clip_tables(clips),
    )


def saliency_section(report: Json) -> Section | None:
    """The claim that a few channels carry most of the error, for this model; None where it was not measured."""
    linears = [
        (name, linear)
        for name, found in linears_by_type(report).items()
        for _, linear in found
        if linear.get("saliency")
    ]
    if not linears:
        return None
    by_type: dict[str, list[list[tuple[float, float]]]] = {}
    for name, linear in linears:
        by_type.setdefault(name, []).append(linear["saliency"])
    means = {name: _mean_shares(found) for name, found in by_type.items()}
    return Section(
        name="saliency",
        title="How much do the most salient channels carry?",
        lead=(
            "AWQ starts from the claim that about 1 % of the input channels, those with the largest activations, "
            "matter most. A dot is the share of plain rounding's output error that would be gone if that part of the "
            "channels kept full precision, averaged over the linears of a type.",
            _saliency_sentence([linear for _, linear in linears]),
        ),
        figures=(saliency_dots(means),),
        legend=tuple(
            LegendEntry(f"{percent_label(channels)} of the channels", color)
            for (channels, _), color in zip(next(iter(means.values())), SALIENCY_COLORS, strict=True)
        ),
    )


def _linear_table(linears: Sequence[Json], key: str) -> Table:
    shown = list(linears)
    if len(shown) > MOST_ROWS:
        shown = sorted(shown, key=lambda linear: linear[key] or 0.0, reverse=True)[:MOST_ROWS]
    rows = tuple(
        (
            linear["name"],
            " × ".join(map(str, linear["shape"])),
            percent(linear["output_error_nearest"], 3),
            percent(linear["output_error"], 3),
            percent(linear["weight_error_nearest"], 3),
            percent(linear["weight_error"], 3),
            percent(linear["clip_mean"], 3),
        )
        for linear in shown
    )
    columns = (
        "linear",
        "shape",
        "output error, plain",
        "as written",
        "weight error, plain",
        "as written",
        "range kept",
    )
    title = "All linears" if len(shown) == len(linears) else f"The {len(shown)} linears with the largest errors"
    return Table(title, columns, rows, folded=True)


def _clip_tables(clips: Sequence[ClipRow]) -> tuple[Table, ...]:
    if not clips:
        return ()
    names = short_names(row.linear for row in clips)
    rows = tuple(
        (names[row.linear], str(row.linears), percent(row.mean, 3), percent(row.min, 3), percent(row.max, 3))
        for row in clips
    )
    return (
        Table(
            "Mean share of the range that was kept", ("linear", "number", "mean", "least", "most"), rows, folded=True
        ),
    )


def _mean_shares(found: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    return [(column[0][0], sum(share for _, share in column) / len(column)) for column in zip(*found, strict=True)]


def _saliency_sentence(linears: Sequence[Json]) -> str:
    one = [(dict(map(tuple, linear["saliency"])).get(0.01), linear["name"]) for linear in linears]
    known = [(share, name) for share, name in one if share is not None]
    if not known:
        return ""
    mean, (most, where) = sum(share for share, _ in known) / len(known), max(known)
    return (
        f"In this model 1 % of the channels carry {percent(mean)} of the error on average over its linears, and at "
        f"most {percent(most)}, in {where}."
    )
