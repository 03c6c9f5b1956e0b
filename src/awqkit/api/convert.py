"""`convert`: a quantized checkpoint in another format, without loss.

Codes, zero points and scales are the same numbers before and after; every other tensor and file is copied.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awqkit.checkpoint.header import TensorSpec
from awqkit.checkpoint.hub import resolve_model
from awqkit.checkpoint.output import refuse_output
from awqkit.checkpoint.reader import Checkpoint
from awqkit.checkpoint.reports import REPORT_FILE, TIMINGS_FILE
from awqkit.checkpoint.writer import CheckpointWriter, plan_layout
from awqkit.errors import CheckpointError, FormatError, UsageError
from awqkit.events import Caution, Emit, TaskAdvanced, TaskFinished, TaskStarted, ignore_events
from awqkit.formats.format import FORMATS, Format, stored_format, without_quantization
from awqkit.formats.scheme import Scheme
from awqkit.model.disk_places import places_on_disk
from awqkit.model.transformers_bridge import empty_model, load_config
from awqkit.options import RunOptions

_CARD = "README.md"
_TASK = "linear"


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """directory: the written checkpoint. source, target: names of formats. seconds: wall time of the whole call."""

    directory: Path
    source: str
    target: str
    num_linears: int
    cautions: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Conversion:
    """What is read and written; linears: path on disk -> (out_features, in_features)."""

    checkpoint: Checkpoint
    source: Format
    target: Format
    stored: Scheme
    written: Scheme
    linears: dict[str, tuple[int, int]]

    def parts(self, linear: str) -> tuple[str, ...]:
        """The source's tensor names of a linear."""
        return self.source.tensor_names(linear, self.stored)

    def scale_dtype(self, linear: str) -> torch.dtype:
        """The dtype of a linear's group scales: the only one of its tensors that is a float."""
        dtypes = (self.checkpoint.dtype(name) for name in self.parts(linear))
        return next(dtype for dtype in dtypes if dtype.is_floating_point)

    def specs(self) -> list[TensorSpec]:
        """The output's tensors, in the order of the source's; each linear where its first tensor was."""
        owner = {name: linear for linear in self.linears for name in self.parts(linear)}
        specs, done = [], set()
        for name in self.checkpoint.names:
            linear = owner.get(name)
            if linear is None:
                specs.append(TensorSpec(name, self.checkpoint.dtype(name), self.checkpoint.shape(name)))
            elif linear not in done:
                done.add(linear)
                shape, dtype = self.linears[linear], self.scale_dtype(linear)
                parts = self.target.tensor_specs(linear, *shape, self.written, dtype)
                specs += [TensorSpec(part, kind, size) for part, (kind, size) in parts.items()]
        return specs


def convert(
    model: str | Path,
    out: str | Path,
    format: str,
    *,
    options: RunOptions | None = None,
    emit: Emit = ignore_events,
) -> ConvertResult:
    """Write the quantized checkpoint `model` (a folder or a hub id) to the new folder `out` in another format.

    format: "awq" or "compressed-tensors". Of `options` the device is not used. Raises AwqkitError, also where the
    target cannot hold what the source has; `out` then does not exist.
    """
    started = time.monotonic()
    options, out = options or RunOptions(), Path(out)
    if format not in FORMATS:
        raise UsageError(f"format is {format!r}; it takes one of {', '.join(FORMATS)}")
    directory = resolve_model(model)
    refuse_output(out, directory, options.overwrite)
    checkpoint = Checkpoint.open(directory)
    job, kept = _plan(checkpoint, FORMATS[format])
    specs, report = job.specs(), _read_report(directory)
    config = load_config(directory, trust_remote_code=options.trust_remote_code)
    settings = _quantization_config(job, kept, config, options.trust_remote_code)
    cautions = tuple(job.target.cautions(job.linears, job.written))
    for text in cautions:
        emit(Caution(text))
    with CheckpointWriter(out, plan_layout(specs), options.overwrite) as writer:
        _write_tensors(job, writer, emit)
        writer.write_json("config.json", _config(checkpoint.config, settings))
        _write_companions(job, writer, specs, report, cautions)
        writer.commit()
    seconds = time.monotonic() - started
    return ConvertResult(out, job.source.name, job.target.name, len(job.linears), cautions, seconds)


def _plan(checkpoint: Checkpoint, target: Format) -> tuple[_Conversion, tuple[str, ...]]:
    """The conversion, and what the source's config lists as not quantized; refuses what cannot be converted."""
    where, found = checkpoint.directory, stored_format(checkpoint.config)
    if found is None:
        raise CheckpointError(f"{where}: is not quantized, there is nothing to convert; use awqkit quantize")
    source, stored = found
    if source.name == target.name:
        raise UsageError(f"{where}: is in the {target.name} format already; name the other one or leave it")
    linears = source.quantized_linears(checkpoint.names, stored.scheme)
    if not linears:
        raise CheckpointError(f"{where}: config.json says {source.name}, but no tensor is quantized; fetch it again")
    symmetric = source.is_symmetric(linears, checkpoint.read, stored.scheme)
    scheme = replace(stored.scheme, symmetric=symmetric)
    reason = target.why_not(scheme)
    if reason is not None:
        raise FormatError(f"{where}: {reason}; it stays in the {source.name} format")
    shapes = {linear: source.linear_shape(linear, checkpoint.read, stored.scheme) for linear in linears}
    return _Conversion(checkpoint, source, target, stored.scheme, scheme, shapes), stored.kept


def _quantization_config(
    job: _Conversion, kept: tuple[str, ...], config: Any, trust_remote_code: bool
) -> dict[str, Any]:
    """The target's block: readers match their lists in different ways, so what is kept is found again in the model."""
    model = empty_model(config, trust_remote_code=trust_remote_code)
    modules = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = {*job.checkpoint.names, *(f"{linear}.weight" for linear in job.linears)}
    places = places_on_disk(model, names)
    on_disk = places.whole
    everything, full = list(job.linears), []
    for path in modules:
        disk = on_disk.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")
        paths = sorted({path, disk})
        everything += [each for each in paths if each not in job.linears]
        full += paths if disk not in job.linears else []
    # experts that the model holds in one stack: no module of its own is there for them
    stacked = (disk.removesuffix(".weight") for parts in places.slices.values() for disk in parts)
    experts = [disk for disk in stacked if disk not in job.linears]
    everything, full = [*everything, *experts], [*full, *experts]
    listed = [entry for entry in kept if entry not in full and _is_there(entry, job)]
    return job.target.quantization_config(job.written, [*full, *listed], [*everything, *listed])


def _is_there(entry: str, job: _Conversion) -> bool:
    """Whether the checkpoint has tensors of a module of this very path, none of them a quantized linear's."""
    inside = [name for name in job.checkpoint.names if name == entry or name.startswith(f"{entry}.")]
    return bool(inside) and not any(f"{linear}.".startswith(f"{entry}.") for linear in job.linears)


def _write_tensors(job: _Conversion, writer: CheckpointWriter, emit: Emit) -> None:
    packed = {name for linear in job.linears for name in job.parts(linear)}
    for name in job.checkpoint.names:
        if name not in packed:
            writer.write(name, job.checkpoint.read(name))
    emit(TaskStarted(_TASK, len(job.linears)))
    for done, linear in enumerate(job.linears, 1):
        weight = job.source.unpack(linear, job.checkpoint.read_many(job.parts(linear)), job.stored)
        weight = replace(weight, grid=replace(weight.grid, symmetric=job.written.symmetric))
        for name, tensor in job.target.pack(linear, weight, job.written, job.scale_dtype(linear)).items():
            writer.write(name, tensor)
        emit(TaskAdvanced(_TASK, done))
    emit(TaskFinished(_TASK))


def _config(config: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """config.json with the new block at the top level and nowhere else, its other keys as they were."""
    return {**without_quantization(config), "quantization_config": settings}


def _write_companions(
    job: _Conversion,
    writer: CheckpointWriter,
    specs: list[TensorSpec],
    report: dict[str, Any] | None,
    cautions: tuple[str, ...],
) -> None:
    directory = job.checkpoint.directory
    for name in (*job.checkpoint.other_files(), TIMINGS_FILE):
        if (directory / name).is_file():
            writer.copy_file(directory / name, name)
    if (directory / _CARD).is_file():
        card = (directory / _CARD).read_text(encoding="utf-8", errors="replace")
        writer.write_text(_CARD, f"{card.rstrip()}\n\n{_card_note(job)}")
    if report is not None:
        writer.write_json(REPORT_FILE, _carried_over(report, job, specs, cautions))


def _card_note(job: _Conversion) -> str:
    return (
        f"## Converted\n\nThis folder is in the format {job.target.title(job.written)}, made from "
        f"{job.source.title(job.stored)} by `awqkit convert`:\nthe same codes, zero points and scales. "
        f"{job.target.readers(job.written)}\n"
    )


def _read_report(directory: Path) -> dict[str, Any] | None:
    """awqkit.json of any schema, or None where there is none. Raises CheckpointError where it is no JSON object."""
    file = directory / REPORT_FILE
    if not file.is_file():
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); remove it, or quantize again") from error
    if not isinstance(report, dict):
        raise CheckpointError(f"{file}: holds no JSON object; remove it, or quantize again")
    return report


def _carried_over(
    report: dict[str, Any], job: _Conversion, specs: list[TensorSpec], cautions: tuple[str, ...]
) -> dict[str, Any]:
    """awqkit.json with its format noted, and what depends on the format counted anew."""
    from awqkit import __version__

    packed_bytes = sum(spec.num_bytes for spec in specs if spec.name not in job.checkpoint.tensors)
    weights = sum(rows * columns for rows, columns in job.linears.values())
    return {
        **report,
        "bits_per_weight": round(8 * packed_bytes / weights, 4),
        "packed_bytes": packed_bytes,
        "written_bytes": sum(spec.num_bytes for spec in specs),
        "cautions": list(cautions),
        "format": job.target.name,
        "converted": {"from": job.source.name, "to": job.target.name, "awqkit": __version__},
    }
