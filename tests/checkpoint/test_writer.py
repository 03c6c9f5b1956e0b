"""The streamed checkpoint is what safetensors reads, and appears at OUT whole or not at all."""

from __future__ import annotations

import collections
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from awqkit.checkpoint import output, writer
from awqkit.checkpoint.header import TensorSpec
from awqkit.checkpoint.output import refuse_output
from awqkit.checkpoint.reader import Checkpoint
from awqkit.checkpoint.writer import CheckpointWriter, plan_layout
from awqkit.errors import OutputError

TENSORS = {
    "odd.bytes": torch.arange(3, dtype=torch.uint8),
    "halves": torch.arange(5).to(torch.bfloat16),
    "words": torch.arange(-6, 6, dtype=torch.int32).reshape(3, 4),
    "größe": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "scalar": torch.tensor(5, dtype=torch.int64),
    "empty": torch.empty(0, 3),
}
CONFIG = {"architectures": ["LlamaForCausalLM"]}


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_all(out: Path, max_shard_bytes: int = 10**9, overwrite: bool = False, backwards: bool = False) -> None:
    layout = plan_layout(specs_of(TENSORS), max_shard_bytes)
    with CheckpointWriter(out, layout, overwrite) as checkpoint:
        for name in reversed(TENSORS) if backwards else TENSORS:
            checkpoint.write(name, TENSORS[name])
        checkpoint.write_json("config.json", CONFIG)
        checkpoint.commit()


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        loaded.update(load_file(file))
    return loaded


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 24, 1])
def test_safetensors_reads_what_was_streamed(tmp_path: Path, max_shard_bytes: int) -> None:
    out = tmp_path / "an out"
    write_all(out, max_shard_bytes)
    assert_same(load_folder(out), TENSORS)
    assert_same(Checkpoint.open(out).read_many(TENSORS), TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["an out"]
    with safe_open(next(out.glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_single_file_has_no_index_and_shards_have_one(tmp_path: Path) -> None:
    write_all(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    write_all(tmp_path / "many", max_shard_bytes=60)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-0000{len(files)}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert set(index["weight_map"].values()) == set(files)


def test_shards_keep_to_the_limit_unless_one_tensor_exceeds_it() -> None:
    specs = [TensorSpec(f"t{i}", torch.uint8, (size,)) for i, size in enumerate([4, 4, 9, 2, 6, 1])]
    layout = plan_layout(specs, max_shard_bytes=8)
    assert [[spec.name for spec in shard.specs] for shard in layout.shards] == [
        ["t0", "t1"],
        ["t2"],
        ["t3", "t4"],
        ["t5"],
    ]


def test_equal_tensors_give_equal_bytes_in_whatever_order_they_arrive(tmp_path: Path) -> None:
    write_all(tmp_path / "a", max_shard_bytes=40)
    write_all(tmp_path / "b", max_shard_bytes=40, backwards=True)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(
            st.sampled_from([torch.uint8, torch.bool, torch.bfloat16, torch.int32, torch.float64]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        max_size=6,
    ),
    limit=st.integers(1, 200),
)
def test_every_tensor_is_aligned_and_inside_its_file(shapes: list, limit: int) -> None:
    layout = plan_layout([TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)], limit)
    for shard in layout.shards:
        end = len(shard.header)
        assert end % 8 == 0
        for spec, offset in zip(shard.specs, shard.offsets, strict=True):
            assert offset == end
            assert offset % spec.dtype.itemsize == 0
            end += spec.num_bytes
        assert end == shard.file_bytes


def test_a_transposed_tensor_is_written_in_row_order(tmp_path: Path) -> None:
    tensor = torch.arange(6).reshape(2, 3).t()
    with CheckpointWriter(tmp_path / "out", plan_layout([TensorSpec("t", torch.int64, (3, 2))]), False) as checkpoint:
        checkpoint.write("t", tensor)
        checkpoint.commit()
    assert torch.equal(load_folder(tmp_path / "out")["t"], tensor)


def test_copied_files_keep_their_content(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"\x00\xff")
    (tmp_path / "tokenizer.json").symlink_to("blob")  # as in the hub's cache
    with CheckpointWriter(tmp_path / "out", plan_layout([]), False) as checkpoint:
        checkpoint.copy_file(tmp_path / "tokenizer.json", "tokenizer.json")
        checkpoint.copy_file(tmp_path / "blob", "additional_chat_templates/a.jinja")
        checkpoint.write_text("README.md", "Δ\n")
        checkpoint.commit()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"\x00\xff"
    assert (tmp_path / "out" / "additional_chat_templates" / "a.jinja").read_bytes() == b"\x00\xff"
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "Δ\n"


class TestNothingIsLeftBehind:
    @pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
    def test_after_an_error(self, tmp_path: Path, kind: type[BaseException]) -> None:
        with pytest.raises(kind), CheckpointWriter(tmp_path / "out", plan_layout(specs_of(TENSORS)), False):
            assert len(list(tmp_path.iterdir())) == 1
            raise kind
        assert list(tmp_path.iterdir()) == []

    def test_without_commit(self, tmp_path: Path) -> None:
        with CheckpointWriter(tmp_path / "out", plan_layout(specs_of(TENSORS)), False):
            assert not (tmp_path / "out").exists()
        assert list(tmp_path.iterdir()) == []

    def test_when_it_cannot_even_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(writer, "_preallocate", interrupt)
        with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", plan_layout([]), False):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_an_old_checkpoint_survives_a_failed_run(self, tmp_path: Path) -> None:
        write_all(tmp_path / "out")
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "out", plan_layout([]), True):
            raise RuntimeError
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_old_checkpoint_survives_a_failed_rename(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_all(tmp_path / "out")
        replace = Path.replace

        def fail_onto_out(self: Path, target: Path) -> Path:
            if self.name.startswith(".out.awqkit-") and "old" not in self.name:
                raise OSError(errno.EIO, "Input/output error")
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", fail_onto_out)
        with pytest.raises(OutputError, match="Input/output error"):
            write_all(tmp_path / "out", overwrite=True)
        assert_same(load_folder(tmp_path / "out"), TENSORS)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestOverwrite:
    def test_replaces_a_checkpoint(self, tmp_path: Path) -> None:
        write_all(tmp_path / "out", max_shard_bytes=1)
        write_all(tmp_path / "out", overwrite=True)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "config.json",
            "model.safetensors",
        ]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_empty_folder_may_be_filled(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        write_all(tmp_path / "out")
        assert_same(load_folder(tmp_path / "out"), TENSORS)

    def test_a_link_to_a_folder_is_followed(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        write_all(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert_same(load_folder(tmp_path / "real"), TENSORS)

    def test_the_temporary_folder_of_a_killed_run_is_no_obstacle(self, tmp_path: Path) -> None:
        (tmp_path / f".out.awqkit-{os.getpid()}").mkdir()
        write_all(tmp_path / "out")
        assert_same(load_folder(tmp_path / "out"), TENSORS)


class TestDiskErrors:
    def test_too_little_space_is_seen_before_anything_is_created(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = collections.namedtuple("usage", "total used free")
        monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
        with pytest.raises(OutputError, match=r"0\.00 GB are free.*needs 0\.07 GB"):
            write_all(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
    def test_disk_that_fills_while_space_is_reserved(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writer.os, "posix_fallocate", full)
        with pytest.raises(OutputError, match="disk full"):
            write_all(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
    def test_file_system_that_cannot_reserve(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(writer.os, "posix_fallocate", unsupported)
        write_all(tmp_path / "out")
        assert_same(load_folder(tmp_path / "out"), TENSORS)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_disk_that_fills_while_a_tensor_is_written(self, tmp_path: Path) -> None:
        with (
            pytest.raises(OutputError, match="disk full"),
            CheckpointWriter(tmp_path / "out", plan_layout(specs_of(TENSORS)), False) as checkpoint,
        ):
            shard = checkpoint.folder / "model.safetensors"
            shard.unlink()
            shard.symlink_to("/dev/full")
            checkpoint.write("words", TENSORS["words"])
        assert list(tmp_path.iterdir()) == []


class TestMisuse:
    def test_wrong_tensors_are_refused(self, tmp_path: Path) -> None:
        with CheckpointWriter(tmp_path / "out", plan_layout(specs_of(TENSORS)), False) as checkpoint:
            with pytest.raises(ValueError, match="not in the layout"):
                checkpoint.write("unknown", TENSORS["words"])
            with pytest.raises(ValueError, match="the layout has"):
                checkpoint.write("words", TENSORS["words"].float())
            with pytest.raises(ValueError, match="the layout has"):
                checkpoint.write("words", TENSORS["words"].t())
            checkpoint.write("words", TENSORS["words"])
            with pytest.raises(ValueError, match="written twice"):
                checkpoint.write("words", TENSORS["words"])
            with pytest.raises(ValueError, match="5 planned tensors were not written"):
                checkpoint.commit()
        assert list(tmp_path.iterdir()) == []

    def test_a_name_given_twice_is_refused(self) -> None:
        spec = TensorSpec("t", torch.int32, (1,))
        with pytest.raises(ValueError, match="given twice"):
            plan_layout([spec, spec])

    def test_a_closed_writer_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not open"):
            CheckpointWriter(tmp_path / "out", plan_layout([]), False).write_text("a", "b")


class TestRefuseOutput:
    """Each refusal comes before anything is created; the writer repeats those that need no MODEL."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        directory = tmp_path / "models" / "model"
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        return directory

    @staticmethod
    def refusal(out: Path, model: Path, overwrite: bool = False) -> str:
        with pytest.raises(OutputError) as caught:
            refuse_output(out, model, overwrite)
        assert "\n" not in str(caught.value)
        assert str(out) in str(caught.value)
        return str(caught.value)

    def test_a_new_name_is_fine(self, model: Path) -> None:
        refuse_output(model.parent / "model-AWQ", model, overwrite=False)  # MODEL's name is only a prefix of it

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_model_itself_its_inside_and_its_outside(self, model: Path, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "link").symlink_to(model)
        assert "is MODEL itself" in self.refusal(model, model, overwrite)
        assert "is MODEL itself" in self.refusal(tmp_path / "link", model, overwrite)
        assert "inside MODEL" in self.refusal(model / "out", model, overwrite)
        assert "inside MODEL" in self.refusal(tmp_path / "link" / "out", model, overwrite)
        assert "holds MODEL" in self.refusal(model.parent, model, overwrite)

    def test_a_folder_with_content(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        refuse_output(out, model, overwrite=False)
        (out / "notes.txt").touch()
        assert "--overwrite" in self.refusal(out, model)
        assert "no checkpoint" in self.refusal(out, model, overwrite=True)
        (out / "config.json").touch()
        refuse_output(out, model, overwrite=True)

    def test_a_file(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "out").touch()
        assert "not a folder" in self.refusal(tmp_path / "out", model, overwrite=True)
        assert "not a folder" in self.refusal(tmp_path / "out", model)

    def test_a_missing_parent(self, model: Path, tmp_path: Path) -> None:
        assert "does not exist" in self.refusal(tmp_path / "no" / "out", model)

    def test_a_parent_that_cannot_be_written(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(output.os, "access", lambda *_: False)
        assert "cannot be written" in self.refusal(tmp_path / "out", model)

    def test_the_writer_refuses_by_itself(self, tmp_path: Path) -> None:
        write_all(tmp_path / "out")
        with pytest.raises(OutputError, match="--overwrite"):
            write_all(tmp_path / "out")
        with pytest.raises(OutputError, match="does not exist"):
            write_all(tmp_path / "no" / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
