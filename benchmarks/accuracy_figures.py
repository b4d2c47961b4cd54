"""Figures of accuracies: of what `stability`, `compression` and their like have in their tables."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SALMON,
    SKY,
    Row,
    column,
    grouped,
    label,
    panels,
    table,
)
from matplotlib import colormaps
from matplotlib.figure import Figure

OURS = {  # drawn in front, in colours of their own
    "TDLRT": BLUE,
    "TDLRT, layers as tensors": RED,
    "TDLRT, rate_power 1/4": SKY,
    "TDLRT, rate_power 1/2": GREEN,
    "TDLRT, rate_power 1/4, layers as tensors": SALMON,
    "TDLRT, rate_power 1/3, layers as tensors": BLACK,
}
WHOLE = ("dense", "as it came")  # of one size: drawn level
_FIVE = (GREY, PINK, BLUE, ORANGE, GREEN)
_PEERS = (PINK, ORANGE, GREEN, GREY, RED)


def stability(folder: Path) -> Figure:
    """Draw accuracy over the epochs from a good and from a badly conditioned start."""
    rows = longest(table(folder, "stability"))
    starts = grouped(rows, "start")
    figure, axes = panels(len(starts), 3.4)
    palette = colors(rows)
    for panel, ((start,), own) in zip(axes, starts, strict=True):
        for (method,), runs in grouped(own, "method"):
            color = palette[method]
            epochs = [rows for _, rows in grouped(runs, "epoch")]
            scores = [column(rows, "test_accuracy") for rows in epochs]
            x = [int(rows[0]["epoch"]) for rows in epochs]
            panel.plot(x, [s.mean() for s in scores], color=color, label=method)
            panel.fill_between(
                x, [s.min() for s in scores], [s.max() for s in scores], color=color, alpha=0.2
            )
        panel.set(title=f"{start} start", xlabel="epoch", ylim=(0, 100))
    axes[0].set_ylabel("test accuracy (%)")
    lines = {line.get_label(): line for panel in axes for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
    return figure


def compression(folder: Path) -> Figure:
    """Draw accuracy against the share of the parameters, by method.

    A panel for each problem of which the table holds more than one share.
    """
    problems = [own for _, own in grouped(table(folder, "compression"), "problem")]
    several = [own for own in problems if len({row["kept"] for row in own} - {"1.0"}) > 1]
    return by_size([row for own in several for row in own], "problem")


def fine_tuning(folder: Path) -> Figure:
    """Draw accuracy after fine-tuning against the share of the parameters, for each network.

    Of the longest runs, on the most images: others are trials.
    """
    rows = table(folder, "fine_tuning")
    most = f"{column(rows, 'images').max():.0f}"
    return by_size([row for row in rows if row["images"] == most], "network")


def time(folder: Path) -> Figure:
    """Draw accuracy over the processor time of training, at one share of the parameters."""
    rows = longest(table(folder, "compression", problem="lenet5", seed="0"))
    chosen = [row for row in rows if row["kept"] in ("1.0", "0.02")]
    figure, (axes,) = panels(1, 5.0)
    figure.set_figwidth(6.4)
    palette = colors(chosen)
    for (method,), runs in grouped(chosen, "method"):
        own, color = best_rate(runs), palette[method]
        x, y = column(own, "seconds"), column(own, "test_accuracy")
        axes.plot(x, y, color=color, label=method, **front(method))
    axes.set(xlabel="processor time of training (s)", ylabel="test accuracy (%)", ylim=(97, 99.5))
    figure.legend(fontsize=7, ncols=2, loc="outside lower center")
    return figure


def sensitivity(folder: Path) -> Figure:
    """Draw the end of runs in which one setting varies, a panel for each."""
    settings = grouped(table(folder, "sensitivity"), "setting")
    figure = Figure(figsize=(8.4, 2.2 * -(-len(settings) // 3)))
    axes = list(np.atleast_1d(figure.subplots(-(-len(settings) // 3), 3)).flat)
    for panel, setting in zip_longest(axes, settings):
        if setting is None:
            panel.set_axis_off()
            continue
        (name,), rows = setting
        ends = [run[-1] for _, run in grouped(rows, "value", "seed", "epochs")]
        values = [row["value"] for row in ends]
        panel.plot(range(len(ends)), column(ends, "test_accuracy"), "o-", color=BLUE)
        panel.set_xticks(range(len(ends)), values, rotation=30 if name == "optimizer" else 0)
        panel.set(title=name, ylim=(94, 99.5))
        for i, row in enumerate(ends):
            if row["test_accuracy"] == "nan":
                place = {"xytext": (0, 4), "ha": "center", "va": "bottom", "rotation": 90}
                label(panel, i, 94.0, "diverges", GREY, **place)
        if name == "tolerance":  # the only one that leads to other sizes
            for i, row in enumerate(ends):
                share = int(row["parameters"]) / 431_080
                y = float(row["test_accuracy"])
                label(
                    panel, i, max(y, 94.6), f"{100 * share:.0f}%", GREY, xytext=(0, -9), ha="center"
                )
    return figure


def robustness(folder: Path) -> Figure:
    """Draw accuracy against the learning rate, by optimizer and start; rings: after more epochs."""
    rows = table(folder, "robustness", seed="0")
    starts = grouped(rows, "start")
    figure = Figure(figsize=(8.4, 2.4 * len(starts)))
    grid = len(starts), len(grouped(rows, "optimizer"))
    axes = figure.subplots(*grid, sharey=True, squeeze=False)
    palette = dict(zip(dict.fromkeys(row["network"] for row in rows), _FIVE, strict=False))
    for line, ((start,), own) in zip(axes, starts, strict=True):
        line[0].set_ylabel(f"{start} start\ntest accuracy (%)")
        for panel, ((optimizer,), runs) in zip(line, grouped(own, "optimizer"), strict=True):
            panel.set(title=optimizer, xscale="log", ylim=(0, 102))
            for (network, epochs), ends in grouped(runs, "network", "epochs"):
                ends = sorted(ends, key=lambda row: float(row["rate"]))
                x, y = column(ends, "rate"), np.nan_to_num(column(ends, "test_accuracy"))
                once = epochs == "1"
                style = {"label": network} if once else {"linestyle": "", "fillstyle": "none"}
                panel.plot(x, y, "o-" if once else "o", color=palette[network], **style)
    for panel in axes[-1]:
        panel.set_xlabel("learning rate")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def completion(folder: Path) -> Figure:
    """Draw mean errors of completed tensors against the share of entries that are observed."""
    rows = table(folder, "completion")
    tensors = grouped(rows, "tensor")
    figure, axes = panels(len(tensors), 2.9)
    palette = dict(zip(dict.fromkeys(row["method"] for row in rows), _PEERS, strict=True))
    palette |= {"geotucker": BLUE}
    for panel, ((tensor,), own) in zip(axes, tensors, strict=True):
        for (method,), runs in grouped(own, "method"):
            means = [np.mean(column(same, "error")) for _, same in grouped(runs, "observed")]
            shares = [100 * float(share) for (share,), _ in grouped(runs, "observed")]
            front = {"linewidth": 2.0, "zorder": 3} if method == "geotucker" else {}
            panel.plot(shares, means, "o-", color=palette[method], label=method, **front)
        panel.set(title=tensor, ylim=(0, 1.25), xlabel="entries observed (%)", xticks=shares)
    axes[0].set_ylabel("relative error")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def by_size(rows: Sequence[Row], where: str) -> Figure:
    """Draw means over seeds against the share of the parameters, and from worst to best.

    What ends far below most others, by the fence of Tukey's box plots, is off the figure.
    """
    places = [(place, longest(own)) for place, own in grouped(rows, where)]
    figure, axes = panels(len(places), 5.4)
    palette = colors(rows)
    figure.set_figwidth(max(6.0, 5.0 * len(places)))
    for panel, ((name,), own) in zip(axes, places, strict=True):
        dense, means, top = max(int(row["parameters"]) for row in own), list[float](), 0.0
        for (method,), runs in grouped(own, "method"):
            color, points = palette[method], []
            for _, same in grouped(best_rate(runs), "kept"):
                last = [run[-1] for _, run in grouped(same, "seed")]
                scores = column(last, "test_accuracy")
                if np.isnan(scores).all():  # diverged, or cannot meet the share
                    continue
                points.append((column(last, "parameters").mean() / dense, scores))
            if not points:
                continue
            points.sort(key=lambda point: point[0])
            x, y = [share for share, _ in points], [np.nanmean(scores) for _, scores in points]
            top = max(top, *y)
            if method in WHOLE:
                panel.axhline(y[0], color=GREY, linewidth=0.8)
                label(panel, 1.0, y[0], method, GREY, xytext=(0, 5), ha="right")
                continue
            panel.plot(x, y, "o-", color=color, label=method, **front(method))
            means += y
            panel.vlines(
                x, [np.nanmin(s) for _, s in points], [np.nanmax(s) for _, s in points], color
            )
        panel.set(title=f"{name}, {own[0]['data']}", xscale="log", xlabel="parameters kept")
        if means:
            low, high = np.quantile(means, [0.25, 0.75])
            bottom = max(panel.get_ylim()[0], low - 1.5 * (high - low))
            panel.set_ylim(bottom, top + 0.1 * (top - bottom))
        shares = sorted({float(row["kept"]) for row in own} - {1.0})
        panel.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
        panel.minorticks_off()
    axes[0].set_ylabel("test accuracy (%)")
    lines = {line.get_label(): line for panel in axes for line in panel.get_lines()}
    shown = {name: line for name, line in lines.items() if not str(name).startswith("_")}
    figure.legend(shown.values(), shown.keys(), fontsize=7, ncols=2, loc="outside lower center")
    return figure


def front(method: str) -> dict[str, Any]:
    """Return how the lines of a method are drawn: ours before those of others."""
    return {"linewidth": 2.0, "zorder": 3} if method in OURS else {}


def best_rate(rows: Iterable[Row]) -> list[Row]:
    """Return for each share the runs at the learning rate that served best, over all seeds.

    By the test accuracies at the end, which flatters whoever has tried more rates. A run that
    diverged counts as zero.
    """

    def merit(runs: Sequence[Row]) -> float:
        ends = [run[-1] for _, run in grouped(runs, "seed")]
        return float(np.nan_to_num(column(ends, "test_accuracy")).mean())

    found: list[Row] = []
    for _, same in grouped(list(rows), "kept"):
        found += max((runs for _, runs in grouped(same, "rate")), key=merit)
    return found


def longest(rows: Sequence[Row]) -> list[Row]:
    """Return the runs of the most epochs; shorter ones are trials."""
    most = f"{max(int(row['epochs']) for row in rows)}"
    return [row for row in rows if row["epochs"] == most]


def colors(rows: Sequence[Row]) -> dict[str, Any]:
    """Return a colour for each method, the same in all panels of a figure."""
    others = iter([ORANGE, PINK, *colormaps["tab20"].colors])  # type: ignore[attr-defined]
    strong = OURS | dict.fromkeys(WHOLE, GREY)
    names = [method for (method,), _ in grouped(rows, "method")]
    return {name: strong[name] if name in strong else next(others) for name in names}
