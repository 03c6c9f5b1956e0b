"""The main job on models of all kinds of storage: what is written is right, whole, and says how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import TOKENIZER_FILES, change_config, change_tensors, make_model, tensors_of

import awqkit
from awqkit import Recipe

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PARTS = ("qweight", "qzeros", "scales")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "awqkit.json").read_text())


def kept_modules(folder: Path) -> list[str]:
    return config_of(folder)["quantization_config"]["modules_to_not_convert"]


@pytest.mark.parametrize(
    ("source", "flags", "stored"),
    [
        (torch.bfloat16, (), torch.bfloat16),
        (torch.float16, (), torch.float16),
        (torch.float32, (), torch.bfloat16),
        (torch.float32, ("--dtype", "float16"), torch.float16),
        (torch.bfloat16, ("--dtype", "fp16"), torch.float16),
    ],
)
def test_every_source_dtype_is_written_in_the_right_one(quantize, place, source, flags, stored):
    model = make_model(place.root / "source", source)
    assert quantize(*flags, model=model).code == 0
    written = tensors_of(place.out)
    names = {f"model.layers.{i}.{linear}.{part}" for i in (0, 1) for linear in LINEARS for part in PARTS}
    norms = {
        f"model.layers.{i}.{norm}.weight" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert set(written) == names | norms | {"model.embed_tokens.weight", "model.norm.weight"}
    for name, tensor in written.items():
        assert tensor.dtype == (torch.int32 if name.endswith(("qweight", "qzeros")) else stored), name
    config = config_of(place.out)
    assert config["dtype"] == str(stored).removeprefix("torch.")
    assert "torch_dtype" not in config
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        assert (place.out / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--method", "awq", "--no-clip"),
        ("--quality", "fast", "--symmetric"),
        ("--quality", "fast", "--alpha-search", "layer"),
    ],
)
def test_the_result_loads_and_stays_near_the_original(quantize, place, flags):
    assert quantize(*flags).code == 0
    ids = torch.randint(2, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = awqkit.load(place.model, dtype=torch.float32)(ids).logits
        found = awqkit.load(place.out, dtype=torch.float32)(ids).logits
    assert float((found - expected).square().mean() / expected.square().mean()) < 0.03


def test_a_sharded_source_gives_the_same_tensors(quantize, place):
    sharded = make_model(place.root / "sharded", max_shard_size="300KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert quantize(out="one").code == 0
    assert quantize(model=sharded, out="two").code == 0
    one, two = tensors_of(Path("one")), tensors_of(Path("two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_runs_with_one_seed_write_identical_bytes_wherever_they_run(awqkit, place):
    files = []
    for folder in ("here", "some where else"):
        root = place.root / folder
        root.mkdir()
        make_model(root / "tiny")
        (root / "words.txt").write_bytes(place.text.read_bytes())
        words = ["quantize", root / "tiny", root / "out", "--calibration", root / "words.txt", "--samples", 4]
        assert awqkit(*words, "--seq-len", 32, "--seed", 3).code == 0
        files.append({path.name: path.read_bytes() for path in (root / "out").iterdir()})
        assert files[-1].pop("awqkit-timings.json")
    assert files[0] == files[1]


def test_another_seed_takes_other_rows(quantize, place):
    for seed in (0, 1):
        assert quantize("--seed", seed, out=f"out{seed}").code == 0
    first, second = tensors_of(Path("out0")), tensors_of(Path("out1"))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_tied_embeddings_stay_tied_where_the_source_holds_both(quantize, place):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    change_tensors(place.model, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    assert quantize("--method", "rtn").code == 0
    written = tensors_of(place.out)
    assert head not in written
    assert torch.equal(written[embedding], tensors_of(place.model)[embedding])
    assert config_of(place.out)["tie_word_embeddings"] is True
    assert report_of(place.out)["dropped"] == {head: f"tied to {embedding}"}
    loaded = awqkit.load(place.out)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_untied_embeddings_keep_their_head_in_full_precision(quantize, place):
    model = make_model(place.root / "untied", tie_word_embeddings=False)
    assert quantize("--method", "rtn", model=model).code == 0
    assert torch.equal(tensors_of(place.out)["lm_head.weight"], tensors_of(model)["lm_head.weight"])
    assert kept_modules(place.out) == ["lm_head"]


@pytest.mark.parametrize(
    ("changes", "size", "line"),
    [
        ({"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}, 128, None),
        ({}, 64, "groups of 64: 128 does not divide every linear's input"),
        ({"intermediate_size": 96}, 32, "groups of 32: 128 does not divide every linear's input"),
    ],
)
def test_the_group_size_is_the_largest_usual_one_that_divides(quantize, place, changes, size, line):
    model = make_model(place.root / "source", **changes)
    outcome = quantize("--method", "rtn", model=model)
    assert outcome.code == 0
    assert [text for text in outcome.err.splitlines() if text.startswith("groups of")] == ([line] if line else [])
    assert config_of(place.out)["quantization_config"]["group_size"] == size


def test_a_group_size_that_was_asked_for_is_used(quantize, place):
    assert quantize("--method", "rtn", "--group-size", 32).code == 0
    assert config_of(place.out)["quantization_config"]["group_size"] == 32
    assert tensors_of(place.out)["model.layers.0.mlp.down_proj.scales"].shape == (128 // 32, 64)


def test_ignoring_one_of_q_k_v_keeps_its_partners_too(quantize, place):
    assert quantize("--ignore", "*.0.self_attn.k_proj", "--ignore", "*.mlp.down_proj").code == 0
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in ("k", "q", "qkv", "v")]
    down = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert kept_modules(place.out) == [*sorted([*attention, *down]), "lm_head"]
    reasons = {kept["name"]: kept["reason"] for block in report_of(place.out)["blocks"] for kept in block["kept"]}
    partner = "readers fuse it with model.layers.0.self_attn.k_proj, which stays in full precision"
    assert reasons == {
        "model.layers.0.self_attn.q_proj": partner,
        "model.layers.0.self_attn.k_proj": "matches --ignore",
        "model.layers.0.self_attn.v_proj": partner,
        **dict.fromkeys(down, "matches --ignore"),
    }
    written = tensors_of(place.out)
    for name in reasons:
        assert f"{name}.weight" in written
        assert f"{name}.qweight" not in written
    assert "model.layers.1.self_attn.k_proj.qweight" in written


def test_a_kept_linear_that_no_fold_touches_keeps_its_bytes(quantize, place):
    assert quantize("--method", "rtn", "--ignore", "*.o_proj").code == 0
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(tensors_of(place.out)[name], tensors_of(place.model)[name])


def test_a_glob_that_matches_nothing_is_named(quantize, place):
    outcome = quantize("--method", "rtn", "--ignore", "*.k_porj", "--ignore", "lm_head")
    cautions = [line for line in outcome.err.splitlines() if "--ignore" in line]
    assert cautions == [
        "caution: --ignore *.k_porj matches no linear; "
        "it is a glob on full module paths, such as model.layers.0.self_attn.q_proj"
    ]


def test_flags_win_over_a_recipe_file(quantize, place):
    Path("mine.toml").write_text('method = "rtn"\ngroup_size = 32\ndtype = "float16"\nignore = ["*.down_proj"]\n')
    assert quantize("--recipe", "mine.toml", "--group-size", 64, "--method", "rtn").code == 0
    recipe = report_of(place.out)["recipe"]
    assert (recipe["name"], recipe["group_size"], recipe["dtype"]) == ("rtn", 64, "float16")
    assert recipe["ignore"] == ["*.down_proj"]


def test_json_holds_what_awqkit_json_holds(quantize, place):
    assert quantize("--method", "rtn", "--json", "r.json").code == 0
    assert json.loads(Path("r.json").read_text()) == report_of(place.out)


def test_quiet_says_nothing_but_the_result(quantize):
    outcome = quantize("--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Saved out" in outcome.out


def test_calibration_says_what_was_used_and_what_was_left(quantize, place):
    place.text.write_text("<|endoftext|>".join(f"Document {i}. " * 20 for i in range(6)))
    outcome = quantize()
    used = report_of(place.out)["calibration"]
    assert used["tokens_used"] == 5 * 31
    assert (used["rows"], used["held_out_rows"], used["tokens_per_row"], used["start_tokens"]) == (4, 1, 32, [1])
    left = used["tokens_found"] - used["tokens_used"]
    assert outcome.err.splitlines()[0] == (
        "calibration: 4 rows and 1 held out, of 32 tokens, each starting with token 1, "
        f"from {used['documents_used']} of 6 documents of text.txt; 155 tokens used, {left:,} left"
    )


def test_chats_go_through_the_tokenizers_own_template(quantize, place):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    file = place.model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    chat = [{"role": "user", "content": "What is it? " * 20}, {"role": "assistant", "content": "Nothing much. " * 20}]
    Path("chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"text": "Plain text. " * 20}))
    assert quantize("--calibration", "chats.jsonl", "--samples", 2).code == 0

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.model)
    texts = [f"[user] {chat[0]['content']}\n[assistant] {chat[1]['content']}\n", "Plain text. " * 20]
    used = report_of(place.out)["calibration"]
    assert used["tokens_found"] == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert used["documents_found"] == 2


def test_padding_of_given_token_rows_leaves_no_trace(place, monkeypatch):
    rows = [list(range(1 + 7 * i, 25 + 6 * i)) for i in range(10)]  # 24 tokens down to 15
    result = awqkit.quantize("model", "one", calibration=rows)
    used = result.report.calibration
    assert (used.rows, used.held_out_rows, used.tokens_used) == (9, 1, sum(map(len, rows)))
    assert used.source == result.report.recipe.calibration == "token rows given by the caller"
    monkeypatch.setattr("awqkit.calibration.rows.PAD_ID", 77)
    awqkit.quantize("model", "two", calibration=rows)
    one, two = tensors_of(Path("one")), tensors_of(Path("two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert report_of(Path("one"))["blocks"] == report_of(Path("two"))["blocks"]


def test_the_python_api_takes_a_recipe_and_tells_what_happened(place):
    events = []
    recipe = Recipe.preset("fast", samples=4, seq_len=32)
    result = awqkit.quantize(place.model, place.out, recipe, calibration=place.text, emit=events.append)
    assert result.directory == place.out
    assert result.report.to_json() == report_of(place.out)
    kinds = [type(event).__name__ for event in events]
    assert kinds.count("BlockFinished") == 2
    assert (
        kinds.index("Notice") < kinds.index("TaskStarted") < kinds.index("BlockFinished") < kinds.index("TaskFinished")
    )


def strings(value: Any) -> list[str]:
    """Every key and every text in a JSON value."""
    if isinstance(value, dict):
        return [text for item in value.items() for text in strings(list(item))]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_awqkit_json_has_every_decision_and_nothing_of_the_machine(awqkit, place):
    words = ["quantize", place.model.resolve(), place.out.resolve(), "--calibration", place.text.resolve()]
    assert awqkit(*words, "--samples", 4, "--seq-len", 32, "--ignore", "*.1.mlp.down_proj").code == 0
    report = report_of(place.out)
    assert [block["path"] for block in report["blocks"]] == ["model.layers.0", "model.layers.1"]
    for index, block in enumerate(report["blocks"]):
        decided = [linear["name"] for linear in block["linears"]] + [kept["name"] for kept in block["kept"]]
        assert sorted(decided) == sorted(f"model.layers.{index}.{linear}" for linear in LINEARS)
        assert block["held_out_error"] <= block["held_out_error_nearest"]
        for linear in block["linears"]:
            assert 0 < linear["output_error"] <= linear["output_error_nearest"] * 1.5
            assert linear["weight_error"] > 0
            assert 0.5 <= linear["clip_mean"] <= 1
        for fold in block["folds"]:
            assert fold["fallback"] or fold["error_chosen"] <= fold["error_nearest"]
            assert fold["proof_error"] <= 1e-5
            assert fold["alpha"]["num_units"] >= 1
    found = [{fold["producer"] for fold in block["folds"]} for block in report["blocks"]]
    assert found[0] == {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"}
    assert found[1] == found[0] - {"mlp.up_proj"}  # its only reader is kept
    assert report["recipe"]["seed"] == 0
    assert set(report["versions"]) == {"awqkit", "torch", "transformers", "python"}
    machine = (str(place.root), str(Path.home()), "second", "date", "host")
    assert not [text for text in strings(report) if any(word in text for word in machine)]
    assert set(json.loads((place.out / "awqkit-timings.json").read_text())) == {"seconds", "stages"}


def test_the_model_card_can_be_read_by_the_hub(quantize, place):
    from huggingface_hub import ModelCard

    (place.model / "README.md").write_text("---\nlicense: apache-2.0\ntags: [text]\n---\n# Tiny\n")
    assert quantize().code == 0
    card = ModelCard.load(place.out / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "model"
    assert card.data.tags == ["awq", "awqkit"]
    assert "# model, quantized with awqkit" in card.text
    assert "| bits, group size | 4, 64, asymmetric |" in card.text
    assert "| calibration | text.txt: 4 rows of 32 tokens, 1 held out |" in card.text
    assert str(place.root) not in card.text
    table = [line for line in card.text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {3}


def test_sizes_that_would_not_serve_in_parallel_are_cautioned(quantize, place):
    outcome = quantize("--method", "rtn")
    assert "caution: tensor parallelism of 8 would not load this checkpoint: model.layers.0." in outcome.err
    assert "tensor parallelism of 8" in (place.out / "README.md").read_text()


def test_a_config_that_spells_dtype_the_old_way(quantize, place):
    change_config(place.model, "dtype", torch_dtype="bfloat16")
    assert quantize("--method", "rtn").code == 0
    config = config_of(place.out)
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
