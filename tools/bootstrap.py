"""Set up `.venv` so that `make demo` and `make test` work: `python3 tools/bootstrap.py [--extra NAME]...`.

Needs nothing but the Python that runs it and knows nothing of what awqkit does. A second run reads a stamp.
Which torch it takes, the first rule that fits:

    1. the environment has torch, new enough             kept
    2. the Python that runs this has torch, new enough   kept and seen from the environment (your CUDA build)
    3. Linux without an NVIDIA GPU                       PyTorch's CPU index, if it answers within seconds
    4. else                                              what pip finds for the version in constraints.txt

A torch that is kept is never replaced: pip gets constraints.txt with torch's line set to the version present.
transformers and the rest go into the environment as constraints.txt pins them; your Python keeps its own.
"""

# No `from __future__ import annotations`, no `:=`: Python 3.6 must be able to read on to the check below.
import sys

if sys.version_info < (3, 10):  # noqa: UP036 - this runs before pip could refuse
    sys.exit(
        f"awqkit needs Python 3.10 or newer, and {sys.executable} is Python {sys.version.split()[0]}: "
        "install a newer one (Debian, Ubuntu: python3.12 with python3.12-venv), then `make PYTHON=python3.12`"
    )

import argparse
import fcntl
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pip_steps import SetUpError, ask, exit_code_of, pip_install_torch, python_of, run_pip, say, torch_version

ROOT = Path(__file__).resolve().parent.parent
STAMP = ".awqkit-ready"
DERIVED_CONSTRAINTS = "awqkit-constraints.txt"
VISIBLE_TORCH = "awqkit-visible-torch.pth"


def minimum_torch(root: Path) -> tuple[int, int]:
    """(major, minor) of the oldest torch that pyproject.toml allows. Raises SetUpError."""
    found = re.search(r'"torch>=(\d+)\.(\d+)', (root / "pyproject.toml").read_text(encoding="utf-8"))
    if found is None:
        raise SetUpError(f'{root / "pyproject.toml"} has no dependency "torch>=X.Y": restore it')
    return int(found[1]), int(found[2])


def is_new_enough(version: str, minimum: tuple[int, int]) -> bool:
    """Whether torch `version` is at least `minimum`; a pre-release of `minimum` itself is older than it."""
    found = re.match(r"(\d+)\.(\d+)(?:\.\d+)*(a|b|rc|\.?dev)?", version)
    if found is None:
        return False
    release = (int(found[1]), int(found[2]))
    return release > minimum or (release == minimum and found[3] is None)


def with_torch_kept(constraints: str, version: str) -> str:
    """The text of constraints.txt with torch's line replaced by the version that is kept."""
    return re.sub(r"(?m)^torch==.*$", f"torch=={version}  # already here and kept", constraints)


def fingerprint(root: Path) -> str:
    """A hash of what set-up depends on; of the place too, since scripts in an environment name their path."""
    digest = hashlib.sha256(f"{root}\0{sys.version}\0".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def stamped_extras(venv: Path, wanted: str) -> set[str] | None:
    """The extras that a finished set-up of fingerprint `wanted` installed, or None if there was none."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if stamp.get("fingerprint") != wanted or not python_of(venv).exists():
        return None
    return set(stamp["extras"])


def make_venv(venv: Path, minimum: tuple[int, int]) -> None:
    """Make the environment unless a working one is there; it sees the running Python's torch if that is kept.

    Raises SetUpError where Python cannot make environments.
    """
    if ask(python_of(venv), "import sys, pip; assert sys.version_info >= (3, 10)") is not None:
        return
    if venv.exists():
        say(f"the {venv.name} that is here has no working Python >= 3.10 with pip: it is made anew")
    if ask(sys.executable, "import venv, ensurepip") is None:
        short = ".".join(map(str, sys.version_info[:2]))
        raise SetUpError(
            f"{sys.executable} cannot make virtual environments (venv or ensurepip is missing): "
            f"install it (Debian, Ubuntu: `apt install python{short}-venv`) and run this again"
        )
    base = torch_version(sys.executable)
    keep = base is not None and is_new_enough(base, minimum)
    if base is not None:
        why = "kept, the environment will see it" if keep else "too old, left alone"
        say(f"{sys.executable} has torch {base}: {why}")
    say(f"making {venv.name} with Python {sys.version.split()[0]} ({sys.executable})")
    options = ["--clear", "--system-site-packages"] if keep else ["--clear"]
    made = subprocess.run([sys.executable, "-m", "venv", *options, str(venv)], capture_output=True, text=True)
    if made.returncode != 0:
        raise SetUpError(f"making {venv} failed:\n{(made.stdout + made.stderr).strip()}")
    if keep and torch_version(python_of(venv)) is None:
        _make_visible(venv)


def _make_visible(venv: Path) -> None:
    # --system-site-packages shows the base Python's packages; `python3` may itself be that of an environment.
    where = ask(sys.executable, "import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)")
    site = ask(python_of(venv), "import sysconfig; print(sysconfig.get_path('purelib'))")
    if where and site:
        (Path(site) / VISIBLE_TORCH).write_text(f"{where}\n", encoding="utf-8")


def install_torch(root: Path, venv: Path, minimum: tuple[int, int]) -> str:
    """Install torch unless a good one is there; returns the version that is there then. Raises SetUpError."""
    python = python_of(venv)
    present = torch_version(python)
    if present is not None and is_new_enough(present, minimum):
        say(f"torch {present} is already there and new enough: kept")
        return present
    pip_install_torch(python, ["torch", "-c", str(root / "constraints.txt")])
    present = torch_version(python)
    if present is None:
        raise SetUpError(f"torch was installed but cannot be imported: see `{python} -c 'import torch'`")
    return present


def write_constraints(root: Path, venv: Path, torch: str) -> Path:
    """Write constraints.txt with torch pinned to the version that is there into `venv`; returns the file."""
    constraints = venv / DERIVED_CONSTRAINTS
    text = (root / "constraints.txt").read_text(encoding="utf-8")
    constraints.write_text(with_torch_kept(text, torch), encoding="utf-8")
    return constraints


def install_package(root: Path, venv: Path, extras: Iterable[str], constraints: Path) -> None:
    """Install awqkit itself, editable, with `extras`."""
    names = ",".join(sorted(extras))
    say("installing awqkit and what it needs" + (f" ({names})" if names else ""))
    package = f"{root}[{names}]" if names else str(root)
    run_pip(python_of(venv), ["install", "-e", package, "-c", str(constraints)], "installing awqkit")


def set_up(root: Path, venv: Path, extras: set[str], *, only_torch: bool = False) -> None:
    """Bring `venv` to where awqkit with `extras` runs in it; a stamp says when that is so. Raises SetUpError.

    only_torch: stop after torch, without a stamp (for an environment that gets a wheel).
    """
    wanted = fingerprint(root)
    with exclusive(root):
        done = stamped_extras(venv, wanted)
        if done is not None and extras <= done and not only_torch:
            return
        started = time.monotonic()
        (venv / STAMP).unlink(missing_ok=True)  # from here to the end the environment is not whole
        minimum = minimum_torch(root)
        make_venv(venv, minimum)
        torch = install_torch(root, venv, minimum)
        constraints = write_constraints(root, venv, torch)
        if only_torch:
            return
        everything = extras | (done or set())
        install_package(root, venv, everything, constraints)
        _write_stamp(venv, {"fingerprint": wanted, "extras": sorted(everything), "torch": torch})
    say(f"ready after {time.monotonic() - started:.0f} s")


def _write_stamp(venv: Path, content: dict[str, object]) -> None:
    whole = venv / f"{STAMP}.new"
    whole.write_text(json.dumps(content) + "\n", encoding="utf-8")
    whole.replace(venv / STAMP)


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Hold `root` against a second set-up at the same time (`make demo` and `make test` in two windows)."""
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work here: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: one set-up at a time is then the user's care
        yield
    finally:
        os.close(handle)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Set up the environment that awqkit runs in.")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml; repeatable")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment (default: .venv)")
    parser.add_argument("--only-torch", action="store_true", help="make the environment with torch, and stop")
    options = parser.parse_args(arguments)
    venv = options.venv.absolute()
    return exit_code_of(lambda: set_up(ROOT, venv, set(options.extra), only_torch=options.only_torch))


if __name__ == "__main__":
    sys.exit(main())
