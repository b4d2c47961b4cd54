"""The picture of a run: accuracy, loss, parameters, and the ranks of every layer over time."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from .._files import write_atomically
from ._networks import tucker_layers
from ._progress import label
from ._run import Run

__all__ = ["draw"]

# Colours of Okabe and Ito (2008), which people with any colour vision can tell apart.
_NETWORKS = {"dense": "#555555", "tucker": "#0072B2"}
_MODES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
# Modes often have equal ranks: a dashed line lets the solid one under it be seen.
_DASHES: tuple[Any, ...] = ("-", (0, (4, 3)), "-", (0, (4, 3)), (0, (1, 2)))
_MODE_NAMES = {
    2: ("out", "in"),
    3: ("out", "in", "width"),
    4: ("out", "in", "height", "width"),
    5: ("out", "in", "depth", "height", "width"),
}
_PANELS = 8  # layers with a panel of their own; more are drawn as one map
_COLUMNS = 4


def draw(run: Run, path: Path) -> None:
    """Draw a run that has finished at least one epoch, and write it as PNG.

    Parameters
    ----------
    run : Run
        Its metrics are drawn.
    path : Path
        The picture; replaced in one step.
    """
    layers = len(run.start_ranks)
    rows = math.ceil(layers / _COLUMNS) if layers <= _PANELS else 2
    figure = Figure(figsize=(12, 3.6 + 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    halves: Any = figure.subfigures(2, 1, height_ratios=(3.6, 2.6 * rows))
    top, bottom = halves
    accuracy, loss, size = top.subplots(1, 3, width_ratios=(3, 3, 2))
    title = f"{run.config.model} on {run.data.name}"
    top.suptitle(f"{title}: dense and in Tucker format", fontsize=13, fontweight="bold")
    _draw_accuracy(accuracy, run)
    _draw_loss(loss, run)
    _draw_size(size, run)
    if layers <= _PANELS:
        _draw_layers(bottom, run)
    else:
        _draw_map(bottom, run)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def _rows(run: Run, network: str) -> list[dict[str, Any]]:
    return [record for record in run.metrics if record["network"] == network]


def _tidy(axes: Axes) -> None:
    """Take away what carries no information; whole numbers on the time axis."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _draw_accuracy(axes: Axes, run: Run) -> None:
    values: list[float] = []
    for network in run.networks:
        rows = _rows(run, network.name)
        percent = [100 * row["test_accuracy"] for row in rows]
        values += percent
        text = f"{label(network.name)}, at the end {percent[-1]:.2f}%"
        axes.plot(
            [row["epoch"] for row in rows],
            percent,
            color=_NETWORKS[network.name],
            marker="o",
            markersize=3,
            label=text,
        )
    axes.set(title="Test accuracy in %", xlabel="epoch")
    # The first epochs must not squeeze the rest: the axis begins where most of the run is.
    low = sorted(values)[len(values) // 8]
    span = max(values) - low
    axes.set_ylim(max(0.0, low - 0.15 * span - 0.1), min(100.0, max(values) + 0.15 * span + 0.1))
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    _tidy(axes)


def _draw_loss(axes: Axes, run: Run) -> None:
    for network in run.networks:
        rows = _rows(run, network.name)
        epochs = [row["epoch"] for row in rows]
        colour, name = _NETWORKS[network.name], label(network.name)
        axes.plot(epochs, [row["loss"] for row in rows], color=colour, label=f"{name}, training")
        axes.plot(
            epochs,
            [row["test_loss"] for row in rows],
            color=colour,
            linestyle=(0, (4, 2)),
            label=f"{name}, test",
        )
    axes.set(title="Loss", xlabel="epoch", yscale="log")
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)


def _draw_size(axes: Axes, run: Run) -> None:
    sizes = {"dense": run.tucker.dense_parameters, "tucker": run.tucker.parameters}
    for position, (name, size) in enumerate(sizes.items()):
        axes.bar(position, size, width=0.6, color=_NETWORKS[name])
        text = f"{size:,}"
        if name == "tucker":
            text += f"\n{100 * run.tucker.compression:.1f}% saved"
        axes.annotate(
            text, (position, size), (0, 3), textcoords="offset points", ha="center", va="bottom"
        )
    axes.set_xticks(range(len(sizes)), [label(name) for name in sizes])
    axes.set_ylim(0, 1.15 * max(sizes.values()))
    axes.set_title("Parameters")
    axes.yaxis.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _history(run: Run, layer: str) -> list[tuple[int, ...]]:
    """Return the ranks of a layer at the start and after each epoch."""
    rows = _rows(run, run.tucker.name)
    return [run.start_ranks[layer], *(tuple(row["ranks"][layer]) for row in rows)]


def _draw_layers(figure: SubFigure, run: Run) -> None:
    """Draw one panel per layer, one line per mode."""
    names = list(run.start_ranks)
    columns = min(_COLUMNS, len(names))
    grid = figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False).flat
    shapes = {name: layer.shape for name, layer in tucker_layers(run.tucker.model).items()}
    for axes, name in zip(grid, names, strict=False):
        _draw_ranks(axes, _history(run, name))
        axes.set_title(f"{name}  {'x'.join(map(str, shapes[name]))}", fontsize=10)
        axes.set_xlabel("epoch")
        _tidy(axes)
    for axes in list(grid)[len(names) :]:
        axes.set_visible(False)
    figure.suptitle("Ranks of each layer's modes", fontsize=12)


def _draw_ranks(axes: Axes, history: Sequence[tuple[int, ...]]) -> None:
    """Draw the ranks of one layer; a value holds until the next epoch's end."""
    order = len(history[0])
    modes = _MODE_NAMES.get(order, tuple(f"mode {i}" for i in range(order)))
    for mode in range(order):
        ranks = [entry[mode] for entry in history]
        axes.plot(
            range(len(ranks)),
            ranks,
            color=_MODES[mode % len(_MODES)],
            linestyle=_DASHES[mode % len(_DASHES)],
            linewidth=1.8,
            label=f"{modes[mode]} {ranks[-1]}",
        )
    axes.set_ylim(0, 1.12 * max(max(entry) for entry in history) + 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.legend(frameon=False, fontsize=8, ncols=2, handlelength=1.6)


def _draw_map(figure: SubFigure, run: Run) -> None:
    """Draw all layers as one map of rank divided by dimension: for deep networks."""
    shapes = {name: layer.shape for name, layer in tucker_layers(run.tucker.model).items()}
    rows, names = [], []
    for name in run.start_ranks:
        history = _history(run, name)
        for mode in range(min(2, len(shapes[name]))):  # kernel modes are too small to matter
            rows.append([entry[mode] / shapes[name][mode] for entry in history])
            names.append(f"{name} {_MODE_NAMES[4][mode]}")
    axes = figure.subplots()
    image = axes.imshow(rows, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="none")
    axes.set_yticks(range(0, len(names), 2), names[::2], fontsize=7)
    axes.set(title="Rank divided by dimension; per layer the output mode, then the input mode")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, fraction=0.03)
