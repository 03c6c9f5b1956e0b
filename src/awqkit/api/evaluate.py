"""`evaluate`: perplexity of a checkpoint on a text, and its distance from a reference."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from awqkit.api.device import choose_device
from awqkit.api.source import open_readable
from awqkit.calibration.rows import cut_windows, token_stream
from awqkit.calibration.sources import read_documents
from awqkit.checkpoint.hub import resolve_model
from awqkit.errors import CalibrationError, CheckpointError, UsageError
from awqkit.evaluation.evaluate import Evaluation, evaluate_windows
from awqkit.evaluation.load import load_checkpoint
from awqkit.events import Caution, Emit, Notice, TaskAdvanced, TaskFinished, TaskStarted, ignore_events
from awqkit.model.transformers_bridge import TextEncoder, load_text_encoder
from awqkit.options import RunOptions

DTYPES = ("float32", "bfloat16", "float16")
_TASK = "window"


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    reference: str | Path | None = None,
    seq_len: int = 512,
    max_windows: int | None = None,
    dtype: str = "float32",
    options: RunOptions | None = None,
    emit: Emit = ignore_events,
) -> Evaluation:
    """Perplexity of `model` over non-overlapping windows of `seq_len` tokens of `text`; with a reference also KL and
    top-1 agreement.

    model, reference: folders or hub ids, full precision or quantized. text: .txt, .jsonl, "builtin" or a hub dataset.
    Each window starts with what the tokenizer itself puts at the start of a text. Raises AwqkitError.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; it takes one of {', '.join(DTYPES)}")
    options = options or RunOptions()
    device = choose_device(options.device)
    checkpoint = open_readable(resolve_model(model))
    beside = None if reference is None else open_readable(resolve_model(reference))
    trust = options.trust_remote_code
    encoder = load_text_encoder(checkpoint.directory, trust_remote_code=trust)
    documents = read_documents(str(text), render_chat=encoder.render_chat)
    windows = text_windows(documents.texts, encoder, seq_len, max_windows, documents.label)
    found = len(windows.all)
    emit(Notice(f"{len(windows.used)} of {found} windows of {seq_len} tokens from {documents.label}"))
    loaded = load_checkpoint(checkpoint, getattr(torch, dtype), device, trust_remote_code=trust)
    other = None if beside is None else load_checkpoint(beside, getattr(torch, dtype), device, trust_remote_code=trust)
    _refuse_other_vocabulary(windows.used, loaded, other)
    return score(loaded, windows.used, len(encoder.start_tokens), other, device, emit)


def _refuse_other_vocabulary(windows: Tensor, model: nn.Module, reference: nn.Module | None) -> None:
    known, highest = model.get_input_embeddings().weight.shape[0], int(windows.max())
    if highest >= known:
        raise CalibrationError(
            f"the text has token id {highest}, outside the model's vocabulary of {known}; "
            "the tokenizer is not this model's, use the files that belong to it"
        )
    beside = known if reference is None else reference.get_input_embeddings().weight.shape[0]
    if beside != known:
        raise CheckpointError(
            f"the reference has a vocabulary of {beside} tokens, the model one of {known}; "
            "a reference is the model that was quantized"
        )


class Windows:
    """All windows of a text `[windows, seq_len]`, and those in use."""

    def __init__(self, all_windows: Tensor, max_windows: int | None) -> None:
        self.all = all_windows
        self.used = all_windows if max_windows is None else all_windows[:max_windows]


def text_windows(
    texts: tuple[str, ...], encoder: TextEncoder, seq_len: int, max_windows: int | None, label: str
) -> Windows:
    """The windows of a text. Raises CalibrationError where it is shorter than one."""
    stream = token_stream(texts, encoder.encode_all)
    windows = Windows(cut_windows(stream.ids, seq_len, encoder.start_tokens), max_windows)
    if len(windows.used) == 0:
        raise CalibrationError(
            f"{label}: {len(stream.ids)} tokens do not fill one window of {seq_len}; "
            "give more text or a smaller --seq-len"
        )
    return windows


def score(
    model: nn.Module,
    windows: Tensor,
    num_start_tokens: int,
    reference: nn.Module | None,
    device: torch.device,
    emit: Emit = ignore_events,
) -> Evaluation:
    """`evaluate_windows` with progress events."""
    emit(TaskStarted(_TASK, len(windows)))
    result = evaluate_windows(
        model, windows, num_start_tokens, reference, device, lambda done: emit(TaskAdvanced(_TASK, done))
    )
    emit(TaskFinished(_TASK))
    if not math.isfinite(result.perplexity):
        emit(Caution("the perplexity is no number: the weights hold NaN or inf, or activations overflow in this dtype"))
    return result
