"""How much memory there is to spare, how much was used, and a bound to it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_PINNED_SHARE = 0.3  # of the host's free memory


def free_bytes(device: torch.device) -> float | None:
    """What a device, or the host for the CPU, can still give; None where the system does not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, unused = _torch_has(device)
        allowed = torch.cuda.get_per_process_memory_fraction(_index(device)) * total
        return max(0.0, min(free, allowed - reserved)) + unused
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def _torch_has(device: torch.device) -> tuple[int, int]:
    """Bytes of a CUDA device that torch's allocator has taken, and those of them that are not in use.

    Read off the nested statistics: making the flat ones, as `memory_reserved` does, takes longer than the rest.
    """
    stats = torch.cuda.memory_stats_as_nested_dict(device)  # empty before the device was first used
    if not stats:
        return 0, 0
    reserved, used = (stats[name]["all"]["current"] for name in ("reserved_bytes", "allocated_bytes"))
    return reserved, reserved - used


def is_spare(needed: float, share: float, reserved: float, device: torch.device) -> bool:
    """Whether `needed` bytes are no more than a share of what is free, and leave `reserved` bytes of it.

    It is asked many times a block: what torch holds unused often settles it, and the driver is not asked.
    """

    def fits(free: float | None) -> bool:
        return free is not None and needed <= min(share * free, free - reserved)

    return (device.type == "cuda" and fits(_torch_has(device)[1])) or fits(free_bytes(device))


def can_pin(num_bytes: float, device: torch.device) -> bool:
    """Whether what a GPU has no room for may lie in pinned memory of its host, which copies go to and from fast.

    torch takes whole powers of two of it, and keeps them.
    """
    return device.type == "cuda" and is_spare(2 * num_bytes, _PINNED_SHARE, 0.0, torch.device("cpu"))


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
