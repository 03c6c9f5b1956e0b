"""What the searches of all blocks of a run share: what follows from a fold's structure alone, and graphs to replay."""

from __future__ import annotations

from dataclasses import dataclass, field

from awqkit.errors import first_error, gist
from awqkit.events import Emit, Notice
from awqkit.kernels.replay import Replays
from awqkit.methods.fold import Tied
from awqkit.model.structure import Fold

_NOT_REPLAYED = "some of the searches went without CUDA graphs, slower and with the same result: {}"


@dataclass(frozen=True, slots=True)
class AcrossBlocks:
    """Blocks of a kind have one structure, and weights of the same shapes."""

    replays: Replays = field(default_factory=lambda: Replays(lambda error: gist(first_error(error))))
    _tied: dict[tuple[int, str], tuple[Fold, Tied]] = field(default_factory=dict)

    def tied(self, fold: Fold, consumer: str) -> Tied:
        """What a consumer of a fold reads of its channels."""
        key = (id(fold), consumer)
        if key not in self._tied:  # with the fold, so that no other has its id
            self._tied[key] = fold, Tied(fold.channel_of[consumer], fold.num_channels)
        return self._tied[key][1]

    def let_go(self, emit: Emit) -> None:
        """After the last block: hold no graphs, and say what stood in the way of one, if anything did."""
        self.replays.let_go()
        if self.replays.why_not is not None:
            emit(Notice(_NOT_REPLAYED.format(self.replays.why_not)))
