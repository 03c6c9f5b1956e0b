"""Flags and recipe files become the Recipe and RunOptions that the api gets; the result is printed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from awqkit import recipe as recipe_module
from awqkit.cli import recipe_flags
from awqkit.options import RunOptions
from awqkit.recipe import DEFAULT_QUALITY, Recipe

DEFAULT = partial(Recipe.preset, DEFAULT_QUALITY)


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        ((), DEFAULT()),
        (("--bits", "3"), DEFAULT(bits=3)),
        (("--group-size", "64"), DEFAULT(group_size=64)),
        (("--symmetric",), DEFAULT(symmetric=True)),
        (("--asymmetric",), DEFAULT(symmetric=False)),
        (("--quality", "fast"), Recipe.preset("fast")),
        (("--quality", "balanced"), DEFAULT()),
        (("--quality", "best"), Recipe.preset("best")),
        (("--quality", "best", "--rounds", "2"), Recipe.preset("best", rounds=2)),
        (("--method", "rtn"), Recipe.method("rtn")),
        (("--method", "awq"), Recipe.method("awq")),
        (("--method", "gptq"), Recipe.method("gptq")),
        (("--method", "smoothquant"), Recipe.method("smoothquant")),
        (("--method", "smoothquant", "--smooth-alpha", "0.5"), Recipe.method("smoothquant", smooth_alpha=0.5)),
        (("--bits", "3", "--format", "compressed-tensors"), DEFAULT(bits=3, format="compressed-tensors")),
        (("--propagate", "off"), DEFAULT(propagation=0.0)),
        (("--propagate", "auto"), DEFAULT(propagation="auto")),
        (("--propagate", "0.75"), DEFAULT(propagation=0.75)),
        (("--propagate", "1"), DEFAULT(propagation=1.0)),
        (("--alpha-search", "layer"), DEFAULT(alpha_search="layer")),
        (("--importance", "mean-abs"), DEFAULT(importance="mean-abs")),
        (("--clip",), DEFAULT(clip="ends")),
        (("--no-clip",), DEFAULT(clip="none")),
        (("--folds", "off"), DEFAULT(folds="off")),
        (("--method", "rtn", "--clip"), Recipe.method("rtn", clip="ends")),
        (("--dtype", "float16"), DEFAULT(dtype="float16")),
        (("--dtype", "bf16"), DEFAULT(dtype="bfloat16")),
        (("--calibration", "mine.txt"), DEFAULT(calibration="mine.txt")),
        (("--samples", "16", "--seq-len", "256"), DEFAULT(samples=16, seq_len=256)),
        (("--seed", "7"), DEFAULT(seed=7)),
        (("--ignore", "*.a", "--ignore", "*.b"), DEFAULT(ignore=("*.a", "*.b"))),
    ],
)
def test_flags_become_the_recipe(awqkit, api, flags, recipe):
    assert awqkit("quantize", "MODEL", "OUT", *flags).code == 0
    (call,) = api.calls
    assert call.recipe == recipe
    assert (str(call.model), str(call.out)) == ("MODEL", "OUT")


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ((), RunOptions()),
        (("--device", "cpu"), RunOptions(device="cpu")),
        (("--overwrite",), RunOptions(overwrite=True)),
        (("--restart",), RunOptions(restart=True)),
        (("--save-every", "5"), RunOptions(save_every=5)),
        (("--device-memory", "5.5"), RunOptions(device_memory=5.5)),
        (("--trust-remote-code",), RunOptions(trust_remote_code=True)),
    ],
)
def test_flags_become_the_run_options(awqkit, api, flags, options):
    assert awqkit("quantize", *flags, "MODEL", "OUT").code == 0
    assert api.calls[0].options == options


def test_choices_offered_are_those_of_the_recipe():
    assert tuple(recipe_module._PRESETS) == recipe_flags.QUALITIES
    assert tuple(recipe_module._METHODS) == recipe_flags.METHODS
    assert recipe_module._CHOICES["importance"] == recipe_flags.IMPORTANCES
    assert recipe_module._CHOICES["alpha_search"] == recipe_flags.ALPHA_SEARCHES


def test_help_states_the_default_presets_own_values(awqkit, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = " ".join(awqkit("quantize", "--help").out.split())
    default = DEFAULT()
    for words in (
        f"several times slower (default: {DEFAULT_QUALITY})",
        f"on rows held out (default: {default.propagation})",
        f"wants propagation (default: {default.importance},",
        f"of descent and refit (default: {default.rounds},",
        f"rows of text (default: {default.samples})",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("toml", "flags", "recipe"),
    [
        ("bits = 3\nseed = 5", (), DEFAULT(bits=3, seed=5)),
        ("bits = 3\nseed = 5", ("--seed", "9"), DEFAULT(bits=3, seed=9)),
        ("symmetric = true", ("--asymmetric",), DEFAULT(symmetric=False)),
        ('clip = "none"', ("--clip",), DEFAULT(clip="ends")),
        ('ignore = ["*.a"]', (), DEFAULT(ignore=("*.a",))),
        ('ignore = ["*.a"]', ("--ignore", "*.b"), DEFAULT(ignore=("*.b",))),
        ('method = "awq"', (), Recipe.method("awq")),
        ('quality = "fast"', ("--method", "rtn"), Recipe.method("rtn")),
        ('method = "rtn"\nbits = 3', ("--quality", "fast"), Recipe.preset("fast", bits=3)),
        ('method = "rtn"', ("--method", "awq"), Recipe.method("awq")),
    ],
)
def test_flags_win_over_the_recipe_file(awqkit, api, toml, flags, recipe):
    Path("r.toml").write_text(toml)
    assert awqkit("quantize", "MODEL", "OUT", "--recipe", "r.toml", *flags).code == 0
    assert api.calls[0].recipe == recipe


def test_result_goes_to_stdout_and_progress_to_stderr(awqkit):
    outcome = awqkit("quantize", "my model", "OUT")
    assert "the report → text" in outcome.out
    assert "Saved OUT (1.50 kB) after 12.3 s, with 3 fallbacks." in outcome.out
    assert "vllm serve OUT" in outcome.out
    assert "--reference 'my model'" in outcome.out
    assert outcome.err.splitlines() == [
        "group size 64",
        "block 0/2",
        "block 1/2  4.2 s  output error 0.0123 -> 0.0061  left 0:00",
        "block 2/2  4.0 s  3 fell back",
    ]


def test_quiet_prints_the_result_alone(awqkit):
    outcome = awqkit("quantize", "MODEL", "OUT", "--quiet")
    assert outcome.err == ""
    assert "the report" in outcome.out
    assert "Next" not in outcome.out


def test_json_holds_the_report(awqkit):
    assert awqkit("quantize", "MODEL", "OUT", "--json", "r.json").code == 0
    assert json.loads(Path("r.json").read_text()) == {"blocks": 2}


def test_flags_that_the_method_does_not_read_are_named(awqkit):
    outcome = awqkit("quantize", "M", "O", "--method", "rtn", "--importance", "square", "--calibration", "t.txt")
    assert outcome.code == 0
    assert "--importance not used: rtn searches no channel scales" in outcome.err
    assert "--calibration not used: rtn looks at no text" in outcome.err


@pytest.mark.parametrize(
    ("flags", "notice"),
    [
        ("--quality fast --rounds 3", "--rounds not used: fast refines no codes"),
        ("--smooth-alpha 0.5", "--smooth-alpha not used: balanced does not smooth activations"),
        (
            "--method smoothquant --alpha-search layer --importance square",
            "--alpha-search and --importance not used: smoothquant searches no channel scales",
        ),
        ("--method gptq --alpha-search layer", "--alpha-search not used: gptq searches no channel scales"),
    ],
)
def test_each_flag_that_goes_unread_has_its_reason(awqkit, flags, notice):
    outcome = awqkit("quantize", "M", "O", *flags.split())
    assert outcome.code == 0
    assert notice in outcome.err.splitlines()


@pytest.mark.parametrize(
    "flags", ["--rounds 3 --importance square --alpha-search layer", "--method smoothquant --smooth-alpha 0.5"]
)
def test_nothing_is_said_of_flags_that_are_read(awqkit, flags):
    assert "not used" not in awqkit("quantize", "M", "O", *flags.split()).err
