"""Durable points of a run: after some blocks, everything that the rest depends on goes to the disk.

A run that was stopped starts again at the last of them. Blocks that were finished after it are quantized again, which
gives the same bytes: see docs/decisions/0023.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from awqkit.checkpoint.run_state import RunState
from awqkit.checkpoint.writer import CheckpointWriter
from awqkit.decisions import BlockDecision, as_json, block_decision_of
from awqkit.numerics.grid import Grid, QuantizedWeight
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.block_step import BlockResult
from awqkit.pipeline.context import Streams
from awqkit.pipeline.plan import BlockPlan, RunPlan
from awqkit.pipeline.ranks import Ranks
from awqkit.pipeline.saved_states import put_together, taken_apart
from awqkit.pipeline.whole_streams import gathered_streams, put_streams
from awqkit.recipe import Recipe

_LARGEST_SHARE = 0.05  # of the time, for durable points; where they take long they come less often


class DurablePoints:
    """Those of one run, on the first rank. every: seconds from one to the next, at least; 0 has one after every block.

    The others take part in `restore` and `make` by `follow_restore` and `follow_block`.
    """

    def __init__(self, state: RunState, writer: CheckpointWriter, every: float, ranks: Ranks | None = None) -> None:
        self._state, self._writer, self._every = state, writer, every
        self._ranks = ranks or Ranks.alone()
        self._since, self._due_after = time.monotonic(), every
        self._batch_tokens = 0, 0
        self._results = [name for name in state.journal.get("files", ()) if name.startswith("block-")]

    @property
    def blocks(self) -> int:
        """How many blocks an earlier run has finished."""
        return self._state.journal.get("blocks", 0)

    @property
    def decisions(self) -> list[BlockDecision]:
        """Those of the blocks that an earlier run has finished."""
        return [block_decision_of(content) for content in self._state.journal.get("decisions", ())]

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, what an earlier run took until then."""
        return dict(self._state.journal.get("seconds", {}))

    def why_not_tuned(self, ask: Callable[[], str | None]) -> str | None:
        """What an earlier run settled of tuning, whatever memory there is now; else what `ask` says, to be kept."""
        if self.blocks:
            return self._state.journal["untuned"]
        untuned = ask()
        self._state.note(untuned=untuned)
        return untuned

    def batch_tokens(self, ask: Callable[[], int]) -> tuple[int, int]:
        """How many tokens a batch holds, by an earlier run or else by `ask`, and how often it was halved since."""
        tokens, halved = self._state.journal.get("batch_tokens") or (ask(), 0)
        self.note_batch_tokens(tokens, halved)
        return tokens, halved

    def experts_at_once(self, ask: Callable[[], int | None]) -> int | None:
        """Of how many experts the statistics are in memory at a time, by an earlier run or else by `ask`."""
        known = self._state.journal
        found = known["experts_at_once"] if "experts_at_once" in known else ask()
        self._state.note(experts_at_once=found)
        return found

    def note_halved(self) -> None:
        """Batches have become half as large."""
        tokens, halved = self._batch_tokens
        self.note_batch_tokens(tokens, halved + 1)

    def note_batch_tokens(self, tokens: int, halved: int) -> None:
        """Keep what `batch_tokens` tells, with the next durable point: the last bits depend on it."""
        self._batch_tokens = tokens, halved
        self._state.note(batch_tokens=[tokens, halved])

    def restore(self, streams: Streams) -> None:
        """Put the streams where the earlier run's were."""
        tensors, forms = self._state.load(self._state.journal["states"]), self._state.journal["forms"]
        saved = {}
        for name, form in forms.items():
            start = f"{name}: "
            own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            saved[name] = own["hidden"], [(first, put_together(beside, own)) for first, beside in form]
        put_streams(self._ranks, streams, saved)

    def keep_result(self, index: int, result: BlockResult) -> None:
        """Write what tuning starts from: a block as it was quantized."""
        name = f"block-{index:05d}.safetensors"
        tensors = {f"stored {key}": value for key, value in result.stored.items()}
        for linear, weight in result.quantized.items():
            tensors |= {
                f"codes {linear}": weight.codes,
                f"scale {linear}": weight.grid.group_scale,
                f"zero {linear}": weight.grid.group_zero,
            }
        self._state.save(name, tensors)
        self._results.append(name)

    def result(self, block: BlockPlan, device: torch.device) -> BlockResult:
        """What `keep_result` wrote for a block in an earlier run."""
        tensors = {name: value.to(device) for name, value in self._state.load(self._results[block.index]).items()}
        quantized, stored = {}, {}
        for key, value in tensors.items():
            kind, name = key.split(" ", 1)
            if kind == "stored":
                stored[name] = value
            elif kind == "codes":
                plan = block.linears[name]
                size = value.shape[1] // tensors[f"scale {name}"].shape[1]
                grid = Grid(plan.bits, size, plan.symmetric, tensors[f"scale {name}"], tensors[f"zero {name}"])
                quantized[name] = QuantizedWeight(value, grid)
        return BlockResult(quantized, stored, self.decisions[block.index])

    def is_due(self, num_blocks: int, done: int) -> bool:
        """Whether it is time for one, after so many blocks."""
        return time.monotonic() - self._since >= self._due_after and done < num_blocks

    def make(
        self,
        num_blocks: int,
        decisions: Sequence[BlockDecision],
        streams: Streams | None,
        seconds: Mapping[str, float],
    ) -> None:
        """Make one, now that all blocks so far are written. decisions: theirs."""
        began = time.monotonic()
        states, forms, done = None, {}, len(decisions)
        if streams is not None:
            states, tensors = f"states-{done:05d}.safetensors", {}
            for name, (hidden, pieces) in (gathered_streams(self._ranks, streams) or {}).items():
                own = {"hidden": hidden}
                forms[name] = [[first, taken_apart(beside, own)] for first, beside in pieces]
                tensors |= {f"{name}: {key}": value for key, value in own.items()}
            self._state.save(states, tensors)
        self._state.record(
            blocks=done,
            told=f"{done} of {num_blocks} blocks are done",
            decisions=as_json(list(decisions)),
            written=self._writer.checksums(),
            seconds=dict(seconds),
            states=states,
            forms=forms,
            files=[*self._state.lasting, *self._results[:done], *filter(None, [states])],
        )
        self._since = time.monotonic()
        self._due_after = max(self._every, (self._since - began) / _LARGEST_SHARE if self._every else 0.0)

    def before_rewriting(self) -> None:
        """What is written of the blocks is about to change: their checksums say nothing from now on."""
        if self._state.journal:
            self._state.record(rewriting=True)


def follow_restore(ranks: Ranks, streams: Streams) -> None:
    """What the other ranks do where the first calls `restore`."""
    put_streams(ranks, streams, None)


def follow_block(ranks: Ranks, streams: Streams) -> None:
    """What the other ranks do where the first asks whether a point is due, and makes it."""
    if ranks.told():
        gathered_streams(ranks, streams)


def durable_bytes(recipe: Recipe, plan: RunPlan, rows: TokenRows | None, held_out: TokenRows | None) -> int:
    """About how many bytes of disk durable points need at most, beside the checkpoint."""
    if rows is None:
        return 0
    tokens = sum(part.ids.numel() for part in (rows, held_out) if part is not None)
    width = plan.probe.hidden[0, 0].numel()
    states = 4 * width * tokens * (2 if recipe.propagates else 1)
    codes = sum(shape[0] * shape[1] for shape in (linear.shape for linear in plan.linears if linear.keep is None))
    return 2 * states + (codes if recipe.tuning_epochs > 0 else 0)


def scratch_bytes(recipe: Recipe, plan: RunPlan, rows: TokenRows | None) -> int:
    """How many bytes of temporary files `kept_states` makes at most, where they do not go to the device."""
    if rows is None:
        return 0
    width, tokens = plan.probe.hidden[0, 0].numel(), rows.ids.numel()
    gradients = (len(plan.blocks) + 1) * width if recipe.sensitivity != "none" else 0
    channels = [
        sum(each.num_channels for each in block.structure.inputs if each.expert is None) for block in plan.blocks
    ]
    return 2 * tokens * (gradients + (max(channels) if recipe.propagates else 0))


def written_before(state: RunState) -> dict[str, int | None]:
    """Tensor name -> checksum, of what an earlier run left in the checkpoint; None where it may have been rewritten."""
    rewriting = state.journal.get("rewriting", False)
    return {name: None if rewriting else crc for name, crc in state.journal.get("written", {}).items()}
