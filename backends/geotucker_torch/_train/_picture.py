"""The picture of a run: accuracy, loss, parameters, and the ranks of every layer over time."""

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._files import write_atomically
from .._spectra import Spectra
from .._views._panels import draw_weights, tidy, weights_height
from ._progress import label
from ._run import Run

__all__ = ["draw"]

# Colours of Okabe and Ito (2008), which people with any colour vision can tell apart.
_NETWORKS = {"dense": "#555555", "tucker": "#0072B2"}


def draw(run: Run, measured: Spectra, path: Path) -> None:
    """Draw a run that has finished at least one epoch, and write it as PNG.

    Parameters
    ----------
    run : Run
        Its metrics are drawn.
    measured : Spectra
        Of its Tucker network, with ranks over time.
    path : Path
        The picture; replaced in one step.
    """
    height = weights_height(measured)
    figure = Figure(figsize=(12, 3.6 + height), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(3.6, height))
    top, bottom = halves
    accuracy, loss, size = top.subplots(1, 3, width_ratios=(3, 3, 2))
    title = f"{run.config.model} on {run.data.name}"
    top.suptitle(f"{title}: dense and in Tucker format", fontsize=13, fontweight="bold")
    _draw_accuracy(accuracy, run)
    _draw_loss(loss, run)
    _draw_size(size, run)
    draw_weights(bottom, measured)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def _rows(run: Run, network: str) -> list[dict[str, Any]]:
    return [record for record in run.metrics if record["network"] == network]


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
    tidy(axes)


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
    tidy(axes)


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
