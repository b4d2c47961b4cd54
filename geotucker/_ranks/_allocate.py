"""The ranks of all tensors of a network under one budget: the solver of `Budget`.

The ranks of each tensor are enumerated if they are few, else on a geometric grid, and
`_knapsack` chooses among them. A grid is then refined around the choice until that no longer
changes.

*Guarantee.* With all ranks enumerated the choice is the optimum, or, for lists longer than the
limit, loses more than the bound of the relaxation by less than one step of one tensor: see
`_knapsack`. On a grid, let consecutive ranks a < b satisfy ``b - 1 <= (1 + delta) a`` and let c
modes of a tensor be coarse. Lower the optimal ranks to the grid: the cost does not grow, and as
singular values descend, the first a of r hold at least the share a / r of what the first r hold.
If ``r_i`` then exceeds the product of the others (one i at most can: ``r_i > r_k q`` and
``r_k > r_i q`` need q < 1), it is lowered to that product, which is at least the optimal ``r_i``
divided by ``(1 + delta)^(c - 1)``. So the grid holds a choice that keeps
``1 / (1 + delta)^max(1, c - 1)`` of the optimal energy: ``1 / (1 + delta)`` for a convolution,
whose small modes are complete. Refinement never makes it less, and usually finds the optimum.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np

from ._base import Ranks
from ._knapsack import Floats, Ints, Options, fill, solve, total_cost, total_lost

__all__ = ["Allocation", "Tensor", "allocate"]

# Limits of memory and time, by measurement: the boxes of LeNet-5 are enumerated, and VGG16
# takes some tens of milliseconds.
BOX = 2**15  # ranks of a tensor that are enumerated
GRID = 2**12  # points of a grid, where they are more
ROUNDS = 12  # refinements; they end by themselves after about five
NEAR = 4  # the last grids reach so many ranks to both sides


class Tensor(NamedTuple):
    """One tensor's part of the problem.

    Parameters
    ----------
    lower, upper : tuple of int
        Least and largest ranks, both feasible.
    lost : tuple of numpy.ndarray
        Per mode, what is lost at rank 0, ..., upper_i: descending.
    cost : callable
        From ranks of shape (d, m) to their m costs; it does not fall where a rank grows.
    """

    lower: Ranks
    upper: Ranks
    lost: tuple[Floats, ...]
    cost: Callable[[Ints], Ints]


class Allocation(NamedTuple):
    """A choice for all tensors, and a lower bound of what any choice on its grid loses."""

    ranks: list[Ranks]
    cost: int
    lost: float
    bound: float


Grid: TypeAlias = tuple[Ints, ...]
"""Per mode, the ranks to try, ascending."""


def allocate(
    tensors: Sequence[Tensor],
    budget: float,
    aim: tuple[float, float] = (0.0, 0.0),
) -> Allocation:
    """Return ranks that cost at most `budget` together and lose little; see the module.

    Parameters
    ----------
    tensors : sequence of Tensor
        Their least ranks must be within the budget.
    budget : float
        Largest cost.
    aim : pair of float
        Cost c and share x: if the best choice costs less than c, one that costs at least that is
        preferred, if there is one that loses at most ``1 + x`` times as much.
    """
    grids = [_first_grid(tensor) for tensor in tensors]
    tables = [_options(tensor, grid) for tensor, grid in zip(tensors, grids, strict=True)]
    found = solve(tables, budget)
    best = first = _allocation(tables, found.picks, found.bound)
    for _ in range(ROUNDS):
        zooms = [
            _zoom(tensor, grid, ranks)
            for tensor, grid, ranks in zip(tensors, grids, best.ranks, strict=True)
        ]
        if all(zoom is grid for zoom, grid in zip(zooms, grids, strict=True)):
            break
        tables = [
            table if zoom is grid else _options(tensor, zoom)
            for tensor, zoom, grid, table in zip(tensors, zooms, grids, tables, strict=True)
        ]
        grids = zooms
        found = solve(tables, budget, found.price)
        best = min(best, _allocation(tables, found.picks, first.bound), key=_merit)
    least, share = aim
    if best.cost < least and best.lost > 0.0:
        picks = fill(tables, budget, least, found.price, (1.0 + share) * best.lost)
        best = best if picks is None else _allocation(tables, picks, first.bound)
    return best


def _allocation(tables: Sequence[Options], picks: list[int], bound: float) -> Allocation:
    ranks = [tuple(table.ranks[:, k].tolist()) for table, k in zip(tables, picks, strict=True)]
    return Allocation(ranks, total_cost(tables, picks), total_lost(tables, picks), bound)


def _merit(allocation: Allocation) -> tuple[float, int]:
    return allocation.lost, allocation.cost


def _first_grid(tensor: Tensor) -> Grid:
    """Return all ranks, or a geometric grid of them where they are too many."""
    box = list(zip(tensor.lower, tensor.upper, strict=True))
    free = [mode for mode, (low, high) in enumerate(box) if high > 1]
    if len(free) == 2:  # a matrix: feasibility will set this rank to the other one
        high = box[free[1]][1]
        box[free[1]] = (high, high)
    if math.prod(high - low + 1 for low, high in box) <= BOX:
        return tuple(_spread(low, high, high - low + 1) for low, high in box)
    return _within(box)


def _within(box: Sequence[tuple[int, int]]) -> Grid:
    """Return a grid of at most `GRID` points in a box, coarsest where the box is longest."""
    counts = [high - low + 1 for low, high in box]
    while math.prod(counts) > GRID and max(counts) > 2:
        longest = counts.index(max(counts))
        counts[longest] = max(2, counts[longest] * 9 // 10)
    return tuple(_spread(low, high, count) for (low, high), count in zip(box, counts, strict=True))


@lru_cache(maxsize=4096)
def _spread(low: int, high: int, count: int) -> Ints:
    """Return about `count` ranks from `low` to `high` with constant ratio."""
    if count == high - low + 1:
        return np.arange(low, high + 1)
    spread: Ints = np.unique(np.rint(np.geomspace(low, high, count)).astype(np.int64))
    return spread


def _zoom(tensor: Tensor, grid: Grid, ranks: Ranks) -> Grid:
    """Return a finer grid around a choice, or the same grid where there is none."""
    box = []
    for points, rank, low, high in zip(grid, ranks, tensor.lower, tensor.upper, strict=True):
        if len(points) == 1:  # the second mode of a matrix
            box.append((int(points[0]), int(points[0])))
            continue
        after = int(np.searchsorted(points, rank, side="right"))
        before = max(int(np.searchsorted(points, rank)) - 1, 0)
        next_one = int(points[min(after, len(points) - 1)])
        reach = max(rank - int(points[before]), next_one - rank, NEAR)
        box.append((max(low, rank - reach), min(high, rank + reach)))
    complete = all(len(points) == points[-1] - points[0] + 1 for points in grid)
    inside = all(
        (points[0] == low or points[0] < rank) and (points[-1] == high or points[-1] > rank)
        for points, rank, (low, high) in zip(grid, ranks, box, strict=True)
    )
    return grid if complete and inside else _within(box)


def _options(tensor: Tensor, grid: Grid) -> Options:
    """Return the choices on a grid, lowered to ``r_i <= prod_{j != i} r_j``."""
    ranks: Ints = np.stack([np.ravel(r) for r in np.meshgrid(*grid, indexing="ij", copy=False)])
    product = ranks.prod(axis=0)
    for rank in ranks:  # one i at most breaks it: r_i > r_k q and r_k > r_i q need q < 1
        wide = np.flatnonzero(rank * rank > product)
        rank[wide] = product[wide] // rank[wide]
    lost = sum(tail[rank] for tail, rank in zip(tensor.lost, ranks, strict=True))
    return Options(ranks, tensor.cost(ranks), np.asarray(lost))
