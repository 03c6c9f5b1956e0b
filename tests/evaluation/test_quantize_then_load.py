"""From a tiny checkpoint to a loaded quantized one, for every family: what was simulated is what runs."""

from __future__ import annotations

import functools
import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_contexts import GROUP, run_on, token_ids, written
from tiny_models import FAMILIES, save_tiny, tiny_model, token_rows
from torch import Tensor, nn

from awqkit import Recipe, RunOptions, load, quantize
from awqkit.evaluation.evaluate import evaluate_windows
from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.kernels.int4_matmul import CHUNKS
from awqkit.numerics.divergence import token_kl
from awqkit.numerics.grid import QuantizedWeight, dequantize
from awqkit.pipeline import run as pipeline_run

CPU = torch.device("cpu")
FAST, RTN = Recipe.preset("fast", group_size=GROUP), Recipe.method("rtn", group_size=GROUP)
TIED = ("llama-tied", "gemma2", "gemma3", "opt")
_FOLDERS = TemporaryDirectory()


@dataclass(frozen=True)
class Case:
    """A family's model, its quantized folder, and the weights as the run held them before it packed them."""

    model: Any
    directory: Path
    simulated: dict[str, QuantizedWeight]

    def float_model(self) -> Any:
        """The original in float32 with the written norms, biases and kept weights, and the dequantized linears."""
        model = deepcopy(self.model)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in written(self.directory).items():
                if name in parameters:
                    parameters[name].copy_(value.float())
            for name, weight in self.simulated.items():
                parameters[f"{name}.weight"].copy_(dequantize(weight.codes, weight.grid))
        return model


def case_of(family: str, recipe: Recipe = FAST) -> Case:
    """The family quantized by the recipe, once for all tests."""
    return _quantized(family, recipe)


@functools.cache
def _quantized(family: str, recipe: Recipe) -> Case:
    model, simulated = tiny_model(family), {}
    quantize_block = pipeline_run.quantize_block

    def recorded(context: Any, *arguments: Any) -> Any:
        result = quantize_block(context, *arguments)
        simulated.update({f"{context.block_plan.path}.{name}": weight for name, weight in result.quantized.items()})
        return result

    folder = Path(_FOLDERS.name) / f"{family}-{hash(recipe)}"
    folder.mkdir()
    with patch.object(pipeline_run, "quantize_block", recorded):
        result = run_on(model, folder, recipe)
    return Case(model, result.directory, simulated)


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(token_ids(16, 20, seed=9)).logits.float()


def _packed(model: nn.Module) -> dict[str, PackedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("recipe", [FAST, Recipe.method("rtn", group_size=GROUP, symmetric=True)], ids=["fast", "rtn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_weights_are_the_simulated_ones_bit_for_bit(family: str, recipe: Recipe) -> None:
    case = case_of(family, recipe)
    packed = _packed(load(case.directory, dtype=torch.float32, device="cpu"))
    inside = [p for p, m in case.model.named_modules() if isinstance(m, nn.Linear) and "layers." in p]
    assert sorted(packed) == sorted(case.simulated) == sorted(inside)
    for path, linear in packed.items():
        found, expected = linear.quantized_weight(), case.simulated[path]
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.grid.group_scale, expected.grid.group_scale)
        assert torch.equal(found.grid.group_zero, expected.grid.group_zero)
        bias = 0.0 if linear.bias is None else linear.bias
        weight = (linear(torch.eye(linear.in_features)) - bias).t()
        exact = dequantize(expected.codes, expected.grid)
        assert torch.equal(weight, exact) if linear.bias is None else torch.allclose(weight, exact, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_logits_are_those_of_a_float_model_with_the_dequantized_weights(family: str) -> None:
    case = case_of(family)
    found, expected = _logits(load(case.directory, dtype=torch.float32, device="cpu")), _logits(case.float_model())
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_and_clip_bring_the_model_nearer_to_the_original_than_plain_rounding(family: str) -> None:
    """A fold that were applied on one side only would show here, whatever the block's own errors say."""
    original = _logits(case_of(family).model)
    kl = {}
    for recipe in (FAST, RTN):
        loaded = load(case_of(family, recipe).directory, dtype=torch.float32, device="cpu")
        kl[recipe.name] = float(token_kl(original, _logits(loaded)).mean())
    assert kl["fast"] < 0.8 * kl["rtn"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "starcoder2", "cohere", "phi3"])
def test_in_bfloat16_the_packed_model_scores_as_the_simulated_one_does(family: str) -> None:
    case = case_of(family)
    loaded = load(case.directory, device="cpu")
    assert all(linear.uses_kernel for linear in _packed(loaded).values())
    windows = token_ids(24, 32, seed=5)
    scores = [
        evaluate_windows(model, windows, 1, None, CPU, lambda done: None).perplexity
        for model in (loaded, case.float_model().to(torch.bfloat16))
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", TIED)
def test_tied_embeddings_stay_tied(family: str) -> None:
    case = case_of(family)
    names = list(written(case.directory))
    assert not any(name.startswith("lm_head") for name in names)
    assert sum("embed_tokens" in name for name in names) == 1
    assert json.loads((case.directory / "config.json").read_text())["tie_word_embeddings"] is True
    loaded = load(case.directory, dtype=torch.float32, device="cpu")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_untied_heads_are_written_as_they_were() -> None:
    case = case_of("llama")
    assert torch.equal(written(case.directory)["lm_head.weight"].float(), case.model.lm_head.weight)


def test_a_tied_head_that_the_source_holds_twice_is_written_once(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny_model("llama-tied")
    source = save_tiny(model, tmp_path / "source")
    tensors = written(source)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    result = run_on(model, tmp_path, RTN)
    assert "lm_head.weight" not in written(result.directory)
    assert list(result.report.dropped) == ["lm_head.weight"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_two_runs_write_identical_bytes(family: str, tmp_path: Path) -> None:
    files = []
    for out in ("first", "second"):
        directory = run_on(tiny_model(family), tmp_path, FAST, out=out).directory
        files.append({path.name: path.read_bytes() for path in sorted(directory.iterdir())})
    assert files[0].keys() == files[1].keys()
    assert {name for name in files[0] if files[0][name] != files[1][name]} <= {"awqkit-timings.json"}
    assert "awqkit-timings.json" in files[0]
    assert "awqkit.json" in files[0]


def _dtypes(directory: Path) -> set[torch.dtype]:
    return {value.dtype for value in written(directory).values() if value.is_floating_point()}


@pytest.mark.parametrize(
    ("source", "asked", "expected"),
    [
        (torch.float32, None, torch.bfloat16),
        (torch.float32, "float16", torch.float16),
        (torch.float16, None, torch.float16),
        (torch.bfloat16, "float16", torch.float16),
    ],
)
def test_the_dtype_on_disk(source: torch.dtype, asked: str | None, expected: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen2", dtype=source)
    save_tiny(model, tmp_path / "source", source)
    result = run_on(model, tmp_path, Recipe.preset("fast", group_size=GROUP, dtype=asked))
    assert _dtypes(result.directory) == {expected}
    assert json.loads((result.directory / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    loaded = load(result.directory, device="cpu")
    assert loaded.model.norm.weight.dtype == expected
    kl = float(token_kl(_logits(model), _logits(load(result.directory, dtype=torch.float32, device="cpu"))).mean())
    rtn = run_on(model, tmp_path, Recipe.method("rtn", group_size=GROUP, dtype=asked), out="rtn")
    plain = float(token_kl(_logits(model), _logits(load(rtn.directory, dtype=torch.float32, device="cpu"))).mean())
    assert kl < 0.8 * plain


def test_a_sharded_source_gives_the_tensors_of_a_single_file(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    save_tiny(model, tmp_path / "source", max_shard_size="40KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    sharded, single = written(run_on(model, tmp_path, FAST).directory), written(case_of("qwen2").directory)
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], value) for name, value in single.items())


def test_rows_given_with_padding_are_as_good_as_rows_without(tmp_path: Path) -> None:
    """Rows of two lengths: the shorter ones are padded, and the padding is not calibrated on."""
    model, rows = tiny_model("llama"), token_rows(36, 24)
    source = save_tiny(model, tmp_path / "source")
    ragged = [row[: 16 + 8 * (index % 2)] for index, row in enumerate(rows)]
    result = quantize(source, tmp_path / "out", FAST, calibration=ragged, options=RunOptions(device="cpu"))
    assert result.report.calibration.tokens_found == sum(map(len, ragged))
    kl = [
        float(token_kl(_logits(model), _logits(load(directory, dtype=torch.float32, device="cpu"))).mean())
        for directory in (result.directory, case_of("llama").directory)
    ]
    assert kl[0] < 1.5 * kl[1]


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_loaded_model_generates(dtype: torch.dtype | None) -> None:
    loaded = load(case_of("gemma2").directory, dtype=dtype, device="cpu")
    with torch.no_grad():
        ids = loaded.generate(token_ids(2, 6), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=191)
    assert ids.shape[1] > 6
    assert torch.equal(ids[:, :6], token_ids(2, 6))


def test_linears_that_read_one_input_are_joined_when_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = case_of("llama").directory
    plain = _logits(load(directory, dtype=torch.float32, device="cpu"))
    monkeypatch.setattr("awqkit.evaluation.packed_linear.int4_kernel", lambda *_: CHUNKS)  # as where there is a GPU
    loaded = load(directory, dtype=torch.float32, device="cpu")
    packed = {path: part for path, part in loaded.named_modules() if isinstance(part, PackedLinear)}
    apart = {path.rpartition(".")[2] for path, part in packed.items() if part.joined is None}
    assert apart == {"o_proj", "down_proj"}
    torch.testing.assert_close(_logits(loaded), plain)


def test_a_full_precision_folder_loads_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("llama")
    loaded = load(save_tiny(model, tmp_path / "m"), dtype=torch.float32, device="cpu")
    assert torch.equal(_logits(loaded), _logits(model))
