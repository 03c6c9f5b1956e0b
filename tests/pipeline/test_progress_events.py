"""What a run says before its first block: the two passes for end-loss gradients take as long as blocks do."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_contexts import run_on
from tiny_models import tiny_model

from awqkit.cli.progress import PlainProgress
from awqkit.events import Event, TaskAdvanced, TaskFinished, TaskStarted
from awqkit.recipe import Recipe


def _events(folder: Path, recipe: Recipe) -> list[Event]:
    heard: list[Event] = []
    run_on(tiny_model("llama"), folder, recipe, emit=heard.append)
    return heard


def test_each_block_of_both_gradient_passes_but_the_last_of_all_is_a_step(tmp_path: Path) -> None:
    events = _events(tmp_path, Recipe.preset("best", group_size=16, tuning_epochs=0))
    started, finished = events.index(TaskStarted("gradient step", 3)), events.index(TaskFinished("gradient step"))
    steps = [event.done for event in events[started:finished] if isinstance(event, TaskAdvanced)]
    assert steps == [1, 2, 3]
    assert finished < events.index(TaskStarted("block", 2))


@pytest.mark.parametrize("recipe", [Recipe.preset("fast", group_size=16), Recipe.method("rtn", group_size=16)])
def test_a_recipe_without_sensitivity_takes_no_gradient_steps(tmp_path: Path, recipe: Recipe) -> None:
    assert not [event for event in _events(tmp_path, recipe) if getattr(event, "name", "") == "gradient step"]


def test_the_stages_of_a_block_are_named(tmp_path: Path) -> None:
    events = _events(tmp_path, Recipe.preset("balanced", group_size=16))
    first = [event.detail for event in events if isinstance(event, TaskAdvanced) and event.done == 0]
    assert list(dict.fromkeys(first)) == ["read", "prove", "observe", "search", "follow", "check", "advance", "write"]


def test_a_log_shows_the_gradient_steps_before_the_blocks(tmp_path: Path) -> None:
    lines: list[str] = []
    log = PlainProgress(lines.append, now=lambda: 0.0)
    for event in _events(tmp_path, Recipe.preset("best", group_size=16, tuning_epochs=0)):
        log(event)
    steps = [line.split("  ")[0] for line in lines if line.startswith("gradient step")]
    assert steps == [f"gradient step {done}/3" for done in (0, 1, 2, 3)]
    assert lines.index("block 0/2") > max(index for index, line in enumerate(lines) if line.startswith("gradient"))
