"""One token a step with a static cache, as it comes or as a captured graph: nothing in a step waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Tensor]
_WARM_STEPS = 3


class Decoding:
    """A model with its cache after `context` random tokens; `step` decodes greedily, all state in tensors."""

    def __init__(self, model: Any, batch: int, context: int, length: int, *, compiled: bool = False) -> None:
        from transformers import StaticCache

        table = model.get_input_embeddings().weight
        device, self.context, self.batch = table.device, context, batch
        self._call = torch.compile(model.__call__, dynamic=False) if compiled else model
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._columns = torch.arange(length, device=device).view(1, 1, 1, length)
        self._seen = torch.zeros((), dtype=table.dtype, device=device)
        self._unseen = torch.full((), float("-inf"), dtype=table.dtype, device=device)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator).to(device)
        with torch.no_grad():
            found = model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._first = found.logits[:, -1:].argmax(dim=-1)
        self.restart()

    def restart(self) -> None:
        """Back to the end of the context; what the cache holds behind it is masked and written anew."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self.context)
        self._position.fill_(self.context)
        self._token.copy_(self._first)

    def step(self) -> Tensor:
        """Logits `[batch, vocabulary]` of the next token, which becomes the input of the next step."""
        # a mask of four dimensions is taken as it is: transformers' own would have to know a length on the host
        mask = torch.where(self._columns <= self._position, self._seen, self._unseen)
        logits: Tensor = self._call(
            input_ids=self._token,
            attention_mask=mask.expand(self.batch, -1, -1, -1),
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        self._token.copy_(logits.argmax(dim=-1, keepdim=True))
        self._position.add_(1)
        return logits

    def captured(self) -> Step:
        """`step` as a CUDA graph: the same kernels, launched at once; its logits are overwritten by the next call."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(_WARM_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            logits = self.step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def seconds_a_step(decoding: Decoding, step: Step, tokens: int) -> float:
    """Mean seconds of a step over `tokens` steps from the end of the context, after a few that do not count."""
    with torch.no_grad():
        decoding.restart()
        for _ in range(_WARM_STEPS):
            step()
        decoding.restart()
        _wait()
        start = time.perf_counter()
        for _ in range(tokens):
            step()
        _wait()
    return (time.perf_counter() - start) / tokens


def greedy(decoding: Decoding, step: Step, tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens `[tokens, batch]` and the logits of all steps `[tokens, batch, vocabulary]` float32, on the CPU."""
    with torch.no_grad():
        decoding.restart()
        logits = torch.stack([step().float().cpu() for _ in range(tokens)])
    return logits.argmax(dim=-1), logits


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
