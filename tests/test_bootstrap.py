"""Set-up takes the right torch, never replaces a good one, shows life, and says plainly what went wrong.

No network and no real installs: a recorder stands for pip, a folder with an interpreter for an environment.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

import bootstrap  # noqa: E402
import pip_steps  # noqa: E402
import vllm_env  # noqa: E402
from pip_steps import SetUpError  # noqa: E402

CONSTRAINTS = "# why\ntorch==2.13.0\ntransformers==5.23.0\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout in a path with spaces, with the two files that set-up reads."""
    root = tmp_path / "a check out"
    root.mkdir()
    (root / "pyproject.toml").write_text('dependencies = ["torch>=2.11"]\n', encoding="utf-8")
    (root / "constraints.txt").write_text(CONSTRAINTS, encoding="utf-8")
    return root


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What pip was asked to do, in order; it does none of it."""
    calls: list[list[str]] = []

    def record(python: Path, arguments: list[str], doing: str) -> None:
        calls.append(arguments)

    monkeypatch.setattr(bootstrap, "run_pip", record)
    monkeypatch.setattr(pip_steps, "run_pip", record)
    return calls


@pytest.fixture
def torch_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """The torch that an interpreter has, by "venv" or "base"; a test sets it."""
    present: dict[str, str | None] = {"venv": None, "base": None}

    def version(python: Path | str) -> str | None:
        return present["base" if str(python) == sys.executable else "venv"]

    monkeypatch.setattr(bootstrap, "torch_version", version)
    return present


def place_environment(venv: Path) -> Path:
    """An environment with nothing in it but a Python that runs (pip is the test environment's own)."""
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return venv


# --- which torch ------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("2.11.0", True),
        ("2.13.0+cpu", True),
        ("2.12.0a0+5bcb7a9.nv26.3", True),
        ("3.0", True),
        ("2.10.9", False),
        ("1.13.1+cu117", False),
        ("2.11.0a0+git1", False),
        ("2.11.0rc1", False),
        ("2.11.0.dev20260101", False),
        ("unknown", False),
    ],
)
def test_a_torch_is_good_enough_from_the_minimum_on(version: str, good: bool) -> None:
    assert bootstrap.is_new_enough(version, (2, 11)) is good


def test_the_minimum_is_read_from_the_project_itself() -> None:
    major, minor = bootstrap.minimum_torch(ROOT)
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").split("torch==")[1].split()[0]
    assert bootstrap.is_new_enough(pinned, (major, minor))


def test_a_torch_that_is_there_is_kept(project: Path, pip_calls: list, torch_of: dict, capsys) -> None:
    venv = place_environment(project / ".venv")
    torch_of["venv"] = "2.12.1+cu128"

    bootstrap.set_up(project, venv, {"test"})

    assert pip_calls == [["install", "-e", f"{project}[test]", "-c", str(venv / "awqkit-constraints.txt")]]
    pins = (venv / "awqkit-constraints.txt").read_text(encoding="utf-8")
    assert "torch==2.12.1+cu128 " in pins and "torch==2.13.0" not in pins and "transformers==5.23.0" in pins
    assert "torch 2.12.1+cu128 is already there and new enough: kept" in capsys.readouterr().out


def test_an_old_torch_in_the_environment_is_renewed(
    project: Path, pip_calls: list, torch_of: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = place_environment(project / ".venv")
    torch_of["venv"] = "2.4.0"
    monkeypatch.setattr(bootstrap, "pip_install_torch", lambda python, wanted: pip_calls.append(["torch"]))

    bootstrap.set_up(project, venv, set())

    assert [call[0] for call in pip_calls] == ["torch", "install"]


def test_a_new_environment_sees_the_torch_of_the_running_python(
    project: Path, pip_calls: list, torch_of: dict, capsys
) -> None:
    torch_of["base"] = torch_of["venv"] = "2.13.0+cu130"

    bootstrap.set_up(project, project / ".venv", set())

    said = capsys.readouterr().out
    assert "has torch 2.13.0+cu130: kept" in said and "installing torch" not in said
    config = (project / ".venv" / "pyvenv.cfg").read_text(encoding="utf-8")
    assert "include-system-site-packages = true" in config


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no torch on the package index has CUDA")
@pytest.mark.parametrize(
    ("gpu", "problem", "indexes"),
    [
        (True, None, [None]),
        (False, None, [pip_steps.CPU_INDEX]),
        (False, "no route to host", [None]),
    ],
)
def test_where_torch_comes_from(
    gpu: bool, problem: str | None, indexes: list, pip_calls: list, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(pip_steps, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(pip_steps, "index_problem", lambda url: problem)

    pip_steps.pip_install_torch(Path("python"), ["torch"])

    assert [index_of(call) for call in pip_calls] == indexes
    assert (problem or "torch") in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no torch on the package index has CUDA")
def test_a_cpu_index_that_fails_half_way_is_not_the_end(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tried: list[str | None] = []

    def pip(python: Path, arguments: list[str], doing: str) -> None:
        tried.append(index_of(arguments))
        if tried[-1] is not None:
            raise SetUpError("installing torch failed; pip's last lines:\n    connection reset")

    monkeypatch.setattr(pip_steps, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(pip_steps, "index_problem", lambda url: None)
    monkeypatch.setattr(pip_steps, "run_pip", pip)

    pip_steps.pip_install_torch(Path("python"), ["torch"])

    assert tried == [pip_steps.CPU_INDEX, None]
    assert "connection reset" in capsys.readouterr().out


def index_of(arguments: list[str]) -> str | None:
    return arguments[arguments.index("--index-url") + 1] if "--index-url" in arguments else None


@pytest.mark.parametrize(("code", "found"), [(0, True), (9, False)])
def test_a_gpu_is_what_nvidia_smi_lists(
    code: int, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho 'GPU 0: some card'\nexit {code}\n", encoding="utf-8")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pip_steps.has_nvidia_gpu() is found
    smi.unlink()
    assert pip_steps.has_nvidia_gpu() is False


def test_an_index_that_does_not_answer_costs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    started = time.monotonic()
    assert pip_steps.index_problem("http://127.0.0.1:9", timeout=2)
    assert time.monotonic() - started < 10


# --- the stamp ------------------------------------------------------------


@pytest.fixture
def ready(project: Path, pip_calls: list, torch_of: dict) -> Path:
    """An environment that was set up once, with the extra "test"."""
    venv = place_environment(project / ".venv")
    torch_of["venv"] = "2.13.0"
    bootstrap.set_up(project, venv, {"test"})
    pip_calls.clear()
    return venv


def test_a_second_run_does_and_says_nothing(project: Path, ready: Path, pip_calls: list, capsys) -> None:
    capsys.readouterr()
    bootstrap.set_up(project, ready, {"test"})
    bootstrap.set_up(project, ready, set())
    assert pip_calls == [] and capsys.readouterr().out == ""


def test_another_extra_is_added_to_those_that_are_there(project: Path, ready: Path, pip_calls: list) -> None:
    bootstrap.set_up(project, ready, {"smollm2"})
    assert pip_calls[0][2] == f"{project}[smollm2,test]"
    pip_calls.clear()
    bootstrap.set_up(project, ready, {"smollm2", "test"})
    assert pip_calls == []


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_project_is_installed_again(changed: str, project: Path, ready: Path, pip_calls: list) -> None:
    with (project / changed).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    bootstrap.set_up(project, ready, {"test"})
    assert len(pip_calls) == 1


def test_a_moved_checkout_is_installed_again(project: Path, ready: Path, pip_calls: list) -> None:
    moved = project.with_name("moved")
    project.rename(moved)
    bootstrap.set_up(moved, moved / ".venv", {"test"})
    assert len(pip_calls) == 1


def test_an_interrupted_install_is_done_again(
    project: Path, ready: Path, pip_calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "run_pip", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bootstrap.set_up(project, ready, {"smollm2"})
    assert not (ready / bootstrap.STAMP).exists()
    bootstrap.set_up(project, ready, {"test"})
    assert len(pip_calls) == 1


def test_a_garbled_stamp_is_no_stamp(project: Path, ready: Path, pip_calls: list) -> None:
    (ready / bootstrap.STAMP).write_text("{", encoding="utf-8")
    bootstrap.set_up(project, ready, {"test"})
    assert len(pip_calls) == 1 and json.loads((ready / bootstrap.STAMP).read_text(encoding="utf-8"))


def test_the_environment_for_a_wheel_gets_torch_and_no_stamp(project: Path, pip_calls: list, torch_of: dict) -> None:
    venv = place_environment(project / ".venv-wheel")
    torch_of["venv"] = "2.13.0"
    bootstrap.set_up(project, venv, set(), only_torch=True)
    assert pip_calls == [] and not (venv / bootstrap.STAMP).exists()
    assert (venv / bootstrap.DERIVED_CONSTRAINTS).exists()


# --- what a newcomer reads ------------------------------------------------------------


def fake_python(tmp_path: Path, script: str) -> Path:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    python.chmod(0o755)
    return python


def test_a_failure_of_pip_ends_with_its_last_lines(tmp_path: Path) -> None:
    python = fake_python(tmp_path, "for i in $(seq 40); do echo line $i; done; echo no space left >&2; exit 3")
    with pytest.raises(SetUpError) as caught:
        pip_steps.run_pip(python, ["install", "x"], "installing x")
    first, *rest = str(caught.value).splitlines()
    assert first == "installing x failed (pip exit code 3); pip's last lines:"
    assert rest[-1].strip() == "no space left" and len(rest) == pip_steps.TAIL_LINES


def test_long_work_shows_what_it_is_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(pip_steps, "HEARTBEAT_SECONDS", 0.1)
    python = fake_python(tmp_path, "echo Collecting a-big-one; sleep 0.5")
    pip_steps.run_pip(python, ["install", "x"], "installing x")
    assert "Collecting a-big-one" in capsys.readouterr().out


def test_errors_and_interrupts_become_one_line_and_an_exit_code(capsys) -> None:
    def fails() -> None:
        raise SetUpError("no disk")

    def stops() -> None:
        raise KeyboardInterrupt

    assert pip_steps.exit_code_of(lambda: None) == 0
    assert pip_steps.exit_code_of(fails) == 1
    assert pip_steps.exit_code_of(stops) == 130
    assert capsys.readouterr().err.splitlines() == [
        "set-up failed: no disk",
        "set-up was interrupted; run it again to go on",
    ]


def test_a_python_without_venv_is_told_what_to_install(
    project: Path, torch_of: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "ask", lambda python, code: None)
    with pytest.raises(SetUpError, match=r"venv or ensurepip is missing.*apt install python3\.\d+-venv"):
        bootstrap.set_up(project, project / ".venv", set())
    assert not (project / ".venv").exists()


def test_an_old_python_can_read_as_far_as_the_sentence_for_it() -> None:
    source = (TOOLS / "bootstrap.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 6))
    assert "from __future__ import annotations\n" not in source  # 3.6 stops at it before any sentence
    check = source.index("if sys.version_info < (3, 10)")
    assert source.index("import argparse") > check and source.index("from pip_steps") > check


def test_the_versions_of_the_vllm_environment_are_those_of_the_tests() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert vllm_env.TORCH in pinned
    assert not vllm_env.is_ready(Path("nowhere"))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_make_alone_lists_the_targets() -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    listed = subprocess.run(["make"], cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "demo-smollm2", "test", "test-vllm", "lint", "wheel", "clean"):
        assert f"make {target} " in listed


def test_only_ci_sets_up_the_browser_for_the_report_page() -> None:
    """It is 694 MB; make test must work without, and then skips what needs one (`tests/report/test_html.py`)."""
    assert "browser" not in (ROOT / "Makefile").read_text(encoding="utf-8")
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert steps.index("--extra test --extra browser\n") < steps.index(' test\n\nannounce "make test-kills"')
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    test_extra = declared.split("\ntest = [")[1].split("]")[0]
    assert "PySide6" in declared and "PySide6" not in test_extra
