"""AutoAWQ as a peer: its own recipe, asymmetric, our calibration tokens. 4 bits only, as its format.

    PYTHON autoawq.py --model FOLDER --rows rows.json --out FOLDER --json result.json [--device cuda]

Written for autoawq 0.2.9, the last release, which needs transformers 4. That library does not know `rope_parameters`
and `dtype` in a config.json of transformers 5 and would go on with its own defaults: a model with another rotary base
is another model. So the config is respelled first. On a CPU its scale search keeps the weights that it goes back to
with `.cpu()`, which copies nothing there, and then scales them in place: what comes out is far worse than plain
rounding. Here it gets copies, so that the figure is the method's; on a GPU that changes nothing.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.modules.linear import WQLinear_GEMM
from awq.quantize.quantizer import AwqQuantizer
from peer_protocol import Clock, dequantized, read_task, write_checkpoint, write_result

# nibble j of a word, lowest first, holds output column ORDER[j] of the word's eight
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def main() -> None:
    """Quantize, read the packed words back in float32, write."""
    task = read_task(("awq",))
    config = {"w_bit": task.bits, "q_group_size": task.group_size, "zero_point": True, "version": "GEMM"}
    AwqQuantizer._compute_best_scale = _with_copies(AwqQuantizer._compute_best_scale)
    clock = Clock(task.device)
    with tempfile.TemporaryDirectory() as scratch:
        _respell(task.model, Path(scratch))
        tool = AutoAWQForCausalLM.from_pretrained(scratch, device_map=None, safetensors=True)
        tool.quantize(
            None,  # the rows are tokens already
            quant_config=config,
            calib_data=task.rows.tolist(),
            max_calib_samples=len(task.rows),
            max_calib_seq_len=task.rows.shape[1],
        )
    clock.stop()
    linears = {
        f"{name}.weight": _weight(layer)
        for name, layer in tool.model.named_modules()
        if isinstance(layer, WQLinear_GEMM)
    }
    write_checkpoint(task, linears, tool.model.state_dict())
    write_result(task, clock, ("autoawq",), len(linears), "zero_point True, GEMM, else its defaults")


def _respell(source: Path, target: Path) -> None:
    """A folder that transformers 4 reads as the same model: links to the files, and a config in its spelling."""
    for path in source.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path.resolve())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype"))
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _with_copies(search: Any) -> Any:
    """Its search for one scale, with a `state_dict()` of copies on the module that it restores after each trial."""

    def searched(self: Any, x: Any, w_mean: Any, x_mean: Any, module2inspect: torch.nn.Module, *others: Any) -> Any:
        plain = module2inspect.state_dict
        module2inspect.state_dict = lambda: {name: value.clone() for name, value in plain().items()}
        try:
            return search(self, x, w_mean, x_mean, module2inspect, *others)
        finally:
            del module2inspect.state_dict

    return searched


def _weight(layer: WQLinear_GEMM) -> torch.Tensor:
    """The dequantized weight [out, in] in float32."""
    codes, zeros = _unpacked(layer.qweight).T, _unpacked(layer.qzeros).T  # [out, in], [out, groups]
    return dequantized(codes, layer.scales.T, zeros)


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, columns / 8] as codes [rows, columns]."""
    shifts = torch.tensor([4 * ORDER.index(column) for column in range(8)], device=words.device)
    return ((words[:, :, None] >> shifts) & 15).reshape(words.shape[0], -1)


if __name__ == "__main__":
    main()
