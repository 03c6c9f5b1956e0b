"""The table of the AWQ and GPTQ papers for any model, beside the figures that were published for Llama-2-7B.

    python benchmarks/wikitext2.py meta-llama/Llama-2-7b-hf --device cuda
    python benchmarks/wikitext2.py FOLDER --text wiki.txt --calibration c4.txt      where no hub is in reach

The protocol: the rows of WikiText-2's raw test set joined by two newlines and encoded as one text, non-overlapping
windows of 2048 tokens, perplexity over all of them; 128 × 2048 tokens of C4 for calibration. Windows are cut from the
stream as the papers' code cuts them: what the tokenizer puts before a text stands once, before the first. Calibration
rows are made as awqkit always makes them, each with its start tokens. What differs from the protocol, and what the
model cannot hold, is said at the end and in the JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench import DATA, RESULTS, environment, save
from conditions import METHODS, W8A8, calibration_rows, format_of, settings_of, whole_text
from published import FULL_PRECISION, LLAMA2_7B, SOURCES, published_text
from torch import Tensor

from awqkit import Recipe, RunOptions, quantize
from awqkit.api.device import choose_device
from awqkit.api.evaluate import DTYPES, score, text_windows
from awqkit.calibration.rows import cut_windows
from awqkit.calibration.sources import Documents, read_documents
from awqkit.checkpoint.hub import resolve_model
from awqkit.checkpoint.reader import Checkpoint
from awqkit.errors import AwqkitError, CalibrationError, CheckpointError
from awqkit.evaluation.load import load_checkpoint
from awqkit.model.skeleton import Skeleton
from awqkit.model.transformers_bridge import TextEncoder, load_config, load_text_encoder

WIKITEXT2, C4 = ("Salesforce/wikitext", "wikitext-2-raw-v1"), "allenai/c4:en"
SEQ_LEN, SAMPLES = 2048, 128
STAND_IN_GROUPS = (64, 32)  # in this order where a group of the papers does not divide the model's widths


@dataclass(frozen=True)
class Setting:
    """Bits and group size."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"INT{self.bits} g{self.group_size}"


@dataclass(frozen=True)
class Row:
    """One figure, or why there is none. setting: of the papers, empty for full precision. run_as: what was run."""

    setting: str
    run_as: str
    method: str
    perplexity: float | None = None
    seconds: float | None = None
    not_run: str | None = None


SETTINGS = (Setting(4, 128), Setting(4, 32), Setting(3, 128))
OWN_METHODS = ["rtn", "gptq", "awq", "fast", "balanced", "best"]


def main() -> None:
    """Run the table and write its JSON."""
    args = _arguments()
    device, notes = choose_device(args.device), []
    try:
        model = resolve_model(args.model)
    except CheckpointError as error:
        raise SystemExit(f"not run: {error}") from error
    name, encoder = Path(args.model).name, load_text_encoder(model)
    notes += model_notes(name)
    seq_len = fitting_length(args.seq_len, model, notes)
    windows = cut_evaluation(_evaluation_text(args.text, notes), encoder, seq_len, args.windows, notes)
    rows = _calibration(args, encoder, seq_len, notes)

    def perplexity_of(folder: Path) -> float:
        loaded = load_checkpoint(Checkpoint.open(folder), getattr(torch, args.dtype), device)
        return score(loaded, windows, 0, None, device).perplexity

    table = [Row("", "", "fp", perplexity_of(model))]
    print(table[0], flush=True)
    for setting, run_as in held_settings(linear_widths(model), notes):
        for method in args.methods if run_as else ():
            table.append(_measured(args, model, (setting, run_as), method, rows, perplexity_of))
            print(table[-1], flush=True)
    print("\n".join([*table_lines(table, name), *(f"not the papers' protocol: {note}" for note in notes)]))
    result = {"environment": environment(device), "model": name, "settings": settings_of(args) | {"model": name}}
    result |= {"windows": list(windows.shape), "not_the_papers_protocol": notes}
    published = {"model": "Llama-2-7B", "figures": LLAMA2_7B, "sources": SOURCES}
    save(args.name, {**result, "published": published, "rows": [asdict(row) for row in table]}, args.results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weight_only = [name for name in METHODS if name not in W8A8]
    parser.add_argument("model", help="a checkpoint folder or a hub id")
    parser.add_argument("--text", type=Path, help="a file with the joined test text (default: from the hub)")
    parser.add_argument("--calibration", help=".txt, .jsonl, builtin or a hub dataset (default: C4 from the hub)")
    parser.add_argument("--methods", nargs="+", default=OWN_METHODS, choices=weight_only, metavar="METHOD")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--windows", type=int, help="only the first so many windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="in which the models are evaluated")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="wikitext2", help="file name of the result")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def model_notes(name: str) -> list[str]:
    """What to say where the model is not the one of the published figures."""
    if "llama-2-7b" in name.lower():
        return []
    return [f"Llama-2-7B was not run; the model is {name}, so gaps to full precision compare, perplexities do not"]


def fitting_length(asked: int, model: Path, notes: list[str]) -> int:
    """The window length asked for, or the longest that the model was made for."""
    positions = getattr(load_config(model).get_text_config(), "max_position_embeddings", None) or asked
    seq_len = min(asked, positions)
    if seq_len != SEQ_LEN:
        why = f": the model has {positions} positions" if seq_len < asked else ""
        notes.append(f"windows and calibration rows of {seq_len} tokens, not {SEQ_LEN}{why}")
    return seq_len


def joined(rows: Iterable[str]) -> str:
    """The rows of WikiText-2, empty ones too, joined as the papers' code joins them.

    >>> joined(["", " = Title = \\n", ""])
    '\\n\\n = Title = \\n\\n\\n'
    """
    return "\n\n".join(rows)


def cut_evaluation(text: str, encoder: TextEncoder, seq_len: int, limit: int | None, notes: list[str]) -> Tensor:
    """The windows `[windows, seq_len]` of one text that begins with the start tokens. Raises CalibrationError."""
    ids = torch.tensor([*encoder.start_tokens, *encoder.encode(text)], dtype=torch.int64)
    windows = cut_windows(ids, seq_len)
    if not len(windows):
        raise CalibrationError(
            f"the test text has {len(ids)} tokens, less than one window of {seq_len}; give more text"
        )
    if limit is not None and limit < len(windows):
        notes.append(f"the first {limit} of {len(windows)} windows")
    return windows[:limit]


def _evaluation_text(file: Path | None, notes: list[str]) -> str:
    if file is None:
        try:
            from datasets import load_dataset

            return joined(load_dataset(*WIKITEXT2, split="test")["text"])
        except Exception as error:  # not installed, offline, moved: `datasets` has no common class
            file = DATA / "wikitext2_test.txt"
            notes.append(f"WikiText-2 raw cannot be read from the hub ({_first_line(error)}); {file.name} in its place")
    else:
        notes.append(f"the test text is {file.name}, taken as joined already")
    if not file.is_file():
        raise SystemExit(f"not run: {file} is not here; give the joined WikiText-2 test text with --text FILE")
    return whole_text(file)


def _calibration(args: argparse.Namespace, encoder: TextEncoder, seq_len: int, notes: list[str]) -> list[list[int]]:
    documents = _calibration_documents(args.calibration, notes)
    windows = text_windows(documents.texts, encoder, seq_len, None, documents.label).all
    samples = min(args.samples, max(1, len(windows) * 8 // 9))  # an eighth more is held out
    if samples != SAMPLES:
        notes.append(f"{samples} calibration rows, not {SAMPLES}")
    return calibration_rows(windows, samples, args.seed)


def _calibration_documents(source: str | None, notes: list[str]) -> Documents:
    if source is not None:
        notes.append(f"the calibration text is {Path(source).name}")
        return read_documents(source)
    try:
        return read_documents(C4)
    except CalibrationError as error:
        file = DATA / "books_calibration.txt"
        notes.append(f"C4 cannot be read from the hub; {file.name} in its place")
        if not file.is_file():
            raise SystemExit(f"not run: {error}; or give calibration text with --calibration FILE") from error
        return read_documents(str(file))


def linear_widths(model: Path) -> dict[str, int]:
    """The number of inputs of every matrix in the model's blocks, by its name in the model."""
    skeleton = Skeleton(load_config(model), Checkpoint.open(model))
    shapes, blocks = skeleton.shapes_on_disk(), [f"{skeleton.block_path(i)}." for i in range(skeleton.num_blocks)]
    named = {name: shapes.get(skeleton.disk_name(name) or "", ()) for name in skeleton.names()}
    return {name: shape[1] for name, shape in named.items() if len(shape) == 2 and name.startswith(tuple(blocks))}


def held_settings(widths: dict[str, int], notes: list[str]) -> list[tuple[Setting, Setting | None]]:
    """The papers' settings, each with what is run for it: itself, or smaller groups that divide every width, or None.

    A stand-in that is one of the papers' own settings is not run twice.
    """
    settings: list[tuple[Setting, Setting | None]] = []
    for setting in SETTINGS:
        name = next((name for name, width in widths.items() if width % setting.group_size), None)
        if name is None:
            settings.append((setting, setting))
            continue
        sizes = [size for size in STAND_IN_GROUPS if all(width % size == 0 for width in widths.values())]
        choices = [Setting(setting.bits, size) for size in sizes if size < setting.group_size]
        run_as = next((choice for choice in choices if choice not in SETTINGS), None)
        why = f"{setting.group_size} does not divide the {widths[name]} inputs of {name}"
        notes.append(f"{setting} was not run: {why}; {run_as or 'nothing'} in its place")
        settings.append((setting, run_as))
    return settings


def recipe_for(method: str, setting: Setting, seed: int) -> Recipe:
    """The method at these bits and groups, in the format that holds them. Raises UsageError."""
    choices = {"bits": setting.bits, "group_size": setting.group_size, "format": format_of(setting.bits), "seed": seed}
    return Recipe.from_choices({**METHODS[method], **choices})


def _measured(
    args: argparse.Namespace,
    model: Path,
    setting: tuple[Setting, Setting],
    method: str,
    rows: list[list[int]],
    perplexity_of: Callable[[Path], float],
) -> Row:
    asked, run_as = map(str, setting)
    try:
        recipe = recipe_for(method, setting[1], args.seed)
        with tempfile.TemporaryDirectory() as scratch:
            began = time.monotonic()
            options = RunOptions(device=args.device)
            done = quantize(model, Path(scratch) / "out", recipe, calibration=rows, options=options)
            seconds = round(time.monotonic() - began, 2)
            return Row(asked, run_as, method, perplexity_of(done.directory), seconds)
    except AwqkitError as error:
        return Row(asked, run_as, method, not_run=_first_line(error))


def table_lines(table: Sequence[Row], name: str) -> list[str]:
    """The table for people: perplexity and gap to full precision, beside what was published for Llama-2-7B."""
    full = table[0].perplexity
    assert full is not None
    lines = [
        f"{'':14} {name + ' (above fp)':>28}   Llama-2-7B, published",
        f"{'fp':14} {full:19.3f} {'':8}   {FULL_PRECISION}",
    ]
    for setting, figures in LLAMA2_7B.items():
        rows = [row for row in table if row.setting == setting]
        instead = "" if not rows or rows[0].run_as == setting else f", here {rows[0].run_as}"
        lines.append(f"{setting}{instead}")
        ours = {row.method: row for row in rows}
        for method in [*ours, *(method for method in figures if method not in ours)]:
            beside = published_text(figures.get(method, {}))
            lines.append(f"  {method:12} {_figure(ours.get(method), full):>28}   {beside}")
        for reason in dict.fromkeys(row.not_run for row in rows if row.not_run):
            without = ", ".join(row.method for row in rows if row.not_run == reason)
            lines.append(f"  not run, {without}: {reason}")
        if not figures:
            lines.append("  no figure of this setting in the papers")
    return lines


def _figure(row: Row | None, full: float) -> str:
    if row is None or row.perplexity is None:
        return "not run" if row else "-"
    return f"{row.perplexity:.3f} ({100 * (row.perplexity / full - 1):+6.1f} %)"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    main()
