"""`awqkit convert`: flags arrive, results and hints are printed, the rest is the api's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from awqkit.events import Caution, TaskFinished, TaskStarted


@pytest.fixture
def calls(api, monkeypatch):
    """Calls that reach a fake `awqkit.api.convert`, which writes a file of 1500 bytes."""
    arrived = []

    def convert(model, out, format, *, options, emit):
        arrived.append(SimpleNamespace(model=model, out=out, format=format, options=options))
        for event in (Caution("a reader cannot"), TaskStarted("linear", 2), TaskFinished("linear")):
            emit(event)
        Path(out).mkdir()
        (Path(out) / "model.safetensors").write_bytes(bytes(1500))
        return SimpleNamespace(directory=Path(out), source="awq", target=format, num_linears=2, seconds=1.25)

    module = ModuleType("awqkit.api.convert")
    module.convert = convert
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return arrived


def test_flags_arrive(awqkit, calls):
    words = ("convert", "in", "out", "--format", "compressed-tensors")
    assert awqkit(*words, "--overwrite", "--trust-remote-code").code == 0
    (call,) = calls
    assert (call.model, call.out, call.format) == ("in", Path("out"), "compressed-tensors")
    assert call.options.overwrite and call.options.trust_remote_code


def test_what_is_printed(awqkit, calls):
    outcome = awqkit("convert", "in", "an out", "--format", "compressed-tensors")
    saved, _, _, hint = outcome.out.splitlines()
    assert saved.startswith("Saved an out (1.50 kB) after 1.2 s: 2 linears, awq to compressed-tensors, without loss.")
    assert hint == "  vllm serve 'an out'"
    assert "caution: a reader cannot" in outcome.err


def test_quiet_prints_the_result_only(awqkit, calls):
    outcome = awqkit("convert", "in", "out", "--format", "awq", "--quiet")
    assert outcome.err == ""
    assert len(outcome.out.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("in", "out"), "the following arguments are required: --format"),
        (("in", "out", "--format", "awk"), "argument --format: 'awk' is not one of awq, compressed-tensors"),
        (("in",), "the following arguments are required: OUT, --format"),
    ],
)
def test_wrong_use_is_one_line(awqkit, calls, words, line):
    outcome = awqkit("convert", *words)
    assert outcome.code == 2
    assert outcome.err.startswith(f"awqkit convert: error: {line}")
    assert outcome.err.count("\n") == 1
    assert calls == []


@pytest.mark.parametrize(("text", "size"), [("channel", -1), ("64", 64)])
def test_the_group_size_of_quantize_takes_a_number_or_channel(awqkit, api, text, size):
    assert awqkit("quantize", "in", "out", "--format", "compressed-tensors", "--group-size", text).code == 0
    assert (api.calls[0].recipe.group_size, api.calls[0].recipe.format) == (size, "compressed-tensors")


@pytest.mark.parametrize("text", ["row", "0", "-1"])
def test_another_group_size_is_wrong_use(awqkit, api, text):
    outcome = awqkit("quantize", "in", "out", f"--group-size={text}")
    assert outcome.code == 2
    assert f"argument --group-size: '{text}' is not" in outcome.err
