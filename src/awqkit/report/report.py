"""The report of one run: what is saved as awqkit.json, and the lines that a person reads.

Everything in it is the same for two runs with one seed; timings have a file of their own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from awqkit.decisions import ENOUGH_TOKENS, BlockDecision, CalibrationSummary, FoldDecision, TuningDecision, as_json
from awqkit.recipe import PER_CHANNEL, Recipe

SCHEMA = 1
_SHOWN_REASONS = 5


@dataclass(frozen=True, slots=True)
class Report:
    """model: what was quantized, as the user named it. versions: of the libraries that the bytes depend on.

    source_bytes, written_bytes: tensor data. quantized_weights: how many weights were packed, in packed_bytes.
    dropped: source tensors that the output does not have, with the reason. cautions: what may hurt a reader.
    """

    model: str
    recipe: Recipe
    group_size: int
    stored_dtype: str
    device: str
    versions: dict[str, str]
    calibration: CalibrationSummary | None
    blocks: tuple[BlockDecision, ...]
    source_bytes: int
    written_bytes: int
    packed_bytes: int
    quantized_weights: int
    dropped: dict[str, str]
    cautions: tuple[str, ...]
    tuning: TuningDecision | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits that a quantized weight takes on disk, group scales and zero points included."""
        return 8 * self.packed_bytes / max(self.quantized_weights, 1)

    @property
    def folds(self) -> list[FoldDecision]:
        """Every fold of every block."""
        return [fold for block in self.blocks for fold in block.folds]

    @property
    def fallbacks(self) -> list[tuple[str, str]]:
        """(where, reason) of every choice that was undone or refused."""
        found = []
        if self.calibration is not None and self.calibration.not_generated:
            found.append(("calibration", self.calibration.not_generated))
        if self.tuning is not None and self.tuning.fallback:
            found.append(("tuning", self.tuning.fallback))
        for block in self.blocks:
            if block.fallback:
                found.append((block.path, block.fallback))
            found += [(f"{block.path}.{fold.producer}", fold.fallback) for fold in block.folds if fold.fallback]
            found += [(linear.name, linear.fallback) for linear in block.linears if linear.fallback]
        return found

    @property
    def mean_output_errors(self) -> tuple[float, float] | None:
        """Mean relative output error over all linears, of plain rounding and of what was chosen; None without text."""
        linears = [linear for block in self.blocks for linear in block.linears if linear.output_error is not None]
        if not linears:
            return None
        return tuple(
            sum(getattr(linear, name) for linear in linears) / len(linears)
            for name in ("output_error_nearest", "output_error")
        )

    def to_json(self) -> dict[str, Any]:
        """The content of awqkit.json."""
        found = {name: as_json(getattr(self, name)) for name in self.__slots__ if name != "recipe"}
        return {
            "schema": SCHEMA,
            "recipe": self.recipe.to_dict(),
            "bits_per_weight": round(self.bits_per_weight, 4),
            "mean_output_errors": as_json(self.mean_output_errors),
            **found,
        }

    def __str__(self) -> str:
        return "\n".join([*self._what(), *self._how(), *self._undone()])

    def _what(self) -> list[str]:
        linears = sum(len(block.linears) for block in self.blocks)
        kept = [keep for block in self.blocks for keep in block.kept]
        grid = "symmetric" if self.recipe.symmetric else "asymmetric"
        groups = "one group a row" if self.group_size == PER_CHANNEL else f"groups of {self.group_size}"
        inputs = "" if self.recipe.activations == "none" else f", inputs in {self.recipe.activations}"
        lines = [
            f"{linears} linears in {len(self.blocks)} blocks: {self.recipe.name}, {self.recipe.bits} bits, "
            f"{groups}{inputs}, {grid}, {self.bits_per_weight:.2f} bits per weight"
        ]
        if kept:
            reasons = Counter(keep.reason for keep in kept)
            lines.append(
                f"{len(kept)} linears kept in full precision: " + "; ".join(f"{n} {r}" for r, n in reasons.items())
            )
        return lines

    def _how(self) -> list[str]:
        lines = []
        if self.folds:
            used = [fold for fold in self.folds if fold.fallback is None]
            lines.append(f"{len(used)} of {len(self.folds)} folds in use, each proved exact on its own block")
        lines += self._experts()
        errors = self.mean_output_errors
        if errors is not None:
            lines.append(f"mean output error of a linear: {errors[0]:.5f} plainly rounded, {errors[1]:.5f} as written")
        held = [block for block in self.blocks if block.held_out_error is not None]
        if held:
            plain = sum(block.held_out_error_nearest for block in held) / len(held)
            chosen = sum(block.held_out_error for block in held) / len(held)
            lines.append(f"mean block error on held-out rows: {plain:.5f} plainly rounded, {chosen:.5f} as written")
        if self.tuning is not None and self.tuning.held_out_kl is not None:
            lines.append(
                f"KL on held-out rows: {self.tuning.held_out_kl_before:.5f} before tuning, "
                f"{self.tuning.held_out_kl:.5f} after"
            )
        return lines

    def _experts(self) -> list[str]:
        """How many calibration tokens met the linears of experts, where there are any."""
        linears = [linear for block in self.blocks for linear in block.linears if linear.tokens is not None]
        if not linears:
            return []
        met = sorted(linear.tokens for linear in linears)
        few = sum(linear.tokens < ENOUGH_TOKENS * linear.shape[1] for linear in linears)
        borrow = f"; {few} of {len(met)} linears had fewer than {ENOUGH_TOKENS} a channel and borrow" if few else ""
        return [f"calibration tokens per expert: {met[0]} to {met[-1]}, {met[len(met) // 2]} in the middle{borrow}"]

    def _undone(self) -> list[str]:
        if not self.fallbacks:
            return ["nothing fell back"] if self.recipe.needs_calibration else []
        lines = [f"{len(self.fallbacks)} choices fell back:"]
        lines += [f"  {where}: {reason}" for where, reason in self.fallbacks[:_SHOWN_REASONS]]
        if len(self.fallbacks) > _SHOWN_REASONS:
            lines.append(f"  and {len(self.fallbacks) - _SHOWN_REASONS} more, see awqkit.json")
        return lines
