"""llm-compressor as a peer: GPTQ, AWQ, or AWQ then GPTQ, asymmetric, by its own examples' recipes, our tokens.

    PYTHON llm_compressor.py --method gptq --model FOLDER --rows rows.json --out FOLDER --json result.json

Written for llm-compressor 0.14 (the file is not named like the package, which it would hide). Its AWQ pins memory,
which PyTorch refuses where there is no accelerator; pinning is left out there.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from peer_protocol import Clock, Task, dequantized, load_original, read_task, write_checkpoint, write_result
from torch.utils.data import DataLoader

BATCH = 8  # rows have one length, so a batch adds no padding


def main() -> None:
    """Quantize, dequantize in float32, write."""
    task = read_task(("gptq", "awq", "awq-gptq"))
    if task.device == "cpu":
        IntermediatesCache.pin_memory = lambda *_args, **_named: None
    clock = Clock(task.device)
    model = load_original(task)
    oneshot(model=model, dataset=_loader(task), recipe=_recipe(task))
    clock.stop()
    linears = {}
    for name, layer in model.named_modules():
        scheme = getattr(layer, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        scale, zero, args = layer.weight_scale, layer.weight_zero_point, scheme.weights
        codes = quantize(layer.weight, scale, zero, args)  # what it does when it packs
        linears[f"{name}.weight"] = dequantized(codes, scale, zero)
    write_checkpoint(task, linears, model.state_dict())
    notes = f"batch {BATCH}, AWQ with duo_scaling='both' as in its examples, else its defaults"
    write_result(task, clock, ("llmcompressor", "compressed-tensors"), len(linears), notes)


def _recipe(task: Task) -> list[Any]:
    scheme = _scheme(task)
    chosen = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    smoothing = [AWQModifier(duo_scaling="both")] if task.method != "gptq" else []
    rounding = QuantizationModifier(**chosen) if task.method == "awq" else GPTQModifier(**chosen)
    return [*smoothing, rounding]


def _scheme(task: Task) -> QuantizationScheme:
    """W4A16_ASYM, its own preset, with the task's bits and group size."""
    scheme = preset_name_to_scheme("W4A16_ASYM", ["Linear"])
    scheme.weights = scheme.weights.model_copy(update={"num_bits": task.bits, "group_size": task.group_size})
    return scheme


def _loader(task: Task) -> DataLoader:
    """The rows in their order: a DataLoader goes to its pipelines as it is."""
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in task.rows]
    return DataLoader(rows, batch_size=BATCH, shuffle=False)


if __name__ == "__main__":
    main()
