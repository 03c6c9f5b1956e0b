"""A place with a tiny model to work in, and the command line run in this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_folders import Outcome, Place, make_model

# As the command line does before it imports these libraries; here they may have been imported already.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from awqkit.cli.main import main

SMALL_RUN = ("--samples", "4", "--seq-len", "32")  # with the place's text a run takes about a second


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, made once; copy it before changing it."""
    return make_model(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A Place that is the current directory; its path has a space in it."""
    root = tmp_path / "some where"
    root.mkdir()
    shutil.copytree(made, root / "model")
    (root / "text.txt").write_text("".join(f"Line {i} of a plain text about nothing much.\n" for i in range(200)))
    monkeypatch.chdir(root)
    return Place(root, Path("model"), Path("text.txt"), Path("out"))


@pytest.fixture
def awqkit(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command line in this process: `awqkit("quantize", "MODEL", "OUT")`."""

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def quantize(place: Place, awqkit: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """`awqkit quantize model out` in the place with its text and few rows, and any further flags."""

    def run(*flags: object, model: object = None, out: object = None) -> Outcome:
        calibration = () if "--calibration" in flags or "rtn" in flags else ("--calibration", place.text)
        return awqkit("quantize", model or place.model, out or place.out, *calibration, *SMALL_RUN, *flags)

    return run


@pytest.fixture
def refused(place: Place, quantize: Callable[..., Outcome]) -> Callable[..., str]:
    """The one line that a refused `quantize` ends with: the exit code is right and nothing else has changed.

    after: how stderr lines may begin that come before it; block lines only where the run may have started.
    """

    def run(*flags: object, code: int = 1, after: tuple[str, ...] = (), **paths: object) -> str:
        before = place.contents()
        outcome = quantize(*flags, **paths)
        *others, line = outcome.err.splitlines()
        assert outcome.code == code, outcome.err
        assert outcome.out == ""
        assert all(other.startswith(after) for other in others), outcome.err
        start = "awqkit: error: " if code == 1 else "awqkit quantize: error: "
        assert line.startswith(start)
        assert len(line) < 400
        assert place.contents() == before, "something was left behind, or changed"
        assert Path.cwd() == place.root
        return line.removeprefix(start)

    return run
