"""The numbers of a report: tables that say in text what its pictures show."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .._spectra import Spectra, WeightSpectra
from ._text import by, percent, title

__all__ = ["Table", "energy", "history", "modes", "values", "weights"]

_ROWS = 8  # of a table of numbers beside a curve
_SHARES = (0.9, 0.99, 0.999)


class Cell(NamedTuple):
    """Text, and the id of what it leads to."""

    text: str
    link: str = ""


class Table(NamedTuple):
    """A table of texts; the first cell of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def weights(measured: Spectra, links: Mapping[str, str]) -> Table:
    """Return the table of all weights, with links to their sections by name."""
    rows = [
        [Cell(title(weight), links.get(weight.name, "")), *map(Cell, _cells(weight))]
        for weight in measured.weights
    ]
    head = ["weight", "type", "shape", "at the start", "ranks", "for 99 %", "dense", "now", "share"]
    caption = "All weights: ranks at the start, now, and for 99 % of the energy; parameters"
    if any(weight.flops for weight in measured.weights):
        head.append("multiply-adds")
        caption += "; multiply-adds on the last training batch, as a share of the dense weight's"
    return Table(caption, head, [row[: len(head)] for row in rows])


def _cells(weight: WeightSpectra) -> tuple[str, ...]:
    ranks = ("", "dense", "")
    if weight.ranks is not None:
        first = next(iter(weight.history.values()), ())
        ranks = (by(first), by(weight.ranks), by(weight.ranks_for(0.99)))
    counts = (f"{weight.dense_parameters:,}", f"{weight.parameters:,}")
    share = percent(weight.parameters, weight.dense_parameters)
    flops = percent(weight.flops, weight.dense_flops)
    return (weight.type, by(weight.shape), *ranks, *counts, share, flops)


def modes(weight: WeightSpectra) -> Table:
    """Return the table of a weight's modes."""
    assert weight.ranks is not None
    shares = [weight.ranks_for(share) for share in _SHARES]
    head = ["mode", "dimension", "rank", *(f"for {100 * share:g} %" for share in _SHARES)]
    rows = [
        [
            Cell(mode),
            *(Cell(str(n)) for n in (weight.shape[i], weight.ranks[i], *(r[i] for r in shares))),
            *(Cell(_short(value)) for value in (weight.values[i][0], weight.values[i][-1])),
        ]
        for i, mode in enumerate(weight.modes)
    ]
    caption = "Ranks, those that keep shares of the energy, and singular values"
    return Table(caption, [*head, "largest value", "smallest value"], rows)


def values(weight: WeightSpectra) -> Table:
    """Return some singular values of each mode."""
    columns = [list(enumerate(values, start=1)) for values in weight.values]
    return _curves("Singular values", "number", weight, columns)


def energy(weight: WeightSpectra) -> Table:
    """Return the energy that some ranks keep."""
    columns = [
        [(rank, 100 * share) for rank, share in enumerate(weight.energy(mode)) if rank]
        for mode in range(len(weight.modes))
    ]
    return _curves("Energy kept in %", "rank", weight, columns)


def history(weight: WeightSpectra) -> Table:
    """Return the ranks after some numbers of steps."""
    columns = [
        [(step, float(ranks[mode])) for step, ranks in weight.history.items()]
        for mode in range(len(weight.modes))
    ]
    return _curves("Ranks", "step", weight, columns)


def _curves(
    caption: str,
    axis: str,
    weight: WeightSpectra,
    columns: Sequence[Sequence[tuple[int, float]]],
) -> Table:
    """Return a few rows of curves, one column a mode; a shorter one ends before."""
    longest = max(columns, key=len)
    count = min(_ROWS, len(longest))
    last = len(longest) - 1
    chosen = sorted({round(i * last / max(1, count - 1)) for i in range(count)})
    rows = [
        [
            Cell(f"{longest[i][0]:,}"),
            *(Cell(_short(column[i][1]) if i < len(column) else "") for column in columns),
        ]
        for i in chosen
    ]
    return Table(caption, (axis, *weight.modes), rows)


def _short(value: float) -> str:
    return f"{value:.4g}"
