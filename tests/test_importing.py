"""Imports without looks for garbage, and a process that ends without one."""

from __future__ import annotations

import gc

import pytest

from awqkit.cli import main as command_line
from awqkit.imports import importing


def test_no_look_for_garbage_amid_an_import() -> None:
    with importing():
        assert not gc.isenabled()
        with importing():
            pass
        assert not gc.isenabled()  # the outer one is not over
    assert gc.isenabled()


def test_looks_go_on_after_an_import_that_failed() -> None:
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_who_looks_for_no_garbage_is_left_alone() -> None:
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_process_ends_without_a_look_and_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[str] = []
    monkeypatch.setattr(command_line, "main", lambda: ends.append("ran") or 3)
    monkeypatch.setattr(command_line.gc, "freeze", lambda: ends.append("left alone"))
    assert command_line.command() == 3
    assert ends == ["ran", "left alone"]
