"""What one block costs: taken through the steps of a run on a few rows, its results thrown away."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from awqkit.kernels.capture import replayed
from awqkit.kernels.compiled import CompileClock
from awqkit.model.block_calls import hand_on
from awqkit.pipeline.activations import HiddenStates, TokenRows
from awqkit.pipeline.block_step import BlockResult, quantize_block
from awqkit.pipeline.captured_pass import BlocksPass
from awqkit.pipeline.context import BlockContext, Stream, Streams
from awqkit.pipeline.end_gradients import BATCH_DIVISOR, EndGradients
from awqkit.pipeline.observe_block import measure_row_weights
from awqkit.pipeline.quantized_block import advance
from awqkit.pipeline.run import Run, block_context, packed_tensors
from awqkit.pipeline.stage_clock import StageClock
from awqkit.pipeline.start_streams import start_streams
from awqkit.pipeline.tunable_block import TunableBlock, kept_bytes
from awqkit.pipeline.tune import STEPPING
from awqkit.pipeline.tuning_stage import tunable_block
from awqkit.recipe import Recipe

_BY_TOKENS = ("observe", "follow", "advance")  # the other stages are of the weights, or of rows held out
_LONG = 10.0  # seconds: after a block that took longer nothing is run again to see what the first time added


@dataclass(frozen=True, slots=True)
class StepCost:
    """Of tuning, for one block. seconds, forward_seconds: for each token, of a step and of a pass forward.

    capture: seconds until a GPU replays steps. kept_bytes: for each token, what the gradients need to have kept.
    code_bytes: of what stays in memory.
    """

    seconds: float
    forward_seconds: float
    capture: float
    kept_bytes: float
    code_bytes: int


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Seconds of one block. fixed: by stage, whatever the rows. by_row: by stage, of one calibration row.

    once: what the first blocks take on top, but for compiling kernels, which the run will find compiled. gradient: of
    one row on its two passes for end-loss gradients. token_step: of one token more for `_PASSAGES` passages. tuning:
    None where the recipe does not tune.
    """

    fixed: Mapping[str, float]
    by_row: Mapping[str, float]
    once: float
    gradient: float
    token_step: float
    tuning: StepCost | None


def measure_block(
    job: Run, index: int, rows: TokenRows | None, held_out: TokenRows | None, tokens_per_batch: int, passages: int
) -> BlockCost:
    """Of block `index`, on `rows` (None for a recipe that looks at no text), with all rows held out.

    passages: that the model writes at once, 0 for none. Raises ValueError for a block that needs more of the one
    before than hidden states, where that cannot be made up.
    """
    settle = settler(job.device)
    attempts = list[dict[str, float]]()
    compiling = CompileClock(job.device)
    while not attempts or _again(job, attempts):
        streams = None if rows is None else scratch_streams(job, index, rows, held_out, tokens_per_batch)
        clock = StageClock(settle)
        clock.enter("read")
        context = block_context(job, index, job.skeleton.load_block(index, job.device))
        probe = None if streams is None else streams.probe.copy()
        with compiling:
            result = _through(job, context, streams, clock)
        attempts.append(dict(clock.seconds))
    try:
        if rows is None or streams is None or probe is None:
            return BlockCost(attempts[-1], {}, 0.0, 0.0, 0.0, None)
        last = {**attempts[-1], "read": attempts[0]["read"]}
        once = sum(sum(each.values()) - sum(last.values()) for each in attempts[:-1]) - compiling.seconds
        recipe, weigh = job.recipe, 0.0
        if recipe.sensitivity == "none" and (recipe.scales_channels or recipe.column_order == "energy"):
            weigh = seconds_of(lambda: measure_row_weights(context, probe), settle)
        by_row = {stage: last[stage] for stage in _BY_TOKENS if stage in last}
        by_row["observe"] = max(0.0, by_row["observe"] - weigh)
        fixed = {stage: seconds for stage, seconds in last.items() if stage not in by_row} | {"observe": weigh}
        count = len(rows.ids)
        return BlockCost(
            fixed,
            {stage: seconds / count for stage, seconds in by_row.items()},
            max(0.0, once),
            _gradient_seconds(context, streams, settle) if recipe.sensitivity != "none" else 0.0,
            _token_step(job, context, passages, settle) if passages else 0.0,
            _step_cost(job, context, result, rows, settle) if recipe.tuning_epochs > 0 else None,
        )
    finally:
        job.skeleton.release_block(index)


def _again(job: Run, attempts: Sequence[Mapping[str, float]]) -> bool:
    """A second time for what is only done once, and a third where the second captured what all others replay."""
    if len(attempts) == 1:
        return job.device.type == "cuda" or sum(attempts[0].values()) < _LONG
    return len(attempts) == 2 and job.across.replays.num_captured > 0


def settler(device: torch.device) -> Callable[[], None]:
    """A function that waits for the device."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def seconds_of(work: Callable[[], object], settle: Callable[[], None]) -> float:
    """Wall time of some work, done by the device."""
    settle()
    began = time.monotonic()
    work()
    settle()
    return time.monotonic() - began


def _through(job: Run, context: BlockContext, streams: Streams | None, clock: StageClock) -> BlockResult:
    result = quantize_block(context, streams, clock.enter)
    clock.enter("write")
    for _ in packed_tensors(job, context.block_plan, result.quantized):
        pass
    clock.enter("")
    return result


def scratch_streams(
    job: Run, index: int, rows: TokenRows, held_out: TokenRows | None, tokens_per_batch: int
) -> Streams:
    """The rows as they enter the first block, as if they entered this one; gradients at its end are made up."""
    plain = replace(job.recipe, sensitivity="none")
    streams = start_streams(
        job.skeleton, plain, rows, held_out, job.device, lambda block: None, tokens_per_batch=tokens_per_batch
    )
    for before in range(index) if _is_given_more(streams.probe, index) else ():
        _pass(job, before, streams)
    if job.recipe.sensitivity == "none":
        return streams
    if _is_given_more(streams.probe, job.skeleton.num_blocks - 1):
        raise ValueError("blocks hand on more than hidden states")
    states = HiddenStates(job.skeleton, rows, job.device, tokens_per_batch=max(1, tokens_per_batch // BATCH_DIVISOR))
    gradient = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(job.device, torch.bfloat16)
    calibration = Stream(states, states.copy() if job.recipe.propagates else None)
    return replace(streams, calibration=calibration, gradients=EndGradients([gradient] * job.skeleton.num_blocks))


def _is_given_more(states: HiddenStates, index: int) -> bool:
    _, _, calls, _ = states.batch(0)
    return any(call.wanted for call in calls[: index + 1])


def _pass(job: Run, index: int, streams: Streams) -> None:
    context = block_context(job, index, job.skeleton.load_block(index, job.device))
    try:
        for states in streams.named.values():
            advance(context, states, {})
    finally:
        job.skeleton.release_block(index)


def _gradient_seconds(context: BlockContext, streams: Streams, settle: Callable[[], None]) -> float:
    """Of one row forward, and then forward and back."""
    states = streams.calibration.original
    part, hidden, call, _ = next(iter(states.batches(context.index)))

    def there() -> None:
        with torch.no_grad():
            hand_on(context.block, hidden, call)

    def back() -> None:
        with torch.enable_grad():
            hand_on(context.block, hidden.clone().requires_grad_(True), call).hidden.sum().backward()

    return (seconds_of(there, settle) + seconds_of(back, settle)) / (part.stop - part.start)


def _token_step(job: Run, context: BlockContext, passages: int, settle: Callable[[], None]) -> float:
    """Of one more token for each passage: the block on rows of one token."""
    states = HiddenStates(job.skeleton, TokenRows(torch.zeros(passages, 1, dtype=torch.int64)), job.device)
    _, hidden, calls, _ = states.batch(0)
    if calls[context.index].wanted:
        raise ValueError("blocks hand on more than hidden states")

    def step() -> None:
        with torch.no_grad():
            hand_on(context.block, hidden, calls[context.index])

    again = replayed(step, job.device)
    return min(seconds_of(again, settle) for _ in range(3))


def _step_cost(
    job: Run, context: BlockContext, result: BlockResult, rows: TokenRows, settle: Callable[[], None]
) -> StepCost:
    recipe: Recipe = job.recipe
    tunable = tunable_block(context, result)
    count = max(1, STEPPING[recipe.tuning].tokens_per_step // rows.ids.shape[1])
    states = HiddenStates(job.skeleton, rows.rows(slice(0, count)), job.device, tokens_per_batch=1 << 40)
    part, hidden, calls, _ = states.batch(0)
    call, tokens = calls[context.index], (part.stop - part.start) * rows.ids.shape[1]
    if call.wanted:
        raise ValueError("blocks hand on more than hidden states")

    run = BlocksPass([tunable])

    def step() -> None:
        with torch.enable_grad():
            output = run.forward(hidden, [call])
        run.backward(output, torch.ones_like(output))
        for leaf in tunable.leaves:
            leaf.grad = None

    def forward() -> None:
        with torch.no_grad():
            run.forward(hidden, [call])

    kept = kept_bytes(tunable, hidden, call)
    tunable.hold_weights()
    capture = seconds_of(lambda: run.capture(hidden, [call]), settle)
    seconds = sum(seconds_of(step, settle) for _ in range(2)) / 2  # memory that is new each time is part of it
    forward_seconds = seconds_of(forward, settle)
    return StepCost(seconds / tokens, forward_seconds / tokens, capture, kept / tokens, _code_bytes(tunable))


def _code_bytes(block: TunableBlock) -> int:
    fixed = sum(value.nbytes for value in block.fixed.values())
    return fixed + sum(view.shape[0] * view.shape[1] for view in block.views.values())
