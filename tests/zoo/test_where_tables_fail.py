"""Folds by name change these architectures; what is found by asking does not. The page has the same figures."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from architecture_check import CPU, built, distance_of, folds_exactly, logits
from mapped_folds import MAPPED, apply_mapped
from tiny_models import WeightsOf

from awqkit.model.skeleton import Skeleton
from awqkit.pipeline.plan import look_at

PAGE = Path(__file__).resolve().parents[2] / "docs" / "where-tables-fail.md"


@pytest.mark.parametrize("model_type", MAPPED)
def test_the_mapped_fold_changes_the_model_and_ours_do_not(model_type: str) -> None:
    model = built(model_type).double()
    mapped = deepcopy(model)
    norms, readers = apply_mapped(mapped, MAPPED[model_type])
    assert norms == 2 and readers >= 4
    away = distance_of(logits(mapped), logits(model))
    assert away == pytest.approx(_said()[model_type], rel=0.3)
    mended = deepcopy(model)
    apply_mapped(mended, MAPPED[model_type].mended)
    assert distance_of(logits(mended), logits(model)) < 1e-5  # nothing else was missing
    single = model.float()
    skeleton = Skeleton(single.config, WeightsOf(single))
    with torch.no_grad():
        proved = folds_exactly(single, skeleton, look_at(skeleton, CPU))  # asserts 1e-6 in float64
    assert all(count >= 2 for count in proved.values())


def test_the_page_has_every_architecture() -> None:
    assert list(_said()) == list(MAPPED)


def _said() -> dict[str, float]:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) % \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: float(percent) / 100 for name, percent in rows}
