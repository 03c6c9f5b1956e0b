"""What the command asks of torch's allocator."""

from __future__ import annotations

import sys

import pytest

from awqkit.cli.allocator import grow_segments


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_asked_for_stays(name: str) -> None:
    environment = {name: "max_split_size_mb:64"}
    grow_segments(environment)
    assert environment == {name: "max_split_size_mb:64"}


def test_segments_grow_on_linux_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, expected in (("linux", {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}), ("win32", {})):
        monkeypatch.setattr(sys, "platform", platform)
        environment: dict[str, str] = {}
        grow_segments(environment)
        assert environment == expected
