"""Imports without looks for garbage, and a process that ends without one."""

from __future__ import annotations

import gc

import pytest

from awqkit import imports
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


@pytest.mark.parametrize("ours", [True, False])
def test_what_is_imported_is_never_looked_through_in_a_process_of_our_own_alone(
    ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[str] = []
    monkeypatch.setattr(imports, "_freezes", False)
    monkeypatch.setattr(imports.gc, "freeze", lambda: frozen.append("once"))
    if ours:
        imports.freeze_imports()
    with importing(), importing():
        pass
    assert frozen == ["once"] * ours


def test_a_process_ends_without_a_look_and_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[str] = []
    monkeypatch.setattr(imports, "_freezes", False)
    monkeypatch.setattr(command_line, "main", lambda: ends.append("ran") or 3)
    monkeypatch.setattr(command_line.gc, "freeze", lambda: ends.append("left alone"))
    assert command_line.command() == 3
    assert ends == ["ran", "left alone"]
