"""The decoder without its weights: names, blocks, and what a checkpoint lacks."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, WeightsOf, block_probes, tiny_model
from torch import Tensor, nn

from awqkit.errors import ModelError
from awqkit.model.block_calls import BlockInputs, hand_on, run_block
from awqkit.model.disk_places import places_on_disk
from awqkit.model.skeleton import Skeleton

CPU = torch.device("cpu")


class Renamed:
    """A model's tensors under other names, or without some."""

    def __init__(self, model: Any, rename: Any) -> None:
        self._tensors = {rename(name): value for name, value in model.named_parameters() if rename(name)}

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def assert_streams_to(logits: torch.Tensor, skeleton: Skeleton, started: BlockInputs) -> None:
    """Its blocks one by one on each other's outputs, and then its head, give these logits."""
    hidden = started.hidden
    for index, call in enumerate(started.calls):
        hidden = run_block(skeleton.load_block(index, CPU), hidden, call)
    with torch.no_grad(), skeleton.head(CPU) as head:
        assert torch.allclose(head(IDS, hidden, None), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_and_loaded_in_float32_with_the_checkpoints_values(family: str) -> None:
    model = tiny_model(family)
    skeleton = Skeleton(model.config, WeightsOf(model))
    assert skeleton.num_blocks == 2
    assert skeleton.missing() == []
    for index in (0, 1):
        path = skeleton.block_path(index)
        block, expected = skeleton.load_block(index, CPU), model.get_submodule(path)
        for (name, value), (other, reference) in zip(
            block.named_parameters(), expected.named_parameters(), strict=True
        ):
            assert name == other
            assert value.dtype == torch.float32
            assert torch.equal(value, reference)
            assert skeleton.disk_name(f"{path}.{name}") == f"{path}.{name}"
        skeleton.release_block(index)


def test_a_checkpoint_of_the_bare_decoder_is_read_by_its_own_names() -> None:
    model = tiny_model("llama-tied")
    bare = Renamed(model, lambda name: name.removeprefix("model."))
    skeleton = Skeleton(model.config, bare)
    assert skeleton.missing() == []
    assert skeleton.disk_name("model.layers.0.mlp.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    block = skeleton.load_block(0, CPU)
    assert torch.equal(block.mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_missing_tensors_are_named_and_a_tied_head_is_not_missing() -> None:
    model = tiny_model("llama-tied")
    lost = "model.layers.1.mlp.up_proj.weight"
    assert Skeleton(model.config, Renamed(model, lambda name: "" if name == lost else name)).missing() == [lost]
    untied = tiny_model("llama")
    headless = Renamed(untied, lambda name: "" if name == "lm_head.weight" else name)
    assert Skeleton(untied.config, headless).missing() == ["lm_head.weight"]


def test_a_tied_head_stored_twice_is_a_duplicate_also_after_a_run_through_the_model() -> None:
    model = tiny_model("llama-tied")

    class Twice(WeightsOf):
        @property
        def names(self) -> list[str]:
            return [*super().names, "lm_head.weight"]

    skeleton = Skeleton(model.config, Twice(model))
    expected = {"lm_head.weight": "model.embed_tokens.weight"}
    assert skeleton.tied_duplicates() == expected
    list(skeleton.start([(torch.arange(8).unsqueeze(0), None)], CPU))
    assert skeleton.tied_duplicates() == expected
    assert skeleton.missing() == []


def test_linears_outside_the_blocks_are_known() -> None:
    model = tiny_model("llama")
    assert Skeleton(model.config, WeightsOf(model)).linears_outside_blocks() == ["lm_head"]


def test_blocks_of_one_kind_share_what_discovery_found() -> None:
    _, _, structures = block_probes(tiny_model("llama"))
    assert structures[0] is structures[1]


def test_every_block_gets_the_arguments_that_the_model_passes_it() -> None:
    """Gemma's first block slides a window of 8 tokens, its second sees everything before it."""
    _, probe, _ = block_probes(tiny_model("gemma3"))
    sliding, full = (call.kwargs["attention_mask"] for call in probe.calls)
    assert sliding[0, 0].sum(dim=-1).tolist() == [min(position + 1, 8) for position in range(16)]
    assert full is None or full[0, 0].sum(dim=-1).tolist() == [position + 1 for position in range(16)]


def test_names_match_with_or_without_the_prefix_of_the_base_model() -> None:
    class Head(nn.Module):
        base_model_prefix = "model"

        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    assert places_on_disk(Head(), ["weight", "head.weight", "other"]).whole == {
        "model.weight": "weight",
        "head.weight": "head.weight",
    }


class Pair(nn.Module):
    """A block that gives its hidden states in a tuple, as models of older releases have them."""

    def __init__(self, *beside: Any) -> None:
        super().__init__()
        self.linear, self.beside = nn.Linear(4, 4, bias=False), beside

    def forward(self, hidden_states: torch.Tensor, state: Any = None) -> tuple[Any, ...]:
        return (hidden_states + self.linear(hidden_states), *self.beside)


def toy_skeleton(monkeypatch: pytest.MonkeyPatch, blocks: list[nn.Module], forward: Any) -> tuple[Skeleton, nn.Module]:
    """A Skeleton of a model that is nothing but an embedding, these blocks and a forward through them."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.blocks = nn.Embedding(16, 4), nn.ModuleList(blocks)

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=forward(self, self.embedding(input_ids)))

    whole, empty = Toy(), copy.deepcopy(Toy()).to("meta")
    monkeypatch.setattr("awqkit.model.skeleton.empty_model", lambda config, **_: empty)
    return Skeleton(None, WeightsOf(whole)), whole


IDS = torch.arange(8).unsqueeze(0)


@pytest.mark.parametrize("beside", [(), (None,), (torch.ones(2),), (None, torch.ones(2))])
def test_blocks_that_give_tuples_are_followed_and_the_head_gets_what_it_expects(
    monkeypatch: pytest.MonkeyPatch, beside: tuple[Any, ...]
) -> None:
    def forward(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        for block in model.blocks:
            found = block(hidden)
            if not isinstance(found, tuple) or len(found) != 1 + len(beside):
                raise ValueError("cannot unpack")
            hidden = found[0]
        return hidden

    skeleton, whole = toy_skeleton(monkeypatch, [Pair(*beside), Pair(*beside)], forward)
    (started,) = skeleton.start([(IDS, None)], CPU)
    assert_streams_to(whole(IDS).logits, skeleton, started)


def test_a_block_that_text_does_not_reach_counts_as_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        for number in (0, 2):
            hidden = model.blocks[number](hidden)[0]
        return hidden

    skeleton, whole = toy_skeleton(monkeypatch, [Pair(), Pair(), Pair()], forward)
    (started,) = skeleton.start([(IDS, None)], CPU)
    assert [skeleton.block_path(index) for index in range(skeleton.num_blocks)] == ["blocks.0", "blocks.2"]
    assert skeleton.uncalled_blocks == ["blocks.1"]
    assert skeleton.linears_outside_blocks() == ["blocks.1.linear"]
    assert_streams_to(whole(IDS).logits, skeleton, started)


def test_a_model_that_visits_other_blocks_for_other_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    visited = [[0, 1], [0]]

    def forward(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        for number in visited[0]:
            hidden = model.blocks[number](hidden)[0]
        return hidden

    skeleton, _ = toy_skeleton(monkeypatch, [Pair(), Pair()], forward)
    list(skeleton.start([(IDS, None)], CPU))
    del visited[0]
    with pytest.raises(ModelError, match="does not visit the same blocks of blocks each time"):
        list(skeleton.start([(IDS, None)], CPU))


def test_a_model_that_visits_no_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton, _ = toy_skeleton(monkeypatch, [Pair(), Pair()], lambda model, hidden: hidden)
    with pytest.raises(ModelError, match="visited none of its 2 blocks"):
        list(skeleton.start([(IDS, None)], CPU))


def test_of_several_lists_the_largest_that_text_reaches_is_taken_and_the_idle_ones_stay_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(16, 4), nn.Linear(4, 16)
            self.tower = nn.ModuleList([Pair(), Pair(), Pair()])
            self.blocks = nn.ModuleList([Pair(), Pair()])

        def forward(self, input_ids: torch.Tensor, pixels: Any = None, **_: Any) -> Any:
            hidden = self.embedding(input_ids)
            for block in (*(self.tower if pixels is not None else ()), *self.blocks):
                hidden = block(hidden)[0]
            return SimpleNamespace(logits=self.head(hidden))

    whole, empty = Towers(), copy.deepcopy(Towers()).to("meta")
    monkeypatch.setattr("awqkit.model.skeleton.empty_model", lambda config, **_: empty)
    skeleton = Skeleton(None, WeightsOf(whole))
    recording = skeleton.start([(IDS, None)], CPU)
    started = next(iter(recording))
    assert empty.embedding.weight.device == CPU
    assert all(value.is_meta for value in empty.tower.parameters())
    assert list(recording) == []
    assert [skeleton.block_path(index) for index in range(skeleton.num_blocks)] == ["blocks.0", "blocks.1"]
    assert skeleton.linears_outside_blocks() == ["head", *(f"tower.{number}.linear" for number in range(3))]
    assert_streams_to(whole(IDS).logits, skeleton, started)


def test_a_model_that_computes_between_its_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        for block in model.blocks:
            hidden = 2.0 * block(hidden)[0]
        return hidden

    skeleton, _ = toy_skeleton(monkeypatch, [Pair(), Pair()], forward)
    with pytest.raises(ModelError, match="block 1 reads something else than what block 0 gives"):
        list(skeleton.start([(IDS, None)], CPU))


def test_of_several_ways_to_answer_the_one_that_got_furthest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows can be unpacked as a pair: the plain answer fails first, and not for the reason that counts."""

    def forward(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        for block in (*model.blocks, *model.blocks):
            hidden, _ = block(hidden)
        return hidden

    skeleton, _ = toy_skeleton(monkeypatch, [Pair(None), Pair(None)], forward)
    with pytest.raises(ModelError, match="block 0 of blocks was called out of order"):
        list(skeleton.start([(IDS.expand(2, 8), None)], CPU))


def test_blocks_that_get_their_hidden_states_under_a_name_of_their_own_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        for block in model.blocks:
            hidden = block(x=hidden, state=None)[0]
        return hidden

    skeleton, _ = toy_skeleton(monkeypatch, [Pair(), Pair()], forward)
    with pytest.raises(ModelError, match=r"block 0 of blocks is called with keywords only \(x, state\)"):
        list(skeleton.start([(IDS, None)], CPU))


def test_what_reaches_a_block_after_the_next_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        states = [None]
        for block in model.blocks:
            hidden, state = block(hidden, state=states[0])
            states.append(state)
            states = states[-2:]
        return hidden

    skeleton, _ = toy_skeleton(monkeypatch, [Pair(torch.ones(2)) for _ in range(3)], forward)
    with pytest.raises(ModelError, match="block 2 gets what blocks before it gave in a way that cannot be followed"):
        list(skeleton.start([(IDS, None)], CPU))


@pytest.mark.parametrize(
    "kept", [lambda hidden: hidden, lambda hidden: hidden.mean(dim=-1), lambda hidden: {"given": (hidden + 1.0,)}]
)
def test_hidden_states_that_go_on_to_later_blocks_on_ways_of_their_own_are_refused(
    monkeypatch: pytest.MonkeyPatch, kept: Any
) -> None:
    def forward(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        given = []
        for block in model.blocks:
            (hidden,) = block(hidden, state=tuple(given))
            given.append(kept(hidden))
        return hidden

    skeleton, _ = toy_skeleton(monkeypatch, [Pair() for _ in range(3)], forward)
    with pytest.raises(ModelError, match="block 1 gets what blocks before it gave in a way that cannot be followed"):
        list(skeleton.start([(IDS, None)], CPU))


def test_what_has_no_rows_cannot_be_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        state = None
        for block in model.blocks:
            hidden, state = block(hidden, state=state)
        return hidden

    for handed in (torch.ones(2), "a word"):
        skeleton, _ = toy_skeleton(monkeypatch, [Pair(handed), Pair(handed)], forward)
        (started,) = skeleton.start([(IDS, None)], CPU)
        with pytest.raises(ModelError, match=r"a block hands the next one a (tensor of shape|str)"):
            hand_on(skeleton.load_block(0, CPU), started.hidden, started.calls[0])


def test_a_parameter_that_blocks_share_is_known_by_its_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, alone = Pair(), Pair(), Pair()
    other.linear = one.linear
    skeleton, _ = toy_skeleton(monkeypatch, [one, alone, other], lambda model, hidden: hidden)
    assert [dict(skeleton.shared_by(index)) for index in range(3)] == [
        {"linear.weight": (0, 2)},
        {},
        {"linear.weight": (0, 2)},
    ]
    assert skeleton.block_kind(0) == skeleton.block_kind(2) != skeleton.block_kind(1)


def test_streams_before_rows_and_tokens_are_put_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        hidden = torch.stack([hidden, 2.0 * hidden, 3.0 * hidden])
        for block in model.blocks:
            hidden = block(hidden)[0]
        return hidden.sum(dim=0)

    skeleton, whole = toy_skeleton(monkeypatch, [Pair(), Pair()], forward)
    (started,) = skeleton.start([(IDS, None)], CPU)
    hidden = started.hidden
    assert hidden.shape == (1, 8, 3, 4)
    for index, call in enumerate(started.calls):
        hidden = run_block(skeleton.load_block(index, CPU), hidden, call)
        assert hidden.shape == (1, 8, 3, 4)
    with torch.no_grad(), skeleton.head(CPU) as head:
        assert torch.allclose(head(IDS, hidden, None), whole(IDS).logits)


def test_hidden_states_without_rows_and_tokens_side_by_side_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.transpose(0, 1)
        for block in model.blocks:
            hidden = block(hidden)[0]
        return hidden

    skeleton, _ = toy_skeleton(monkeypatch, [Pair(), Pair()], forward)
    with pytest.raises(ModelError, match="expected these two side by side"):
        list(skeleton.start([(IDS, None)], CPU))
