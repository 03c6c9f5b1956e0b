"""Indifference to scaling: KL on twins of the model that compute the same function with other channel scales.

    python benchmarks/twins.py --device cuda                  full size: 128 rows, 60 windows, seeds 0 1 2
    python benchmarks/twins.py --samples 8 --windows 4 --seeds 0 --methods rtn fast     a size for two CPU cores

A twin has 2 % of the channels of every fold that awqkit finds (norms of the blocks, rows of v and of up) multiplied by
factors that are log-uniform in 4 … 30, and the columns that read them divided by the same; it is stored in float32. A
method that is indifferent to scaling reaches on the twin the KL that it reaches on the original. A seed draws the
twin's channels and the calibration rows. Each model is compared with its own float model, everything in float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bench import environment, save, write
from conditions import SEEDLESS, TESTS, Conditions, add_arguments, measure, open_conditions, recipe_of, settings_of
from torch import Tensor, nn

from awqkit.checkpoint.reader import Checkpoint
from awqkit.checkpoint.writer import CheckpointWriter, plan_layout
from awqkit.model.proof import PROOF_TOLERANCE, prove
from awqkit.model.skeleton import Skeleton
from awqkit.model.structure import BlockStructure, Fold
from awqkit.model.transformers_bridge import load_config
from awqkit.pipeline.plan import discover_blocks, make_probe

CHANNEL_SHARE = 0.02
SMALLEST, LARGEST = 4.0, 30.0  # of the factors
SAME_FUNCTION = 1e-4  # largest change of a logit, relative to the largest logit
BOUND = 1.06  # of balanced on the near text, twin ÷ original
CHECKED_WINDOWS = 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rescaled:
    """What a twin changed in one fold of one block: channel -> factor, of so many channels that are read."""

    block: int
    fold: str
    factors: dict[int, float]
    channels: int


def main() -> None:
    """Run the table; its JSON is written after every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "twins", ["rtn", "gptq", "autoawq", "fast", "balanced"])
    args = parser.parse_args()
    conditions = open_conditions(args)
    original = conditions.reference(conditions.model)
    head = {"environment": environment(conditions.device), "model": conditions.model.name}
    head["settings"] = settings_of(args)
    rows: list[dict[str, Any]] = []
    twins = []
    for seed in args.seeds:
        for method in args.methods:
            if method in SEEDLESS and seed != args.seeds[0]:
                continue
            found = measure(conditions, recipe_of(method, seed, args), seed, reference=original)
            rows.append(_say({"model": "original", "method": method, "seed": seed, **found}))
        with conditions.scratch() as scratch:
            folder = Path(scratch) / "twin"
            changed = write_twin(conditions.model, folder, seed)
            twin = conditions.reference(folder)
            twins.append(_checked(seed, changed, logit_difference(original, twin, conditions)))
            for method in args.methods:
                recipe = recipe_of(method, seed, args)
                found = measure(conditions, recipe, seed, model=folder, reference=twin)
                rows.append(_say({"model": "twin", "method": method, "seed": seed, **found}))
        write(args.name, {**head, "twins": twins, "table": compare(rows), "rows": rows}, args.results)
    table = compare(rows)
    print("\n".join(table_lines(table)))
    save(args.name, {**head, "twins": twins, "table": table, "rows": rows}, args.results)


def write_twin(model: Path, out: Path, seed: int) -> list[Rescaled]:
    """Write a twin of the folder `model` to the new folder `out`, in float32, and return what was changed.

    The folds are those that awqkit finds, and proves on each block. Raises AwqkitError.
    """
    source = Checkpoint.open(model)
    skeleton = Skeleton(load_config(model), source)
    probe = make_probe(skeleton, CPU)
    structures = discover_blocks(skeleton, probe, CPU)
    generator = torch.Generator().manual_seed(seed)
    specs = [
        replace(stored.spec, dtype=torch.float32) if stored.spec.dtype.is_floating_point else stored.spec
        for stored in source.tensors.values()
    ]
    changed, rest = [], set(source.names)
    with CheckpointWriter(out, plan_layout(specs), False) as writer:
        for index, structure in enumerate(structures):
            block, path = skeleton.load_block(index, CPU), skeleton.block_path(index)
            run = probe.runner(block, index)
            exact = [
                fold for fold in structure.folds
                if prove(block, run, probe.hidden, structure, (fold,)) <= PROOF_TOLERANCE
            ]  # fmt: skip
            drawn = [(fold, draw_factors(fold, generator)) for fold in exact]
            for name, value in rescale(dict(block.named_parameters()), structure, drawn).items():
                disk = skeleton.disk_name(f"{path}.{name}")
                assert disk is not None
                writer.write(disk, value)
                rest.remove(disk)
            changed += [_rescaled(index, fold, factor) for fold, factor in drawn]
            skeleton.release_block(index)
        for name in sorted(rest):
            value = source.read(name)
            writer.write(name, value.to(torch.float32) if value.is_floating_point() else value)
        config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
        writer.write_json("config.json", {**config, "dtype": "float32"})
        for name in source.other_files():
            writer.copy_file(model / name, name)
        writer.commit()
    return changed


def draw_factors(fold: Fold, generator: torch.Generator) -> Tensor:
    """Factors `[producer channels]`, float64: log-uniform for 2 % of the channels that a consumer reads, else 1.

    At least one channel is drawn.
    """
    channels = read_channels(fold)
    count = max(1, round(CHANNEL_SHARE * len(channels)))
    chosen = channels[torch.randperm(len(channels), generator=generator)[:count]]
    position = torch.rand(count, generator=generator, dtype=torch.float64)
    factor = torch.ones(fold.num_channels, dtype=torch.float64)
    factor[chosen] = torch.exp(math.log(SMALLEST) + position * math.log(LARGEST / SMALLEST))
    return factor


def read_channels(fold: Fold) -> Tensor:
    """The producer channels that some consumer reads, int64, ascending."""
    return fold.read.nonzero().flatten()


def rescale(
    parameters: Mapping[str, Tensor], structure: BlockStructure, drawn: Sequence[tuple[Fold, Tensor]]
) -> dict[str, Tensor]:
    """The parameters of a block that change, in float32: producers' channels × factor, consumers' columns ÷ factor.

    The products are made in float64 and rounded once, since a weight may be in two folds.
    """
    changed: dict[str, Tensor] = {}

    def current(name: str) -> Tensor:
        return changed.get(name, parameters[name].detach().to(torch.float64))

    for fold, factor in drawn:
        rows = structure.linear(fold.producer_linear) if fold.producer_linear else None
        for name in fold.producer:
            turned = rows is not None and rows.transposed and name == rows.weight
            value = current(name).t() if turned else current(name)
            along = factor.reshape(-1, *(1,) * (value.dim() - 1))
            scaled = (1.0 + value) * along - 1.0 if name == fold.offset else value * along
            changed[name] = scaled.t() if turned else scaled
        for consumer, channel_of in fold.channel_of.items():
            view = structure.linear(consumer)
            columns = torch.where(channel_of >= 0, factor[channel_of.clamp(min=0)], torch.ones_like(factor[:1]))
            changed[view.weight] = view.oriented(view.oriented(current(view.weight)) / columns)
    return {name: value.to(torch.float32) for name, value in changed.items()}


def logit_difference(original: nn.Module, twin: nn.Module, conditions: Conditions) -> float:
    """The largest change of a logit over a few windows of each text, relative to the largest logit."""
    worst = 0.0
    with torch.inference_mode():
        for windows in conditions.windows.values():
            ids = windows[:CHECKED_WINDOWS].to(conditions.device)
            expected, found = (model(ids, use_cache=False).logits for model in (original, twin))
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def compare(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per method and text the mean KL on originals and twins, their quotient, and both as multiples of RTN's on the
    original.

    The quotient is the mean of the seeds' own quotients. A method that draws nothing has one row on the original,
    which stands for every seed.
    """
    originals: dict[tuple[str, int], Mapping[str, Any]] = {}
    for row in rows:
        if row["model"] == "original":
            originals[row["method"], row["seed"]] = row
    first: dict[str, Mapping[str, Any]] = {}
    for (method, _), row in originals.items():
        first.setdefault(method, row)
    table = []
    for method in first:
        twins = [row for row in rows if row["model"] == "twin" and row["method"] == method]
        pairs = [(originals.get((method, row["seed"]), first[method]), row) for row in twins]
        line: dict[str, Any] = {"method": method, "seeds": len(pairs)}
        for name in TESTS:
            key = f"kl_{name}"
            quotients = [twin[key] / plain[key] for plain, twin in pairs]
            line[f"{key}_original"] = mean(plain[key] for plain, _ in pairs)
            line[f"{key}_twin"] = mean(twin[key] for _, twin in pairs)
            line[f"twin_to_original_{name}"] = mean(quotients)
            line[f"twin_to_original_{name}_by_seed"] = quotients
            if "rtn" in first:
                for model in ("original", "twin"):
                    line[f"{key}_{model}_to_rtn"] = line[f"{key}_{model}"] / first["rtn"][key]
        table.append(line)
    return table


def table_lines(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table for people; near text first, since its quotient is the one that binds."""
    lines = ["KL on the original, on its twins, their quotient, and both ÷ RTN's on the original (mean of seeds)"]
    for name in ("near", "far"):
        lines.append(f"{name:14} {'original':>9} {'twin':>9} {'quotient':>9} {'orig÷RTN':>9} {'twin÷RTN':>9}")
        for line in table:
            key = f"kl_{name}"
            to_rtn = [line.get(f"{key}_{model}_to_rtn") for model in ("original", "twin")]
            lines.append(
                f"{line['method']:14} {line[f'{key}_original']:9.4f} {line[f'{key}_twin']:9.4f} "
                f"{line[f'twin_to_original_{name}']:9.3f} "
                + " ".join(f"{'-' if value is None else format(value, '.3f'):>9}" for value in to_rtn)
            )
    for line in table:
        if line["method"] == "balanced":
            quotient = line["twin_to_original_near"]
            kept = "kept" if quotient <= BOUND else "not kept"
            lines.append(f"balanced, near: {quotient:.3f} × its KL on the original, bound {BOUND}: {kept}")
    return lines


def _rescaled(block: int, fold: Fold, factor: Tensor) -> Rescaled:
    changed = {channel: float(factor[channel]) for channel in (factor != 1.0).nonzero().flatten().tolist()}
    return Rescaled(block, fold.label, changed, len(read_channels(fold)))


def _checked(seed: int, changed: Sequence[Rescaled], difference: float) -> dict[str, Any]:
    """What the JSON says of a twin. Ends the run where it is another function."""
    count = sum(len(part.factors) for part in changed)
    print(
        f"twin {seed}: {count} channels in {len(changed)} folds, logits differ by {difference:.1e} relative", flush=True
    )
    if not difference <= SAME_FUNCTION:
        raise SystemExit(f"the twin is another function: its logits differ by more than {SAME_FUNCTION}")
    folds = sorted({part.fold for part in changed})
    return {"seed": seed, "logit_difference": difference, "folds": folds, "channels_rescaled": count}


def _say(row: dict[str, Any]) -> dict[str, Any]:
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
