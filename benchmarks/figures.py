"""The figures of the documentation, drawn from the tables of the benchmarks alone.

Run from the root of the repository, with the extras ``command`` and ``report`` installed::

    python benchmarks/figures.py

Each figure is a function from the folder of the tables to a figure of matplotlib, and stands in
``FIGURES`` under the name of its file in ``docs/evidence``. From the same tables, by the same
version of matplotlib, come the same bytes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import accuracy_figures
import matplotlib
import theorem_figures
import typer
from drawing import STYLE
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]

FIGURES: dict[str, Callable[[Path], Figure]] = {
    "stability": accuracy_figures.stability,
    "compression": accuracy_figures.compression,
    "time": accuracy_figures.time,
    "fine_tuning": accuracy_figures.fine_tuning,
    "sensitivity": accuracy_figures.sensitivity,
    "robustness": accuracy_figures.robustness,
    "completion": accuracy_figures.completion,
    "theorems_descent": theorem_figures.descent,
    "theorems_convergence": theorem_figures.convergence,
    "theorems_approximation": theorem_figures.approximation,
    "theorems_spectra": theorem_figures.spectra,
    "truncation": theorem_figures.truncation,
}


def save(name: str, folder: Path, path: Path) -> None:
    """Draw a figure in the common style, whatever the user's own is."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        FIGURES[name](folder).savefig(path, format="svg", metadata={"Date": None})


def main(
    only: Annotated[str, typer.Option(help="Figures, with commas between.")] = ",".join(FIGURES),
    tables: Annotated[Path, typer.Option(help="Their folder.")] = ROOT / "benchmarks" / "results",
    out: Annotated[Path, typer.Option(help="Folder of figures.")] = ROOT / "docs" / "evidence",
) -> None:
    """Draw the figures."""
    out.mkdir(parents=True, exist_ok=True)
    for name in only.split(","):
        try:
            save(name, tables, out / f"{name}.svg")
            typer.echo(out / f"{name}.svg")
        except FileNotFoundError as error:
            typer.echo(f"{name}: left out, no table {error}")


if __name__ == "__main__":
    typer.run(main)
