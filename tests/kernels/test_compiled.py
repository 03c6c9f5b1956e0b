"""The clock of Triton's compiler, with a stand-in for Triton where none is installed."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from awqkit.kernels.compiled import CompileClock

CUDA = torch.device("cuda")


def _stand_in(monkeypatch: pytest.MonkeyPatch, **content: object) -> None:
    triton = ModuleType("triton")
    triton.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    vars(triton).update(content)
    monkeypatch.setitem(sys.modules, "triton", triton)


def test_what_was_compiled_is_added_up_and_what_was_found_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bool] = []
    compilation = SimpleNamespace(listener=lambda **about: heard.append(about["cache_hit"]))
    others = compilation.listener
    _stand_in(monkeypatch, knobs=SimpleNamespace(compilation=compilation))
    clock = CompileClock(CUDA)
    for _ in range(2):  # one clock for several stretches
        with clock:
            for cache_hit in (False, True):
                times = SimpleNamespace(total=250_000)
                compilation.listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=cache_hit)
        assert compilation.listener is others
    assert clock.seconds == 0.5
    assert heard == [False, True, False, True]  # whoever listened before still does


def test_a_triton_that_tells_nobody_counts_as_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch)
    with CompileClock(CUDA) as clock:
        pass
    assert clock.seconds == 0.0


def test_on_a_cpu_triton_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # whose import would raise
    with CompileClock(torch.device("cpu")) as clock:
        pass
    assert clock.seconds == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_kernel_takes_time_to_compile_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    triton = pytest.importorskip("triton")
    language = pytest.importorskip("triton.language")

    @triton.jit
    def doubled(values, count, COUNT: language.constexpr):
        at = language.arange(0, COUNT)
        found = language.load(values + at, mask=at < count)
        language.store(values + at, 2 * found, mask=at < count)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
    values, seconds = torch.ones(8, device="cuda"), []
    for _ in range(2):
        with CompileClock(CUDA) as clock:
            doubled[(1,)](values, 8, COUNT=8)
        seconds.append(clock.seconds)
    assert values.tolist() == [4.0] * 8
    assert seconds[0] > 0.0
    assert seconds[1] == 0.0
