"""What the searches of all blocks of a run share: what follows from a fold's structure alone, and graphs to replay."""

from __future__ import annotations

from dataclasses import dataclass, field

from awqkit.kernels.replay import Replays
from awqkit.methods.fold import Tied
from awqkit.model.structure import Fold


@dataclass(frozen=True, slots=True)
class AcrossBlocks:
    """Blocks of a kind have one structure, and weights of the same shapes."""

    replays: Replays = field(default_factory=Replays)
    _tied: dict[tuple[int, str], tuple[Fold, Tied]] = field(default_factory=dict)

    def tied(self, fold: Fold, consumer: str) -> Tied:
        """What a consumer of a fold reads of its channels."""
        key = (id(fold), consumer)
        if key not in self._tied:  # with the fold, so that no other has its id
            self._tied[key] = fold, Tied(fold.channel_of[consumer], fold.num_channels)
        return self._tied[key][1]
