"""What a run says at its end: the two networks side by side, layer by layer, and the files."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._networks import layer_shapes, tucker_layers
from ._progress import label
from ._run import Run

__all__ = ["print_report"]


def print_report(run: Run, console: Console, files: Sequence[Path]) -> None:
    """Print the results of a finished run.

    Parameters
    ----------
    run : Run
        All its epochs are done.
    console : rich.console.Console
        Where to print.
    files : sequence of Path
        The files that the run has written.
    """
    console.print()
    console.print(_layers(run))
    console.print()
    console.print(_comparison(run))
    console.print()
    console.print(Text("Files"))
    for path in files:
        console.print(Text(f"  {path}"), soft_wrap=True)  # a wrapped path cannot be copied


def _comparison(run: Run) -> Table:
    """Return the table of both networks."""
    table = Table(title=f"{run.config.model} on {run.data.name}", title_justify="left")
    table.add_column("")
    columns = []
    for network in run.networks:
        table.add_column(label(network.name), justify="right")
        columns.append([r for r in run.metrics if r["network"] == network.name])
    for name, cell in (
        ("parameters", lambda rows: f"{rows[-1]['parameters']:,}"),
        ("compression", lambda rows: f"{100 * rows[-1]['compression']:.2f}%"),
        ("test accuracy, last epoch", lambda rows: f"{100 * rows[-1]['test_accuracy']:.2f}%"),
        ("test accuracy, best epoch", _best),
        ("training loss, last epoch", lambda rows: f"{rows[-1]['loss']:.4f}"),
        ("seconds per epoch", lambda rows: f"{sum(r['seconds'] for r in rows) / len(rows):.2f}"),
    ):
        table.add_row(name, *(cell(rows) for rows in columns))
    return table


def _best(rows: Sequence[dict[str, Any]]) -> str:
    best = max(rows, key=lambda row: row["test_accuracy"])
    return f"{100 * best['test_accuracy']:.2f}% (epoch {best['epoch']})"


def _layers(run: Run) -> Table:
    """Return the table of the Tucker network's layers."""
    table = Table(title="Layers", title_justify="left")
    for name in ("layer", "shape", "ranks"):
        table.add_column(name)
    for name in ("dense", "Tucker", "saved"):
        table.add_column(name, justify="right")
    model, tucker = run.tucker.model, tucker_layers(run.tucker.model)
    shapes = layer_shapes(model) | {name: layer.shape for name, layer in tucker.items()}
    dense_rest, tucker_rest = run.tucker.dense_parameters, run.tucker.parameters
    for name in (name for name, _ in model.named_modules() if name in shapes):
        dense = size = math.prod(shapes[name])
        ranks = "dense"
        if name in tucker:
            size, ranks = tucker[name].point.size, _by(tucker[name].ranks)
        table.add_row(name, _by(shapes[name]), ranks, *_sizes(dense, size))
        dense_rest, tucker_rest = dense_rest - dense, tucker_rest - size
    table.add_row("biases and others", "", "", *_sizes(dense_rest, tucker_rest))
    table.add_section()
    sizes = _sizes(run.tucker.dense_parameters, run.tucker.parameters)
    table.add_row("total", "", "", *sizes)
    return table


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _sizes(dense: int, tucker: int) -> tuple[str, str, str]:
    saved = f"{100 * (1 - tucker / dense):.1f}%" if dense else ""
    return f"{dense:,}", f"{tucker:,}", saved
