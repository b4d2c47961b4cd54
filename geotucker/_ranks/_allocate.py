"""The ranks of all tensors of a network under one budget: the solver of `Budget`.

The ranks of each tensor are enumerated if they are few, else on a geometric grid, and
`_knapsack` chooses among them. A grid is then refined around the choice until that no longer
changes.

What is added up is attenuation: ``-log`` of the share of its energy that a mode keeps.

*Guarantee.* With all ranks enumerated the choice is the optimum, or, for lists longer than the
limit, exceeds the bound of the relaxation by less than one step of one tensor: see `_knapsack`.
On a grid, let consecutive ranks a < b of mode i satisfy ``b - 1 <= (1 + delta_i) a``, and let S be
the sum of ``log(1 + delta_i)`` over the modes of a tensor; it is 0 where they are complete. Lower
the optimal ranks to the grid: the cost does not grow, and as singular values descend, the first a
of r hold at least the share a / r of what the first r hold. So a mode keeps at least the optimal
share divided by ``1 + delta_i``, and the tensor's attenuation grows by at most S. If ``r_i`` then
exceeds the product of the others (one i at most can: ``r_i > r_k q`` and ``r_k > r_i q`` need
q < 1), it is lowered to that product, which is at least the optimal ``r_i`` divided by the
others' ``1 + delta_k``: by the same argument mode i is attenuated by at most S more, and all modes
together by ``2 S``. So the best choice on the grid is within the sum of ``2 S`` over the tensors,
an additive constant. Refinement never makes it worse, and usually finds the optimum.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np

from ._base import Ranks
from ._knapsack import Floats, Ints, Options, fill, solve, total_cost, total_loss

__all__ = ["Allocation", "Tensor", "allocate", "leeway"]

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
    attenuation : tuple of numpy.ndarray
        Per mode, ``-log`` of the share of energy that rank 0, 1, ... keeps: descending from
        infinity, as rank 0, which no choice has, keeps nothing.
    cost : callable
        From ranks of shape (d, m) to their m costs; it does not fall where a rank grows.
    """

    lower: Ranks
    upper: Ranks
    attenuation: tuple[Floats, ...]
    cost: Callable[[Ints], Ints]


class Allocation(NamedTuple):
    """A choice for all tensors, and a lower bound for any choice on its grid."""

    ranks: list[Ranks]
    cost: int
    attenuation: float
    bound: float


Grid: TypeAlias = tuple[Ints, ...]
"""Per mode, the ranks to try, ascending."""


def allocate(
    tensors: Sequence[Tensor],
    budget: float,
    aim: tuple[float, float] = (0.0, 0.0),
) -> Allocation:
    """Return ranks that cost at most `budget` together and attenuate little; see the module.

    Parameters
    ----------
    tensors : sequence of Tensor
        Their least ranks must be within the budget.
    budget : float
        Largest cost.
    aim : pair of float
        Cost c and share x: if the best choice costs less than c, one that costs at least that is
        preferred, if there is one within the `leeway` x of the best.
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
    if best.cost < least and best.attenuation > 0.0:
        worst = best.attenuation + leeway(best.attenuation, share)
        picks = fill(tables, budget, least, found.price, worst)
        best = best if picks is None else _allocation(tables, picks, first.bound)
    return best


def leeway(attenuation: float, share: float) -> float:
    """Return by how much two choices may differ that are nearly as good as each other.

    Their attenuations A differ by at most the share x of it, and what passes, ``exp(-A)``, by at
    most that share: ``x min(A, 1)`` does both, as ``exp(-x) >= 1 - x``. The first matters where
    little is lost, the second where much is.
    """
    return share * min(attenuation, 1.0)


def _allocation(tables: Sequence[Options], picks: list[int], bound: float) -> Allocation:
    ranks = [tuple(table.ranks[:, k].tolist()) for table, k in zip(tables, picks, strict=True)]
    return Allocation(ranks, total_cost(tables, picks), total_loss(tables, picks), bound)


def _merit(allocation: Allocation) -> tuple[float, int]:
    return allocation.attenuation, allocation.cost


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
    loss = sum(mode[rank] for mode, rank in zip(tensor.attenuation, ranks, strict=True))
    return Options(ranks, tensor.cost(ranks), np.asarray(loss))
