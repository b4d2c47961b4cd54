"""The order of the training images: drawn by a generator of its own that can be put back."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Order"]


@dataclass
class Order:
    """Batches of indices, epoch after epoch, and the draws that go with them.

    Two orders of the same seed give the same batches, so that two networks see the same
    images in the same sequence.

    Parameters
    ----------
    count : int
        Number of training images.
    batch_size : int
        Images per batch; the last batch of an epoch may be smaller.
    seed : int
        Seed of the generator.

    Examples
    --------
    >>> order = Order(5, 2, seed=0)
    >>> order.start_epoch()
    >>> sorted(torch.cat([order.batch(step) for step in range(order.steps)]).tolist())
    [0, 1, 2, 3, 4]
    """

    count: int
    batch_size: int
    seed: int
    # changes with every epoch
    _epoch_start: Tensor = field(init=False, repr=False)
    _permutation: Tensor = field(init=False, repr=False)
    # changes with every draw
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Seed the generator."""
        self.generator = torch.Generator().manual_seed(self.seed)
        self._epoch_start = self.generator.get_state()
        self._permutation = torch.arange(self.count)

    @property
    def steps(self) -> int:
        """Number of batches in an epoch."""
        return -(-self.count // self.batch_size)

    def start_epoch(self) -> None:
        """Draw a new permutation of the images."""
        self._epoch_start = self.generator.get_state()
        self._permutation = torch.randperm(self.count, generator=self.generator)

    def batch(self, step: int) -> Tensor:
        """Return the indices of one batch, shape (batch_size,) or less, int64."""
        return self._permutation[step * self.batch_size : (step + 1) * self.batch_size]

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's states at the epoch's start and now."""
        return {"epoch_start": self._epoch_start, "now": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the order back, in the middle of an epoch too."""
        self.generator.set_state(state["epoch_start"])
        self.start_epoch()
        self.generator.set_state(state["now"])
