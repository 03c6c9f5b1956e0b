"""KL and perplexity of packed and loaded checkpoints on SmolLM2-135M, several calibration seeds, as ratios to RTN.

    python benchmarks/quality.py --device cuda                full size: 128 rows, 60 windows, seeds 0 1 2
    python benchmarks/quality.py --samples 16 --windows 16 --seeds 0       a size for two CPU cores

Each row of the table is `awqkit.quantize` to a folder, then `evaluate` of that folder against the original, both in
float32. far: WikiText-2 test, near: books like the calibration text.
"""

from __future__ import annotations

import argparse
from statistics import mean
from typing import Any

from bench import environment, save
from conditions import SEEDLESS, TESTS, add_arguments, measure, open_conditions, recipe_of, settings_of


def main() -> None:
    """Run the table and write its JSON."""
    args = _arguments()
    conditions = open_conditions(args)
    original = conditions.load(conditions.model)
    base = {name: result.perplexity for name, result in conditions.score(original).items()}
    print(f"original: perplexity far {base['far']:.3f}, near {base['near']:.3f}", flush=True)
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        for seed in args.seeds[:1] if method in SEEDLESS else args.seeds:
            found = measure(conditions, recipe_of(method, seed, args), seed, reference=original)
            rows.append({"method": method, "seed": seed, **found})
            print(rows[-1], flush=True)
    table = _table(rows, base)
    print("\n".join(_lines(table)))
    result = {"environment": environment(conditions.device), "model": conditions.model.name}
    result |= {"settings": settings_of(args), "original": base}
    save(args.name, {**result, "table": table, "rows": rows}, args.results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "quality", ["rtn", "autoawq", "awq", "fast"])
    return parser.parse_args()


def _table(rows: list[dict[str, Any]], base: dict[str, float]) -> list[dict[str, Any]]:
    plain = next((row for row in rows if row["method"] == "rtn"), None)
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        line: dict[str, Any] = {
            "method": method,
            "seeds": len(own),
            "seconds": round(mean(row["seconds"] for row in own), 2),
        }
        for name in TESTS:
            line[f"kl_{name}"] = mean(row[f"kl_{name}"] for row in own)
            line[f"perplexity_{name}"] = mean(row[f"perplexity_{name}"] for row in own)
            if plain is not None:
                gap = plain[f"perplexity_{name}"] - base[name]
                line[f"kl_ratio_{name}"] = line[f"kl_{name}"] / plain[f"kl_{name}"]
                line[f"gap_closed_{name}"] = (plain[f"perplexity_{name}"] - line[f"perplexity_{name}"]) / gap
        table.append(line)
    return table


def _lines(table: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'method':14} {'KL far':>8} {'÷ RTN':>7} {'KL near':>8} {'÷ RTN':>7} {'ppl far':>8} {'ppl near':>8} {'s':>7}"
    ]
    for line in table:
        lines.append(
            f"{line['method']:14} {line['kl_far']:8.4f} {line.get('kl_ratio_far', 0):7.3f} {line['kl_near']:8.4f} "
            f"{line.get('kl_ratio_near', 0):7.3f} {line['perplexity_far']:8.3f} {line['perplexity_near']:8.3f} "
            f"{line['seconds']:7.1f}"
        )
    return lines


if __name__ == "__main__":
    main()
