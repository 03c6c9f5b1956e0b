"""A bound to the memory of a GPU: told to the allocator, known to whoever asks what is free, and taken away again."""

import pytest
import torch

from awqkit import Recipe, RunOptions, quantize
from awqkit.errors import UsageError
from awqkit.pipeline.free_memory import device_memory_at_most, free_bytes, is_spare

GPU = torch.device("cuda", 0)


class PretendedGpu:
    """80 GB, of which others have 20; what torch has reserved and handed out."""

    def __init__(self, reserved=4e9, allocated=3e9):
        self.fraction, self._reserved, self._allocated = 1.0, reserved, allocated

    def _stats(self):
        sizes = {"reserved_bytes": int(self._reserved), "allocated_bytes": int(self._allocated)}
        return {name: {"all": {"current": size}} for name, size in sizes.items()}

    def install(self, monkeypatch):
        for name, value in (
            ("mem_get_info", lambda device: (int(60e9 - self._reserved), int(80e9))),
            ("memory_stats_as_nested_dict", lambda device: self._stats()),
            ("get_per_process_memory_fraction", lambda device: self.fraction),
            ("set_per_process_memory_fraction", lambda fraction, device: setattr(self, "fraction", fraction)),
        ):
            monkeypatch.setattr(torch.cuda, name, value)


def test_free_is_what_the_device_has_and_what_torch_holds_unused(monkeypatch):
    PretendedGpu().install(monkeypatch)
    assert free_bytes(GPU) == pytest.approx(56e9 + 1e9)


def test_within_a_bound_free_counts_what_torch_has_taken_already(monkeypatch):
    gpu = PretendedGpu()
    gpu.install(monkeypatch)
    with device_memory_at_most(GPU, 10.0):
        assert gpu.fraction == pytest.approx(10 / 80)
        assert free_bytes(GPU) == pytest.approx(10e9 - 3e9)
    assert gpu.fraction == 1.0


def test_a_bound_below_what_is_taken_leaves_what_lies_unused(monkeypatch):
    PretendedGpu(reserved=12e9, allocated=8e9).install(monkeypatch)
    with device_memory_at_most(GPU, 10.0):
        assert free_bytes(GPU) == pytest.approx(4e9)


def test_a_bound_above_what_the_device_has_changes_nothing(monkeypatch):
    gpu = PretendedGpu()
    gpu.install(monkeypatch)
    with device_memory_at_most(GPU, 500.0):
        assert free_bytes(GPU) == pytest.approx(57e9)
    assert gpu.fraction == 1.0


def test_the_bound_is_taken_away_when_the_run_fails(monkeypatch):
    gpu = PretendedGpu()
    gpu.install(monkeypatch)
    with pytest.raises(RuntimeError), device_memory_at_most(GPU, 10.0):
        raise RuntimeError
    assert gpu.fraction == 1.0


def test_on_the_cpu_a_bound_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--device-memory"):
        quantize(tmp_path, tmp_path / "out", Recipe.preset("fast"), options=RunOptions(device="cpu", device_memory=4.0))


def test_what_is_kept_leaves_what_is_reserved(monkeypatch):
    PretendedGpu(reserved=0.0, allocated=0.0).install(monkeypatch)  # 60 GB free
    assert is_spare(18e9, 0.3, 0.0, GPU)
    assert not is_spare(18.1e9, 0.3, 0.0, GPU)
    assert is_spare(10e9, 0.3, 50e9, GPU)
    assert not is_spare(10.1e9, 0.3, 50e9, GPU)


def test_what_torch_holds_unused_settles_it_without_the_driver(monkeypatch):
    PretendedGpu(reserved=30e9, allocated=10e9).install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("asked"))
    assert is_spare(6e9, 0.3, 14e9, GPU)
    for needed, reserved in ((6.1e9, 0.0), (6e9, 14.1e9)):  # more than that: the driver knows
        with pytest.raises(pytest.fail.Exception, match="asked"):
            is_spare(needed, 0.3, reserved, GPU)
