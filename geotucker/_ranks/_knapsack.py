"""Choose one option from each table: least loss within a budget of cost.

The multiple-choice knapsack of Kellerer, Pferschy and Pisinger (2004, chapter 11), in two phases.

1. *Relaxation*. For a price p per unit of cost each table on its own minimises
   ``loss + p cost``; the price at which the budget is met is found by cutting planes on the dual
   (a concave, piecewise linear function of p, exact after finitely many steps). Its two choices,
   one just within the budget and one just above, are neighbours on the lower convex hulls of
   (cost, loss): the optimum of the linear relaxation lies between them, a lower bound of the
   loss, and moving tables from one to the other while the budget lasts is the greedy algorithm
   along the hulls, which loses more than the bound by less than one step of one table.
2. *Search*. A choice that is no worse than the greedy one, with loss l, has
   ``loss + p cost <= l + p budget``. Options and partial sums that exceed this, even with the
   least values of all other tables, are dropped: exact fixing of variables by their reduced
   costs. The others are merged table by table, and of the partial sums only those are kept that
   no other beats in both cost and loss (Nemhauser and Ullmann 1969).

Where no list of the search is longer than its limit, the choice is optimal: each discarded option
or sum is worse than one that is kept. Where one is, the entries with least ``loss + p cost`` are
kept, and the choice is at least as good as the greedy one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

__all__ = [
    "Floats",
    "Ints",
    "Options",
    "Picks",
    "Solution",
    "fill",
    "solve",
    "total_cost",
    "total_loss",
]

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Picks: TypeAlias = list[int]
"""The number of an option in each table."""

Select: TypeAlias = Callable[[Ints, Floats], Ints]
"""From costs and losses to the entries worth keeping, by ascending cost."""

# Limit of memory and time, by measurement: VGG16 takes some tens of milliseconds. Networks of
# a few layers stay below it and get the optimum.
LIST = 2**12  # options of a table, and partial sums, divided by the number of tables


class Options(NamedTuple):
    """What may be chosen for one tensor: a table with m rows."""

    ranks: Ints  # shape: (d, m)
    cost: Ints  # shape: (m,)
    loss: Floats  # shape: (m,)


class Solution(NamedTuple):
    """A choice, the price at which the budget is met, the bound of the relaxation."""

    picks: Picks
    price: float
    bound: float


def solve(tables: Sequence[Options], budget: float, price: float | None = None) -> Solution:
    """Return a choice that costs at most `budget`; the cheapest options must be within it.

    `price` is a guess of the price, if there is one.
    """
    within, above, price = _relax(tables, budget, price)
    if within is above:
        return Solution(within, 0.0, total_loss(tables, within))
    picks = _greedy(tables, budget, within, above)
    bound = sum(_best(table, price)[1] for table in tables) - price * budget
    loss = total_loss(tables, picks)
    if loss > bound:
        found = _search(tables, budget, price, loss, _front)
        if found and total_loss(tables, found[-1]) <= loss:
            picks = found[-1]
    return Solution(picks, price, bound)


def fill(
    tables: Sequence[Options], budget: float, least: float, price: float, worst: float
) -> Picks | None:
    """Return the best choice that costs from `least` to `budget` and loses at most `worst`.

    Found for sure while costs are below 1000 and lists below their limit; else sums whose costs
    agree to a thousandth of the budget share one place.
    """
    width = max(1, int(budget) // 1000)

    def one_each(cost: Ints, loss: Floats) -> Ints:
        order = np.lexsort((loss, cost // width))
        places = cost[order] // width
        return np.asarray(order[np.append(True, places[1:] > places[:-1])[: len(order)]])

    found = _search(tables, budget, price, worst, one_each)
    filling = [picks for picks in found if total_cost(tables, picks) >= least]
    best = min(filling, key=lambda picks: total_loss(tables, picks), default=None)
    # What the search leaves out is sure to lose more than `worst`; what it keeps may too.
    return best if best is not None and total_loss(tables, best) <= worst else None


def total_cost(tables: Sequence[Options], picks: Picks) -> int:
    """Return what a choice costs."""
    return sum(int(table.cost[pick]) for table, pick in zip(tables, picks, strict=True))


def total_loss(tables: Sequence[Options], picks: Picks) -> float:
    """Return what a choice loses."""
    return math.fsum(table.loss[pick] for table, pick in zip(tables, picks, strict=True))


# Phase 1


def _best(table: Options, price: float) -> tuple[int, float]:
    """Return the number and the value of the option with least ``loss + price * cost``."""
    values = table.loss + price * table.cost
    pick = int(values.argmin())
    return pick, float(values[pick])


def _first(major: Any, minor: Any) -> int:
    """Return where `major` is least, and among equals `minor`."""
    ties = np.flatnonzero(major == major.min())
    return int(ties[minor[ties].argmin()])


def _relax(
    tables: Sequence[Options], budget: float, guess: float | None
) -> tuple[Picks, Picks, float]:
    """Return the choices just within and just above the budget, and the price of both.

    They are one object if all that is of use is within the budget.
    """
    above = [_first(table.loss, table.cost) for table in tables]
    if total_cost(tables, above) <= budget:
        return above, above, 0.0
    within = [_first(table.cost, table.loss) for table in tables]
    ends = {True: within, False: above}
    costs = {side: total_cost(tables, end) for side, end in ends.items()}
    losses = {side: total_loss(tables, end) for side, end in ends.items()}
    while True:
        slope = (losses[True] - losses[False]) / (costs[False] - costs[True])
        price = slope if guess is None else guess
        picks = [_best(table, price)[0] for table in tables]
        cost, loss = total_cost(tables, picks), total_loss(tables, picks)
        # Strictly between the ends, so that rounding cannot go round in circles.
        between = costs[True] < cost < costs[False] and losses[False] < loss < losses[True]
        if between and loss + slope * cost < losses[True] + slope * costs[True]:
            side = cost <= budget
            ends[side], costs[side], losses[side] = picks, cost, loss
        elif guess is None:
            return ends[True], ends[False], slope
        guess = None


def _greedy(tables: Sequence[Options], budget: float, within: Picks, above: Picks) -> Picks:
    """Move tables from one choice to the other while the budget lasts, then spend the rest."""
    picks = list(within)
    room = budget - total_cost(tables, picks)
    steps = [
        int(table.cost[b] - table.cost[a])
        for table, a, b in zip(tables, within, above, strict=True)
    ]
    for k in sorted(range(len(tables)), key=lambda k: -steps[k]):
        if 0 < steps[k] <= room:
            picks[k] = above[k]
            room -= steps[k]
    for k, table in enumerate(tables):
        allowed = np.flatnonzero(table.cost <= table.cost[picks[k]] + room)
        better = int(allowed[table.loss[allowed].argmin()])
        if table.loss[better] < table.loss[picks[k]]:
            room -= int(table.cost[better] - table.cost[picks[k]])
            picks[k] = better
    return picks


# Phase 2


class _Sums(NamedTuple):
    """Partial sums over the tables merged so far, by ascending cost."""

    cost: Ints  # shape: (m,)
    loss: Floats  # shape: (m,)
    picks: Ints  # shape: (m, number of tables merged)


def _search(
    tables: Sequence[Options], budget: float, price: float, worst: float, select: Select
) -> list[Picks]:
    """Return choices within the budget that lose at most `worst`, by ascending cost."""
    most = LIST // len(tables) + 1
    least = [_best(table, price)[1] for table in tables]
    # Rounding must not drop the optimum.
    ceiling = (worst + price * budget) * (1 + 1e-14)
    slack = ceiling - sum(least)
    kept = [
        _useful(table.cost, table.loss, budget, (price, low + slack), select, most)
        for table, low in zip(tables, least, strict=True)
    ]
    order = sorted(range(len(tables)), key=lambda k: len(kept[k]))
    if not all(len(options) for options in kept):
        return []
    cheapest = [int(table.cost[o].min()) for table, o in zip(tables, kept, strict=True)]
    sums = _Sums(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int64))
    for number, k in enumerate(order):
        rest = order[number + 1 :]
        limit = (price, ceiling - sum(least[j] for j in rest))
        affordable = budget - sum(cheapest[j] for j in rest)
        cost = np.add.outer(sums.cost, tables[k].cost[kept[k]]).ravel()
        loss = np.add.outer(sums.loss, tables[k].loss[kept[k]]).ravel()
        useful = _useful(cost, loss, affordable, limit, select, most)
        parents, options = np.divmod(useful, len(kept[k]))
        picks = np.concatenate([sums.picks[parents], kept[k][options][:, None]], axis=1)
        sums = _Sums(cost[useful], loss[useful], picks)
    back = np.argsort(order)
    return [picks[back].tolist() for picks in sums.picks]


def _useful(
    cost: Ints,
    loss: Floats,
    budget: float,
    limit: tuple[float, float],  # price p and the largest loss + p cost
    select: Select,
    most: int,
) -> Ints:
    """Return the entries within budget and limit that `select` keeps, by ascending cost."""
    price, largest = limit
    values = loss + price * cost
    useful = np.flatnonzero((cost <= budget) & (values <= largest))
    useful = useful[select(cost[useful], loss[useful])]
    if len(useful) > most:
        useful = useful[np.sort(np.argpartition(values[useful], most)[:most])]
    return useful


def _front(cost: Ints, loss: Floats) -> Ints:
    """Return the entries that no other beats in both, by ascending cost."""
    order = np.lexsort((loss, cost))
    in_order = loss[order]
    best: Floats = np.minimum.accumulate(in_order)
    return np.asarray(order[np.append(True, in_order[1:] < best[:-1])[: len(order)]])
