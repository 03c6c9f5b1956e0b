"""How long a run will take, and what it needs: one block of each shape is measured, and the rest is counted."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from awqkit.events import Emit, TaskAdvanced, TaskFinished, TaskStarted
from awqkit.model.generate import PASSAGE, passages_at_once
from awqkit.numerics.divergence import kl_gradient
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.block_cost import BlockCost, measure_block, seconds_of, settler
from awqkit.pipeline.block_memory import fitting_tokens
from awqkit.pipeline.durable_points import durable_bytes, scratch_bytes
from awqkit.pipeline.end_gradients import BATCH_DIVISOR
from awqkit.pipeline.free_memory import free_bytes, peak_resident_bytes
from awqkit.pipeline.run import Run
from awqkit.pipeline.tune import STEPPING
from awqkit.pipeline.tuning_stage import why_not_tuned

_TASK = "kind of block measured"
_TRIAL_BYTES = 1 << 25  # written and synced to see how fast the disk is
_COMPUTING = ("prove", "observe", "search", "follow", "check", "advance", "round")
_UPLOAD = 0.2  # of the time to read a block, for what is in memory already
_SHARE_OF_FREE = 0.5  # as in `pipeline.tune`, for what the gradients of a step keep


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will take. seconds: by stage, in the order of the run. Bytes: peaks in memory, sums on the disk.

    device_bytes: None on a CPU, where all is on the host. state_bytes, scratch_bytes: beside OUT and in TMPDIR,
    both gone at the end. measured_blocks, measured_rows: what it was taken from.
    """

    seconds: Mapping[str, float]
    device_bytes: int | None
    host_bytes: int
    out_bytes: int
    state_bytes: int
    scratch_bytes: int
    tokens_per_batch: int
    measured_blocks: int
    measured_rows: int

    @property
    def total_seconds(self) -> float:
        """Of the whole run."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "seconds"}
        return {"total_seconds": self.total_seconds, "seconds": dict(self.seconds), **fields}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of the run: how many for calibration with those that the model writes, and those held out."""

    rows: TokenRows
    count: int
    held_out: TokenRows | None
    generated: int  # of both

    @property
    def length(self) -> int:
        return self.rows.ids.shape[1]

    @property
    def passages(self) -> int:
        """Of those that the model writes."""
        return self.generated * -(-self.length // PASSAGE)


def estimate_run(
    job: Run,
    rows: TokenRows | None,
    held_out: TokenRows | None,
    generated: tuple[int, int],
    out: Path,
    planning_seconds: float,
    emit: Emit,
) -> Estimate:
    """The estimate. rows: of the text. generated: how many more the model will write, for calibration and held out.

    out: where the run will write, for the speed of that disk. planning_seconds: spent until here, as the run will.
    Nothing stays behind. Raises ValueError for a model whose blocks cannot be run by themselves.
    """
    if torch.cuda.is_available() and job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    job = job.with_fitting_experts()
    tokens = fitting_tokens(job.memory, job.device, free_bytes(job.device))
    all_rows = None if rows is None else _Rows(rows, len(rows.ids) + generated[0], held_out, sum(generated))
    used = None if rows is None else rows.rows(slice(0, _measured_rows(job, rows, tokens)))
    passages = 0 if all_rows is None else min(passages_at_once(job.device), all_rows.passages)
    counts, members = Counter[Any](), dict[Any, list[int]]()
    for block in job.plan.blocks:
        kind = tuple(sorted((name, linear.shape) for name, linear in block.linears.items()))
        counts[kind] += 1
        members.setdefault(kind, []).append(block.index)
    costs = list[tuple[int, BlockCost]]()
    emit(TaskStarted(_TASK, len(counts)))
    for kind, indices in members.items():
        index = indices[len(indices) // 2]
        costs.append((counts[kind], measure_block(job, index, used, held_out, tokens, passages)))
        emit(TaskAdvanced(_TASK, len(costs)))
    emit(TaskFinished(_TASK))
    per_byte = _seconds_per_byte(out.parent)
    head = _Head.measured(job, used) if job.recipe.needs_logits and used is not None else None
    seconds = {"plan": planning_seconds, **_seconds(job, all_rows, costs, tokens, per_byte, head, passages)}
    on_device, on_host = _peaks(job, all_rows, 0 if used is None else len(used.ids), costs)
    return Estimate(
        seconds,
        on_device,
        on_host,
        sum(spec.num_bytes for spec in job.layout.specs),
        durable_bytes(job.recipe, job.plan, rows, held_out),
        scratch_bytes(job.recipe, job.plan, rows),
        tokens,
        len(costs),
        0 if used is None else len(used.ids),
    )


def _measured_rows(job: Run, rows: TokenRows, tokens: int) -> int:
    """As many as fill a batch: smaller ones would take longer for each row."""
    wanted = max(2, tokens // rows.ids.shape[1])
    if job.recipe.sensitivity != "none":
        wanted = max(2, wanted // BATCH_DIVISOR)
    return min(len(rows.ids), wanted)


@dataclass(frozen=True, slots=True)
class _Head:
    """Seconds of what lies outside the blocks: to read it; of one row of logits, with its gradient, and in tuning."""

    load: float
    forward: float
    back: float
    step: float

    @classmethod
    def measured(cls, job: Run, rows: TokenRows) -> _Head:
        settle, began = settler(job.device), time.monotonic()
        with job.skeleton.head(job.device) as head:
            settle()
            load = time.monotonic() - began
            ids = rows.ids[:1].to(job.device)
            width = job.plan.probe.hidden.shape[2:]
            hidden = torch.randn(*ids.shape, *width, generator=torch.Generator().manual_seed(0)).to(job.device)

            def forward() -> None:
                with torch.no_grad():
                    head(ids, hidden, None).log_softmax(dim=-1)

            def back() -> None:
                with torch.enable_grad():
                    head(ids, hidden.clone().requires_grad_(True), None).log_softmax(dim=-1).sum().backward()

            def step() -> None:
                with torch.no_grad():
                    goal = head(ids, hidden, None)
                with torch.enable_grad():
                    logits = head(ids, hidden.clone().requires_grad_(True), None)
                with torch.no_grad():
                    felt = kl_gradient(goal, logits)
                logits.backward(felt.to(logits.dtype))

            return cls(load, *(min(seconds_of(work, settle) for _ in range(2)) for work in (forward, back, step)))


def _seconds_per_byte(folder: Path) -> float:
    """Of writing to the disk where `folder` lies and waiting for it."""

    def write() -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())

    return seconds_of(write, lambda: None) / _TRIAL_BYTES


def _seconds(
    job: Run,
    rows: _Rows | None,
    costs: list[tuple[int, BlockCost]],
    tokens: int,
    per_byte: float,
    head: _Head | None,
    passages: int,
) -> dict[str, float]:
    """By stage, in the order of the run."""
    num_blocks = len(job.plan.blocks)
    written = sum(spec.num_bytes for spec in job.layout.specs)
    outside = sum(spec.num_bytes for spec in job.layout.specs if spec.name in _outside(job))
    found = {"generate": 0.0, "copy": outside * per_byte, "start": 0.0}
    if rows is not None:
        found["generate"] = _generating(job, rows, costs, head, passages)
        found["start"] = _gradients(job, rows, costs, head)
    for count, cost in costs:
        for stage, seconds in cost.fixed.items():
            found[stage] = found.get(stage, 0.0) + count * seconds
        for stage, seconds in cost.by_row.items():
            found[stage] = found.get(stage, 0.0) + count * seconds * (rows.count if rows is not None else 0)
    found["first block"] = sum(cost.once for _, cost in costs)
    if rows is not None and job.recipe.tuning_epochs > 0 and why_not_tuned(job.recipe, job.plan, job.device) is None:
        codes = sum(count * cost.tuning.code_bytes for count, cost in costs if cost.tuning is not None)
        found["save"] = codes * per_byte
        found["tune"] = _tuning(job, rows, costs, head, num_blocks)
    _overlap(found, num_blocks, (written - outside) * per_byte, beside_device=job.device.type == "cuda")
    return {stage: seconds for stage, seconds in found.items() if seconds > 0}


def _overlap(seconds: dict[str, float], num_blocks: int, disk: float, *, beside_device: bool) -> None:
    """Take off what is done while a block computes: writing the last one and, beside a device, packing and reading.

    disk: seconds of writing all blocks. What is hidden is no more than what the blocks compute.
    """
    computing = sum(seconds.get(stage, 0.0) for stage in _COMPUTING)
    pack, read = seconds.get("write", 0.0), seconds.get("read", 0.0)
    behind = pack + disk if beside_device else disk
    seconds["write"] = pack + disk - behind + max(behind / num_blocks, behind - computing)
    if beside_device:
        ahead = read * (num_blocks - 1) / num_blocks
        seconds["read"] = read - ahead + max(_UPLOAD * ahead, ahead - computing)


def _outside(job: Run) -> set[str]:
    inside = tuple(f"{block.path}." for block in job.plan.blocks)
    held = {disk for name in job.skeleton.names() if name.startswith(inside) for disk in job.skeleton.disk_names(name)}
    return {name for name in job.layout.kept if name not in held}


def _generating(job: Run, rows: _Rows, costs: list[tuple[int, BlockCost]], head: _Head | None, passages: int) -> float:
    """Reading the model, and a step of all blocks and the head for each token of a passage, so many at once."""
    if not passages:
        return 0.0
    reading = sum(count * cost.fixed.get("read", 0.0) for count, cost in costs) + (head.load if head else 0.0)
    each = sum(count * cost.token_step for count, cost in costs)
    each += head.forward * passages / rows.length if head else 0.0
    rounds = math.ceil(rows.passages / passages_at_once(job.device))
    return reading + rounds * min(PASSAGE, rows.length) * each


def _gradients(job: Run, rows: _Rows, costs: list[tuple[int, BlockCost]], head: _Head | None) -> float:
    if job.recipe.sensitivity == "none" or head is None:
        return 0.0
    blocks = sum(count * (2 * cost.fixed.get("read", 0.0) + rows.count * cost.gradient) for count, cost in costs)
    return head.load + rows.count * head.back + blocks


def _tuning(job: Run, rows: _Rows, costs: list[tuple[int, BlockCost]], head: _Head | None, num_blocks: int) -> float:
    """Steps through calibration rows, and the KL of those held out: before, where a stream was there, and after."""
    steps = [(count, cost.tuning) for count, cost in costs if cost.tuning is not None]
    free, size = free_bytes(job.device), max(1, STEPPING[job.recipe.tuning].tokens_per_step // rows.length)
    kept = sum(count * step.kept_bytes for count, step in steps) * size * rows.length
    again = free is None or kept > _SHARE_OF_FREE * free
    step_seconds = sum(count * (step.seconds + (step.forward_seconds if again else 0.0)) for count, step in steps)
    visited = max(job.recipe.tuning_epochs * rows.count, size)
    held_out = 0 if rows.held_out is None else len(rows.held_out.ids)
    passes = 1 if job.recipe.propagates else 2
    forward = sum(count * step.forward_seconds for count, step in steps) * rows.length * held_out * passes
    logits = 0.0 if head is None else head.load + visited * head.step + held_out * 4 * head.forward
    capture = sum(count * step.capture for count, step in steps)
    return capture + visited * rows.length * step_seconds + forward + logits


def _peaks(job: Run, rows: _Rows | None, measured: int, costs: list[tuple[int, BlockCost]]) -> tuple[int | None, int]:
    """The peak on the device, None on a CPU, and on the host: what was measured, and what all rows add to that."""
    more = 0
    if rows is not None:
        width = job.plan.probe.hidden[0, 0].numel()
        more = 4 * width * (rows.count - measured) * rows.length * (2 if job.recipe.propagates else 1)
        if job.recipe.tuning_epochs > 0:
            more += sum(count * cost.tuning.code_bytes for count, cost in costs if cost.tuning is not None)
    resident = peak_resident_bytes()
    if job.device.type == "cpu":
        return None, resident + more
    return torch.cuda.max_memory_allocated(job.device) + more, resident
