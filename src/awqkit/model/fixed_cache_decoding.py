"""Passages written one token a step into a cache of fixed size: on a GPU a CUDA graph a step, replayed.

A step of a small model takes a GPU a tenth of the time in which `generate` of transformers launches it. All that a step
changes lies in tensors, the position among them, so that one graph does for every step; nothing in it is random, and
nothing waits for the device. Begun passages go in token by token as well. It knows no model: what was written is proved
by the model itself, called on it without a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from awqkit.errors import AwqkitError, ModelError, first_error, gist
from awqkit.kernels.capture import beside_usual_stream, captured, waiting_refused
from awqkit.model.transformers_bridge import fixed_cache, quiet_transformers
from awqkit.numerics.draw import draw_chances, drawn_tokens

_PROVED = 4  # passages: hundreds of tokens, in one call
_ALIGNED = 8  # kernels of masked attention want rows of whole 16 bytes
# Root mean square error of the chosen tokens' log probabilities ÷ their standard deviation. SmolLM2-135M rounds by
# 0.000002 in float32 and 0.006 in bfloat16; seeing 100 of 127 tokens is 0.4, and none but the last 2.5.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
_APART = "a cache of fixed size changes the log probabilities that it computes, by {:.2g} of their spread"


def decode_tokens(
    model: nn.Module, rows: Tensor, num_tokens: int, seed: int, step: Callable[[int], None]
) -> Tensor | str:
    """What `sample_tokens` gives, by the same chances, or why this model cannot write so.

    step(done): called after each token; a GPU may still be at an earlier one. Raises OutOfMemoryError where the device
    has no room for so many rows.
    """
    try:
        with quiet_transformers(), torch.no_grad():
            decoding = Decoding(model, rows, num_tokens, seed)
            if rows.device.type == "cuda":
                decoding.capture()
            decoding.write(step)
            error = decoding.error()
            return decoding.tokens if error <= _ROUNDING[decoding.dtype] else _APART.format(error)
    except Exception as failure:  # whatever a model's own code does when it is called in a way that it does not know
        first = first_error(failure)
        kind = "" if isinstance(first, AwqkitError) else f"{type(first).__name__}: "
        short, reason = isinstance(first, torch.OutOfMemoryError), kind + gist(first)
    if short:  # raised anew: the old one holds what was captured
        raise torch.OutOfMemoryError(reason)
    return reason


class Decoding:
    """Rows and what is written behind them, `tokens` `[rows, tokens]` int64, complete after `write`.

    What is captured is what it computes uncaptured, on any device.
    """

    def __init__(self, model: nn.Module, rows: Tensor, num_tokens: int, seed: int) -> None:
        weight = next(model.parameters())
        count, self._given = rows.shape
        self._steps = self._given + num_tokens - 1
        positions = -(-self._steps // _ALIGNED) * _ALIGNED
        self._model, self._cache, self.dtype = model, fixed_cache(model, positions), weight.dtype
        self.tokens = torch.cat([rows, rows.new_zeros(count, num_tokens)], dim=1)
        before = torch.zeros(self._given - 1, count, 1)  # a chance for every step, also those through what is given
        self._chances = torch.cat([before, draw_chances(num_tokens, count, seed)]).to(rows.device)
        self._log_chosen = torch.zeros(min(_PROVED, count), self._steps, device=rows.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=rows.device)
        self._columns = torch.arange(positions, device=rows.device)
        self._seen = torch.zeros((), dtype=weight.dtype, device=rows.device)
        self._unseen = torch.full((), -torch.inf, dtype=weight.dtype, device=rows.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def _step(self) -> None:
        """One more token of each row, and the next position."""
        # a mask of four dimensions is taken as it is: transformers' own would have to know a length on the host
        mask = torch.where(self._columns <= self._position, self._seen, self._unseen)
        logits: Tensor = self._model(
            input_ids=self.tokens.index_select(1, self._position),
            attention_mask=mask.expand(len(self.tokens), 1, 1, -1),
            position_ids=self._position[None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        drawn = drawn_tokens(logits, self._chances.index_select(0, self._position)[0])
        following = self._position + 1
        chosen = torch.where(following < self._given, self.tokens.index_select(1, following), drawn)
        self.tokens.index_copy_(1, following, chosen)
        proved = slice(len(self._log_chosen))
        self._log_chosen.index_copy_(1, self._position, _log_probability(logits[proved], chosen[proved]))
        self._position.copy_(following)

    def capture(self) -> None:
        """Replay a captured step from now on. Raises what stands in the way."""
        with beside_usual_stream(self.tokens.device):
            self._step()  # makes the cache, which waits
            with waiting_refused():
                self._step()
            graph, _ = captured(self._step)
        self.restart()
        self._graph = graph

    def restart(self) -> None:
        """Back to the first token. Raises ModelError where the cache cannot be emptied in place."""
        self._cache.reset()
        if any(int(layer.get_seq_length()) for layer in self._cache.layers):
            raise ModelError("its cache cannot be emptied")
        self._position.zero_()

    def write(self, step: Callable[[int], None]) -> None:
        """All tokens; step(done): called after each."""
        advance = self._step if self._graph is None else self._graph.replay
        for done in range(self._steps):
            advance()
            if done + 1 >= self._given:
                step(done + 2 - self._given)

    def error(self) -> float:
        """How far the steps were from the model called without a cache, as a share of what tokens differ by."""
        proved = self.tokens[: len(self._log_chosen)]
        logits = self._model(input_ids=proved[:, :-1], use_cache=False).logits
        expected = _log_probability(logits, proved[:, 1:, None])[..., 0]
        return float((self._log_chosen - expected).square().mean().sqrt() / expected.std())


def _log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(dim=-1).gather(-1, tokens)
