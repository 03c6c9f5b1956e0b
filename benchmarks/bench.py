"""What every benchmark shares: where the text is, and a JSON that says on what it was measured."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
DATA = REPO.parent / "shared" / "data"
CALIBRATION_FILES = {"books": "books_calibration.txt", "second": "books_second.txt"}
_MEMORY_FILES = Path("/dev/shm")  # Linux' file system in memory


def text_files(folder: Path, calibration: str = "books") -> dict[str, Path]:
    """The benchmark's texts by role; calibration: a key of CALIBRATION_FILES. Exits with a clear word without them."""
    files = {
        "calibration": folder / CALIBRATION_FILES[calibration],
        "far": folder / "wikitext2_test.txt",
        "near": folder / "books_test.txt",
    }
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        print(f"skipped: the benchmark's text is not here ({', '.join(missing)}); pass --data FOLDER")
        raise SystemExit(0)
    return files


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and command of this run."""
    import transformers

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"{_processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *map(_without_way, sys.argv[1:])]),
    }


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write `result` to benchmarks/results/NAME.json and say so."""
    print(f"written: {write(name, result, folder).name}")


def write(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `result` to NAME.json, and return its path; a run killed meanwhile leaves what stood there before."""
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{name}.json", folder / f".{name}.part"
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def scratch_folder(num_bytes: int) -> tempfile.TemporaryDirectory[str]:
    """A folder for files that live as long as a row of a table: TMPDIR, else in memory where `num_bytes` fit, else
    where temporary files go."""
    in_memory = "TMPDIR" not in os.environ and _MEMORY_FILES.is_dir() and os.access(_MEMORY_FILES, os.W_OK)
    if in_memory and shutil.disk_usage(_MEMORY_FILES).free >= num_bytes:
        return tempfile.TemporaryDirectory(dir=_MEMORY_FILES)
    return tempfile.TemporaryDirectory()


def _without_way(word: str) -> str:
    """An argument without the folders of this machine; of NAME=PYTHON the name."""
    name, equals, _ = word.partition("=")
    return f"{name}=…" if equals else Path(word).name


def _commit() -> str:
    if os.environ.get("AWQKIT_COMMIT"):
        return os.environ["AWQKIT_COMMIT"]
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPO, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
