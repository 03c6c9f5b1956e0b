"""Help teaches with examples, fits 80 columns, and answers without importing torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import awqkit as package
from awqkit.cli import main
from awqkit.cli.main import VERBS
from awqkit.cli.recipe_flags import RECIPE_FLAGS

SOURCE = str(Path(main.__file__).resolve().parents[2])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_with_examples(awqkit, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    outcome = awqkit(verb, "--help")
    assert outcome.code == 0
    assert f"examples:\n  awqkit {verb}" in outcome.out
    assert "(default: " in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert outcome.out.isascii()


def test_quantize_help_names_every_option(awqkit):
    text = awqkit("quantize", "--help").out
    for flag in (
        *RECIPE_FLAGS.values(),
        "--asymmetric",
        "--no-clip",
        "--device",
        "--overwrite",
        "--json",
        "--recipe",
        "--quiet",
    ):
        assert f"  {flag}" in text


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_awqkit_alone_shows_its_verbs(awqkit, words):
    outcome = awqkit(*words)
    assert outcome.code == 0
    for verb in VERBS:
        assert f"\n  {verb} " in outcome.out


def test_version(awqkit):
    assert awqkit("--version").out == f"awqkit {package.__version__}\n"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("quantize --help", 0),
        ("quantize M O --bits nine", 2),
        ("quantize M O --bits 9", 2),
        ("compare M --text t.txt --methods all", 2),
    ],
)
def test_help_and_wrong_use_import_no_torch(words, code):
    program = (
        "import sys; from awqkit.cli.main import main; code = main(sys.argv[1:]);"
        "slow = {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(f'imported {slow}' if slow else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words.split()],
        env={**os.environ, "PYTHONPATH": SOURCE}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr


def test_python_m_awqkit_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "awqkit", "quantize"],
        env={**os.environ, "PYTHONPATH": SOURCE}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("awqkit quantize: error: the following arguments are required: MODEL, OUT; ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
