"""What can be drawn of a model's spectra: one function for each kind of picture, on given axes.

They are the panels of figures, reports and the picture of a training run alike.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .._spectra import Spectra, WeightSpectra
from ._text import by, title

__all__ = [
    "adapted",
    "draw_energy",
    "draw_map",
    "draw_ranks",
    "draw_sizes",
    "draw_values",
    "draw_weights",
    "map_height",
    "sizes_height",
    "tidy",
    "weights_height",
]

# Colours of Okabe and Ito (2008), which people with any colour vision can tell apart.
_MODES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
# Modes often have equal ranks: a dashed line lets the solid one under it be seen.
_DASHES: tuple[Any, ...] = ("-", (0, (4, 3)), "-", (0, (4, 3)), (0, (1, 2)))
_NEUTRAL = "#888888"  # seen on a light and on a dark page
_POINTS = 128  # of a curve; more are not seen
_PANELS = 8  # weights with a panel of their own; more are drawn as one map
_COLUMNS = 4
_BARS = 24
_ROUNDING = 1e-8  # of the largest singular value; below is noise


def tidy(axes: Axes) -> None:
    """Take away what carries no information; whole numbers on the horizontal axis."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_NEUTRAL, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def adapted(measured: Spectra) -> list[WeightSpectra]:
    """Return the weights whose ranks over time are known."""
    return [weight for weight in measured.tucker if len(weight.history) > 1]


def draw_values(axes: Axes, weight: WeightSpectra) -> None:
    """Draw the singular values of each mode."""
    everything = [value for values in weight.values for value in values]
    largest = max(everything)
    floor = max(min(everything), _ROUNDING * largest)
    for mode, values in enumerate(weight.values):
        index = _thinned(1, len(values))
        heights = np.maximum(np.asarray(values)[index - 1], floor)
        axes.plot(index, heights, **_line(mode, len(index)), label=_of(weight, mode))
    if largest > 10 * floor:
        axes.set(yscale="log", ylim=(0.7 * floor, 1.4 * largest))
        subs = (1.0,) if largest > 100 * floor else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.1 * largest or 1)
    axes.set(title="Singular values", xlabel="number")
    _finish(axes)


def draw_energy(axes: Axes, weight: WeightSpectra) -> None:
    """Draw the energy that would be kept if a mode were cut to a rank."""
    enough = weight.ranks_for(0.99)
    for mode, values in enumerate(weight.values):
        index = np.concatenate([[0], _thinned(1, len(values))])
        percent = 100 * np.asarray(weight.energy(mode))[index]
        label = f"{weight.modes[mode]} {enough[mode]} for 99 %"
        axes.plot(index, percent, **_line(mode, len(index)), label=label)
    axes.set(title="Energy kept in %, cut to a rank", xlabel="rank", ylim=(0, 103))
    _finish(axes, "lower right")


def draw_ranks(axes: Axes, weight: WeightSpectra) -> None:
    """Draw the ranks of each mode over time."""
    steps = list(weight.history)
    for mode in range(len(weight.modes)):
        ranks = [entry[mode] for entry in weight.history.values()]
        axes.plot(steps, ranks, **_line(mode), drawstyle="steps-post", label=_of(weight, mode))
    axes.set_ylim(0, 1.12 * max(map(max, weight.history.values())) + 0.5)
    axes.set(title="Ranks over time", xlabel="step")
    _finish(axes)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def draw_sizes(axes: Axes, measured: Spectra) -> None:
    """Draw the parameters of the largest weights, dense and as they are."""
    shown = _largest(measured)
    rows = range(len(shown))
    dense = [weight.dense_parameters for weight in shown]
    axes.barh(rows, dense, color=_NEUTRAL, alpha=0.35, label="dense")
    axes.barh(rows, [weight.parameters for weight in shown], color=_MODES[0], label="now")
    for row, weight in zip(rows, shown, strict=True):
        text = f"{weight.parameters:,}"
        text += "" if weight.ranks is None else f" of {weight.dense_parameters:,}"
        place: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (weight.dense_parameters, row), fontsize=8, **place)
    _name_rows(axes, rows, [_short(weight) for weight in shown])
    axes.set(xlim=(0, 1.8 * max(dense)), ylim=(len(shown) - 0.4, -0.6))
    more = len(measured.weights) - len(shown)
    note = f", the {len(shown)} largest of {len(measured.weights)}" if more else ""
    axes.set_title(f"Parameters by weight{note}", fontsize=10)
    axes.xaxis.set_visible(False)  # the numbers are at the bars
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(labelsize=8)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncols": 2}
    axes.legend(frameon=False, fontsize=8, **below)


def draw_map(axes: Axes, measured: Spectra) -> None:
    """Draw all ranks over time as one map of rank divided by dimension."""
    rows, names = [], []
    weights = adapted(measured)
    for weight in weights:
        for mode, label in enumerate(weight.modes[:2]):  # kernel modes are too small to matter
            ranks = [entry[mode] / weight.shape[mode] for entry in weight.history.values()]
            rows.append(ranks)
            names.append(f"{_short(weight)} {label}")
    steps = list(weights[0].history)
    half = (steps[1] - steps[0]) / 2
    extent = (steps[0] - half, steps[-1] + half, len(rows) - 0.5, -0.5)
    options: dict[str, Any] = {"aspect": "auto", "cmap": "cividis", "interpolation": "none"}
    image = axes.imshow(rows, vmin=0, vmax=1, extent=extent, **options)
    every = max(1, math.ceil(len(names) / 60))  # more names would overlap
    _name_rows(axes, range(0, len(names), every), names[::every])
    axes.set_title("Rank divided by dimension, over time", fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.tick_params(labelsize=8)
    axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).ax.tick_params(labelsize=8)


def draw_weights(figure: Figure | SubFigure, measured: Spectra) -> None:
    """Draw the ranks over time: a panel for each weight, or a map if there are many."""
    weights = adapted(measured)
    if len(weights) > _PANELS:
        draw_map(figure.subplots(), measured)
        return
    rows = math.ceil(len(weights) / _COLUMNS)
    grid = figure.subplots(rows, min(_COLUMNS, len(weights)), squeeze=False).flat
    for axes, weight in zip(grid, weights, strict=False):
        draw_ranks(axes, weight)
        text = f"{_short(weight)}  {by(weight.shape)}"
        axes.set_title(text, fontsize=10, parse_math=False)
    for axes in list(grid)[len(weights) :]:
        axes.set_visible(False)
    figure.suptitle("Ranks of each weight's modes", fontsize=12)


def weights_height(measured: Spectra) -> float:
    """Return the inches that `draw_weights` needs."""
    count = len(adapted(measured))
    return 2.6 * math.ceil(count / _COLUMNS) if count <= _PANELS else map_height(measured)


def sizes_height(measured: Spectra) -> float:
    """Return the inches that `draw_sizes` needs."""
    return 0.8 + 0.22 * len(_largest(measured))


def map_height(measured: Spectra) -> float:
    """Return the inches that `draw_map` needs."""
    return 1.1 + 0.15 * min(60, 2 * len(adapted(measured)))


def _largest(measured: Spectra) -> list[WeightSpectra]:
    """Return the weights with most parameters when dense, in the order of the model."""
    order = sorted(measured.weights, key=lambda weight: -weight.dense_parameters)
    kept = {weight.name for weight in order[:_BARS]}
    return [weight for weight in measured.weights if weight.name in kept]


def _line(mode: int, points: int = _POINTS) -> dict[str, Any]:
    style = {"color": _MODES[mode % len(_MODES)], "linestyle": _DASHES[mode % len(_DASHES)]}
    return {**style, "linewidth": 1.8, "marker": "o" if points <= 12 else None, "markersize": 3}


def _of(weight: WeightSpectra, mode: int) -> str:
    assert weight.ranks is not None
    return f"{weight.modes[mode]} {weight.ranks[mode]} of {weight.shape[mode]}"


def _thinned(first: int, last: int) -> Any:
    """Return whole numbers from first to last, closer at the beginning where there are many."""
    if last - first < _POINTS:
        return np.arange(first, last + 1)
    return np.unique(np.geomspace(first, last, _POINTS).round().astype(int))


def _finish(axes: Axes, legend: Any = "best") -> None:
    tidy(axes)
    axes.title.set_fontsize(10)
    axes.xaxis.label.set_fontsize(8)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8, handlelength=1.6, loc=legend)


def _name_rows(axes: Axes, rows: Sequence[int], names: Sequence[str]) -> None:
    """Write names, which may hold dollar signs, beside rows."""
    axes.set_yticks(rows, names)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", length=0)


def _short(weight: WeightSpectra) -> str:
    """Return a name that leaves room for the picture: its end tells layers apart."""
    name = title(weight)
    return name if len(name) <= 20 else "…" + name[-19:]
