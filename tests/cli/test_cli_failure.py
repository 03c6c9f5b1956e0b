"""Wrong use and failures: one line on stderr, nothing on stdout, the right exit code."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from awqkit.checkpoint.run_state import KEPT_ATTRIBUTE
from awqkit.cli.failure import report_failure
from awqkit.errors import CheckpointError, FormatError, OutputError


def raising(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("quantise M O", "awqkit: error: no verb 'quantise' (did you mean quantize?)"),
        ("--versoin", "awqkit: error: no option --versoin (did you mean --version?)"),
        ("quantize M", "awqkit quantize: error: the following arguments are required: OUT"),
        ("quantize M O P", "awqkit quantize: error: unexpected argument 'P'"),
        ("quantize M O --bist 4", "awqkit quantize: error: no option --bist (did you mean --bits?)"),
        ("quantize M O --group 64", "awqkit quantize: error: no option --group"),
        ("quantize M O --bits four", "awqkit quantize: error: argument --bits: 'four' is not a whole number"),
        ("quantize M O --bits 9", "awqkit quantize: error: bits is 9; it takes a whole number from 2 to 8"),
        (
            "quantize M O --method gptx",
            "argument --method: 'gptx' is not one of rtn, gptq, awq, smoothquant (did you mean gptq?)",
        ),
        ("quantize M O --quality fats", "'fats' is not one of fast, balanced, best (did you mean fast?)"),
        ("quantize M O --quality fast --method awq", "quality 'fast' and method 'awq' were both given"),
        ("quantize M O --quality best --method gptq", "quality 'best' and method 'gptq' were both given"),
        ("quantize M O --propagate 1.5", "argument --propagate: '1.5' is not off, auto or a number from 0 to 1"),
        ("quantize M O --propagate nan", "argument --propagate: 'nan' is not off, auto or a number from 0 to 1"),
        ("quantize M O --propagate on", "argument --propagate: 'on' is not off, auto or a number from 0 to 1"),
        ("quantize M O --smooth-alpha 2", "argument --smooth-alpha: '2' is not a number from 0 to 1"),
        ("quantize M O --rounds 1.5", "argument --rounds: '1.5' is not a whole number of at least 0"),
        ("quantize M O --rounds 65", "rounds is 65; it takes a whole number from 0 to 64"),
        ("quantize M O --symmetric --asymmetric", "not allowed with argument --symmetric"),
        ("quantize M O --clip --no-clip", "not allowed with argument --clip"),
        ("quantize M O --device gpu", "argument --device: 'gpu' is not one of auto, cpu, cuda, cuda:N"),
        ("quantize M O --dtype int8", "argument --dtype: 'int8' is not one of bfloat16, float16"),
        ("quantize M O --json no/r.json", "--json no/r.json: there is no folder no"),
        ("quantize M O --json .", "--json .: is a folder"),
        ("quantize M O --recipe no.toml", "recipe no.toml: cannot be read"),
        ("quantize M O --recipe both.toml", "were both given"),
        ("quantize M O --recipe unknown.toml", "unknown key 'bitss'"),
        ("evaluate M", "awqkit evaluate: error: the following arguments are required: --text"),
        ("evaluate M --text t --max-windows 0", "'0' is not a whole number of at least 1"),
        ("demo --model smolm2", "'smolm2' is not one of embedded, smollm2 (did you mean smollm2?)"),
    ],
)
def test_wrong_use_is_one_line_and_no_work(awqkit, api, words, message):
    Path("both.toml").write_text('quality = "fast"\nmethod = "awq"')
    Path("unknown.toml").write_text("bitss = 4")
    outcome = awqkit(*words.split())
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert message in line
    assert line.endswith(" --help")
    assert not api.calls


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CheckpointError("M: no\nsafetensors"), 1, "awqkit: error: M: no safetensors"),
        (OutputError("OUT exists"), 1, "awqkit: error: OUT exists"),
        (
            FormatError("awq has no 3 bits."),
            2,
            "awqkit quantize: error: awq has no 3 bits; try awqkit quantize --help",
        ),
        (KeyboardInterrupt(), 130, "awqkit: interrupted, nothing was left behind"),
        (
            OSError(errno.ENOSPC, "No space left on device", "OUT/a.safetensors"),
            1,
            "awqkit: error: disk full while writing OUT/a.safetensors: "
            "nothing was left behind, free some space and run again",
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            1,
            "awqkit: error: disk full: nothing was left behind, free some space and run again",
        ),
        (
            MemoryError(),
            1,
            "awqkit: error: out of memory (the machine has none left): nothing was left behind",
        ),
    ],
)
def test_failures_are_one_line(awqkit, api, error, code, line):
    api.fails = raising(error)
    outcome = awqkit("quantize", "M", "O")
    assert (outcome.code, outcome.out, outcome.err) == (code, "", f"{line}\n")


def test_anything_else_is_a_bug_with_its_traceback(awqkit, api):
    api.fails = raising(KeyError("odd"))
    outcome = awqkit("quantize", "M", "O")
    assert outcome.code == 1
    assert outcome.err.startswith("Traceback")
    assert "KeyError: 'odd'" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("awqkit: this is a bug in awqkit: please report it")


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals_unwind_so_that_temporary_output_goes(awqkit, api, number, code, word):
    removed = []

    def killed_while_writing():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)  # the signal comes within it
        finally:
            os.kill(os.getpid(), number)  # a second press does not stop the cleaning up
            removed.append("temporary output")

    # a suite started in the background inherits an ignored SIGINT, which awqkit rightly leaves ignored
    inherited = signal.signal(number, signal.default_int_handler)
    before = signal.getsignal(number)
    api.fails = killed_while_writing
    try:
        outcome = awqkit("quantize", "M", "O")
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, inherited)
    assert (outcome.code, outcome.err) == (code, f"awqkit: {word}, nothing was left behind\n")
    assert removed


def test_a_json_that_cannot_be_written_keeps_the_result(awqkit, api):
    api.fails = lambda: Path("s.json").mkdir()  # after the check, while the work runs
    outcome = awqkit("evaluate", "M", "--text", "t", "--json", "s.json")
    assert outcome.code == 1
    assert "perplexity" in outcome.out
    assert outcome.err.splitlines()[-1] == "awqkit: error: --json s.json: cannot be written (Is a directory)"


def test_a_device_that_is_not_there_is_named(awqkit, api):
    torch = pytest.importorskip("torch")
    missing = f"cuda:{torch.cuda.device_count()}"
    outcome = awqkit("quantize", "M", "O", "--device", missing)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"awqkit quantize: error: --device {missing}: torch ")
    assert not api.calls


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "awqkit: interrupted, 5 of 30 blocks are done; the same command goes on"),
        (MemoryError("x"), "awqkit: error: out of memory (x): 5 of 30 blocks are done; the same command goes on"),
        (OutputError("out: full"), "awqkit: error: out: full; 5 of 30 blocks are done; the same command goes on"),
    ],
)
def test_a_run_that_can_go_on_says_so(capsys, error, line):
    setattr(error, KEPT_ATTRIBUTE, "5 of 30 blocks are done; the same command goes on")
    report_failure(error, "awqkit quantize")
    assert capsys.readouterr().err.strip() == line
