"""A model of the wall time on several ranks, from the stage seconds of a run on one and the sizes of what is exchanged.

    python benchmarks/scaling.py OUT/awqkit-timings.json --config MODEL/config.json --link-gb 300

It measures nothing: the stages of one real run are divided among ranks by what docs/scaling.md says of each, and the
bytes exchanged per block are divided by the bandwidth given. --measured RANKS FILE gives the timings of a real run on
several ranks, which are set beside the model's and from which the share of the search that is not shared is taken.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_BY_ROWS = ("start", "observe", "follow", "check", "advance")
SHARED_BY_LINEAR = ("search",)
RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the model of communication needs to know of a model. inputs: channels of each distinct linear input.

    linears: (out, in) of every linear of a block.
    """

    blocks: int
    width: int
    inputs: tuple[int, ...]
    linears: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Choices:
    """Of a run: rows, the size of groups, and whether it propagates; of the machines: bytes a second.

    alone: the share of `search` that every rank repeats or one does for all.
    """

    rows: int
    group_size: int
    propagates: bool
    bytes_per_second: float
    alone: float


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Those of a decoder of the Llama kind, dense or with experts, by its config.json."""
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head = int(config.get("head_dim") or width // heads)
    keys = int(config.get("num_key_value_heads") or heads) * head
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    of_experts = config.get("moe_intermediate_size") if experts else None
    inner = int(of_experts or config["intermediate_size"])
    attention = ((heads * head, width), (keys, width), (keys, width), (width, heads * head))
    part = ((inner, width), (inner, width), (width, inner))
    return Sizes(
        int(config["num_hidden_layers"]),
        width,
        (width, heads * head, *(width, inner) * max(experts, 1)),
        attention + part * max(experts, 1),
    )


def block_bytes(sizes: Sizes, choices: Choices) -> dict[str, float]:
    """Bytes that one block sums over the ranks, and bytes of results that every rank must have."""
    whole = choices.propagates  # without propagation `fast` keeps the blocks of H on its diagonal
    moments = 4.0 * sum(channels * (channels if whole else choices.group_size) for channels in sizes.inputs)
    twice = 2.0 if choices.propagates else 0.0  # Ĥ and C of every input on both streams
    weights = sum(rows * columns for rows, columns in sizes.linears)
    return {"summed": (1.0 + twice) * moments, "results": weights * (1.0 + 8.0 / choices.group_size)}


def seconds(stages: Mapping[str, float], sizes: Sizes, choices: Choices, ranks: int) -> dict[str, float]:
    """The modelled stages on so many ranks, and `exchange`."""
    most_rows = math.ceil(choices.rows / ranks) / choices.rows
    modelled = {}
    for name, taken in stages.items():
        if name in SHARED_BY_ROWS:
            modelled[name] = taken * most_rows
        elif name in SHARED_BY_LINEAR:
            modelled[name] = taken * (choices.alone + (1.0 - choices.alone) / ranks)
        else:
            modelled[name] = taken
    sent = block_bytes(sizes, choices)
    share = (ranks - 1) / ranks
    per_block = (2.0 * share * sent["summed"] + share * sent["results"]) / choices.bytes_per_second
    modelled["exchange"] = sizes.blocks * per_block
    return modelled


def fitted_alone(one: Mapping[str, float], several: Mapping[str, float], ranks: int) -> float:
    """The share of the search that ranks do not share, by a run on one and a run on several."""
    ratio = sum(several[name] for name in SHARED_BY_LINEAR) / sum(one[name] for name in SHARED_BY_LINEAR)
    return min(1.0, max(0.0, (ratio - 1.0 / ranks) / (1.0 - 1.0 / ranks)))


def table(
    stages: Mapping[str, float], sizes: Sizes, choices: Choices, measured: Mapping[int, float], ranks: Sequence[int]
) -> str:
    """Markdown: modelled seconds, times as fast, what the exchange takes of it, and measured seconds where known."""
    lines = ["| ranks | modelled s | times as fast | exchange | measured s |", "| --- | --- | --- | --- | --- |"]
    first = sum(seconds(stages, sizes, choices, 1).values())
    for count in ranks:
        modelled = seconds(stages, sizes, choices, count)
        total = sum(modelled.values())
        known = measured.get(count)
        told = "" if known is None else f"{known:.1f}"
        lines.append(
            f"| {count} | {total:.1f} | {first / total:.2f} | {100 * modelled['exchange'] / total:.1f} % | {told} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, and what it is computed from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("timings", type=Path, help="awqkit-timings.json of a run on one rank")
    parser.add_argument("--config", type=Path, required=True, help="config.json of its model")
    parser.add_argument("--link-gb", type=float, required=True, help="GB a second that a rank sends and receives")
    parser.add_argument("--rows", type=int, default=128, help="calibration rows (default: 128)")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--no-propagation", action="store_true", help="the run was `fast`")
    parser.add_argument("--alone", type=float, default=0.0, help="share of `search` that is not shared (default: 0)")
    parser.add_argument("--measured", nargs=2, action="append", default=[], metavar=("RANKS", "FILE"))
    args = parser.parse_args()
    one = json.loads(args.timings.read_text(encoding="utf-8"))
    runs = {int(count): json.loads(Path(file).read_text(encoding="utf-8")) for count, file in args.measured}
    alone = args.alone
    if runs:
        most = max(runs)
        alone = fitted_alone(one["stages"], runs[most]["stages"], most)
    sizes = sizes_of(json.loads(args.config.read_text(encoding="utf-8")))
    choices = Choices(args.rows, args.group_size, not args.no_propagation, args.link_gb * 1e9, alone)
    sent = block_bytes(sizes, choices)
    print("A model, not a measurement: see docs/scaling.md.")
    print(f"summed per block {sent['summed'] / 1e6:.2f} MB, results {sent['results'] / 1e6:.2f} MB, alone {alone:.3f}")
    opening = max(0.0, one["seconds"] - sum(one["stages"].values()))  # the model and the plan, on every rank
    measured = {1: one["seconds"], **{count: found["seconds"] for count, found in runs.items()}}
    print(f"\n{table({'opening': opening, **one['stages']}, sizes, choices, measured, RANKS)}")


if __name__ == "__main__":
    main()
