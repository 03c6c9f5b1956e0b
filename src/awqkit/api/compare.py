"""`compare`: several methods on one model and one text, measured against the original; nothing is written.

The model is read block by block and never as a whole, so its size does not matter. Token by token the figures are those
of `quantize` and then `evaluate` of what it wrote, in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awqkit.api.calibration_rows import CalibrationRows, enough_to_check, rows_text, source_name, text_rows
from awqkit.api.contenders import DEFAULT_BITS, METHODS, ORIGINAL, NamedRecipe, contender_recipes
from awqkit.api.device import choose_device
from awqkit.api.entries import Entry, entries_for, original_bits
from awqkit.api.evaluate import text_windows
from awqkit.api.generated_rows import with_generated
from awqkit.api.given_model import GivenModel, find_given, given_name, open_given
from awqkit.api.refuse import refuse_large_block, refuse_large_weights, refuse_unknown_tokens
from awqkit.calibration.sources import Documents, read_documents
from awqkit.decisions import CalibrationSummary, as_json
from awqkit.errors import UsageError
from awqkit.evaluation.evaluate import Evaluation, evaluate_states
from awqkit.events import Caution, Emit, Notice, TaskAdvanced, TaskFinished, TaskStarted, ignore_events
from awqkit.model.plain_model import PlainModel
from awqkit.model.skeleton import Skeleton
from awqkit.model.transformers_bridge import TextEncoder
from awqkit.options import RunOptions
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.compare import EVALUATE, Compared, compare_recipes
from awqkit.pipeline.course import CompareRows, LearningRows
from awqkit.pipeline.ranks import asked_size

DEFAULT_WINDOWS = 32
_TASK = "window"


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One method on one text.

    method, bits: "fp" with the bits of its weights on disk is the original. group_size: −1 for one group a row; None
    for the original. bits_per_weight: on disk, group scales and zero points included. kl, top1_agreement: against the
    original, None for itself. seconds: the method's own, without what all share; None for the original.
    num_fallbacks: choices that were undone.
    """

    method: str
    bits: int
    group_size: int | None
    bits_per_weight: float
    text: str
    perplexity: float
    kl: float | None
    top1_agreement: float | None
    seconds: float | None
    num_fallbacks: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """rows: text by text, the original first. windows: of each text. tokens_per_window: start tokens included.

    skipped: a line for each method that this model cannot have. shared_seconds: by stage, what all methods share.
    seconds: wall time of the whole call. calibration: None where no method looked at any.
    """

    model: str
    rows: tuple[ComparisonRow, ...]
    windows: dict[str, int]
    tokens_per_window: int
    calibration: CalibrationSummary | None
    skipped: tuple[str, ...]
    shared_seconds: dict[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return as_json(self)


@dataclass(frozen=True, slots=True)
class _Text:
    """A text's windows `[windows, tokens]`, and which of all windows they are."""

    label: str
    windows: Tensor
    part: slice


def compare(
    model: str | Path | PlainModel,
    text: str | Path | Documents | Sequence[str | Path | Documents],
    *,
    methods: Sequence[str] = METHODS,
    bits: Sequence[int] = DEFAULT_BITS,
    group_size: int | None = None,
    calibration: str | Path = "builtin",
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    windows: int | None = DEFAULT_WINDOWS,
    exclude_modules: frozenset[str] = frozenset(),
    options: RunOptions | None = None,
    emit: Emit = ignore_events,
) -> Comparison:
    """Quantize `model` in memory by every method at every bit width and measure each on `text`.

    model: a folder, a hub id, or a PlainModel that can encode text. text: one or more of .txt, .jsonl, "builtin", a hub
    dataset, or Documents. group_size: as in Recipe; smoothquant has its own, and its own bits. samples, seq_len, seed:
    calibration rows; seq_len is that of the windows, too. windows: how many of each text, None for all.
    exclude_modules: standard library modules that builtin calibration leaves out.
    A method that the model cannot have is skipped with a Caution. Raises AwqkitError.
    """
    started = time.monotonic()
    options = options or RunOptions()
    if asked_size() > 1:
        raise UsageError("compare runs in one process: start it without torchrun")
    named = contender_recipes(methods, bits, group_size=group_size, samples=samples, seq_len=seq_len, seed=seed)
    device = choose_device(options.device)
    given = open_given(find_given(model), given_name(model), device, options, needs_logits=True)
    skeleton, encoder = given.skeleton, given.encoder()
    if given.caution is not None:
        emit(Caution(given.caution))
    refuse_large_weights(skeleton, device)
    texts = _texts(text, calibration, encoder, seq_len, windows, emit)
    evaluation = TokenRows(torch.cat([each.windows for each in texts]))
    refuse_unknown_tokens(evaluation, skeleton, "text")
    rows = _calibration_rows(named, calibration, encoder, exclude_modules, skeleton, emit)
    entered, skipped = entries_for(given.source, skeleton, named, device)
    for each in (entry.contender for entry in entered):
        if rows is not None and each.recipe.needs_calibration:
            refuse_large_block(skeleton, each.plan, each.recipe, rows.calibration.ids.shape[1], device)
    for line in skipped:
        emit(Caution(line))
    generating = time.monotonic()
    learning = {} if rows is None else _learning_rows(rows, entered, given, device, options, emit)
    generate_seconds = time.monotonic() - generating
    contenders = [each.contender for each in entered]
    compared = compare_recipes(skeleton, contenders, CompareRows(learning, evaluation), device, emit)
    measuring = time.monotonic()
    scores = _scores(skeleton, texts, len(encoder.start_tokens), compared, device, emit)
    measured = compared.shared_seconds.get(EVALUATE, 0.0) + time.monotonic() - measuring
    whole = original_bits(given.source, skeleton, entered[0].contender.plan) if ORIGINAL in methods else None
    return Comparison(
        model=given.name,
        rows=tuple(_rows(texts, scores, whole, entered, compared)),
        windows={each.label: len(each.windows) for each in texts},
        tokens_per_window=seq_len,
        calibration=None if rows is None else rows.summary,
        skipped=tuple(skipped),
        shared_seconds={"generate": generate_seconds, **compared.shared_seconds, EVALUATE: measured},
        seconds=time.monotonic() - started,
    )


def _texts(
    sources: str | Path | Documents | Sequence[str | Path | Documents],
    calibration: str | Path,
    encoder: TextEncoder,
    seq_len: int,
    max_windows: int | None,
    emit: Emit,
) -> list[_Text]:
    """The windows of every text, one text after the other, and a line about each."""
    listed = [sources] if isinstance(sources, str | Path | Documents) else list(sources)
    if not listed:
        raise UsageError("no text to measure on was given; name one or more .txt or .jsonl files")
    found: list[_Text] = []
    given: list[str] = []
    start = 0
    for source in listed:
        documents = source
        if not isinstance(source, Documents):
            documents = read_documents(str(source), render_chat=encoder.render_chat)
            if str(source) == str(calibration):
                emit(Caution(f"{source} is the calibration text, too: methods that look at it are flattered"))
        if documents.label in given:
            raise UsageError(f"the text {documents.label} was given twice; name each text once")
        given.append(documents.label)
        name = source_name(documents.label)
        windows = text_windows(documents.texts, encoder, seq_len, max_windows, documents.label)
        emit(Notice(f"{len(windows.used)} of {len(windows.all)} windows of {seq_len} tokens from {documents.label}"))
        label = documents.label if any(name == text.label for text in found) else name
        found.append(_Text(label, windows.used, slice(start, start + len(windows.used))))
        start += len(windows.used)
    return found


def _calibration_rows(
    named: Sequence[NamedRecipe],
    source: str | Path,
    encoder: TextEncoder,
    exclude_modules: frozenset[str],
    skeleton: Skeleton,
    emit: Emit,
) -> CalibrationRows | None:
    """The rows that every recipe shares; None where no recipe looks at any."""
    recipe = next((each.recipe for each in named if each.recipe.needs_calibration), None)
    if recipe is None:
        return None
    rows = text_rows(recipe, source, encoder, exclude_modules)
    refuse_unknown_tokens(rows.calibration, skeleton)
    emit(Notice(rows_text(rows.summary)))
    return rows


def _learning_rows(
    rows: CalibrationRows,
    entered: Sequence[Entry],
    given: GivenModel,
    device: torch.device,
    options: RunOptions,
    emit: Emit,
) -> dict[tuple[float, float], LearningRows]:
    """By `Recipe.own_text` the rows of the text, and with them what the model writes for recipes that ask for it."""
    found = {}
    for recipe in (each.contender.recipe for each in entered):
        if recipe.needs_calibration and recipe.own_text not in found:
            all_rows = enough_to_check(with_generated(rows, recipe, given, device, options, emit))
            found[recipe.own_text] = LearningRows(all_rows.calibration, all_rows.held_out)
    return found


def _scores(
    skeleton: Skeleton,
    texts: Sequence[_Text],
    num_start_tokens: int,
    compared: Compared,
    device: torch.device,
    emit: Emit,
) -> list[tuple[Evaluation, ...]]:
    """For each text the original's scores and then each contender's."""
    emit(TaskStarted(_TASK, texts[-1].part.stop))
    scores = []
    with skeleton.head(device) as head:
        for text in texts:
            start = text.part.start
            scores.append(
                evaluate_states(
                    lambda ids, states: head(ids, states, None),
                    text.windows,
                    num_start_tokens,
                    skeleton.vocabulary_size,
                    _from(compared.original, start),
                    [_from(reached, start) for reached in compared.reached],
                    device,
                    lambda done, start=start: emit(TaskAdvanced(_TASK, start + done)),
                )
            )
    emit(TaskFinished(_TASK))
    return scores


def _from(states: HiddenStates, start: int) -> Callable[[slice], Tensor]:
    return lambda part: states.rows_of(slice(start + part.start, start + part.stop))


def _rows(
    texts: Sequence[_Text],
    scores: Sequence[tuple[Evaluation, ...]],
    whole_bits: int | None,
    entered: Sequence[Entry],
    compared: Compared,
) -> list[ComparisonRow]:
    rows = []
    for text, (original, *others) in zip(texts, scores, strict=True):
        if whole_bits is not None:
            perplexity = original.perplexity
            rows.append(
                ComparisonRow(ORIGINAL, whole_bits, None, whole_bits, text.label, perplexity, None, None, None, 0)
            )
        for each, score, seconds, undone in zip(entered, others, compared.seconds, compared.num_fallbacks, strict=True):
            rows.append(
                ComparisonRow(
                    method=each.method,
                    bits=each.contender.recipe.bits,
                    group_size=each.contender.plan.group_size,
                    bits_per_weight=round(each.bits_per_weight, 4),
                    text=text.label,
                    perplexity=score.perplexity,
                    kl=score.kl,
                    top1_agreement=score.top1_agreement,
                    seconds=round(seconds, 3),
                    num_fallbacks=undone,
                )
            )
    return rows
