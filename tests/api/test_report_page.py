"""`quantize --report`: the page of a run, and every place where it cannot be written, found before work starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from awqkit.api.report_page import check_report_path, write_report
from awqkit.errors import OutputError, UsageError


def test_a_run_writes_its_page_beside_the_checkpoint(place, quantize):
    outcome = quantize("--report", "run.html")
    assert outcome.code == 0, outcome.err
    assert "Wrote the report to run.html." in outcome.out
    page = Path("run.html").read_text(encoding="utf-8")
    for section in ("errors", "weights", "scales", "search", "time", "undone", "settings"):
        assert f'<section id="{section}">' in page
    assert "<h1>model</h1>" in page
    assert str(place.root) not in page
    assert not (place.out / "run.html").exists()
    report = json.loads((place.out / "awqkit.json").read_text())
    for linear in report["blocks"][0]["linears"]:
        assert linear["name"].replace("_", "_<wbr>").replace(".", ".<wbr>") in page


def test_plain_rounding_has_a_page_too(quantize):
    assert quantize("--method", "rtn", "--report", "run.html").code == 0
    assert "No calibration text was read" in Path("run.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("no/r.html", "--report no/r.html: there is no folder no; make it first or name another path"),
        ("model", "--report model: is a folder; give the path of a file to write, such as model/report.html"),
        ("text.txt", "--report text.txt: is not the name of a page; give one that ends in .html"),
        ("out/r.html", "--report out/r.html: lies inside OUT (out), which is written as a whole; name another place"),
        ("model/../out/a/r.html", "--report model/../out/a/r.html: lies inside OUT (out), "),
    ],
)
def test_places_that_cannot_hold_the_page(refused, path, line):
    assert refused("--report", path, code=2).startswith(line)


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UsageError, match=r"r\.html: may not be written; name another path"):
        check_report_path(tmp_path / "r.html")


def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    page = tmp_path / "r.html"
    page.write_text("old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"--report .*r\.html: cannot be written \(No space left on device\)"):
        write_report(page, None, None, [])
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_a_run_whose_page_fails_keeps_its_checkpoint_and_says_so(place, quantize, monkeypatch):
    def full(*_):
        raise OutputError("--report run.html: cannot be written (No space left on device)")

    monkeypatch.setattr("awqkit.api.quantize.write_report", full)
    outcome = quantize("--method", "rtn", "--report", "run.html")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        "awqkit: error: --report run.html: cannot be written (No space left on device); the checkpoint out is complete"
    )
    assert (place.out / "awqkit.json").exists()
