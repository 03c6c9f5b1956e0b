"""GPTQModel's GPTQ as a peer: asymmetric, its own defaults, our calibration tokens.

    PYTHON gptqmodel_gptq.py --model FOLDER --rows rows.json --out FOLDER --json result.json [--device cuda]

Written for gptqmodel 7.7. It saves its checkpoint, and the codes are read from there: `qweight` and `qzeros` are
streams of codes, lowest bits first, along the inputs and along the outputs; format v2 holds zero points as they are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader wants two; on two cores it would start with one

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT
from peer_protocol import Clock, Task, read_task, write_checkpoint, write_result
from safetensors.torch import load_file

BATCH = 8


def main() -> None:
    """Quantize, save, read back in float32, write."""
    task = read_task(("gptq",))
    config = QuantizeConfig(bits=task.bits, group_size=task.group_size, sym=False, format=FORMAT.GPTQ_V2)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in task.rows]
    clock = Clock(task.device)
    tool = GPTQModel.load(str(task.model), config, device="cuda:0" if task.device == "cuda" else "cpu")
    tool.quantize(rows, batch_size=BATCH, calibration_sort=None)
    clock.stop()
    with tempfile.TemporaryDirectory() as scratch:
        tool.save(scratch)
        saved = {}
        for part in sorted(Path(scratch).glob("*.safetensors")):
            saved |= load_file(part)
    linears = {f"{name}.weight": weight for name, weight in _dequantized(saved, task)}
    write_checkpoint(task, linears, saved)
    write_result(task, clock, ("gptqmodel",), len(linears), f"batch {BATCH}, sym False, else its defaults")


def _dequantized(saved: dict[str, torch.Tensor], task: Task) -> Iterator[tuple[str, torch.Tensor]]:
    """Each linear's name and its weight [out, in] in float32."""
    for name in [key.removesuffix(".qweight") for key in saved if key.endswith(".qweight")]:
        codes = _stream(saved[f"{name}.qweight"].T, task.bits)  # [out, in]
        zeros = _stream(saved[f"{name}.qzeros"], task.bits)  # [groups, out]
        group = saved[f"{name}.g_idx"].long()  # [in]
        scale = saved[f"{name}.scales"].float()  # [groups, out]
        yield name, (codes - zeros[group].T) * scale[group].T


def _stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, words] as float32 codes [rows, words · 32 / bits], the lowest bits first."""
    one_bit = (words[:, :, None] >> torch.arange(32)) & 1
    codes = one_bit.reshape(words.shape[0], -1, bits)
    return (codes << torch.arange(bits)).sum(dim=-1).float()


if __name__ == "__main__":
    main()
