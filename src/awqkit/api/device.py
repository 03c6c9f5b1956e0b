"""From the word in RunOptions to a torch device."""

from __future__ import annotations

from contextlib import suppress
from threading import Thread

import torch

from awqkit.errors import UsageError


def ranks_device(name: str, local_rank: int) -> torch.device:
    """`choose_device` for one of several ranks: where no GPU is named each takes the next one, in turn."""
    device = choose_device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return device


def choose_device(name: str) -> torch.device:
    """The device that `name` means ("auto", "cpu", "cuda", "cuda:N"). Raises UsageError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is not known; it takes auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported; it takes auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device {name!r}: this torch sees no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return device


def wake(device: torch.device) -> None:
    """Have a GPU's driver begin, up to a second while Python goes on importing. What is wrong is seen at first use."""

    def first_product() -> None:
        with suppress(RuntimeError):
            one = torch.ones(1, 1, device=device)
            one @ one

    if device.type == "cuda":
        Thread(target=first_product, name="awqkit-wake", daemon=True).start()
