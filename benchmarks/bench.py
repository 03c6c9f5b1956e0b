"""What every benchmark shares: where the text is, and a JSON that says on what it was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
DATA = REPO.parent / "shared" / "data"


def text_files(folder: Path) -> dict[str, Path]:
    """The benchmark's texts by role. Exits with a clear word where they are not there."""
    files = {
        "calibration": folder / "books_calibration.txt",
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
        "command": " ".join([Path(sys.argv[0]).name, *(Path(word).name for word in sys.argv[1:])]),
    }


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write `result` to benchmarks/results/NAME.json and say so."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path.name}")


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
