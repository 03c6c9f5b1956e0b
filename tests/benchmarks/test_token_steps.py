"""Decoding with a static cache and prepared masks is decoding as transformers does it, and can begin again."""

from __future__ import annotations

import pytest
import torch
from decoder_model import DENSE, SHAPES, build, bytes_a_token, fitting_group_size, weight_bytes
from token_steps import Decoding, greedy

from awqkit.kernels.int4_matmul import CHUNKS

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "hidden"), [("llama-2-7b", 256), ("llama-3-8b", 512)])
def test_steps_are_those_of_generate(name: str, hidden: int) -> None:
    shape = SHAPES[name].resized(2, hidden)
    model = build(shape, DENSE, torch.float32, 128, 64, CPU)
    decoding = Decoding(model, 2, 16, 64)
    tokens, _ = greedy(decoding, decoding.step, 6)
    again, _ = greedy(decoding, decoding.step, 6)
    assert torch.equal(tokens, again)
    prompt = torch.randint(0, shape.vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    usual = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, do_sample=False, eos_token_id=None
    )
    assert torch.equal(usual[:, 17:].t(), tokens)


def test_the_packed_twin_reads_less() -> None:
    shape = SHAPES["llama-3-8b"].resized(2, 512)
    dense, packed = (build(shape, kind, torch.bfloat16, 128, 64, CPU) for kind in (DENSE, CHUNKS))
    head = dense.get_output_embeddings().weight.numel() * 2
    ratio = (bytes_a_token(dense) - head) / (bytes_a_token(packed) - head)
    assert 3.7 < ratio < 4
    assert weight_bytes(packed) - bytes_a_token(packed) == head  # the table of embeddings is as large
    decoding = Decoding(packed, 1, 8, 64)
    assert greedy(decoding, decoding.step, 2)[1].isfinite().all()


@pytest.mark.parametrize(("name", "group_size"), [("llama-2-7b", 128), ("smollm2-135m", 64)])
def test_groups_divide_every_row(name: str, group_size: int) -> None:
    assert fitting_group_size(SHAPES[name], 128) == group_size
