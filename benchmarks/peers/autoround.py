"""AutoRound (SignRound, 200 iterations) as a peer: asymmetric, its own defaults, our calibration tokens.

    PYTHON autoround.py --model FOLDER --rows rows.json --out FOLDER --json result.json [--device cuda]

Written for auto-round 0.16.
"""

from __future__ import annotations

import torch
from auto_round import AutoRound
from peer_protocol import (
    Clock,
    Task,
    codes_of,
    dequantized,
    load_original,
    read_task,
    write_checkpoint,
    write_result,
)  # fmt: skip
from transformers import AutoTokenizer

ITERATIONS, BATCH = 200, 8


def main() -> None:
    """Quantize, dequantize in float32, write."""
    task = read_task(("signround",))
    clock = Clock(task.device)
    tool = AutoRound(
        load_original(task),
        AutoTokenizer.from_pretrained(task.model),
        bits=task.bits,
        group_size=task.group_size,
        sym=False,
        iters=ITERATIONS,
        nsamples=len(task.rows),
        seqlen=task.rows.shape[1],
        batch_size=BATCH,
        dataset=_batches(task),
        device_map=0 if task.device == "cuda" else "cpu",
        enable_torch_compile=False,  # the same arithmetic without a compiler
        low_cpu_mem_usage=False,  # True moves finished blocks to disk and leaves meta tensors behind
    )
    model, _ = tool.quantize()
    clock.stop()
    linears = {}
    for name, layer in model.named_modules():
        if getattr(layer, "scale", None) is None or not isinstance(layer, torch.nn.Linear):
            continue
        shape = (layer.weight.shape[0], -1)
        scale, zero = layer.scale.reshape(shape), torch.as_tensor(layer.zp).expand(layer.scale.shape).reshape(shape)
        codes = codes_of(layer.weight.detach(), scale, zero, task.bits)
        linears[f"{name}.weight"] = dequantized(codes, scale, zero)
    write_checkpoint(task, linears, model.state_dict())
    notes = f"iters {ITERATIONS}, batch {BATCH}, sym False, no torch.compile, else its defaults"
    write_result(task, clock, ("auto-round",), len(linears), notes)


def _batches(task: Task) -> list[dict[str, torch.Tensor]]:
    """The rows in their order. The mask is given, or AutoRound would mask every token that equals the pad token.

    AutoRound itself then clears the last position of the mask, as it does for any rows that a user brings.
    """
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in task.rows.split(BATCH)]


if __name__ == "__main__":
    main()
