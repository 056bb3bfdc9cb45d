"""Whether training diverges: the loss stays far above what it was, for many steps on end."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from trainer.config import DivergenceSection

RECENT = 50


class Divergence:
    """Follows the loss of every step. A single bad batch is no divergence; NaN is told elsewhere, at once."""

    def __init__(self, section: DivergenceSection, recent: Sequence[float] = (), above: int = 0) -> None:
        self._section = section
        self.recent = deque(recent, maxlen=RECENT)
        """The last losses that were not far above the others, in nats a token."""
        self.above = above
        """How many steps on end the loss has been far above."""

    @property
    def level(self) -> float | None:
        """The recent losses' median; None while there are too few."""
        return statistics.median(self.recent) if len(self.recent) >= self._section.steps else None

    @property
    def diverged(self) -> bool:
        """Whether it is time to stop."""
        return self.above >= self._section.steps

    def saw(self, loss: float) -> None:
        """The loss of one more step."""
        if self._section.rise is None:
            return
        if self.level is not None and loss > self.level + self._section.rise:
            self.above += 1
        else:
            self.above = 0
            self.recent.append(loss)
