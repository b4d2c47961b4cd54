"""What the figures of the documentation have in common: their style, and how tables are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import Row, read

# Of Okabe and Ito (2008), which people with any colour vision can tell apart.
BLUE, RED, GREEN, PINK, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
SKY, SALMON, GREY, BLACK = "#56B4E9", "#F4A582", "#888888", "#000000"

STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "font.size": 9.0,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "geotucker",
}


def table(folder: Path, name: str, **wanted: str) -> list[Row]:
    """Read the rows of a table that have certain values.

    Raises
    ------
    FileNotFoundError
        If there is no such table.
    """
    rows = read(path := folder / f"{name}.csv")
    if not rows:
        raise FileNotFoundError(path)
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """Return a column as numbers."""
    return np.array([float(row[name]) for row in rows])


def grouped(rows: Sequence[Row], *names: str) -> list[tuple[tuple[str, ...], list[Row]]]:
    """Return the rows that have the same values in some columns, in order of appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.items())


def panels(count: int, height: float = 2.8) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side."""
    figure = Figure(figsize=(min(3.4 * count, 8.4), height))
    return figure, list(np.atleast_1d(figure.subplots(1, count)))


def label(axes: Axes, x: float, y: float, text: str, color: str, **place: Any) -> None:
    """Write beside a point what it belongs to."""
    options = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"} | place
    axes.annotate(text, (x, y), color=color, fontsize=8, **options)
