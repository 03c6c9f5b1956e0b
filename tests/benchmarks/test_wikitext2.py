"""The pure parts of the papers' table: joining, windows, what a model can hold, and what is printed."""

from __future__ import annotations

import doctest
from pathlib import Path

import published
import pytest
import torch
import wikitext2
from published import LLAMA2_7B, SOURCES
from tiny_models import save_tiny, tiny_model
from wikitext2 import Row, Setting, cut_evaluation, fitting_length, held_settings, joined, linear_widths, table_lines

from awqkit.errors import CalibrationError
from awqkit.evaluation.evaluate import evaluate_windows
from awqkit.model.transformers_bridge import TextEncoder


def encoder(*start: int) -> TextEncoder:
    """One token a character."""
    return TextEncoder(lambda texts: [[ord(letter) for letter in text] for text in texts], start, None)


@pytest.mark.parametrize("module", [published, wikitext2], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def test_rows_are_joined_by_two_newlines_and_empty_ones_count() -> None:
    assert joined(["a", "", "b"]) == "a\n\n\n\nb"


def test_windows_are_cut_from_one_stream_that_begins_with_the_start_tokens_once() -> None:
    notes: list[str] = []
    windows = cut_evaluation("abcdefgh", encoder(1, 2), 4, None, notes)
    assert windows.tolist() == [[1, 2, ord("a"), ord("b")], [ord(letter) for letter in "cdef"]]  # g, h are left over
    assert notes == []


def test_fewer_windows_than_the_text_has_are_said() -> None:
    notes: list[str] = []
    assert len(cut_evaluation("abcdefgh", encoder(), 2, 3, notes)) == 3
    assert notes == ["the first 3 of 4 windows"]


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(CalibrationError, match="3 tokens, less than one window of 4"):
        cut_evaluation("abc", encoder(), 4, None, [])


def test_perplexity_is_that_of_the_papers_code() -> None:
    """Their code: mean cross entropy of each window's shifted tokens, times its length, summed; exp of sum ÷ tokens."""
    model = tiny_model("llama")
    windows = cut_evaluation("The quick brown fox jumps over the lazy dog", encoder(1), 16, None, [])
    losses = []
    for window in windows:
        logits = model(window[None]).logits[0, :-1].detach()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]) * 16)
    expected = torch.exp(torch.stack(losses).sum() / (len(windows) * 16))
    ours = evaluate_windows(model, windows, 0, None, torch.device("cpu"), lambda done: None).perplexity
    assert ours == pytest.approx(float(expected), rel=1e-5)


def test_widths_of_a_model_are_those_of_the_matrices_in_its_blocks(tmp_path: Path) -> None:
    widths = linear_widths(save_tiny(tiny_model("llama"), tmp_path / "model"))
    assert set(widths.values()) == {64, 96}
    assert widths["model.layers.1.mlp.down_proj.weight"] == 96
    assert not [name for name in widths if not name.startswith("model.layers.")]


def test_windows_are_no_longer_than_the_model_allows(tmp_path: Path) -> None:
    notes: list[str] = []
    assert fitting_length(2048, save_tiny(tiny_model("llama"), tmp_path / "model"), notes) == 128
    assert notes == ["windows and calibration rows of 128 tokens, not 2048: the model has 128 positions"]


@pytest.mark.parametrize(
    ("width", "run"),
    [
        (4096, ["INT4 g128", "INT4 g32", "INT3 g128"]),
        (576, ["INT4 g64", "INT4 g32", "INT3 g64"]),
        (96, [None, "INT4 g32", "INT3 g32"]),  # INT4 g32 is a setting of its own already
        (40, [None, None, None]),
    ],
)
def test_groups_that_do_not_divide_a_width_have_a_stand_in_or_are_left_out(width: int, run: list[str | None]) -> None:
    notes: list[str] = []
    settings = held_settings({"narrow": width, "wide": 8192}, notes)
    assert [asked for asked, _ in settings] == [Setting(4, 128), Setting(4, 32), Setting(3, 128)]
    assert [run_as and str(run_as) for _, run_as in settings] == run
    changed = [asked for asked, run_as in settings if run_as != asked]
    assert len(notes) == len(changed)
    assert all(
        f"{asked} was not run" in note and str(width) in note for asked, note in zip(changed, notes, strict=True)
    )


def test_the_table_has_every_figure_beside_its_published_one() -> None:
    table = [
        Row("", "", "fp", 20.0),
        Row("INT4 g128", "INT4 g64", "rtn", 25.0, 1.0),
        Row("INT4 g128", "INT4 g64", "fast", 22.0, 1.0),
        Row("INT3 g128", "INT3 g128", "rtn", not_run="no format holds it"),
        Row("INT3 g128", "INT3 g128", "awq", not_run="no format holds it"),
    ]
    lines = table_lines(table, "tiny")
    assert lines[1].split() == ["fp", "20.000", "5.47"]
    heading = lines.index("INT4 g128, here INT4 g64")
    assert lines[heading + 1].split() == ["rtn", "25.000", "(", "+25.0", "%)", "5.73", "(+4.8", "%)"]
    assert lines[heading + 2].split() == ["fast", "22.000", "(", "+10.0", "%)", "-"]
    assert lines[heading + 3].split()[:3] == ["gptq", "-", "5.61"]  # published, not run by us
    assert lines[-1] == "  not run, rtn, awq: no format holds it"
    assert any(line.split()[:2] == ["OmniQuant", "-"] for line in lines)


def test_every_published_figure_names_its_source() -> None:
    named = {source for methods in LLAMA2_7B.values() for figures in methods.values() for source in figures}
    assert named == set(SOURCES)
