"""A model folder is read exactly, keeps nothing mapped, and is refused in one line if something is wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from awqkit.checkpoint.reader import Checkpoint, refuse_quantized
from awqkit.errors import CheckpointError

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}
TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(6).to(torch.bfloat16).reshape(2, 3),
    "c.flag": torch.tensor([True, False, True]),
    "d.empty": torch.empty(0, 4, dtype=torch.float16),
    "e.scalar": torch.tensor(7, dtype=torch.int64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "a model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(TENSORS, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    homes = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(TENSORS)}
    for shard in set(homes.values()):
        save_file({name: TENSORS[name] for name in homes if homes[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder


def refusal(directory: Path) -> str:
    """The one line that opening `directory` ends with."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def raw_file(folder: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_every_tensor_is_read_as_it_is_stored(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(kind))
    assert set(checkpoint.names) == set(TENSORS)
    assert checkpoint.config == CONFIG
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, tensor in checkpoint.read_many(TENSORS).items():
        assert (checkpoint.dtype(name), checkpoint.shape(name)) == (tensor.dtype, tuple(tensor.shape))
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_a_file_of_another_name_is_read_when_it_is_the_only_one(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert set(Checkpoint.open(folder).names) == set(TENSORS)


def test_a_read_tensor_can_be_written_to_and_leaves_the_file_alone(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.read("a.weight").zero_()
    assert torch.equal(checkpoint.read("a.weight"), TENSORS["a.weight"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_no_memory_map_is_left_behind(folder: Path) -> None:
    tensor = Checkpoint.open(folder).read("a.weight")
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    assert tensor.sum() == TENSORS["a.weight"].sum()


def test_other_files_are_what_belongs_to_the_model(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    wanted = [
        *(
            "LICENSE.txt",
            "NOTICE",
            "additional_chat_templates/tools.jinja",
            "added_tokens.json",
            "chat_template.jinja",
        ),
        *("generation_config.json", "merges.txt", "modeling_custom.py", "preprocessor_config.json"),
        *("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    ]
    left = ["README.md", "tokenizer.bin", "training_args.bin", "optimizer.pt", "model.gguf", ".gitattributes"]
    for name in [*wanted, *left]:
        (folder / name).write_text("x")
    assert list(Checkpoint.open(folder).other_files()) == sorted(wanted)


class TestRefusals:
    def test_missing_directory(self, tmp_path: Path) -> None:
        assert "no such directory" in refusal(tmp_path / "nothing here")

    def test_a_file(self, folder: Path) -> None:
        assert "is a file" in refusal(folder / "config.json")

    def test_empty_directory(self, tmp_path: Path) -> None:
        assert "is empty" in refusal(tmp_path)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_pickles_only(self, folder: Path, name: str) -> None:
        (folder / "model.safetensors").rename(folder / name)
        message = refusal(folder)
        assert name in message
        assert "convert them to safetensors" in message

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        assert "holds no *.safetensors" in refusal(folder)

    def test_several_files_without_an_index(self, sharded: Path) -> None:
        (sharded / "model.safetensors.index.json").unlink()
        assert "2 safetensors files" in refusal(sharded)

    def test_no_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        assert "holds no config.json" in refusal(folder)

    @pytest.mark.parametrize("text", ["{", "", "\x00\xff"])
    def test_config_that_is_not_json(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        assert "config.json: not JSON" in refusal(folder)

    def test_config_that_is_no_object(self, folder: Path) -> None:
        (folder / "config.json").write_text("[1]")
        assert "expected an object" in refusal(folder)

    @pytest.mark.parametrize("value", [None, [], "Llama"])
    def test_config_without_architecture(self, folder: Path, value: object) -> None:
        (folder / "config.json").write_text(json.dumps({"architectures": value}))
        assert '"architectures"' in refusal(folder)

    @pytest.mark.parametrize("keep", [0, 5, 40, -1])
    def test_truncated_file(self, folder: Path, keep: int) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:keep])
        message = refusal(folder)
        assert "model.safetensors: truncated" in message
        assert str(len(content[:keep])) in message

    def test_trailing_bytes(self, folder: Path) -> None:
        with (folder / "model.safetensors").open("ab") as stream:
            stream.write(b"\0" * 3)
        assert "not a sound safetensors file" in refusal(folder)

    def test_text_instead_of_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").write_text("<html>404: not found, and a good deal of other text</html>")
        assert "not a sound safetensors file" in refusal(folder)

    def test_git_lfs_pointer(self, folder: Path) -> None:
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        assert "git lfs pull" in refusal(folder)

    @pytest.mark.parametrize(
        ("header", "found"),
        [
            (b"{not json", "header is not JSON"),
            ([1, 2], "not a JSON object"),
            ({"x": {"dtype": "F32", "shape": [1]}}, "lacks dtype, shape or data_offsets"),
            ({"x": 3}, "lacks dtype, shape or data_offsets"),
            ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "not whole numbers"),
            ({"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "not whole numbers"),
            ({"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, "dtype 'F4'"),
            ({"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "cannot be read"),
            ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "needs 8 bytes"),
            ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "starts at byte"),
            ({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "truncated"),
        ],
    )
    def test_header_that_contradicts_itself(self, folder: Path, header: object, found: str) -> None:
        raw_file(folder, header, b"\0" * 4)
        message = refusal(folder)
        assert found in message
        assert "model.safetensors" in message

    def test_overlapping_tensors(self, folder: Path) -> None:
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        raw_file(folder, {"x": entry, "y": entry}, b"\0" * 8)
        assert "starts at byte" in refusal(folder)

    def test_index_that_names_a_missing_shard(self, sharded: Path) -> None:
        (sharded / "model-00002-of-00002.safetensors").unlink()
        assert "names the shard 'model-00002-of-00002.safetensors'" in refusal(sharded)

    def test_index_that_leads_out_of_the_folder(self, sharded: Path) -> None:
        save_file({"x": torch.zeros(1)}, sharded.parent / "secret.safetensors")
        index = {"weight_map": {"x": "../secret.safetensors"}}
        (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "not in the folder" in refusal(sharded)

    def test_index_that_names_a_tensor_its_shard_lacks(self, sharded: Path) -> None:
        file = sharded / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"]["z.weight"] = "model-00001-of-00002.safetensors"
        file.write_text(json.dumps(index))
        assert "lacks tensor 'z.weight'" in refusal(sharded)

    def test_index_without_a_map(self, sharded: Path) -> None:
        (sharded / "model.safetensors.index.json").write_text("{}")
        assert '"weight_map"' in refusal(sharded)

    def test_unknown_tensor(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
            Checkpoint.open(folder).read("nothing")

    def test_a_file_that_shrinks_after_opening(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-30])
        with pytest.raises(CheckpointError, match="changed since it was opened"):
            checkpoint.read_many(checkpoint.names)


class TestRefuseQuantized:
    def test_a_plain_model_passes(self, folder: Path) -> None:
        refuse_quantized(Checkpoint.open(folder))

    def test_an_empty_entry_is_not_a_quantized_model(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": None}))
        refuse_quantized(Checkpoint.open(folder))

    @pytest.mark.parametrize(
        "extra",
        [
            {"quantization_config": {"quant_method": "gptq"}},
            {"compression_config": {"quant_method": "gptq"}},
            {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        ],
    )
    def test_config_of_a_quantized_model(self, folder: Path, extra: dict) -> None:
        (folder / "config.json").write_text(json.dumps({**CONFIG, **extra}))
        with pytest.raises(CheckpointError, match=r"config\.json: has .*'gptq'.*quantized already"):
            refuse_quantized(Checkpoint.open(folder))

    @pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
    def test_separate_file_of_a_quantized_model(self, folder: Path, name: str) -> None:
        (folder / name).write_text("{}")
        with pytest.raises(CheckpointError, match=name):
            refuse_quantized(Checkpoint.open(folder))
