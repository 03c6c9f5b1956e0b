"""`evaluate` and `demo`: what the api is asked, what is printed, what is saved."""

from __future__ import annotations

import json
from pathlib import Path

from awqkit.options import RunOptions


def test_evaluate_passes_its_flags_on(awqkit, api):
    flags = "--text t.txt --reference REF --seq-len 64 --max-windows 3 --dtype bf16 --device cpu"
    assert awqkit("evaluate", "MODEL", *flags.split()).code == 0
    (call,) = api.calls
    assert (call.model, call.text, call.reference) == ("MODEL", "t.txt", "REF")
    assert (call.seq_len, call.max_windows, call.dtype) == (64, 3, "bfloat16")
    assert call.options == RunOptions(device="cpu")


def test_evaluate_has_the_defaults_of_the_papers(awqkit, api):
    assert awqkit("evaluate", "MODEL", "--text", "t.txt").code == 0
    (call,) = api.calls
    assert (call.reference, call.seq_len, call.max_windows, call.dtype) == (None, 512, None, "float32")


def test_evaluate_prints_what_was_measured(awqkit):
    alone = awqkit("evaluate", "MODEL", "--text", "t.txt", "--quiet")
    assert alone.out.splitlines() == ["perplexity       12.3457", "measured on      1024 tokens in 2 windows"]
    assert alone.err == ""
    both = awqkit("evaluate", "MODEL", "--text", "t.txt", "--reference", "REF", "--json", "s.json")
    assert "KL divergence    0.01230 nats per token" in both.out
    assert "top-1 agreement  93.40 %" in both.out
    saved = json.loads(Path("s.json").read_text())
    assert saved == {
        "perplexity": 12.34567,
        "kl": 0.0123,
        "top1_agreement": 0.934,
        "tokens": 1024,
        "windows": 2,
    }


def test_demo_prints_a_table_and_what_to_type_next(awqkit, api):
    outcome = awqkit("demo", "--json", "rows.json")
    assert outcome.code == 0
    assert outcome.out.splitlines()[:7] == [
        "-" * 51,
        "method     bits  perplexity      KL  top-1  seconds",
        "-" * 51,
        "original  16.00      13.870       -      -        -",
        "rtn        4.16      15.200  0.0912  84.0%      1.2",
        "balanced   4.16      14.300  0.0312  90.0%      8.2",
        "-" * 51,
    ]
    for text in (
        "Saved the checkpoint of balanced: awqkit-demo (1.50 kB)\nWrote the report: awqkit-demo-report.html\n",
        "awqkit quantize MODEL OUT --calibration your.txt",
        "vllm serve OUT",
    ):
        assert text in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["fp", "rtn", "balanced"]
    assert rows[1]["kl"] == 0.0912


def test_demo_replaces_its_own_folder_and_no_other(awqkit, api):
    assert awqkit("demo").code == 0
    assert (api.calls[-1].model, api.calls[-1].out) == ("embedded", Path("awqkit-demo"))
    assert api.calls[-1].options.overwrite
    Path("awqkit-demo/model.safetensors").unlink()
    outcome = awqkit("demo")
    assert outcome.code == 2
    assert "no demo made it" in outcome.err
    Path("awqkit-demo/awqkit.json").touch()
    assert awqkit("demo").code == 0


def test_demo_takes_a_model_and_a_folder_that_is_not_replaced(awqkit, api):
    assert awqkit("demo", "--model", "smollm2", "--out", "here").code == 0
    assert (api.calls[-1].model, api.calls[-1].out) == ("smollm2", Path("here"))
    assert not api.calls[-1].options.overwrite
    assert awqkit("demo", "--out", "here", "--overwrite").code == 0
    assert api.calls[-1].options.overwrite
