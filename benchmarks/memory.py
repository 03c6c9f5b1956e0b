"""Peak resident memory of `quantize` on the CPU, for all 30 blocks of SmolLM2 and for a copy cut to 6.

    python benchmarks/memory.py

Each run is a process of its own. The bound: one block in float32, its H matrices, two sets of block inputs and 400 MB
above the resident size after imports. Exits with 1 where it is not kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench import DATA, environment, save, text_files

from awqkit.api.smollm2 import smollm2
from awqkit.checkpoint.reader import Checkpoint
from awqkit.checkpoint.writer import CheckpointWriter, plan_layout

SEQ_LEN, SLACK_BYTES = 512, 400_000_000

_CHILD = """
import json, sys
from pathlib import Path
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
import awqkit.api.quantize
from awqkit import Recipe, quantize
def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024
model, out, calibration, samples = sys.argv[1:5]
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
quantize(model, out, Recipe.preset("fast", group_size=64, samples=int(samples), seq_len=512), calibration=calibration)
print(json.dumps({"after_imports": before, "peak": status("VmHWM")}))
"""


def main() -> None:
    """Measure both, check the bound, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--samples", type=int, default=128)
    args = parser.parse_args()
    calibration = text_files(args.data)["calibration"]
    model = args.model or smollm2(emit=print)
    bound = _bound(Checkpoint.open(model).config, args.samples)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        short = Path(scratch) / "short"
        first_blocks(model, short, 6)
        for folder, blocks in ((short, 6), (model, 30)):
            command = [
                sys.executable,
                "-c",
                _CHILD,
                folder,
                Path(scratch) / f"out{blocks}",
                calibration,
                str(args.samples),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            used = found["peak"] - found["after_imports"]
            runs.append({"blocks": blocks, **found, "used": used, "kept": used <= bound["bytes"]})
            print(
                f"{blocks} blocks: {used / 1e6:.0f} MB above imports, bound {bound['bytes'] / 1e6:.0f} MB", flush=True
            )
    save("memory-cpu", {"environment": environment(torch.device("cpu")), "bound": bound, "runs": runs})
    raise SystemExit(0 if all(run["kept"] for run in runs) else 1)


def _bound(config: dict, samples: int) -> dict[str, int]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    key_value = config["num_key_value_heads"] * head_dim
    block = 4 * (hidden * (2 * heads * head_dim + 2 * key_value) + 3 * hidden * inner)
    grams = 4 * (2 * hidden**2 + (heads * head_dim) ** 2 + inner**2)
    inputs = 2 * 4 * samples * SEQ_LEN * hidden
    parts = {"block": block, "grams": grams, "two_sets_of_inputs": inputs, "slack": SLACK_BYTES}
    return {**parts, "bytes": sum(parts.values())}


def first_blocks(model: Path, out: Path, blocks: int) -> None:
    """A copy of a Llama checkpoint with its first blocks only."""
    source = Checkpoint.open(model)
    names = [name for name in source.names if ".layers." not in name or int(name.split(".")[2]) < blocks]
    with CheckpointWriter(out, plan_layout([source.tensors[name].spec for name in names]), False) as writer:
        for name in names:
            writer.write(name, source.read(name))
        writer.write_json("config.json", {**source.config, "num_hidden_layers": blocks})
        for name in source.other_files():
            writer.copy_file(model / name, name)
        writer.commit()


if __name__ == "__main__":
    main()
