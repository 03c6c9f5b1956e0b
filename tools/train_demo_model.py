"""Train the model that `awqkit demo` quantizes: a small Llama on CPython's standard library.

    python tools/train_demo_model.py --out OUT --steps 2400 --device cuda

Text: every module of the library and its tests, and the documentation (the topics of `help()`, and the .rst
sources where `--docs` names their folder), without the held-out modules of `awqkit.demo.held_out`, their
tests and their pages. The tokenizer is trained on the same text. Rows are cut at random places and start
with <|bos|>, as the tokenizer does it. The text is read several times over, so dropout keeps the model from
learning it by heart.

One seed gives the same rows and starting weights everywhere; the trained weights agree between machines
only as far as their arithmetic does. OUT is a complete checkpoint in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch.utils.hooks import RemovableHandle
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from awqkit.calibration.builtin import NOT_TEXT, module_files, read_source, topics
from awqkit.demo.held_out import HELD_OUT_MODULES

Loss = Callable[[PreTrainedModel, Tensor], Tensor]  # of rows of token ids
Adders = Callable[[nn.Module], Sequence[nn.Module]]  # the modules of a layer whose outputs go to the residual stream

BOS, END_OF_TEXT = "<|bos|>", "<|endoftext|>"
VOCAB_SIZE = 4096
SEQ_LEN = 512
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.2
DROPOUT = 0.1
PROSE_AND_LIBRARY_REPEATS = 2  # tests are two thirds of the library, and say less about other code
HELD_OUT_ROWS_PER_ROW = 2  # held-out rows in a report, for each row of a step
NUM_REPORTS = 20

# 5.8 million parameters. Every linear's input width (256, 768) is a multiple of 128, the usual group size.
CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": SEQ_LEN,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}


def read_text(stdlib: Path | None, docs: Path | None) -> tuple[list[str], list[str]]:
    """Training and held-out documents: the library in `stdlib` (None: this Python's) and pages in `docs`."""
    unseen = {*HELD_OUT_MODULES, *(f"test_{name}" for name in HELD_OUT_MODULES)}
    library, tests, held_out = [], [], []
    for file in module_files(stdlib, skip=NOT_TEXT):
        parts = file.name.split(".")
        if file.name in HELD_OUT_MODULES:
            held_out.append(read_source(file))
        elif not unseen.intersection(parts):
            (tests if {"test", "tests"}.intersection(parts) else library).append(read_source(file))
    pages = sorted(docs.rglob("*.rst*")) if docs else []
    prose = topics(stdlib) + [
        path.read_text(encoding="utf-8") for path in pages if path.name.split(".")[0] not in unseen
    ]
    train = (prose + library) * PROSE_AND_LIBRARY_REPEATS + tests
    return [text for text in train if text], held_out


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that puts BOS at the start of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[str], separator: list[int]) -> Tensor:
    """All documents as one line of token ids `[tokens]`, int64, each followed by `separator`."""
    ids = array("q")
    for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.extend(separator)
    return torch.frombuffer(ids, dtype=torch.int64)


def make_model(tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """The untrained model in float32."""
    torch.manual_seed(seed)
    token_ids = {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(END_OF_TEXT),
    }
    return LlamaForCausalLM(LlamaConfig(**CONFIG, **token_ids))


def add_dropout(model: PreTrainedModel, adders: Adders) -> list[RemovableHandle]:
    """Dropout on what layers add to the residual stream and on the embeddings; Llama has none of its own."""
    sources = [model.model.embed_tokens, *(source for layer in model.model.layers for source in adders(layer))]
    return [
        source.register_forward_hook(lambda module, _, output: dropout(output, DROPOUT, training=module.training))
        for source in sources
    ]


def make_optimizer(model: PreTrainedModel, device: str) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=device == "cuda")


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    if step < warmup:
        return PEAK_LEARNING_RATE * (step + 1) / warmup
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def random_rows(ids: Tensor, bos: int, num_rows: int, generator: torch.Generator) -> Tensor:
    """`[num_rows, SEQ_LEN]`: BOS, then the text from a random place on."""
    starts = torch.randint(len(ids) - SEQ_LEN, (num_rows, 1), generator=generator).to(ids.device)
    text = ids[starts + torch.arange(SEQ_LEN - 1, device=ids.device)]
    return torch.cat([torch.full_like(text[:, :1], bos), text], dim=1)


def mean_loss(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Nats per predicted token of `rows` `[rows, SEQ_LEN]`."""
    logits = model(rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_perplexity(model: PreTrainedModel, loss_of: Loss, ids: Tensor, bos: int, max_rows: int) -> float:
    """Perplexity of the first non-overlapping windows, each starting with BOS."""
    num_rows = min(max_rows, len(ids) // (SEQ_LEN - 1))
    text = ids[: num_rows * (SEQ_LEN - 1)].reshape(num_rows, SEQ_LEN - 1)
    rows = torch.cat([torch.full_like(text[:, :1], bos), text], dim=1)
    model.eval()
    losses = [loss_of(model, part).item() * len(part) for part in rows.split(32)]
    model.train()
    return math.exp(sum(losses) / num_rows)


def train(
    model: PreTrainedModel,
    loss_of: Loss,
    adders: Adders,
    ids: Tensor,
    held_out: Tensor,
    bos: int,
    args: argparse.Namespace,
) -> None:
    """Train in place, and leave the weights whose held-out perplexity was lowest; on a GPU products are in bfloat16."""
    optimizer = make_optimizer(model, args.device)
    dropouts = add_dropout(model, adders)
    model.train()
    generator = torch.Generator().manual_seed(args.seed)
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if args.device == "cuda" else nullcontext()
    started = time.perf_counter()
    lowest, best = math.inf, dict[str, Tensor]()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        with autocast:
            loss = loss_of(model, random_rows(ids, bos, args.rows, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, args.steps // NUM_REPORTS) == 0 or step + 1 == args.steps:
            with autocast:
                perplexity = held_out_perplexity(model, loss_of, held_out, bos, HELD_OUT_ROWS_PER_ROW * args.rows)
            if perplexity < lowest:
                lowest, best = perplexity, {name: value.clone() for name, value in model.state_dict().items()}
            seconds = time.perf_counter() - started
            print(
                f"step {step + 1} loss {loss.item():.4f} held-out perplexity {perplexity:.3f} {seconds:.1f} s",
                flush=True,
            )
    model.load_state_dict(best)
    for handle in dropouts:
        handle.remove()
    model.eval()


def save(model: PreTrainedModel, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint in bfloat16, with its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END_OF_TEXT, model_max_length=SEQ_LEN
    )
    fast.save_pretrained(out)
    path = out / "tokenizer_config.json"
    # The name that every version of transformers knows; version 5 would write one that version 4 does not.
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps (default %(default)s)")
    parser.add_argument("--rows", type=int, default=64, help=f"rows of {SEQ_LEN} tokens a step (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="starting weights and choice of rows (default %(default)s)")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="default %(default)s")
    parser.add_argument("--stdlib", type=Path, help="a standard library folder (default: the running Python's)")
    parser.add_argument("--docs", type=Path, help="a folder of documentation sources, .rst or .rst.txt")
    parser.add_argument("--max-documents", type=int, help="use only the first so many documents, for a trial run")
    return parser.parse_args()


def run(
    args: argparse.Namespace, make: Callable[[Tokenizer, int], PreTrainedModel], loss_of: Loss, adders: Adders
) -> None:
    """Read the text, train the tokenizer and the model, and write the checkpoint."""
    documents, held_out_documents = read_text(args.stdlib, args.docs)
    documents = documents[: args.max_documents]
    tokenizer = train_tokenizer(documents)
    bos = tokenizer.token_to_id(BOS)
    ids = encode_documents(tokenizer, documents, [tokenizer.token_to_id(END_OF_TEXT)]).to(args.device)
    held_out = encode_documents(tokenizer, held_out_documents, []).to(args.device)
    model = make(tokenizer, args.seed).to(args.device)
    print(f"{len(documents)} documents, {len(ids)} training and {len(held_out)} held-out tokens")
    train(model, loss_of, adders, ids, held_out, bos, args)
    save(model, tokenizer, args.out)


def main() -> None:
    run(parse_arguments(__doc__), make_model, mean_loss, lambda layer: (layer.self_attn.o_proj, layer.mlp.down_proj))


if __name__ == "__main__":
    main()
