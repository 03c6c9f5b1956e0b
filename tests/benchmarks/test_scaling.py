"""The model of scaling: what one rank takes is what was measured, and what is exchanged has the sizes that docs say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import scaling

CONFIG = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
STAGES = {"copy": 1.0, "observe": 8.0, "prove": 4.0, "search": 40.0, "check": 4.0, "advance": 4.0, "write": 2.0}


def choices(**changes: float) -> scaling.Choices:
    values = {
        "rows": 16, "group_size": 32, "propagates": True, "bytes_per_second": 1e9, "alone": 0.0, **changes
    }  # fmt: skip
    return scaling.Choices(**values)


def test_one_rank_is_what_was_measured_and_more_share_it() -> None:
    sizes = scaling.sizes_of(CONFIG)
    one = scaling.seconds(STAGES, sizes, choices(), 1)
    assert one == {**STAGES, "exchange": 0.0}
    four = scaling.seconds(STAGES, sizes, choices(), 4)
    assert four["copy"] == 1.0
    assert four["write"] == 2.0
    assert four["prove"] == 4.0
    assert four["observe"] == 2.0
    assert four["search"] == 10.0
    assert scaling.seconds(STAGES, sizes, choices(), 64)["observe"] == 0.5  # of 16 rows one at least
    assert scaling.fitted_alone(STAGES, {"search": 25.0}, 2) == pytest.approx(0.25)


def test_sizes_of_what_is_exchanged() -> None:
    sizes = scaling.sizes_of(CONFIG)
    assert sizes.inputs == (64, 64, 64, 96)
    weights = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96
    found = scaling.block_bytes(sizes, choices(propagates=False))
    assert found == {"summed": 4 * 32 * (3 * 64 + 96), "results": weights * 1.25}
    assert scaling.block_bytes(sizes, choices())["summed"] == 3 * 4 * (3 * 64**2 + 96**2)
    mixture = scaling.sizes_of({**CONFIG, "num_experts": 8, "moe_intermediate_size": 32})
    assert len(mixture.inputs) == 2 + 2 * 8
    assert len(mixture.linears) == 4 + 3 * 8


def test_it_prints_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"one.json": {"seconds": 63.0, "stages": STAGES}, "two.json": {"seconds": 40.0, "stages": STAGES}}
    for name, content in {**files, "config.json": CONFIG}.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    words = [str(tmp_path / "one.json"), "--config", str(tmp_path / "config.json"), "--link-gb", "1"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words, "--measured", "2", str(tmp_path / "two.json")])
    scaling.main()
    told = capsys.readouterr().out
    assert "A model, not a measurement" in told
    assert "alone 1.000" in told
    assert "| 2 | " in told
    assert "| 40.0 |" in told
