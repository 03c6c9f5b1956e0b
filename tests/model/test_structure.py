"""What can be said of a block from what was found in it."""

from __future__ import annotations

import torch

from awqkit.model.structure import BlockStructure, Fold, LinearInput, LinearView


def test_consumers_of_different_tensors_get_no_common_scale() -> None:
    views = tuple(LinearView(name, f"{name}.weight", None, (4, 4)) for name in ("q", "k", "mixer"))
    inputs = (LinearInput("q", ("q", "k"), 4), LinearInput("mixer", ("mixer",), 4))
    structure = BlockStructure(views, inputs, (), (), ())
    assert structure.why_not_together(("q", "k")) is None
    assert structure.why_not_together(("q", "k", "mixer")).startswith("its consumers read 2 different tensors")


def test_read_channels_are_those_that_some_consumer_has() -> None:
    maps = {"one": torch.tensor([2, -1, 2]), "other": torch.tensor([4, 2, -1])}
    fold = Fold("rows", ("v.weight",), None, "v", 6, ("one", "other"), maps)
    assert fold.read.tolist() == [False, False, True, False, True, False]


def test_a_transposed_weight_is_turned_both_ways() -> None:
    view, stored = LinearView("c", "c.weight", None, (3, 2), transposed=True), torch.arange(6).reshape(2, 3)
    assert view.oriented(stored).shape == view.shape
    assert torch.equal(view.oriented(view.oriented(stored)), stored)
