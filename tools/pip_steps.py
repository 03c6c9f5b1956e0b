"""The steps of set-up that run pip, and what they need to know of this machine; standard library only.

Shared by `bootstrap.py` (awqkit's environment) and `vllm_env.py` (that of `make test-vllm`); knows neither.
"""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 5  # an index that takes longer is treated as absent
HEARTBEAT_SECONDS = 10
TAIL_LINES = 12
# pip's lines that say what it is at, among its warnings and remarks
WORK = (
    "Collecting",
    "Downloading",
    "Processing",
    "Building",
    "Preparing",
    "Installing",
    "Attempting uninstall",
)


class SetUpError(Exception):
    """Set-up cannot go on; `str(error)` opens with one line that says why and what to do."""


def say(text: str) -> None:
    """Print one line of set-up at once, also into a pipe."""
    print(f"set-up: {text}", flush=True)


def exit_code_of(step: Callable[[], None]) -> int:
    """The exit code of a set-up program: a SetUpError is told in one clear line, Ctrl-C with how to go on."""
    try:
        step()
    except SetUpError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up was interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


def python_of(venv: Path) -> Path:
    """The environment's own interpreter."""
    return venv / "bin" / "python"


def ask(python: Path | str, code: str) -> str | None:
    """What `python -c code` prints, or None if it fails or cannot start."""
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def torch_version(python: Path | str) -> str | None:
    """The version of the torch that `python` can import, or None; a broken torch is none."""
    # The version as pip knows it: a distributor's torch.__version__ may say more.
    return ask(python, "import importlib.metadata, torch; print(importlib.metadata.version('torch'))") or None


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi runs and lists a GPU."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def index_problem(url: str, timeout: float = PROBE_SECONDS) -> str | None:
    """Why the package index `url` cannot be used now, or None if it answers."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=timeout):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except urllib.error.URLError as error:
        # A certificate that urllib does not trust may be one that pip was told to trust: let pip try.
        return None if isinstance(error.reason, ssl.SSLCertVerificationError) else str(error.reason)
    except OSError as error:
        return str(error) or type(error).__name__


def run_pip(python: Path, arguments: list[str], doing: str) -> None:
    """Run pip, with a line now and then that shows what it is at. Raises SetUpError with pip's last lines."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    at_work: deque[str] = deque(["pip is starting"], maxlen=1)
    finished = threading.Event()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PIP_PROGRESS_BAR": "off"},
    ) as process:
        threading.Thread(target=_show_life, args=(finished, at_work), daemon=True).start()
        try:
            for line in process.stdout or ():
                tail.append(line.rstrip())
                if line.strip().startswith(WORK):
                    at_work.append(line.strip())
        except BaseException:
            process.terminate()
            raise
        finally:
            finished.set()
    if process.returncode != 0:
        last = "\n".join(f"    {line}" for line in tail)
        raise SetUpError(f"{doing} failed (pip exit code {process.returncode}); pip's last lines:\n{last}")


def _show_life(finished: threading.Event, at_work: deque[str]) -> None:
    started = time.monotonic()
    while not finished.wait(HEARTBEAT_SECONDS):
        say(f"  {time.monotonic() - started:4.0f} s  {at_work[-1][:90]}")


def pip_install_torch(python: Path, wanted: list[str], *, cpu_only: bool = False) -> None:
    """pip install `wanted` (torch and what pins it), from PyTorch's CPU index first where no GPU wants CUDA.

    cpu_only: take a CPU build even if there is an NVIDIA GPU. Raises SetUpError.
    """
    if sys.platform != "linux":  # elsewhere the package index has no CUDA builds
        say("installing torch")
    elif not cpu_only and has_nvidia_gpu():
        say("installing torch with CUDA, for the NVIDIA GPU that nvidia-smi lists (some gigabytes)")
    elif _installed_from_cpu_index(python, wanted):
        return
    run_pip(python, ["install", *wanted], "installing torch")


def _installed_from_cpu_index(python: Path, wanted: list[str]) -> bool:
    problem = index_problem(CPU_INDEX)
    if problem is None:
        say(f"a CPU build of torch will do here: installing it from {CPU_INDEX} (about 200 MB)")
        quick = ["--timeout", "15", "--retries", "0"]
        try:
            run_pip(python, ["install", *wanted, "--index-url", CPU_INDEX, *quick], "installing torch")
            return True
        except SetUpError as error:
            problem = str(error).splitlines()[-1].strip()
    say(f"a CPU build of torch would do here, but PyTorch's CPU index cannot be used ({problem})")
    say("installing the torch that pip finds elsewhere")
    return False
