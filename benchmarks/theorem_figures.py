"""Figures of the theory, from the tables of `theorems` and `truncation`."""

from pathlib import Path
from typing import Any

import numpy as np
from drawing import BLUE, GREEN, GREY, ORANGE, PINK, RED, column, grouped, label, panels, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Tolerances that leave new directions room: beyond, all that is new is cut at once.
FEW = 3
ABOVE: Any = {"xytext": (0, 6), "ha": "left"}


def descent(folder: Path) -> Figure:
    """Theorem 3.1: what the loss fell by, as a multiple of what is promised, step by step."""
    rates = grouped(table(folder, "theorems_descent"), "learning_rate")
    figure, axes = panels(len(rates), 3.2)
    names = {
        ("fixed", "ordinary"): ("ranks fixed at 8", BLUE),
        ("fixed", "ill-conditioned"): ("the same, singular values to 1e-8", RED),
        ("tolerance 0.003", "ordinary"): ("tolerance 0.003", GREEN),
        ("tolerance 0.03", "ordinary"): ("tolerance 0.03", PINK),
        ("descent-safe", "ordinary"): ("descent-safe", ORANGE),
    }
    for panel, ((rate,), runs) in zip(axes, rates, strict=True):
        for run, steps in grouped(runs, "ranks", "start"):
            text, color = names[run]
            y = column(steps, "decrease") / column(steps, "guaranteed")
            panel.plot(column(steps, "step"), y, color=color, label=text, linewidth=0.9)
        panel.axhline(1.0, color=GREY, linewidth=0.8)
        most = float(rate) * column(runs, "smoothness").max()
        panel.set(title=rf"$\lambda$ = {rate}, $\lambda \ell$ up to {most:.1f}", xlabel="step")
        panel.set_ylim(-1.0, 2.5)
    label(axes[0], 0.0, 1.0, "promised", GREY, xytext=(2, -7))
    axes[0].set_ylabel("decrease of the loss / promised")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def convergence(folder: Path) -> Figure:
    """Theorem 3.2: the projected gradient over time."""
    figure, (axes,) = panels(1)
    figure.set_figwidth(5.0)
    runs = grouped(table(folder, "theorems_convergence"), "batch", "rates")
    whole = max(int(batch) for (batch, _), _ in runs)
    for ((batch, rates), rows), color in zip(runs, (BLUE, GREEN, RED), strict=False):
        x, y = column(rows, "step"), column(rows, "gradient")
        text = "all images" if int(batch) == whole else f"batches of {batch}"
        axes.plot(x / x[-1], y, color=color)
        label(axes, 1.0, y[-1], f"{text}, {rates} steps\n(of {int(x[-1])})", color)
    axes.set(yscale="log", xlabel="share of the steps", xlim=(0, 1))
    axes.set_ylabel("norm of the projected gradient")
    return figure


def approximation(folder: Path) -> Figure:
    """Theorem 3.3: the three terms of the distance to the dense flow."""
    figure, (by_step, by_eps, by_tau) = panels(3)
    free = table(folder, "theorems_approximation", term="lambda")
    fixed = table(folder, "theorems_approximation", term="eps")
    cut = table(folder, "theorems_approximation", term="tau")
    lengths = column(free, "lambda")
    _power(by_step, lengths, column(free, "distance"), BLUE, "no truncation, ")
    for (rank,), rows in grouped(fixed, "start"):
        y = column(rows, "distance")
        by_step.plot(column(rows, "lambda"), y, "o-", color=RED)
        label(by_step, lengths[0], y[0], rank, RED)
    label(by_step, lengths[-1], column(fixed, "distance").max(), "at fixed ranks", RED, **ABOVE)
    ends = [row for row in fixed if row["eps"]]
    _power(by_eps, column(ends, "eps"), column(ends, "distance"), RED, "")
    for ((rate,), rows), color in zip(grouped(cut, "lambda"), (BLUE, GREEN), strict=False):
        x, y = column(rows, "tau") / float(rate), column(rows, "apart")
        text = f"$\\lambda$ = 1/{1 / float(rate):.0f}\n"
        _power(by_tau, x, y, color, text, FEW, -1 if color == BLUE else 1)
    by_step.set(title="step size", xlabel=r"$\lambda$", ylabel="distance to the dense flow")
    by_step.set_xticks(lengths, [f"1/{1 / length:.0f}" for length in lengths])
    by_step.set_ylim(top=1.6 * column(fixed, "distance").max())
    by_eps.set(title="gradient off the tangent space", xlabel=r"$\varepsilon$")
    by_eps.set_xticks(column(ends, "eps"), [f"{float(row['eps']):.2f}" for row in ends])
    by_eps.set_yticks(column(ends, "distance"), [f"{float(row['distance']):.2g}" for row in ends])
    by_tau.set(title="truncation", xlabel=r"$\tau / \lambda$", ylabel="distance to no truncation")
    for axes in (by_step, by_eps):
        axes.minorticks_off()
    return figure


def _power(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    color: str,
    text: str,
    few: int | None = None,
    side: int = -1,
) -> None:
    """Draw a curve, and beside its middle the slope of its beginning."""
    axes.loglog(x, y, "o-", color=color)
    middle = len(x[:few]) // 2
    place = {"xytext": (-5 * side, 4 * side), "ha": "left" if side < 0 else "right"}
    number = f"{text}slope {power(x[:few], y[:few]):.2f}"
    label(axes, x[middle], y[middle], number, color, **place)


def spectra(folder: Path) -> Figure:
    """Show the singular values of the largest layer over an epoch."""
    figure, axes = panels(2)
    rows = table(folder, "theorems_spectra", layer="7")
    for panel, ((network,), own) in zip(axes, grouped(rows, "network"), strict=True):
        for (number,), line in grouped(own, "number"):
            x, y = column(line, "step"), column(line, "value")
            panel.plot(x, y, color=BLUE, alpha=1.0 - 0.03 * int(number), linewidth=0.9)
        name = {"dense": "dense", "growing": "Tucker format, ranks from 2"}[network]
        panel.set(title=name, xlabel="step", yscale="log")
    low = min(panel.get_ylim()[0] for panel in axes)
    high = max(panel.get_ylim()[1] for panel in axes)
    for panel in axes:
        panel.set_ylim(low, high)
    axes[0].set_ylabel("singular values, 400 to 120")
    return figure


def power(x: np.ndarray, y: np.ndarray) -> float:
    """Return the power of x by which y grows: least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def truncation(folder: Path) -> Figure:
    """Rank rules: what truncations cost the loss, against what was expected."""
    figure, (axes,) = panels(1)
    figure.set_figwidth(4.2)
    layers = grouped(table(folder, "truncation"), "layer")
    for ((layer,), rows), color in zip(layers, (BLUE, GREEN, RED, PINK), strict=False):
        x, y = column(rows, "expected"), column(rows, "measured")
        axes.plot(x[y > 0], y[y > 0], "o", color=color, label=f"layer {layer}", alpha=0.7)
    axes.axline((1e-3, 1e-3), (1.0, 1.0), color=GREY, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="expected rise of the loss", ylabel="measured")
    axes.legend()
    return figure
