"""Where the embedded model lies. What it is and how it was made: data/README.md."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from awqkit.errors import CheckpointError


def embedded_model() -> Path:
    """The folder of the embedded model, a complete checkpoint with its tokenizer; read only.

    Raises CheckpointError where the package lies in an archive or lost its data.
    """
    folder = Path(str(files("awqkit.demo") / "data"))
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"the embedded model is not at {folder}; install awqkit again, as a folder")
    return folder
