"""Ranks over time, in as many records as a plot needs and a checkpoint can bear."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["RankHistory"]

Ranks: TypeAlias = tuple[int, ...]
_LIMIT = 256  # records; finer than a plot shows


@dataclass(frozen=True)
class RankHistory:
    """Ranks of Tucker tensors after 0, stride, 2 stride ... steps.

    When there are too many records every other one is dropped, and the stride doubles: so it
    stays small however long a training is, and does not depend on when that was interrupted.

    Parameters
    ----------
    ranks : mapping of str to tuple of tuple of int
        By the tensor's name, one tuple of ranks per record.
    stride : int
        Steps from one record to the next.
    """

    ranks: Mapping[str, tuple[Ranks, ...]]
    stride: int = 1

    def after(self, step: int, ranks: Mapping[str, Ranks]) -> "RankHistory":
        """Return the history with the ranks after so many steps, if they are to be recorded.

        Examples
        --------
        >>> RankHistory({"fc": ((4, 4),)}).after(1, {"fc": (3, 3)})
        RankHistory(ranks={'fc': ((4, 4), (3, 3))}, stride=1)
        """
        if step % self.stride:
            return self
        records = {name: (*old, ranks[name]) for name, old in self.ranks.items()}
        if all(len(record) <= _LIMIT for record in records.values()):
            return RankHistory(records, self.stride)
        return RankHistory({name: old[::2] for name, old in records.items()}, 2 * self.stride)

    def by_step(self) -> dict[str, dict[int, Ranks]]:
        """Return the ranks by name and number of steps taken."""
        return {
            name: {i * self.stride: ranks for i, ranks in enumerate(records)}
            for name, records in self.ranks.items()
        }

    def state(self) -> dict[str, Any]:
        """Return the history as plain containers."""
        return {"ranks": dict(self.ranks), "stride": self.stride}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "RankHistory":
        """Return the history with a state of `state`."""
        ranks = {
            str(name): tuple(tuple(map(int, record)) for record in records)
            for name, records in state["ranks"].items()
        }
        return cls(ranks, int(state["stride"]))
