"""Tiny model folders with random weights and a real tokenizer, and ways to damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from awqkit.demo.model import embedded_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 0,
}


def add_tokenizer(directory: Path) -> None:
    """Copy the embedded model's tokenizer (4096 tokens, starts a text with token 1) into a folder."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(embedded_model() / name, directory / name)


def save_folder(model: Any, directory: Path, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "1GB") -> Path:
    """`model` in `dtype` saved as a folder with tokenizer; its norms are made to differ from 1."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.uniform_(0.5, 2.0)  # all ones would hide a fold that is not applied
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    add_tokenizer(directory)
    return directory


def make_model(
    directory: Path, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "1GB", **changes: Any
) -> Path:
    """A random Llama of two blocks as a folder, the same on every call; `changes` go to its config."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, **changes}), dtype=torch.float32)
    return save_folder(model, directory, dtype, max_shard_size)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, of one file or several."""
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let `change` edit the dict of tensors of a single-file folder in place, and save it again."""
    tensors = tensors_of(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, *drop: str, **values: Any) -> None:
    """Set and drop keys of a folder's config.json."""
    file = directory / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps({**config, **values}))


@dataclass(frozen=True)
class Place:
    """A folder to work in, with a copy of the model, calibration text, and no OUT yet; paths are relative to it."""

    root: Path
    model: Path
    text: Path
    out: Path

    def contents(self) -> dict[str, bytes | None]:
        """Every file's bytes and every folder (None) in it, hidden ones too."""
        everything = sorted(self.root.rglob("*"))
        return {str(path): path.read_bytes() if path.is_file() else None for path in everything}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str
