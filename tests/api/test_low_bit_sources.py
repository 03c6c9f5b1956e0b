"""Checkpoints in fp8 and compressed-tensors are quantized as what they mean, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_model, token_rows
from torch import Tensor

from awqkit import Recipe, RunOptions, load, quantize
from awqkit.api.entries import original_bits
from awqkit.api.folds import folds
from awqkit.api.source import open_source
from awqkit.errors import CheckpointError
from awqkit.events import Caution, Event, Notice
from awqkit.formats.format import FORMATS
from awqkit.formats.low_bit_source import scaled_blocks
from awqkit.model.skeleton import Skeleton
from awqkit.model.transformers_bridge import load_config
from awqkit.pipeline.plan import plan_run

BLOCK = (16, 24)  # does not divide every weight
CPU = RunOptions(device="cpu")
FAST = Recipe.preset("fast", group_size=32, dtype="bfloat16")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder in fp8, and one with what it means in float32."""
    return _sources(tiny_model("llama"), tmp_path_factory.mktemp("sources"))


def _sources(model: Any, folder: Path, block: tuple[int, int] = BLOCK) -> tuple[Path, Path]:
    plain = save_tiny(model, folder / "plain")
    tensors, low, meant = load_file(plain / "model.safetensors"), {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("proj.weight"):
            low[name] = meant[name] = tensor
            continue
        codes, scale = _rounded(tensor.float(), block)
        low |= {name: codes, f"{name}_scale_inv": scale}
        meant[name] = scaled_blocks(codes.float(), scale, block)
    _write(plain, folder / "fp8", low, {"quant_method": "fp8", "weight_block_size": list(block)})
    _write(plain, folder / "meant", meant, None)
    return folder / "fp8", folder / "meant"


def _rounded(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rows, columns = (-(-size // part) for size, part in zip(weight.shape, block, strict=True))
    scale = torch.zeros(rows, columns)
    for row in range(rows):
        for column in range(columns):
            part = weight[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
            scale[row, column] = part.abs().max() / 448.0
    return (weight / scaled_blocks(torch.ones_like(weight), scale, block)).to(torch.float8_e4m3fn), scale


def _write(like: Path, folder: Path, tensors: dict[str, Tensor], settings: dict | None) -> None:
    folder.mkdir()
    for file in like.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((like / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _same_tensors(first: Path, second: Path) -> None:
    found, expected = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("recipe", [FAST, Recipe.method("rtn", group_size=32, dtype="bfloat16")])
def test_fp8_is_quantized_as_what_it_means(sources: tuple[Path, Path], recipe: Recipe, tmp_path: Path) -> None:
    events: list[Event] = []
    rows = token_rows(6, 16)
    done = quantize(sources[0], tmp_path / "fp8", recipe, calibration=rows, options=CPU, emit=events.append)
    quantize(sources[1], tmp_path / "meant", recipe, calibration=rows, options=CPU)
    _same_tensors(tmp_path / "fp8", tmp_path / "meant")
    assert any(isinstance(event, Caution) and "rounded to fp8 already" in event.text for event in events)
    assert any("rounded to fp8 already" in text for text in done.report.cautions)
    dropped = done.report.dropped
    assert dropped["model.layers.0.mlp.up_proj.weight_scale_inv"] == (
        "went into model.layers.0.mlp.up_proj.weight, which was dequantized"
    )
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    assert done.report.source_bytes < (sources[1] / "model.safetensors").stat().st_size


def test_experts_in_fp8_are_put_together_as_what_they_mean(tmp_path: Path) -> None:
    """Stacked by transformers, one by one on disk, each with its scales."""
    model = tiny_model(
        "qwen2", model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
    )
    low, meant = _sources(model, tmp_path)
    assert any(".experts.3.up_proj.weight_scale_inv" in name for name in load_file(low / "model.safetensors"))
    for source in (low, meant):
        quantize(source, tmp_path / f"{source.name}-4", FAST, calibration=token_rows(6, 16), options=CPU)
    _same_tensors(tmp_path / "fp8-4", tmp_path / "meant-4")
    found, expected = (load(source, dtype=torch.float32, device="cpu").state_dict() for source in (low, meant))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_linears_that_stay_are_written_as_what_they_mean(sources: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = Recipe.method("rtn", group_size=32, dtype="bfloat16", ignore=("*.down_proj",))
    quantize(sources[0], tmp_path / "out", recipe, options=CPU)
    name = "model.layers.1.mlp.down_proj.weight"
    found = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(found, load_file(sources[1] / "model.safetensors")[name].to(torch.bfloat16))


def test_int4_in_compressed_tensors_is_quantized_as_what_it_means(sources: tuple[Path, Path], tmp_path: Path) -> None:
    four = Recipe.method("rtn", group_size=32, dtype="bfloat16", format="compressed-tensors")
    quantize(sources[1], tmp_path / "four", four, options=CPU)
    meant = {
        name: value.contiguous()
        for name, value in load(tmp_path / "four", dtype=torch.float32, device="cpu").state_dict().items()
    }
    plain = load_file(sources[1] / "model.safetensors")
    model = load(tmp_path / "four", dtype=torch.float32, device="cpu")
    for name in plain:
        if name.endswith("proj.weight"):
            module = model.get_submodule(name.removesuffix(".weight"))
            identity = torch.eye(plain[name].shape[1])
            with torch.no_grad():
                plain[name] = module(identity).t().contiguous()
        elif name in meant:
            plain[name] = meant[name]
    _write(sources[1], tmp_path / "meant", plain, None)
    rows = token_rows(6, 16)
    three = Recipe.preset("fast", bits=3, group_size=16, dtype="bfloat16", format="compressed-tensors")
    for source in ("four", "meant"):
        quantize(tmp_path / source, tmp_path / f"{source}-3", three, calibration=rows, options=CPU)
    _same_tensors(tmp_path / "four-3", tmp_path / "meant-3")


def test_transformers_means_the_same_by_fp8(tmp_path: Path) -> None:
    """A reader that we did not write; it takes blocks that divide the weights."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    source, _ = _sources(tiny_model("llama"), tmp_path, (16, 32))
    settings = FineGrainedFP8Config(weight_block_size=(16, 32), dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=settings)
    expected = theirs.state_dict()
    for name, value in load(source, dtype=torch.float32, device="cpu").state_dict().items():
        torch.testing.assert_close(value, expected[name].float(), rtol=1e-2, atol=0)  # theirs may pass through bfloat16


def test_fp8_loads_as_what_it_means(sources: tuple[Path, Path]) -> None:
    found, expected = (load(source, dtype=torch.float32, device="cpu").state_dict() for source in sources)
    for name, value in expected.items():
        assert torch.equal(found[name], value)


def test_the_model_writes_rows_of_its_own(sources: tuple[Path, Path], tmp_path: Path) -> None:
    events: list[Event] = []
    recipe = Recipe.preset("balanced", group_size=32, generated=0.25, dtype="bfloat16")
    rows = token_rows(8, 16)
    done = quantize(sources[0], tmp_path / "fp8", recipe, calibration=rows, options=CPU, emit=events.append)
    quantize(sources[1], tmp_path / "meant", recipe, calibration=rows, options=CPU)
    assert done.report.calibration.generated_rows == 2
    assert any(isinstance(event, Notice) and "wrote itself" in event.text for event in events)
    _same_tensors(tmp_path / "fp8", tmp_path / "meant")


def test_bits_of_the_original_are_those_on_disk(sources: tuple[Path, Path]) -> None:
    found, awq = [], FORMATS["awq"]
    for source in sources:
        checkpoint = open_source(source).checkpoint
        skeleton = Skeleton(load_config(source), checkpoint)
        plan = plan_run(skeleton, FAST, torch.bfloat16, torch.device("cpu"), awq.why_not_held, awq.fused_partners)
        found.append(original_bits(checkpoint, skeleton, plan))
    assert found == [8, 32]


def test_folds_are_those_of_what_it_means(sources: tuple[Path, Path]) -> None:
    low, meant = (folds(source, options=CPU) for source in sources)
    assert [fold.consumers for fold in low.kinds[0].folds] == [fold.consumers for fold in meant.kinds[0].folds]


def test_a_scale_that_is_missing_is_named(sources: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(sources[0] / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight_scale_inv"]
    settings = json.loads((sources[0] / "config.json").read_text())["quantization_config"]
    _write(sources[1], tmp_path / "broken", tensors, settings)
    with pytest.raises(CheckpointError, match=r"broken: tensor model\.layers\.1\.self_attn\.q_proj\.weight is float8"):
        quantize(tmp_path / "broken", tmp_path / "out", FAST, calibration=token_rows(4, 16), options=CPU)
    assert not (tmp_path / "out").exists()


def test_a_config_without_any_low_bit_tensor_is_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(sources[1] / "model.safetensors")
    _write(sources[1], tmp_path / "none", tensors, {"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="says fp8, but no tensor is quantized"):
        quantize(tmp_path / "none", tmp_path / "out", FAST, options=CPU)
