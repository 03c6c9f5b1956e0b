"""The demo's rows, its checkpoint and its page, with a tiny model in the place of the embedded one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_folders import Place

import awqkit.api.demo as demo_module
from awqkit.api.demo import DemoSize, demo
from awqkit.api.inspect import inspect
from awqkit.errors import OutputError, UsageError
from awqkit.options import RunOptions

CPU = RunOptions(device="cpu")


@pytest.fixture
def small(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The place's tiny model becomes the demo's, with few rows and windows."""
    monkeypatch.setattr(demo_module, "embedded_model", lambda: place.model.absolute())
    monkeypatch.setattr(demo_module, "_SIZES", {"embedded": DemoSize(samples=4, windows=2, group_size=32)})
    return place


def test_rows_checkpoint_and_page(small: Place) -> None:
    result = demo(out="shown", options=CPU)
    original, *others = result.rows
    assert (original.method, original.kl, original.seconds) == ("fp", None, None)
    assert [row.method for row in others] == ["rtn", "gptq", "awq-clip", "fast", "balanced"]
    assert all(row.kl > 0 and row.seconds > 0 and row.bits == 4 and row.group_size == 32 for row in others)
    assert len({row.bits_per_weight for row in others}) == 1
    assert len({row.text for row in result.rows}) == 1

    saved = inspect(result.directory)
    assert saved.recipe["name"] == "balanced"
    assert saved.group_size == 32
    page = Path("shown-report.html")
    assert result.report_page == page
    text = page.read_text(encoding="utf-8")
    for words in ("Methods compared", "Error of every linear", "awq-clip", "balanced", ">Time<"):
        assert words in text


def test_a_page_that_is_there_is_replaced_only_when_asked_to(small: Place) -> None:
    page = Path("shown-report.html")
    page.write_text("years of work")
    with pytest.raises(OutputError, match=r"shown-report\.html: exists; give another --out, or --overwrite"):
        demo(out="shown", options=CPU)
    assert page.read_text() == "years of work"
    assert not Path("shown").exists()


def test_out_that_is_there_is_refused_before_any_work(small: Place) -> None:
    shutil.copytree(small.model, "shown")
    with pytest.raises(OutputError, match="shown: exists"):
        demo(out="shown", options=CPU)


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="it takes one of embedded, smollm2"):
        demo("smolm2")
