"""A model is a folder or a hub id; what is neither ends in one line, without waiting for a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import errors as hub_errors

from awqkit.checkpoint import hub
from awqkit.errors import CheckpointError


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "_fetch", never)


def refusal(model: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        hub.resolve_model(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_returned_as_it_is(tmp_path: Path, no_hub: None) -> None:
    assert hub.resolve_model(tmp_path) == tmp_path
    assert hub.resolve_model(str(tmp_path)) == tmp_path


def test_a_relative_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_model("org/name") == Path("org/name")


@pytest.mark.parametrize(
    "model", ["./nothing", "../nothing", "~/no-such-folder", "a/b/c", "a b", "", "a\\b", "~nobody0/x"]
)
def test_a_path_is_never_looked_up(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None) -> None:
    monkeypatch.chdir(tmp_path)
    if model:
        assert "no such directory" in refusal(model)


def test_an_absolute_path_is_never_looked_up(tmp_path: Path, no_hub: None) -> None:
    message = refusal(tmp_path / "nothing")
    assert "no such directory" in message
    assert "hub" not in message


def test_a_file_is_no_model(tmp_path: Path, no_hub: None) -> None:
    (tmp_path / "model.gguf").touch()
    assert "is a file" in refusal(tmp_path / "model.gguf")


def test_a_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def give(hub_id: str, weights: bool) -> Path:
        asked.append((hub_id, weights))
        return tmp_path

    monkeypatch.setattr(hub, "_fetch", give)
    assert hub.resolve_model("org/name", show_progress=False) == tmp_path
    assert hub.resolve_model("org/name", show_progress=False, weights=False) == tmp_path
    assert asked == [("org/name", True), ("org/name", False)]


@pytest.mark.parametrize("weights", [True, False])
def test_weights_are_fetched_only_where_they_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bool
) -> None:
    unwanted: list[list[str]] = []

    def download(_: str, *, ignore_patterns: list[str], **__: object) -> str:
        unwanted.append(ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub.HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(hub, "snapshot_download", download)
    hub.resolve_model("org/name", show_progress=False, weights=weights)
    assert ("*.safetensors" in unwanted[0]) is not weights


def test_only_the_cache_is_tried_when_the_hub_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def unreachable(*_: object, timeout: float, **__: object) -> None:
        assert timeout == hub.PROBE_SECONDS
        raise TimeoutError("no route")

    def download(_: str, *, local_files_only: bool, **__: object) -> str:
        calls.append(local_files_only)
        return str(tmp_path)

    monkeypatch.setattr(hub.HfApi, "repo_info", unreachable)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.resolve_model("org/name") == tmp_path
    assert calls == [True]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (hub_errors.LocalEntryNotFoundError("line one\nline two"), "cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError(), "ValueError"),
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
    ],
)
def test_a_failure_names_both_possibilities(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise error

    monkeypatch.setattr(hub, "_fetch", fail)
    message = refusal("org/name")
    assert "no such directory" in message
    assert expected in message


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (hub_errors.GatedRepoError, "gated"),
        (hub_errors.RepositoryNotFoundError, "there is none, or it is private"),
    ],
)
def test_what_the_hub_refuses_is_told_in_its_terms(
    kind: type[Exception], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = kind.__new__(kind)
    monkeypatch.setattr(hub, "_fetch", lambda *_: (_ for _ in ()).throw(error))
    assert expected in refusal("org/name")
