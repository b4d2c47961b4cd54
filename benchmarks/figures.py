"""Figures of the tables in ``benchmarks/results``, for the pages of ``docs/evidence``.

Run from the root of the repository, with the extra ``train`` installed::

    python benchmarks/figures.py fine_tuning
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import fine_tuning
import runs
import typer
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]


def compression(path: Path = fine_tuning.RESULTS) -> Figure:
    """Draw accuracy after fine-tuning against the number of parameters, a panel for each network.

    Of runs on the whole training set by the recipe of the script: means over seeds, and from the
    worst to the best.
    """
    recipe = tuple(map(str, (fine_tuning.IMAGES, fine_tuning.EPOCHS, fine_tuning.RATE)))
    rows = [row for row in runs.read(path) if (row["images"], row["epochs"], row["rate"]) == recipe]
    if not rows:
        raise ValueError(f"path: expected a table with runs of the whole recipe, got {path}")
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(5.5 * len(names), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _draw(axes, [row for row in rows if row["network"] == name])
        axes.set_title(f"{name}, {rows[0]['data']}")
    return figure


def _draw(axes: Any, rows: Sequence[Mapping[str, str]]) -> None:
    """Draw methods as lines over budgets; those of one size, such as the dense network, level."""
    last = {(r["method"], r["kept"], r["seed"]): r for r in rows}  # a run's epochs are in order
    ends: dict[str, dict[str, list[Mapping[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for (method, kept, _), row in last.items():
        ends[method][kept].append(row)
    for method, budgets in ends.items():
        groups = sorted(budgets.values(), key=lambda group: float(group[0]["kept"]))
        scores = [[float(row["test_accuracy"]) for row in group] for group in groups]
        middle = [mean(group) for group in scores]
        if method in fine_tuning.WHOLE:
            axes.axhline(middle[0], color="black", linewidth=0.8)
            axes.annotate(method, (1.0, middle[0]), xycoords=("axes fraction", "data"), ha="right")
            continue
        sizes = [mean(float(row["parameters"]) for row in group) for group in groups]
        (line,) = axes.plot(sizes, middle, marker="o", label=method)
        lows, highs = [min(group) for group in scores], [max(group) for group in scores]
        axes.vlines(sizes, lows, highs, color=line.get_color())
    axes.set(xscale="log", xlabel="parameters", ylabel="test accuracy (%)")
    axes.legend()


FIGURES: dict[str, Callable[[], Figure]] = {"fine_tuning": compression}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all by default.")] = None,
    folder: Annotated[Path, typer.Option(help="Where to.")] = ROOT / "docs" / "evidence",
) -> None:
    """Draw figures, as PNG."""
    for name in names or FIGURES:
        if name not in FIGURES:
            raise typer.BadParameter(f"got {name!r}, expected some of {', '.join(FIGURES)}")
        folder.mkdir(parents=True, exist_ok=True)
        FIGURES[name]().savefig(folder / f"{name}.png", dpi=150)


if __name__ == "__main__":
    typer.run(main)
