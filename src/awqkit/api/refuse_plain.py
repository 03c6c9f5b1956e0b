"""What is wrong with a plain module or its rows and can be seen before any work, as one line each."""

from __future__ import annotations

import torch
from torch import Tensor

from awqkit.api.refuse import FULL_PRECISION
from awqkit.checkpoint.tensor_source import TensorSource
from awqkit.errors import CalibrationError, ModelError
from awqkit.model.block_calls import run_block
from awqkit.model.plain_calls import named
from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.plan import Probe, make_probe

_IDS = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1, 1, 0]])  # two ids that every model knows
_SAME = 1e-3  # of the block's own contribution; only the order of sums may differ
_OFF = "give a module without it, or switch it off with PlainModel(run=lambda module, ids: ...)"


def refuse_padded(rows: TokenRows, name: str) -> None:
    """Raises CalibrationError where rows differ in length: a plain module gets no mask."""
    if rows.mask is not None:
        lengths = rows.mask.sum(dim=1)
        raise CalibrationError(
            f"calibration: token rows of {int(lengths.min())} to {int(lengths.max())} ids; {name} is called without an "
            "attention mask, so all rows must have one length: cut them"
        )


def refuse_low_bit(source: TensorSource, skeleton: Skeleton, name: str) -> None:
    """Raises ModelError where a parameter is no float."""
    for parameter in sorted(skeleton.parameters_on_disk()):
        if source.dtype(parameter) not in FULL_PRECISION:
            dtype = str(source.dtype(parameter)).removeprefix("torch.")
            raise ModelError(f"{name}: {parameter} is {dtype}; give a module with bf16, fp16 or fp32 parameters")


def refuse_unstreamable(skeleton: Skeleton, device: torch.device) -> None:
    """Runs the module as far as its last block, and one block of each kind by itself, there and back, twice.

    Raises ModelError where that cannot be done, and where a block does not map hidden states to hidden states, always
    the same ones.
    """
    (started,) = skeleton.start([(_IDS, None)], device)
    if started.hidden.is_inference():
        raise ModelError(
            "the module's forward runs in inference_mode, whose tensors gradients cannot pass: take the decorator off, "
            "or pass PlainModel(run=lambda module, ids: ...) that calls what it decorates"
        )
    probe = make_probe(skeleton, device)
    firsts = {skeleton.block_kind(index): index for index in reversed(range(skeleton.num_blocks))}
    for index in sorted(firsts.values()):
        path, hidden = skeleton.block_path(index), probe.hidden
        first, again = _run_twice(skeleton, index, probe, device)
        if not isinstance(first, Tensor) or first.shape != hidden.shape:
            given = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ModelError(
                f"{path} gives {given} for hidden states of shape {list(hidden.shape)}, expected the same shape: "
                "it is no decoder block; PlainModel(blocks=...) names them"
            )
        contribution = (first - hidden).abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        if not (again - first).abs().max() <= _SAME * contribution:
            raise ModelError(
                f"{path} gives something else when it is run again on the same input, so it draws random numbers or "
                f"keeps a state, such as a cache: {_OFF}"
            )


def _run_twice(skeleton: Skeleton, index: int, probe: Probe, device: torch.device) -> tuple[Tensor, Tensor]:
    """The block's outputs, with a gradient taken in between."""
    block = skeleton.load_block(index, device)
    try:
        with torch.enable_grad():
            outputs = []
            for _ in range(2):
                leaf = probe.hidden.clone().requires_grad_(True)
                output = run_block(block, leaf, probe.calls[index])
                if isinstance(output, Tensor) and output.requires_grad:
                    output.sum().backward()
                outputs.append(output.detach() if isinstance(output, Tensor) else output)
            return outputs[0], outputs[1]
    except Exception as error:  # somebody's own code: anything
        raise ModelError(
            f"{skeleton.block_path(index)} cannot be run and differentiated by itself, twice on one input "
            f"({named(error)}); where that is a state that it keeps, such as a cache: {_OFF}"
        ) from error
    finally:
        skeleton.release_block(index)


def refuse_headless(skeleton: Skeleton, device: torch.device) -> None:
    """Raises ModelError where the module gives no logits of every token, or none that can be differentiated."""
    (started,) = skeleton.start([(_IDS, None)], device)
    with torch.enable_grad(), skeleton.head(device) as logits:
        found = logits(_IDS.to(device), started.hidden.clone().requires_grad_(True), None)
    if not found.requires_grad:
        raise ModelError(
            "the module's forward switches gradients off (no_grad), which tuning and end-loss gradients need: take "
            "that out, pass PlainModel(run=lambda module, ids: ...) that calls what is inside it, or use --quality fast"
        )
