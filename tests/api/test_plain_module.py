"""A decoder that is a plain `nn.Module`: quantized by the same code, and filled in again from the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import token_rows
from tiny_modules import Gpt, Tower, gpt_logits, with_random_weights
from torch import Tensor, nn

import awqkit
from awqkit import PlainModel, Recipe, RunOptions, load, quantize
from awqkit.errors import CalibrationError, CheckpointError, ModelError, UsageError
from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.numerics.grid import dequantize
from awqkit.pipeline import run as pipeline_run

ON_CPU = RunOptions(device="cpu")
ROWS = token_rows(18, 24)
RTN = Recipe.method("rtn", group_size=32)
FAST = Recipe.preset("fast", group_size=32)
BEST = Recipe.preset("best", group_size=32, tuning_epochs=1)


def gpt(seed: int = 0) -> PlainModel:
    return PlainModel(with_random_weights(Gpt(), seed), "transformer.h", run=gpt_logits)


def tower() -> PlainModel:
    return PlainModel(with_random_weights(Tower()), ("ground", "first"))


MODELS = {"gpt": (gpt, Gpt), "tower": (tower, Tower)}
RECIPES = {
    "rtn": RTN,
    "fast": FAST,
    "balanced": Recipe.preset("balanced", group_size=32),
    "best": BEST,
    "folds-off": Recipe.preset("balanced", group_size=32, folds="off"),
    "3-bit": Recipe.preset("fast", group_size=32, bits=3, format="compressed-tensors", symmetric=True),
}


def logits(plain: PlainModel, module: nn.Module) -> Tensor:
    ids = torch.tensor(token_rows(3, 20, seed=5))
    with torch.no_grad():
        given = module(ids) if plain.run is None else plain.run(module, ids)
    return given.logits if hasattr(given, "logits") else given


def simulated_by(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What a run means to write, by the name of the parameter, in float32; filled in while it runs."""
    found: dict[str, Tensor] = {}
    quantize_block, rewrite = pipeline_run.quantize_block, pipeline_run._rewrite

    def note(path: str, structure: Any, quantized: Any, stored: Any) -> None:
        found.update({f"{path}.{name}": value.bfloat16().float() for name, value in stored.items()})
        for name, weight in quantized.items():
            view = structure.linear(name)
            found[f"{path}.{view.weight}"] = view.oriented(dequantize(weight.codes, weight.grid)).contiguous()

    def block(context: Any, *arguments: Any) -> Any:
        result = quantize_block(context, *arguments)
        note(context.block_plan.path, context.structure, result.quantized, result.stored)
        return result

    def moved(job: Any, index: int, linears: Any, gains: Any, writer: Any) -> None:
        note(job.plan.blocks[index].path, job.plan.blocks[index].structure, linears, gains)
        rewrite(job, index, linears, gains, writer)

    monkeypatch.setattr(pipeline_run, "quantize_block", block)
    monkeypatch.setattr(pipeline_run, "_rewrite", moved)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_loaded_computes_what_was_simulated_bit_for_bit(
    model: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, fresh = MODELS[model]
    plain, simulated = make(), simulated_by(monkeypatch)
    done = quantize(plain, tmp_path / "out", RECIPES[recipe], calibration=ROWS, options=ON_CPU)
    expected = deepcopy(plain.module).eval()
    parameters = dict(expected.named_parameters())
    with torch.no_grad():
        for name, value in simulated.items():
            parameters[name].copy_(value)
    loaded = load(done.directory, into=fresh(), dtype=torch.float32, device="cpu")
    assert torch.equal(logits(plain, loaded), logits(plain, expected))
    original = logits(plain, plain.module.eval())
    assert 1e-3 < float((logits(plain, loaded) - original).norm() / original.norm()) < 0.7
    linears = sum(isinstance(part, PackedLinear) for part in loaded.modules())
    assert linears == (8 if model == "gpt" else 12)  # a Tower's `down` is no nn.Linear: it stays, with what codes mean


class Halved(nn.Linear):
    """A linear that does more than a linear."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Odd(Gpt):
    """One of its linears does more, one has a hook that does, one goes by two names."""

    def __init__(self) -> None:
        super().__init__()
        first, second = self.transformer.h
        first.mlp[0] = Halved(64, 128)
        first.attn.c_proj.register_forward_hook(lambda module, inputs, output: output + 1.0)
        self.alias = second.attn.c_proj


def test_what_a_linear_does_beside_its_product_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PlainModel(with_random_weights(Odd()), "transformer.h", run=gpt_logits)
    simulated = simulated_by(monkeypatch)
    done = quantize(plain, tmp_path / "out", FAST, calibration=ROWS, options=ON_CPU)
    expected = deepcopy(plain.module).eval()
    with torch.no_grad():
        for name, value in simulated.items():
            expected.get_parameter(name).copy_(value)
    loaded = load(done.directory, into=Odd(), dtype=torch.float32, device="cpu")
    assert torch.equal(logits(plain, loaded), logits(plain, expected))
    first, second = loaded.transformer.h
    assert type(first.mlp[0]) is Halved and type(first.attn.c_proj) is nn.Linear
    assert type(second.attn.c_proj) is PackedLinear and loaded.alias is second.attn.c_proj


def test_folds_are_found_used_and_better_than_plain_rounding(tmp_path: Path) -> None:
    plain = gpt()
    done = quantize(plain, tmp_path / "out", FAST, calibration=ROWS, options=ON_CPU)
    used = {(fold.producer, fold.consumers) for fold in done.report.folds if fold.fallback is None}
    assert {consumers for _, consumers in used} >= {("attn.c_attn",), ("mlp.0",)}
    nearest, chosen = done.report.mean_output_errors
    assert chosen < 0.8 * nearest


def test_folds_off_still_clips_and_rounds_better(tmp_path: Path) -> None:
    done = quantize(tower(), tmp_path / "out", RECIPES["folds-off"], calibration=ROWS, options=ON_CPU)
    assert not done.report.folds
    nearest, chosen = done.report.mean_output_errors
    assert chosen < nearest


def test_the_module_that_was_given_stays_as_it_is(tmp_path: Path) -> None:
    plain = gpt()
    module = plain.module.train()
    before = {name: (value, value.clone(), value._version) for name, value in module.state_dict(keep_vars=True).items()}
    parts = dict(module.named_modules())
    quantize(plain, tmp_path / "out", FAST, calibration=ROWS, options=ON_CPU)
    assert dict(module.named_modules()) == parts and module.training
    for name, value in module.state_dict(keep_vars=True).items():
        same, content, version = before[name]
        assert value is same and torch.equal(value, content) and value._version == version
        assert value.requires_grad == isinstance(value, nn.Parameter)


def test_what_is_written_says_what_it_is(tmp_path: Path) -> None:
    said: list[Any] = []
    plain = PlainModel(with_random_weights(Tower()), ("ground", "first"), name="my tower")
    recipe = Recipe.preset("balanced", group_size=32)
    done = quantize(plain, tmp_path / "out", recipe, calibration=ROWS, options=ON_CPU, emit=said.append)
    config = json.loads((done.directory / "config.json").read_text())
    assert config.keys() == {"linears_held_as_in_out", "dtype", "quantization_config"}
    assert config["linears_held_as_in_out"] == ["ground.down", "first.down"]
    card = (done.directory / "README.md").read_text()
    assert "# my tower, quantized" in card and "awqkit.load(DIR, into=MODULE)" in card
    assert "vLLM" not in card and "base_model" not in card
    assert any("no server loads this folder" in caution for caution in done.report.cautions)
    told = [event.text for event in said if type(event).__name__ == "Caution"]
    assert any("a plain module has no `generate`" in text and "--generated 0" in text for text in told)
    assert awqkit.inspect(done.directory).model == "my tower"
    with pytest.raises(CheckpointError, match=r"weights of a plain module, awqkit\.load\(DIR, into=MODULE\)"):
        load(done.directory, device="cpu")


def test_text_is_read_with_a_function_that_encodes(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a plain text about nothing much. " * 60)
    plain = PlainModel(
        with_random_weights(Gpt()), run=gpt_logits, encode=lambda text: [ord(each) for each in text], start_tokens=(1,)
    )
    recipe = Recipe.preset("fast", group_size=32, samples=4, seq_len=32)
    done = quantize(plain, tmp_path / "out", recipe, calibration=text, options=ON_CPU)
    assert done.report.calibration.start_tokens == (1,) and done.report.calibration.rows == 4
    compared = awqkit.compare(plain, text, methods=["fp", "rtn"], bits=[4], group_size=32, seq_len=32, options=ON_CPU)
    assert [row.method for row in compared.rows] == ["fp", "rtn"]


def test_folds_lists_what_is_found_in_a_plain_module() -> None:
    (kind,) = awqkit.folds(tower(), options=ON_CPU).kinds
    assert kind.path == "ground" and kind.blocks == (0, 1)
    assert {("q", "k", "v"), ("join",), ("gate", "up"), ("down",)} == {fold.consumers for fold in kind.folds}
    assert all(fold.exact for fold in kind.folds)


def test_weights_in_half_precision_are_taken_as_they_are(tmp_path: Path) -> None:
    plain = PlainModel(with_random_weights(Tower(), dtype=torch.float16), ("ground", "first"))
    done = quantize(plain, tmp_path / "out", RTN, options=ON_CPU)
    assert done.report.stored_dtype == "float16"
    assert next(load(done.directory, into=Tower(), device="cpu").parameters()).dtype == torch.float16


def test_a_mask_with_infinities_in_a_buffer_is_copied_as_it_is(tmp_path: Path) -> None:
    plain = gpt()
    mask = torch.full((4, 4), float("-inf")).triu(1)
    for part in (plain.module, plain.module.transformer.h[1]):
        part.register_buffer("mask", mask)
    done = quantize(plain, tmp_path / "out", RTN, options=ON_CPU)
    fresh = Gpt()
    for part in (fresh, fresh.transformer.h[1]):
        part.register_buffer("mask", torch.zeros(4, 4))
    loaded = load(done.directory, into=fresh, device="cpu")
    assert torch.equal(loaded.mask, mask) and torch.equal(loaded.transformer.h[1].mask, mask)


def test_rows_may_be_a_tensor(tmp_path: Path) -> None:
    done = quantize(gpt(), tmp_path / "out", FAST, calibration=torch.tensor(ROWS), options=ON_CPU)
    assert done.report.calibration.rows == 16 and done.report.calibration.start_tokens == (1,)


class Untied(Gpt):
    def __init__(self) -> None:
        super().__init__()
        self.transformer.wte.weight = nn.Parameter(torch.zeros_like(self.lm_head.weight))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(gpt(), tmp_path_factory.mktemp("plain") / "out", RTN, options=ON_CPU).directory


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Tower, r"which the module has not; give an instance of the class"),
        (lambda: Gpt(blocks=3), r"no tensor for transformer\.h\.2\.\S+, which the module needs"),
        (lambda: Gpt(blocks=1), r"has transformer\.h\.1\.\S+, which the module has not"),
        (Untied, r"no tensor for lm_head\.weight, which the module needs"),
        (lambda: _narrow(Gpt()), r"transformer\.wpe\.weight is \[48, 64\], in the module \[32, 64\]"),
    ],
)
def test_another_module_is_refused_and_stays_as_it_is(other: Callable[[], Any], said: str, written: Path) -> None:
    module = other()
    parts = dict(module.named_modules())
    with pytest.raises(CheckpointError, match=said):
        load(written, into=module, device="cpu")
    assert dict(module.named_modules()) == parts


def _narrow(module: Gpt) -> Gpt:
    module.transformer.wpe = nn.Embedding(32, 64)
    return module


def test_two_tensors_do_not_go_into_one_parameter(tmp_path: Path) -> None:
    plain = PlainModel(with_random_weights(Untied()), "transformer.h")
    done = quantize(plain, tmp_path / "out", RTN, options=ON_CPU)
    assert load(done.directory, into=Untied(), device="cpu")
    with pytest.raises(CheckpointError, match="are two tensors, in the module one"):
        load(done.directory, into=Gpt(), device="cpu")


def _refused(plain: Any, tmp_path: Path, kind: type[Exception], said: str, recipe: Recipe = RTN, **more: Any) -> None:
    with pytest.raises(kind, match=said) as caught:
        quantize(plain, tmp_path / "out", recipe, options=ON_CPU, **{"calibration": ROWS, **more})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ("transformer.layers", r"no such submodule; its lists of modules are transformer\.h \(2\)"),
        ("lm_head", r"blocks='lm_head' is Linear, expected an nn\.ModuleList or nn\.Sequential"),
        ("transformer.h.0.mlp", r"transformer\.h\.0\.mlp\.0 gives \[2, 16, 128\] for .* it is no decoder block"),
        (("transformer.h.1", "transformer.h.0"), r"out of order: cannot stream it; PlainModel takes blocks="),
        (("transformer.h.0", "transformer.h.0"), r"blocks names a module twice"),
        ((), r"blocks is empty"),
    ],
)
def test_blocks_that_are_not_there_are_refused(blocks: Any, said: str, tmp_path: Path) -> None:
    _refused(PlainModel(Gpt(), blocks), tmp_path, ModelError, said)


def _patched(forward: Any) -> Tower:
    return with_random_weights(type("Patched", (Tower,), {"forward": forward})())


def _asks_for_more(self: Tower, ids: Tensor, positions: Tensor) -> Any:
    angle = self.angle[positions]
    return self.say(self.first(self.ground(self.words(ids), angle.cos(), angle.sin())[0], angle.cos(), angle.sin())[0])


def _by_keyword(self: Tower, ids: Tensor) -> Any:
    x, angle = self.words(ids), self.angle[: ids.shape[1]]
    for storey in (self.ground, self.first):
        x, _ = storey(x=x, cos=angle.cos(), sin=angle.sin())
    return self.say(x)


def _twice(self: Tower, ids: Tensor) -> Any:
    x, angle = self.words(ids), self.angle[: ids.shape[1]]
    for storey in (self.ground, self.first, self.ground, self.first):
        x, _ = storey(x, angle.cos(), angle.sin())
    return self.say(x)


def _none(self: Tower, ids: Tensor) -> Any:
    return self.say(self.last(self.words(ids)))


def _embeds_by_hand(self: Tower, ids: Tensor) -> Any:
    x, angle = F.one_hot(ids, 192).float() @ self.words.weight, self.angle[: ids.shape[1]]
    for storey in (self.ground, self.first):
        x, _ = storey(x, angle.cos(), angle.sin())
    return self.say(x)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (_asks_for_more, r"missing 1 required positional argument: 'positions'; PlainModel takes .*run="),
        (_by_keyword, r"block 0 of ground … first is called with keywords only \(x, cos, sin\)"),
        (_twice, r"block 0 of ground … first was called out of order"),
        (_none, r"the model visited none of its 2 blocks in ground … first"),
    ],
)
def test_a_forward_that_cannot_be_followed_is_refused_with_what_to_pass(
    forward: Any, said: str, tmp_path: Path
) -> None:
    _refused(PlainModel(_patched(forward), ("ground", "first")), tmp_path, ModelError, said)


def test_run_gives_a_forward_the_input_that_it_needs(tmp_path: Path) -> None:
    def run(module: nn.Module, ids: Tensor) -> Tensor:
        return module(ids, torch.arange(ids.shape[1]))

    plain = PlainModel(_patched(_asks_for_more), ("ground", "first"), run=run)
    assert quantize(plain, tmp_path / "out", FAST, calibration=ROWS, options=ON_CPU).report.blocks


def test_how_many_ids_it_knows_must_be_said_where_no_embedding_takes_them(tmp_path: Path) -> None:
    module = _patched(_embeds_by_hand)
    _refused(PlainModel(module, ("ground", "first")), tmp_path, ModelError, r"vocabulary_size=", FAST)
    plain = PlainModel(module, ("ground", "first"), vocabulary_size=192)
    assert quantize(plain, tmp_path / "out", FAST, calibration=ROWS, options=ON_CPU).report.blocks


def test_a_module_may_know_as_few_ids_as_there_are_bases_in_dna(tmp_path: Path) -> None:
    plain = PlainModel(with_random_weights(Tower(words=4)), ("ground", "first"))
    rows = [[each % 4 for each in row] for row in ROWS]
    assert quantize(plain, tmp_path / "out", BEST, calibration=rows, options=ON_CPU).report.blocks


def test_logits_of_the_last_token_alone_are_refused_where_all_are_needed(tmp_path: Path) -> None:
    plain = PlainModel(with_random_weights(Gpt()), "transformer.h")
    said = r"gives logits of shape \[2, 1, 192\] for 2 rows of 8 tokens.*run=lambda"
    _refused(plain, tmp_path, ModelError, said, Recipe.preset("balanced", group_size=32))
    assert quantize(plain, tmp_path / "out", FAST, calibration=ROWS, options=ON_CPU).report.blocks


class Cached(nn.Module):
    """A projection that keeps what it gave in a buffer, and reads it from there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("cache", torch.zeros(2, 64, 64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.cache[: len(x), : x.shape[1]] = self.linear(x)
        return self.cache[: len(x), : x.shape[1]]


def test_a_cache_that_gradients_run_into_is_refused(tmp_path: Path) -> None:
    plain = gpt()
    plain.module.transformer.h[0].mlp = Cached()
    _refused(
        plain, tmp_path, ModelError, r"twice on one input \(RuntimeError: .*a state that it keeps, such as a cache"
    )


@torch.inference_mode()
def _infers(self: Tower, ids: Tensor) -> Any:
    return Tower.forward(self, ids)


@torch.no_grad()
def _without_gradients(self: Tower, ids: Tensor) -> Any:
    return Tower.forward(self, ids)


def test_a_forward_without_gradients_is_refused_where_they_are_needed(tmp_path: Path) -> None:
    plain = PlainModel(_patched(_infers), ("ground", "first"))
    _refused(plain, tmp_path, ModelError, r"runs in inference_mode.*take the decorator off")
    plain = PlainModel(_patched(_without_gradients), ("ground", "first"))
    _refused(plain, tmp_path, ModelError, r"switches gradients off \(no_grad\)", BEST)
    assert quantize(plain, tmp_path / "out", FAST, calibration=ROWS, options=ON_CPU).report.blocks


def test_a_block_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    plain = gpt()
    plain.module.transformer.h[1].mlp = _AlwaysDropped()
    _refused(plain, tmp_path, ModelError, r"transformer\.h\.1 gives something else .* draws random numbers")


class _AlwaysDropped(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.2)  # without `training=` it is always on


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    _refused(Gpt(), tmp_path, UsageError, r"Gpt is a bare module: give awqkit\.PlainModel")
    _refused(gpt(), tmp_path, CalibrationError, "no tokenizer to read text with", FAST, calibration=None)
    padded = [row[: 20 + index % 2] for index, row in enumerate(ROWS)]
    _refused(gpt(), tmp_path, CalibrationError, "token rows of 20 to 21 ids", FAST, calibration=padded)
    _refused(gpt(), tmp_path, CalibrationError, "token id 192 lies outside", FAST, calibration=[[1, 192], [1, 2]])
    with torch.device("meta"):
        empty = Gpt()
    _refused(PlainModel(empty), tmp_path, ModelError, "is on the meta device")
    _refused(PlainModel(nn.Linear(4, 4)), tmp_path, ModelError, "no list of decoder blocks found in Linear.*blocks=")
    with pytest.raises(UsageError, match=r"takes a torch\.nn\.Module, not str"):
        PlainModel("a/model")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="weights of its own"):
        awqkit.folds(gpt(), random_weights=True)


def test_a_model_of_transformers_is_given_as_a_folder(tmp_path: Path) -> None:
    from tiny_models import tiny_model

    _refused(PlainModel(tiny_model("llama")), tmp_path, ModelError, "save it with save_pretrained")
