"""The float model's logits, computed once: KL of every further row then costs one forward pass, not two.

KeptLogits answers like the model itself, on the windows that it was made from and on no others, so the evaluation that
a user runs is the one that the benchmark runs. Where the logits do not fit, the model is asked again for every row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn

WINDOWS_AT_ONCE = {"cpu": 2, "cuda": 16}
MEMORY_SHARE = 0.4  # of what is free; the rest is for the quantization and for the model that is scored


class KeptLogits(nn.Module):
    """A model's float32 logits `[windows, tokens, vocabulary]` on its device, found again by the token ids."""

    def __init__(self, model: nn.Module, windows: Tensor, device: torch.device) -> None:
        super().__init__()
        self.config = model.config
        step = WINDOWS_AT_ONCE[device.type]
        self.logits = torch.empty(logits_shape(model, windows), device=device)
        with torch.inference_mode():
            for start in range(0, len(windows), step):
                batch = windows[start : start + step].to(device)
                self.logits[start : start + step] = model(batch, use_cache=False).logits
        self.position = {_key(window): index for index, window in enumerate(windows)}

    def forward(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """The logits of whole windows `ids` `[windows, tokens]`, as a model returns them. KeyError for other ids."""
        found = [self.position[_key(window)] for window in ids.cpu()]
        if found == list(range(found[0], found[0] + len(found))):
            return SimpleNamespace(logits=self.logits[found[0] : found[0] + len(found)])  # a view
        return SimpleNamespace(logits=self.logits[found])


def reference_of(model: nn.Module, windows: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """The model's kept logits on all windows (all of one length), or the model itself where they do not fit."""
    every = torch.cat(list(windows.values()))
    if 4 * logits_shape(model, every).numel() > MEMORY_SHARE * free_bytes(device):
        return model
    return KeptLogits(model, every, device)


def logits_shape(model: nn.Module, windows: Tensor) -> torch.Size:
    """`[windows, tokens, vocabulary]`."""
    return torch.Size((*windows.shape, int(model.config.get_text_config().vocab_size)))


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses, on the device or on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _key(window: Tensor) -> bytes:
    return window.contiguous().numpy().tobytes()
