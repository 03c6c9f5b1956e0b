"""`quantize`: a full-precision checkpoint in, a low-bit checkpoint out."""

from __future__ import annotations

import fnmatch
import itertools
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from awqkit.api.calibration_rows import CalibrationRows, enough_to_check, given_rows, rows_text, text_rows
from awqkit.api.device import choose_device, ranks_device, wake
from awqkit.api.fingerprint import changed_environment, environment, fingerprint, refuse_changed
from awqkit.api.generated_rows import OwnText, own_text, with_generated
from awqkit.api.given_model import GivenModel, find_given, given_name, open_given
from awqkit.api.refuse import (
    refuse_full_scratch,
    refuse_large_block,
    refuse_large_weights,
    refuse_too_few,
    refuse_unknown_tokens,
)
from awqkit.api.refuse_plain import refuse_padded
from awqkit.api.report_page import check_report_path, write_report
from awqkit.checkpoint.output import refuse_output
from awqkit.checkpoint.reports import REPORT_FILE, TIMINGS_FILE
from awqkit.checkpoint.run_state import RunState
from awqkit.checkpoint.tensor_source import TensorSource
from awqkit.checkpoint.writer import CheckpointWriter, plan_layout
from awqkit.errors import OutputError, UsageError
from awqkit.evaluation.fill_module import TURNED_KEY
from awqkit.events import Caution, Emit, Notice, ignore_events
from awqkit.formats.format import Format, format_for
from awqkit.formats.scheme import Scheme
from awqkit.kernels.precision import tensor_cores
from awqkit.model.matrices import parameter_of
from awqkit.model.plain_model import PlainModel
from awqkit.model.skeleton import Skeleton
from awqkit.model.transformers_bridge import library_versions
from awqkit.options import RunOptions
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.durable_points import DurablePoints, durable_bytes, scratch_bytes, written_before
from awqkit.pipeline.free_memory import device_memory_at_most
from awqkit.pipeline.layout import OutputLayout, plan_output
from awqkit.pipeline.plan import BlockPlan, RunPlan, plan_run
from awqkit.pipeline.ranks import Ranks, asked_size, local_rank, started_ranks
from awqkit.pipeline.run import Run, follow, run
from awqkit.recipe import DEFAULT_QUALITY, Recipe
from awqkit.report.card import model_card
from awqkit.report.report import Report

_NO_SERVER = (
    "no server loads this folder by itself, since the code of a plain module is not in it: "
    "awqkit.load(DIR, into=MODULE) fills a module of its class"
)


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """directory: the written checkpoint. report: what was decided. seconds: wall time of the whole call."""

    directory: Path
    report: Report
    seconds: float


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run as it is settled before its first byte is written.

    rows: None for a recipe that looks at no text. settings: what the format puts into config.json. shapes: of every
    linear that is quantized, by name. cautions: what whoever serves the result must know.
    """

    given: GivenModel
    rows: CalibrationRows | None
    job: Run
    settings: dict[str, object]
    shapes: dict[str, tuple[int, int]]
    cautions: tuple[str, ...]


def planned_run(
    model: str | Path | PlainModel,
    out: Path,
    recipe: Recipe,
    calibration: str | Path | Sequence[Sequence[int]] | torch.Tensor | None,
    exclude_modules: frozenset[str],
    options: RunOptions,
    emit: Emit,
    ranks: Ranks | None = None,
) -> PlannedRun:
    """Open and plan everything, and refuse what can be seen to be wrong. Raises AwqkitError.

    ranks: every one of them plans for itself, but for what concerns OUT.
    """
    written = format_for(recipe)  # before a hub model is fetched
    device = choose_device(options.device) if ranks is None else ranks.device
    ranks = ranks or Ranks.alone(device)
    if options.device_memory is not None and device.type != "cuda":
        raise UsageError("device memory is bounded on a GPU only (--device-memory), and this run is on the CPU")
    if ranks.size > 1 and isinstance(model, PlainModel):
        raise UsageError("a plain module is quantized by one process: start it without torchrun")
    found = find_given(model)
    if ranks.is_first:
        refuse_output(out, found if isinstance(found, Path) else None, options.overwrite)
    given = open_given(found, given_name(model), device, options, needs_logits=recipe.needs_logits)
    source, skeleton, is_plain = given.source, given.skeleton, given.folder is None
    rows = _rows(given, recipe, calibration, exclude_modules)
    if rows is not None:
        refuse_too_few(rows.calibration, ranks.size)
        emit(Notice(rows_text(rows.summary)))
    stored_dtype = stored_dtype_of(source, recipe)
    refuse_large_weights(skeleton, device)
    plan = plan_run(skeleton, recipe, stored_dtype, device, written.why_not_held, *_reader_rules(written, is_plain))
    if rows is not None:
        refuse_large_block(skeleton, plan, recipe, rows.calibration.ids.shape[1], device)
    if recipe.group_size is None and plan.group_size != 128:
        emit(Notice(f"groups of {plan.group_size}: 128 does not divide every linear's input"))
    scheme = Scheme.of(recipe, plan.group_size)
    layout = plan_output(source, skeleton, plan, written, scheme)
    for text in _unused_tensors(skeleton, layout):
        emit(Notice(text))
    # What servers must know of linears that are kept; none of them reads a plain module's folder.
    split = ((), ()) if is_plain else _kept_and_all(skeleton, plan, layout)
    settings = written.quantization_config(scheme, *split)
    shapes = {linear.name: linear.shape for linear in plan.linears if linear.keep is None}
    readers = [_NO_SERVER] if is_plain else written.cautions(shapes, scheme)
    cautions = (*filter(None, [given.caution]), *readers)
    for text in (*_idle_choices(recipe, plan, skeleton), *cautions):
        emit(Caution(text))
    if ranks.size > 1:
        emit(Notice(f"{ranks.size} ranks share the rows and the linears of each block, connected by {ranks.backend}"))
    job = Run(source, skeleton, recipe, plan, layout, written, device, ranks)
    return PlannedRun(given, rows, job, settings, shapes, cautions)


def quantize(
    model: str | Path | PlainModel,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: str | Path | Sequence[Sequence[int]] | torch.Tensor | None = None,
    exclude_modules: frozenset[str] = frozenset(),
    options: RunOptions | None = None,
    report_page: str | Path | None = None,
    emit: Emit = ignore_events,
) -> QuantizeResult:
    """Quantize `model` (a folder, a hub id or a PlainModel) into the new folder `out` and return what was decided.

    recipe: the default preset where None. calibration: takes the place of `recipe.calibration`; or token rows, lists
    of ids that include whatever the model expects at the start of a text. exclude_modules: standard library modules
    that the builtin calibration text leaves out. report_page: where to write the run as an HTML page as well, outside
    `out`. Raises AwqkitError; `out` then does not exist, unless it was the page that could not be written at the end.
    """
    started = time.monotonic()
    recipe, options, out = recipe or Recipe.preset(DEFAULT_QUALITY), options or RunOptions(), Path(out)
    device, refused = torch.device("cpu"), None
    try:
        device = choose_device(options.device) if asked_size() == 1 else ranks_device(options.device, local_rank())
    except UsageError as error:
        refused = error  # raised once every rank has been told
    wake(device)
    with started_ranks(device) as ranks, device_memory_at_most(device, options.device_memory):
        emit = emit if ranks.is_first else ignore_events

        def planned() -> PlannedRun:
            if refused is not None:
                raise refused
            if report_page is not None and ranks.is_first:
                check_report_path(report_page, out)
            return planned_run(model, out, recipe, calibration, exclude_modules, options, emit, ranks)

        ready = ranks.together(planned)
        if ranks.is_first:
            return _run_and_write(ready, out, options, report_page, started, emit)
        with tensor_cores(device):
            follow(ready.job, *_texts(ranks.told()))
        return QuantizeResult(out, ranks.told(), time.monotonic() - started)


def _texts(rows: CalibrationRows | None) -> tuple[TokenRows | None, TokenRows | None]:
    return (None, None) if rows is None else (rows.calibration, rows.held_out)


def _run_and_write(
    planned: PlannedRun,
    out: Path,
    options: RunOptions,
    report_page: str | Path | None,
    started: float,
    emit: Emit,
) -> QuantizeResult:
    """The run itself, on the first rank or the only one."""
    given, rows, job, device = planned.given, planned.rows, planned.job, planned.job.device
    recipe, source, plan, layout, ranks = job.recipe, job.source, job.plan, job.layout, job.ranks
    versions, text = _versions(), _texts(rows)
    known = fingerprint(given, recipe, *text, versions["awqkit"])
    places = plan_layout(layout.specs)
    with (
        RunState(out, known, restart=options.restart) as state,
        CheckpointWriter(
            out,
            places,
            options.overwrite,
            folder=state.checkpoint,
            written=written_before(state),
            spare_bytes=durable_bytes(recipe, plan, *text),
        ) as writer,
    ):
        if device.type == "cpu":
            refuse_full_scratch(out, scratch_bytes(recipe, plan, text[0]), durable_bytes(recipe, plan, *text))
        _tell_of_another_environment(state, environment(device, versions), emit)
        generating = time.monotonic()
        if rows is not None:
            rows = enough_to_check(_with_own_text(rows, state, recipe, given, device, options, emit))
        generate_seconds = time.monotonic() - generating
        ranks.told(rows)
        points = DurablePoints(state, writer, options.save_every, ranks)
        with tensor_cores(device):
            outcome = run(job, *_texts(rows), writer, points, emit)
        refuse_changed(given, known)
        report = Report(
            model=given.name,
            recipe=recipe if rows is None else replace(recipe, calibration=rows.summary.source),
            group_size=plan.group_size,
            stored_dtype=str(plan.stored_dtype).removeprefix("torch."),
            device=device.type,
            versions=versions,
            calibration=None if rows is None else rows.summary,
            blocks=outcome.blocks,
            tuning=outcome.tuning,
            source_bytes=source.total_bytes,
            written_bytes=sum(spec.num_bytes for spec in layout.specs),
            packed_bytes=sum(spec.num_bytes for spec in layout.specs if spec.name not in layout.kept),
            quantized_weights=sum(rows_ * columns for rows_, columns in planned.shapes.values()),
            dropped=layout.dropped,
            cautions=planned.cautions,
        )
        _write_companions(writer, given, planned.settings, _turned(plan), report)
        seconds = time.monotonic() - started
        timings = {"seconds": seconds, "stages": {"generate": generate_seconds, **outcome.seconds}}
        writer.write_json(TIMINGS_FILE, timings)
        writer.commit()
        state.complete()
    ranks.told(report)
    if report_page is not None:
        _write_page(report_page, report, timings, out)
    return QuantizeResult(out, report, time.monotonic() - started)


_OWN_TEXT = "own-text.safetensors"


def _with_own_text(
    rows: CalibrationRows,
    state: RunState,
    recipe: Recipe,
    given: GivenModel,
    device: torch.device,
    options: RunOptions,
    emit: Emit,
) -> CalibrationRows:
    """The rows with those that the model writes, now or in the run that goes on."""
    kept = None
    if state.journal:
        kept = OwnText(state.load(_OWN_TEXT)["ids"], state.journal["own_text_failed"])
    rows = with_generated(rows, recipe, given, device, options, emit, kept)
    state.lasting.append(_OWN_TEXT)
    if kept is None:
        found = own_text(rows)
        state.save(_OWN_TEXT, {"ids": found.ids})
        state.note(own_text_failed=found.failed)
    return rows


def _tell_of_another_environment(state: RunState, now: dict[str, str], emit: Emit) -> None:
    if state.journal:
        told = changed_environment(state.journal["environment"], now)
        if told is not None:
            emit(Caution(told))
    state.note(environment=now)


def _rows(
    given: GivenModel,
    recipe: Recipe,
    calibration: str | Path | Sequence[Sequence[int]] | torch.Tensor | None,
    exclude_modules: frozenset[str],
) -> CalibrationRows | None:
    if not recipe.needs_calibration:
        return None
    if calibration is not None and not isinstance(calibration, str | Path):
        rows = given_rows(calibration)
    else:
        rows = text_rows(recipe, calibration, given.encoder(), exclude_modules)
    if given.folder is None:
        refuse_padded(rows.calibration, given.name)
    refuse_unknown_tokens(rows.calibration, given.skeleton)
    return rows


def _reader_rules(written: Format, is_plain: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`fused_partners` and `why_shadowed` of the format; no server reads what is written of a plain module."""
    if is_plain:
        return (lambda linears: ()), (lambda linear, outside: None)
    return written.fused_partners, written.why_shadowed


def _idle_choices(recipe: Recipe, plan: RunPlan, skeleton: Skeleton) -> list[str]:
    """A line for every glob of `ignore` that matches nothing, for experts asked for where there are none, and for
    blocks that no text reaches."""
    idle = []
    if recipe.all_experts and not any(block.structure.inputs_of_experts() for block in plan.blocks):
        idle.append("--all-experts has nothing to do: this model has no experts that can be watched one by one")
    if skeleton.uncalled_blocks:
        idle.append(f"not called for text alone, so in full precision: {', '.join(skeleton.uncalled_blocks)}")
    linears = [*(linear.name for linear in plan.linears), *skeleton.linears_outside_blocks()]
    return idle + [
        f"--ignore {glob} matches no linear; it is a glob on full module paths, such as {linears[0]}"
        for glob in recipe.ignore
        if not any(fnmatch.fnmatchcase(linear, glob) for linear in linears)
    ]


def _unused_tensors(skeleton: Skeleton, layout: OutputLayout) -> list[str]:
    """A line about tensors that the model does not know, if there are any."""
    known = {disk for name in skeleton.names() for disk in skeleton.disk_names(name)}
    unused = [name for name in layout.kept if name not in known]
    if not unused:
        return []
    more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
    return [f"copied as they are, the model does not use them: {unused[0]}{more}"]


def stored_dtype_of(source: TensorSource, recipe: Recipe) -> torch.dtype:
    """The recipe's dtype, else that of most of the source's float bytes, with float32 written as bfloat16.

    Bytes of low-bit weights do not count.
    """
    if recipe.dtype is not None:
        return getattr(torch, recipe.dtype)
    sizes: dict[torch.dtype, int] = {}
    for name in source.names:
        dtype = source.dtype(name)
        if dtype.is_floating_point and name not in source.derived:
            sizes[dtype] = sizes.get(dtype, 0) + source.stored_bytes(name)
    most = max(sizes, key=lambda dtype: sizes[dtype], default=torch.bfloat16)
    return most if most in (torch.bfloat16, torch.float16) else torch.bfloat16


def _kept_and_all(skeleton: Skeleton, plan: RunPlan, layout: OutputLayout) -> tuple[list[str], list[str]]:
    """Paths of the linears that stay in full precision, and of all of them, as readers may call them."""
    packed = set(layout.packed.values())
    everything, kept = [], []
    for block in plan.blocks:
        for name, linear in block.linears.items():
            view = block.structure.linear(name)
            parts = skeleton.matrix_parts(f"{block.path}.{view.weight}", transposed=view.transposed)
            paths = {disk.removesuffix(".weight") for disk in parts or ()}
            if parameter_of(view.weight) == view.weight:
                paths.add(linear.name)
            everything += sorted(paths)
            if packed.isdisjoint(paths):
                kept += sorted(paths)
    outside = skeleton.linears_outside_blocks()
    shapes = skeleton.shapes_on_disk()
    unwatched = [
        path
        for block in plan.blocks
        for name in (*block.structure.unwatched, *_stacks_kept(block))
        for path in _paths_of_parameter(f"{block.path}.{name}", skeleton, shapes)
    ]
    return [*kept, *unwatched, *outside], [*everything, *unwatched, *outside]


def _stacks_kept(block: BlockPlan) -> list[str]:
    """Stacks of which every matrix stays in full precision."""
    kept: dict[str, bool] = {}
    for name, linear in block.linears.items():
        weight = block.structure.linear(name).weight
        if parameter_of(weight) != weight:
            kept[parameter_of(weight)] = kept.get(parameter_of(weight), True) and linear.keep is not None
    return [stack for stack, is_kept in kept.items() if is_kept]


def _paths_of_parameter(name: str, skeleton: Skeleton, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What readers may call the module of a parameter, and those on disk that it holds together, and their parent.

    shapes: of every tensor on disk.
    """
    disk = [each.removesuffix(".weight") for each in skeleton.disk_names(name)]
    paths = {name.removesuffix(".weight"), *disk}
    matrices = all(len(shapes.get(each, ())) == 2 for each in skeleton.disk_names(name))
    if len(disk) > 1 and matrices:  # a stack of experts: readers ask for the module that holds them
        steps = zip(*(each.split(".") for each in disk), strict=False)
        together = itertools.takewhile(lambda words: len(set(words)) == 1, steps)
        paths |= {name.rpartition(".")[0], ".".join(words[0] for words in together)}
    return sorted(paths)


def _turned(plan: RunPlan) -> list[str]:
    """Quantized linears that the module holds as `[in, out]`; files have all of them the other way."""
    return [
        linear.name
        for block in plan.blocks
        for name, linear in block.linears.items()
        if linear.keep is None and block.structure.linear(name).transposed
    ]


def _write_companions(
    writer: CheckpointWriter, given: GivenModel, settings: dict[str, object], turned: list[str], report: Report
) -> None:
    folder, source_card = given.folder, None
    config: dict[str, object] = {TURNED_KEY: turned} if turned else {}
    if folder is not None:
        config = {key: value for key, value in folder.config.items() if key != "torch_dtype"}
        for name in folder.other_files():
            writer.copy_file(folder.directory / name, name)
        card = folder.directory / "README.md"
        source_card = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    writer.write_json("config.json", {**config, "dtype": report.stored_dtype, "quantization_config": settings})
    writer.write_text("README.md", model_card(report, source_card, is_plain=folder is None))
    writer.write_json(REPORT_FILE, report.to_json())


def _write_page(path: str | Path, report: Report, timings: dict[str, object], out: Path) -> None:
    try:
        write_report(path, report.to_json(), timings, None)
    except OutputError as error:
        raise OutputError(f"{error}; the checkpoint {out} is complete") from error


def _versions() -> dict[str, str]:
    from awqkit import __version__

    return {"awqkit": __version__, **library_versions(), "python": platform.python_version()}
