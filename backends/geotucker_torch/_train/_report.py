"""What a run says at its end: the two networks side by side, layer by layer, and the files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._spectra import Spectra, summary
from ._progress import label
from ._run import Run

__all__ = ["print_report"]


def print_report(run: Run, measured: Spectra, console: Console, files: Sequence[Path]) -> None:
    """Print the results of a finished run.

    Parameters
    ----------
    run : Run
        All its epochs are done.
    measured : Spectra
        Of its Tucker network.
    console : rich.console.Console
        Where to print.
    files : sequence of Path
        The files that the run has written.
    """
    console.print()
    console.print(Text(summary(measured)), soft_wrap=True)
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
