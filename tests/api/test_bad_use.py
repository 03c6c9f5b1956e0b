"""Wrong options, places that cannot be written, devices that are not there: one line, exit code, nothing changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

CALIBRATED = ("calibration: ",)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--method", "gptx"), "argument --method: 'gptx' is not one of rtn, gptq, awq, smoothquant"),
        (("--quality", "better"), "argument --quality: 'better' is not one of fast, balanced, best"),
        (("--quality", "fast", "--method", "awq"), "quality 'fast' and method 'awq' were both given: "),
        (("--bits", "3"), "bits is 3; the awq format holds 4 bits only, use --format compressed-tensors"),
        (
            ("--bits", "5", "--format", "compressed-tensors"),
            "bits is 5; the compressed-tensors format is written with 2, 3, 4 and 8 bits",
        ),
        (
            ("--method", "smoothquant", "--format", "awq"),
            "activations is int8; the awq format holds weights only, use --format compressed-tensors",
        ),
        (
            ("--method", "smoothquant", "--bits", "4"),
            "activations is int8 with 4 bits, one group a row and a symmetric grid; it takes --bits 8",
        ),
        (("--bits", "9"), "bits is 9; it takes a whole number from 2 to 8"),
        (("--group-size", "48"), "group_size is 48; readers of the awq format take 128, 64, 32 and 16"),
        (("--dtype", "float32"), "argument --dtype: 'float32' is not one of bfloat16, float16"),
        (("--seq-len", "4"), "seq_len is 4; it takes a whole number from 8 "),
        (("--samples", "0"), "samples is 0; it takes a whole number from 1 "),
        (("--json", "no/r.json"), "--json no/r.json: there is no folder no; make it first"),
        (("--recipe", "no.toml"), "recipe no.toml: cannot be read (No such file or directory)"),
    ],
)
def test_options(refused, flags, line):
    assert refused(*flags, code=2).startswith(line)


def test_a_group_size_that_does_not_divide_names_the_linear_and_the_sizes_that_would(refused):
    line = refused("--group-size", "128", code=2, after=CALIBRATED)
    assert line.startswith(
        "--group-size 128 does not divide the 64 inputs of model.layers.0.self_attn.q_proj; "
        "use --group-size 64 or 32, or leave that linear out with --ignore"
    )


def test_nothing_left_to_quantize(refused):
    line = refused("--ignore", "*", code=2, after=CALIBRATED)
    assert line.startswith("nothing is left to quantize: 14 linears found, all kept (matches --ignore)")


def test_cuda_without_cuda(refused, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused("--device", "cuda", code=2)
    assert line.startswith("--device cuda: torch ")
    assert "finds no CUDA device here; use --device cpu or auto" in line


@pytest.mark.parametrize("out", ["model/out", "model/a/b", "./model/../model/out"])
def test_out_inside_model(refused, out):
    assert "OUT lies inside MODEL (model); write to a folder outside it" in refused(out=out)


@pytest.mark.parametrize("out", ["model", "./model/", "model/../model"])
def test_out_is_model(refused, out):
    assert refused("--overwrite", out=out).endswith("OUT is MODEL itself; write to another folder")


def test_out_through_a_link_into_model(refused, place):
    (place.root / "link").symlink_to("model")
    assert "OUT lies inside MODEL" in refused(out="link/out")


def test_out_holds_model(refused):
    assert "OUT holds MODEL (model) inside it" in refused("--overwrite", out=".")


def test_out_exists(refused, place):
    shutil.copytree(place.model, place.out)
    assert refused() == "out: exists; give another name, or --overwrite to replace it"


def test_out_exists_and_is_no_checkpoint(refused, place):
    place.out.mkdir()
    (place.out / "thesis.tex").write_text("years of work")
    assert "out: exists and is no checkpoint (no config.json), so it is not replaced even with" in refused(
        "--overwrite"
    )


def test_out_is_a_file(refused, place):
    place.out.write_text("x")
    assert refused("--overwrite") == "out: exists and is not a folder; give another name"


def test_the_folder_of_out_is_missing(refused, place):
    line = refused(out="no/such/out")
    assert line == f"no/such/out: the folder {place.root / 'no' / 'such'} does not exist; create it first"


def test_a_disk_that_is_too_small(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000))
    line = refused(after=("calibration: ", "groups of ", "caution: "))
    assert "0.00 GB are free, the checkpoint needs 0.07 GB; free some space or write elsewhere" in line


def test_overwrite_replaces_a_checkpoint_with_all_its_files(quantize, place):
    shutil.copytree(place.model, place.out)
    (place.out / "stale.json").write_text("{}")
    assert quantize("--method", "rtn", "--overwrite").code == 0
    names = {path.name for path in place.out.iterdir()}
    assert "stale.json" not in names
    assert "awqkit.json" in names
    assert {path.name for path in place.root.iterdir()} == {"model", "text.txt", "out"}


def test_wrong_use_in_a_fresh_process_needs_no_torch(place):
    blocked = "import sys; sys.modules['torch'] = None; from awqkit.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", blocked, "quantize", "model", "out", "--method", "gptx"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("awqkit quantize: error: argument --method: 'gptx' is not one of rtn, gptq, ")
