"""From one format to another and back: the same numbers, everything else untouched, what cannot be held refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_folders import change_config, change_tensors, make_model, tensors_of

import awqkit
from awqkit.errors import CheckpointError, UsageError
from awqkit.evaluation.packed_linear import PackedLinear
from awqkit.events import Caution, Event, TaskFinished, TaskStarted
from awqkit.formats.format import FORMATS, stored_format

AWQ, CT = "awq", "compressed-tensors"
PLAIN = ("--method", "rtn", "--group-size", "32")
W8A8 = (
    'method = "rtn"\nformat = "compressed-tensors"\nbits = 8\ngroup_size = -1\nsymmetric = true\nactivations = "int8"\n'
)


def block_of(folder: Path | str) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())["quantization_config"]


def same_tensors(one: Path | str, two: Path | str) -> bool:
    first, second = tensors_of(Path(one)), tensors_of(Path(two))
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def packed_of(folder: Path | str) -> dict[str, PackedLinear]:
    model = awqkit.load(folder, dtype=torch.float32, device="cpu")
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("grid", ["--asymmetric", "--symmetric"])
@pytest.mark.parametrize("first", [AWQ, CT])
def test_there_and_back_gives_the_same_tensors_and_config(quantize, place, first, grid, dtype):
    second = CT if first == AWQ else AWQ
    assert quantize(*PLAIN, grid, "--dtype", dtype, "--format", first).code == 0
    awqkit.convert(place.out, "there", second)
    awqkit.convert("there", "back", first)
    assert same_tensors(place.out, "back")
    assert not same_tensors(place.out, "there")
    assert block_of("back") == block_of(place.out)


@pytest.mark.parametrize("grid", ["--asymmetric", "--symmetric"])
def test_codes_zero_points_and_scales_are_the_same(quantize, place, grid):
    assert quantize(*PLAIN, grid).code == 0
    result = awqkit.convert(place.out, "there", CT)
    assert (result.source, result.target, result.num_linears) == (AWQ, CT, 14)
    before, after = packed_of(place.out), packed_of("there")
    assert before.keys() == after.keys() and len(before) == 14
    for path, linear in before.items():
        one, two = linear.quantized_weight(), after[path].quantized_weight()
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.grid.group_scale, two.grid.group_scale)
        assert torch.equal(one.grid.group_zero, two.grid.group_zero)
    symmetric = grid == "--symmetric"
    assert any("weight_zero_point" in name for name in tensors_of(Path("there"))) != symmetric
    assert block_of("there")["config_groups"]["group_0"]["weights"]["symmetric"] is symmetric


def test_a_conversion_is_what_quantizing_to_that_format_writes(quantize, place):
    assert quantize(*PLAIN, "--ignore", "*.0.mlp.down_proj").code == 0
    assert quantize(*PLAIN, "--ignore", "*.0.mlp.down_proj", "--format", CT, out="direct").code == 0
    awqkit.convert(place.out, "converted", CT)
    converted, direct = tensors_of(Path("converted")), tensors_of(Path("direct"))
    assert converted.keys() == direct.keys()
    assert all(torch.equal(converted[name], direct[name]) for name in converted)
    assert block_of("converted") == block_of("direct")
    awqkit.convert("direct", "awq", AWQ)
    assert block_of("awq") == block_of(place.out)


def test_everything_else_is_carried_over(quantize, place):
    change_tensors(place.model, lambda tensors: tensors.update(extra=torch.arange(3.0)))
    (place.model / "chat_template.jinja").write_text("{{ messages }}")
    assert quantize(*PLAIN).code == 0
    awqkit.convert(place.out, "there", CT)
    before, after = tensors_of(place.out), tensors_of(Path("there"))
    quantized = ("qweight", "qzeros", "scales")
    rest = [name for name in before if not name.endswith(quantized)]
    assert rest and all(torch.equal(before[name], after[name]) for name in rest)
    names = {path.name for path in place.out.iterdir()}
    assert names == {path.name for path in Path("there").iterdir()}
    for name in names - {"model.safetensors", "config.json", "awqkit.json", "README.md"}:
        assert (Path("there") / name).read_bytes() == (place.out / name).read_bytes(), name
    config, old = (json.loads((folder / "config.json").read_text()) for folder in (Path("there"), place.out))
    assert {**config, "quantization_config": None} == {**old, "quantization_config": None}


def test_the_report_and_the_card_note_the_format(quantize, place):
    assert quantize(*PLAIN).code == 0
    awqkit.convert(place.out, "there", CT)
    old, new = (json.loads((folder / "awqkit.json").read_text()) for folder in (place.out, Path("there")))
    assert new["format"] == CT
    assert new["converted"] == {"from": AWQ, "to": CT, "awqkit": awqkit.__version__}
    counted = ("bits_per_weight", "packed_bytes", "written_bytes", "cautions", "format", "converted")
    assert {key: new[key] for key in old if key not in counted} == {
        key: value for key, value in old.items() if key not in counted
    }
    assert new["written_bytes"] - old["written_bytes"] == 14 * 16  # weight_shape
    card = (Path("there") / "README.md").read_text()
    assert card.startswith((place.out / "README.md").read_text().rstrip())
    assert "This folder is in the format compressed-tensors (`pack-quantized`)" in card


def test_shards_and_a_folder_without_a_report(quantize, place):
    sharded = make_model(place.root / "sharded", max_shard_size="300KB")
    assert quantize(*PLAIN, model=sharded).code == 0
    for name in ("awqkit.json", "README.md", "awqkit-timings.json"):
        (place.out / name).unlink()
    awqkit.convert(place.out, "there", CT)
    assert not {"awqkit.json", "README.md", "awqkit-timings.json"} & {path.name for path in Path("there").iterdir()}
    assert len(packed_of("there")) == 14


def test_one_group_a_row_of_somebody_elses_awq(quantize, place):
    assert quantize("--method", "rtn", "--format", CT, "--group-size", "channel").code == 0
    theirs = tensors_of(place.out)
    found = stored_format(json.loads((place.out / "config.json").read_text()))
    assert found is not None
    ct, scheme = found[0], found[1].scheme
    linears = ct.quantized_linears(theirs, scheme)
    rest = {name: value for name, value in theirs.items() if not any(name.startswith(f"{path}.") for path in linears)}
    for path in linears:
        weight = ct.unpack(path, theirs, scheme)
        rest |= FORMATS[AWQ].pack(path, weight, scheme, torch.bfloat16)
    theirs_dir = Path("theirs")
    shutil.copytree(place.out, theirs_dir)
    save_file(rest, theirs_dir / "model.safetensors", metadata={"format": "pt"})
    change_config(theirs_dir, quantization_config={"quant_method": "awq", "bits": 4, "group_size": -1})
    awqkit.convert(theirs_dir, "there", CT)
    assert same_tensors(place.out, "there")
    assert block_of("there") == block_of(place.out)


def test_what_happens_is_told(quantize, place):
    assert quantize(*PLAIN).code == 0
    events: list[Event] = []
    result = awqkit.convert(place.out, "there", CT, emit=events.append)
    assert TaskStarted("linear", 14) in events and TaskFinished("linear") in events
    cautions = tuple(event.text for event in events if isinstance(event, Caution))
    assert cautions == result.cautions and "dequantize=True" in cautions[0]


class TestRefusals:
    """Each is one line, and nothing stands at OUT."""

    @pytest.fixture
    def refused(self, place, awqkit):
        def run(*words: object, code: int) -> str:
            before = place.contents()
            outcome = awqkit("convert", *words)
            assert outcome.code == code, outcome.err
            assert outcome.out == ""
            (line,) = outcome.err.splitlines()
            assert place.contents() == before
            return line.split("error: ", 1)[1]

        return run

    @pytest.mark.parametrize(
        ("flags", "line"),
        [
            (("--bits", "3"), "out: bits is 3; the awq format holds 4 bits only; it stays in the compressed-tensors f"),
            (("--group-size", "channel"), "out: group_size is -1; readers of the awq format take 128, 64, 32 and 16"),
        ],
    )
    def test_what_awq_cannot_hold(self, quantize, place, refused, flags, line):
        assert quantize("--method", "rtn", "--format", CT, *flags).code == 0
        assert refused(place.out, "there", "--format", AWQ, code=2).startswith(line)

    def test_w8a8(self, quantize, place, refused):
        Path("w8a8.toml").write_text(W8A8)
        assert quantize("--recipe", "w8a8.toml", "--calibration", place.text).code == 0
        line = refused(place.out, "there", "--format", AWQ, code=2)
        assert line.startswith("out: activations is int8; the awq format holds weights only; it stays in")

    def test_outputs_that_fill_no_whole_word(self, quantize, place, refused):
        model = make_model(place.root / "odd", intermediate_size=68)
        assert quantize(*PLAIN, "--format", CT, "--ignore", "*.down_proj", model=model).code == 0
        line = refused(place.out, "there", "--format", AWQ, code=2)
        assert line.startswith("model.layers.0.mlp.") and "its 68 outputs are not a multiple of 8" in line

    def test_the_same_format(self, quantize, place, refused):
        assert quantize(*PLAIN).code == 0
        line = refused(place.out, "there", "--format", AWQ, code=2)
        assert line.startswith("out: is in the awq format already")

    def test_a_model_that_is_not_quantized(self, place, refused):
        line = refused(place.model, "there", "--format", CT, code=1)
        assert line == "model: is not quantized, there is nothing to convert; use awqkit quantize"

    def test_out_exists(self, quantize, place, refused, awqkit):
        assert quantize(*PLAIN).code == 0
        shutil.copytree(place.model, "there")
        assert refused(place.out, "there", "--format", CT, code=1).startswith("there: exists; give another name, or")
        assert awqkit("convert", place.out, "there", "--format", CT, "--overwrite").code == 0
        assert block_of("there")["quant_method"] == CT

    def test_out_is_dir(self, quantize, place, refused):
        assert quantize(*PLAIN).code == 0
        assert "OUT is MODEL itself" in refused(place.out, place.out, "--format", CT, "--overwrite", code=1)

    def test_no_such_folder(self, refused):
        assert refused("nowhere/at/all", "there", "--format", CT, code=1).startswith("nowhere/at/all: ")

    def test_a_lost_tensor(self, quantize, place, refused):
        assert quantize(*PLAIN).code == 0
        change_tensors(place.out, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales"))
        line = refused(place.out, "there", "--format", CT, code=1)
        assert "has no tensor 'model.layers.1.mlp.up_proj.scales'" in line

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_a_report_that_is_no_report(self, quantize, place, refused, text):
        assert quantize(*PLAIN).code == 0
        (place.out / "awqkit.json").write_text(text)
        assert refused(place.out, "there", "--format", CT, code=1).startswith("out/awqkit.json: ")

    def test_no_quantized_tensor_at_all(self, place):
        block = {"quant_method": "awq", "bits": 4, "group_size": 32}
        change_config(place.model, quantization_config=block)
        with pytest.raises(CheckpointError, match=r"config\.json says awq, but no tensor is quantized"):
            awqkit.convert(place.model, "there", CT)

    def test_a_format_that_is_not_known(self, place):
        with pytest.raises(UsageError, match="format is 'gguf'; it takes one of awq, compressed-tensors"):
            awqkit.convert(place.model, "there", "gguf")
