"""How much memory there is to spare, how much was used, and a bound to it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> float | None:
    """What a device, or the host for the CPU, can still give; None where the system does not tell."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        allowed = torch.cuda.get_per_process_memory_fraction(_index(device)) * total
        return max(0.0, min(free, allowed - reserved)) + reserved - torch.cuda.memory_allocated(device)
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def is_spare(needed: float, share: float, reserved: float, device: torch.device) -> bool:
    """Whether `needed` bytes are no more than a share of what is free, and leave `reserved` bytes of it."""
    free = free_bytes(device)
    return free is not None and needed <= min(share * free, free - reserved)


def _index(device: torch.device) -> int:
    """What torch's fractions go by: they take no device without a number."""
    return torch.cuda.current_device() if device.index is None else device.index


@contextlib.contextmanager
def device_memory_at_most(device: torch.device, gigabytes: float | None) -> Iterator[None]:
    """torch's allocator gives no more of a CUDA device than that, and `free_bytes` knows of it; None: all there is."""
    if gigabytes is None or device.type != "cuda":
        yield
        return
    index, total = _index(device), torch.cuda.mem_get_info(device)[1]
    before = torch.cuda.get_per_process_memory_fraction(index)
    torch.cuda.set_per_process_memory_fraction(min(before, 1e9 * gigabytes / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)


def peak_resident_bytes() -> int:
    """The most that this process had in memory so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
