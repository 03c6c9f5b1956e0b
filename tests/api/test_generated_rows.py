"""Calibration rows of the model's own: beside the text, in the report, and what is said where there can be none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, tiny_model, token_rows

from awqkit import Recipe, RunOptions, quantize
from awqkit.api import generated_rows
from awqkit.api.calibration_rows import given_rows
from awqkit.errors import ModelError
from awqkit.events import Caution, Event, Notice, TaskFinished, TaskStarted
from awqkit.model import fixed_cache_decoding, generate
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.free_memory import free_bytes
from awqkit.report.analysis import fallbacks

BALANCED = Recipe.preset("balanced", group_size=32, generated=0.25)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model("llama"), tmp_path_factory.mktemp("models") / "llama")


def _quantized(model: Path, out: Path, recipe: Recipe = BALANCED) -> tuple[dict, list[Event]]:
    events: list[Event] = []
    rows = token_rows(18, 24)  # each of them starts with token 1
    done = quantize(model, out, recipe, calibration=rows, options=RunOptions(device="cpu"), emit=events.append)
    return done.report.to_json()["calibration"], events


def test_a_quarter_as_many_rows_are_added_and_reported(model: Path, tmp_path: Path) -> None:
    summary, events = _quantized(model, tmp_path / "out")
    assert (summary["rows"], summary["held_out_rows"]) == (16, 2)
    assert (summary["generated_rows"], summary["generated_held_out_rows"]) == (4, 0)
    assert summary["start_tokens"] == [1]
    assert any(isinstance(event, Notice) and event.text.startswith("and 4 rows, 0 held out,") for event in events)
    tasks = [event for event in events if isinstance(event, TaskStarted | TaskFinished)]
    assert tasks[0].name == tasks[1].name == "step of the model's own text"


def test_they_change_what_is_chosen_and_the_seed_decides_what_they_are(model: Path, tmp_path: Path) -> None:
    written = []
    for index, share in enumerate((0.25, 0.25, 0.0)):
        recipe = Recipe.preset("balanced", group_size=32, generated=share)
        _quantized(model, tmp_path / f"{index}", recipe)
        written.append((tmp_path / f"{index}" / "model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]


def test_without_room_for_the_whole_model_the_text_is_used_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_rows, "free_bytes", lambda device: 1000.0)
    summary, events = _quantized(model, tmp_path / "out")
    assert summary["generated_rows"] == 0
    cautions = [event.text for event in events if isinstance(event, Caution)]
    assert len([text for text in cautions if "writes no calibration rows of its own" in text and "GB" in text]) == 1
    assert summary["not_generated"] in cautions
    report = json.loads((tmp_path / "out" / "awqkit.json").read_text())
    assert [fallback.where for fallback in fallbacks(report)][:1] == ["calibration"]


def test_a_model_that_cannot_generate_is_quantized_all_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AttributeError("no generate here")

    monkeypatch.setattr(generated_rows, "generate_rows", broken)
    summary, events = _quantized(model, tmp_path / "out")
    assert summary["generated_rows"] == 0
    assert any(isinstance(event, Caution) and "AttributeError: no generate here" in event.text for event in events)
    assert "AttributeError" in summary["not_generated"]


def test_a_model_that_takes_no_fixed_cache_writes_the_same_and_a_notice_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise ModelError("no such cache")

    monkeypatch.setattr(generate, "_REPLAYED_ON", ("cpu",))
    monkeypatch.setattr(fixed_cache_decoding, "fixed_cache", refused)
    summary, events = _quantized(model, tmp_path / "out")
    assert summary["generated_rows"] == 4
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert [text for text in notices if "without CUDA graphs, slower: no such cache" in text]


def test_free_memory_is_known_on_linux() -> None:
    if Path("/proc/meminfo").exists():
        assert free_bytes(torch.device("cpu")) > 1e6


def test_common_start_tokens_of_given_rows() -> None:
    assert given_rows([[1, 2, 5, 6], [1, 2, 7, 8]]).summary.start_tokens == (1, 2)
    assert given_rows([[1, 2], [2, 1]]).summary.start_tokens == ()
    assert given_rows([[1, 2, 3, 4, 5, 6]]).summary.start_tokens == ()  # of one row nothing is known


def test_joined_rows_keep_their_masks() -> None:
    ids = torch.arange(6).reshape(2, 3)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    joined = TokenRows(ids, mask).joined(TokenRows(ids))
    assert joined.ids.tolist() == [*ids.tolist(), *ids.tolist()]
    assert joined.mask.tolist() == [*mask.tolist(), *[[True] * 3] * 2]
    assert TokenRows(ids).joined(TokenRows(ids)).mask is None


def test_rows_that_weigh_more_keep_their_weights_beside_those_of_the_text() -> None:
    ids = torch.arange(6).reshape(2, 3)
    joined = TokenRows(ids).joined(TokenRows(ids[:1]).weighing(2.0))
    assert joined.weights.tolist() == [[1.0] * 3, [1.0] * 3, [2.0] * 3]
    assert joined.rows(slice(2, 3)).weights.tolist() == [[2.0] * 3]
    assert TokenRows(ids).joined(TokenRows(ids).weighing(1.0)).weights is None
