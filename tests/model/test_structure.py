"""What can be said of a block from what was found in it."""

from __future__ import annotations

import torch

from awqkit.model.structure import BlockStructure, Fold, LinearInput, LinearView


def test_consumers_that_read_channels_in_other_orders_get_no_common_scale() -> None:
    maps = {"q": torch.tensor([0, 1]), "k": torch.tensor([0, 1]), "mixer": torch.tensor([1, 0])}
    fold = Fold("norm", ("norm.weight",), None, None, 2, tuple(maps), maps)
    assert fold.why_not_together(("q", "k")) is None
    assert "in different orders" in fold.why_not_together(("q", "k", "mixer"))


def test_inputs_are_told_by_who_reads_them_in_order_of_data_flow() -> None:
    views = tuple(LinearView(name, f"{name}.weight", None, (4, 4)) for name in ("q", "k", "o"))
    inputs = (LinearInput("q", ("q", "k"), 4), LinearInput("o", ("o",), 4))
    structure = BlockStructure(views, inputs, (), (), ())
    assert structure.inputs_of(("o", "k")) == inputs
    assert structure.inputs_of(("q", "k")) == inputs[:1]
    assert structure.input_of("k").first == "q"


def test_read_channels_are_those_that_some_consumer_has() -> None:
    maps = {"one": torch.tensor([2, -1, 2]), "other": torch.tensor([4, 2, -1])}
    fold = Fold("rows", ("v.weight",), None, "v", 6, ("one", "other"), maps)
    assert fold.read.tolist() == [False, False, True, False, True, False]


def test_a_transposed_weight_is_turned_both_ways() -> None:
    view, stored = LinearView("c", "c.weight", None, (3, 2), transposed=True), torch.arange(6).reshape(2, 3)
    assert view.oriented(stored).shape == view.shape
    assert torch.equal(view.oriented(view.oriented(stored)), stored)
