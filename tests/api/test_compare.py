"""`compare` block by block says what `quantize` and then `evaluate` of the written folder say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_folders import add_tokenizer, change_config, make_model

from awqkit import Recipe, RunOptions, compare, evaluate, quantize
from awqkit.api import refuse
from awqkit.api.compare import Comparison, ComparisonRow
from awqkit.api.contenders import METHODS, contender_recipes
from awqkit.errors import CalibrationError, CheckpointError, FormatError, NoRoomError, UsageError
from awqkit.events import BlockFinished, Caution, Event, Notice, TaskStarted
from awqkit.pipeline.tune import STEPPING

SIZES = {"samples": 9, "seq_len": 32, "seed": 3}
CPU = RunOptions(device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two blocks, and two texts beside it."""
    root = tmp_path_factory.mktemp("compared")
    make_model(root / "model", hidden_size=64, intermediate_size=96, head_dim=16)
    words = ["norm", "scale", "group", "weight", "block", "code", "grid", "text", "row", "token", "one"]
    for name, step in (("calibration.txt", 3), ("far.txt", 7), ("near.txt", 5)):
        (root / name).write_text(" ".join(words[(i * step + i // 11) % len(words)] for i in range(2500)))
    return root


def _compare(folder: Path, methods: tuple[str, ...], **choices: object) -> Comparison:
    given = {"text": folder / "far.txt", "windows": 5, "options": CPU, "calibration": folder / "calibration.txt"}
    return compare(folder / "model", **{**given, **SIZES, "methods": methods, **choices})


def _row(found: Comparison, method: str, bits: int) -> ComparisonRow:
    (row,) = (row for row in found.rows if (row.method, row.bits) == (method, bits))
    return row


def _falling() -> Callable[..., float]:
    """A measure that finds every tuning a success."""
    found = itertools.count(100, -1)
    return lambda *arguments: float(next(found))


WHOLE = ("rtn", "gptq", "smoothquant", "awq", "awq-clip", "fast", "balanced", "best")


@pytest.fixture(scope="module")
def everything(folder: Path) -> Comparison:
    """All methods at once, in an order in which shared streams would show who moved them."""
    return _compare(folder, ("best", *METHODS), bits=(4, 3))


@pytest.mark.parametrize("method", WHOLE)
def test_a_row_is_what_quantize_and_evaluate_say(
    folder: Path, everything: Comparison, method: str, tmp_path: Path
) -> None:
    (named,) = contender_recipes((method,), (4,), **SIZES)
    done = quantize(
        folder / "model", tmp_path / "out", named.recipe, calibration=folder / "calibration.txt", options=CPU
    )
    scores = evaluate(
        tmp_path / "out", folder / "far.txt", reference=folder / "model", seq_len=32, max_windows=5, options=CPU
    )
    row = _row(everything, method, named.recipe.bits)
    rounds_inputs = method == "smoothquant"  # one that lies on a tie may fall to either side
    assert row.perplexity == pytest.approx(scores.perplexity, rel=1e-4 if rounds_inputs else 1e-5)
    assert row.kl == pytest.approx(scores.kl, rel=0.05 if rounds_inputs else 2e-3)
    assert row.top1_agreement == pytest.approx(scores.top1_agreement, abs=1 / scores.tokens + 1e-9)
    assert row.bits_per_weight == pytest.approx(done.report.bits_per_weight, abs=1e-4)
    assert row.group_size == done.report.group_size
    assert row.num_fallbacks == len(done.report.fallbacks)
    assert row.kl > 1e-7


def test_what_tuning_moved_is_measured(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = replace(STEPPING["groups"], learning_rate=0.02)  # a few steps must be seen after rounding
    monkeypatch.setitem(STEPPING, "groups", fast)
    monkeypatch.setattr("awqkit.pipeline.tune._mean_kl", _falling())
    (named,) = contender_recipes(("best",), (4,), **SIZES)
    (row,) = _compare(folder, ("best",)).rows
    done = quantize(
        folder / "model", tmp_path / "out", named.recipe, calibration=folder / "calibration.txt", options=CPU
    )
    assert done.report.tuning is not None
    assert done.report.tuning.fallback is None
    scores = evaluate(
        tmp_path / "out", folder / "far.txt", reference=folder / "model", seq_len=32, max_windows=5, options=CPU
    )
    assert row.kl == pytest.approx(scores.kl, rel=2e-3)
    assert row.perplexity == pytest.approx(scores.perplexity, rel=1e-5)


def test_the_original_is_the_first_row_and_as_it_evaluates(folder: Path, everything: Comparison) -> None:
    first, *others = everything.rows
    scores = evaluate(folder / "model", folder / "far.txt", seq_len=32, max_windows=5, options=CPU)
    assert (first.method, first.bits, first.bits_per_weight, first.kl, first.seconds) == ("fp", 16, 16, None, None)
    assert first.perplexity == pytest.approx(scores.perplexity, rel=1e-6)
    assert "fp" not in {row.method for row in others}


def test_every_method_has_a_row_for_every_width_and_smoothquant_its_own(everything: Comparison) -> None:
    asked = ("best", "rtn", "gptq", "awq", "awq-clip", "fast", "balanced")
    expected = [("fp", 16), *((m, 4) for m in asked), *((m, 3) for m in asked), ("smoothquant", 8)]
    assert [(row.method, row.bits) for row in everything.rows] == expected
    assert all(row.seconds > 0 for row in everything.rows[1:])
    assert _row(everything, "rtn", 3).kl > 2 * _row(everything, "rtn", 4).kl
    assert {"observe", "evaluate", "end-loss"} <= everything.shared_seconds.keys()


def test_what_is_compared_beside_it_changes_no_row(folder: Path, everything: Comparison) -> None:
    alone = _compare(folder, ("balanced",))
    (row,) = alone.rows
    assert row.kl == _row(everything, "balanced", 4).kl
    assert row.perplexity == _row(everything, "balanced", 4).perplexity


def test_two_texts_are_measured_apart(folder: Path) -> None:
    both = _compare(folder, ("fp", "rtn"), text=[folder / "far.txt", folder / "near.txt"])
    assert both.windows == {"far.txt": 5, "near.txt": 5}
    assert [(row.text, row.method) for row in both.rows] == [
        (text, method) for text in ("far.txt", "near.txt") for method in ("fp", "rtn")
    ]
    for name in ("far.txt", "near.txt"):
        alone = _compare(folder, ("fp", "rtn"), text=folder / name)
        assert [row.perplexity for row in alone.rows] == [row.perplexity for row in both.rows if row.text == name]
    assert both.rows[0].perplexity != both.rows[2].perplexity


def test_methods_that_look_at_no_text_need_none(folder: Path) -> None:
    found = _compare(folder, ("rtn",), calibration=folder / "no such file.txt")
    assert found.calibration is None
    json.dumps(found.to_json())


def test_a_method_that_the_model_cannot_have_is_skipped_with_a_line(folder: Path) -> None:
    events: list[Event] = []
    found = _compare(folder, ("rtn", "smoothquant"), group_size=128, emit=events.append)
    assert [row.method for row in found.rows] == ["smoothquant"]
    (line,) = found.skipped
    assert line.startswith("rtn, 4 bits skipped: --group-size 128 does not divide the 64 inputs of model.layers.0.")
    assert Caution(line) in events
    with pytest.raises(FormatError, match="--group-size 128 does not divide"):
        _compare(folder, ("rtn",), group_size=128)


def test_a_width_that_no_format_holds_is_skipped(folder: Path) -> None:
    found = _compare(folder, ("rtn",), bits=(5, 8))
    assert [row.bits for row in found.rows] == [8]
    assert "rtn, 5 bits skipped: " in found.skipped[0]


def test_progress_names_every_block_and_the_text(folder: Path) -> None:
    events: list[Event] = []
    _compare(folder, ("fp", "fast", "best"), emit=events.append)
    assert [event.index for event in events if isinstance(event, BlockFinished)] == [0, 1]
    started = [event.name for event in events if isinstance(event, TaskStarted)]
    assert started[:3] == ["step of the model's own text", "gradient step", "block"]
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert any(text.startswith("5 of ") and text.endswith("far.txt") for text in notices)
    assert any(text.startswith("calibration: 9 rows and 1 held out") for text in notices)


def test_measuring_on_the_calibration_text_is_worth_a_caution(folder: Path) -> None:
    events: list[Event] = []
    _compare(folder, ("rtn",), text=folder / "calibration.txt", emit=events.append)
    assert any(isinstance(event, Caution) and "is the calibration text, too" in event.text for event in events)


@pytest.mark.parametrize(
    ("choices", "error", "line"),
    [
        ({"methods": ("awk",)}, UsageError, "method 'awk' is not known; it takes one or more of fp, rtn, gptq, "),
        ({"methods": ("fp",)}, UsageError, "the original alone is nothing to compare"),
        ({"bits": (9,)}, UsageError, "bits is 9; it takes a whole number from 2 to 8"),
        ({"bits": ()}, UsageError, "no bit width was given"),
        ({"text": ()}, UsageError, "no text to measure on was given"),
        ({"text": "no.txt"}, CalibrationError, "no.txt: no such file"),
        ({"seq_len": 100000}, CalibrationError, "far.txt: .* do not fill one window of 100000"),
        ({"samples": 5000}, CalibrationError, "calibration.txt: .* 5000 rows of 32 tokens need"),
    ],
)
def test_wrong_use_is_one_line_before_work(
    folder: Path, choices: dict[str, object], error: type[Exception], line: str
) -> None:
    events: list[Event] = []
    with pytest.raises(error, match=line):
        _compare(folder, choices.pop("methods", ("fp", "rtn", "fast")), emit=events.append, **choices)
    assert not [event for event in events if isinstance(event, TaskStarted)]


def test_a_text_given_twice_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="was given twice"):
        _compare(folder, ("rtn",), text=[folder / "far.txt", folder / "far.txt"])


@pytest.mark.parametrize(("free", "line"), [(1e5, "its weights in float32"), (3e5, "one calibration row")])
def test_a_block_that_does_not_fit_is_refused(
    free: float, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refuse, "free_bytes", lambda device: free)
    with pytest.raises(NoRoomError, match=line):
        _compare(folder, ("rtn", "gptq"), bits=(4,))


def test_models_that_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    out = quantize(folder / "model", tmp_path / "out", Recipe.method("rtn"), options=CPU).directory
    with pytest.raises(CheckpointError, match="the model is quantized already"):
        compare(out, folder / "far.txt", options=CPU)
    bare = make_model(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        compare(bare, folder / "far.txt", options=CPU)
    small = make_model(tmp_path / "small", vocab_size=8)
    add_tokenizer(small)
    with pytest.raises(CalibrationError, match=r"text: token id .* lies outside the model's vocabulary of 8"):
        compare(small, folder / "far.txt", seq_len=32, options=CPU)
    change_config(small, "num_hidden_layers", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="is missing"):
        compare(small, folder / "far.txt", options=CPU)


def test_weights_of_float32_are_named_as_such(folder: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model", dtype=torch.float32)
    found = compare(tmp_path / "model", folder / "far.txt", methods=("fp", "rtn"), seq_len=32, windows=2, options=CPU)
    assert found.rows[0].bits == 32
