"""Figures of matplotlib: of a whole model, and of one of its weights."""

from typing import TYPE_CHECKING

from .._spectra import Source, Spectra, WeightSpectra, spectra
from ._needs import needed_by
from ._text import by, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot"]


def plot(source: Source, name: str | None = None) -> "Figure":
    """Draw a model's parameters and ranks, or the spectra of one of its weights.

    Parameters
    ----------
    source : nn.Module, TDLRT or Spectra
        See `spectra`. Ranks over time are drawn if the optimizer is given and has taken a step.
    name : str, optional
        Of a weight in Tucker format: its singular values, the energy that each rank would keep, and
        its ranks over time. By default the whole model: parameters and ranks over time.

    Returns
    -------
    matplotlib.figure.Figure
        In the style in force; save it with its ``savefig``.

    Raises
    ------
    ValueError
        If no weight in Tucker format has this name, or the model has no weights.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> from torch import nn
    >>> from geotucker_torch import factorize, plot
    >>> model = factorize(nn.Sequential(nn.Linear(100, 50)), 8, verbose=False)
    >>> figure = plot(model, "0")
    >>> [axes.get_title() for axes in figure.axes]
    ['Singular values', 'Energy kept in %, cut to a rank']
    """
    measured = drawable(spectra(source))
    return _overview(measured) if name is None else _of_weight(_weight(measured, name))


def drawable(measured: Spectra) -> Spectra:
    """Return what was measured; raise ValueError if it is nothing."""
    if not measured.weights:
        raise ValueError("source: expected a model with weights, got one without")
    return measured


def _weight(measured: Spectra, name: str) -> WeightSpectra:
    weights = {weight.name: weight for weight in measured.tucker}
    if name not in weights:
        raise ValueError(f"name: expected one of {', '.join(map(repr, weights))}, got {name!r}")
    return weights[name]


def _overview(measured: Spectra) -> "Figure":
    with needed_by("plot"):
        from matplotlib.figure import Figure

        from ._panels import adapted, draw_map, draw_sizes, map_height, sizes_height
    timed = bool(adapted(measured))
    height = max(sizes_height(measured), map_height(measured) if timed else 0.0, 2.5)
    figure = Figure(figsize=(11 if timed else 6, height), layout="constrained")
    panels = figure.subplots(1, 1 + timed, squeeze=False)[0]
    draw_sizes(panels[0], measured)
    if timed:
        draw_map(panels[1], measured)
    return figure


def _of_weight(weight: WeightSpectra) -> "Figure":
    with needed_by("plot"):
        from matplotlib.figure import Figure

        from ._panels import draw_energy, draw_ranks, draw_values
    draws = [draw_values, draw_energy, *([draw_ranks] if len(weight.history) > 1 else [])]
    figure = Figure(figsize=(3.8 * len(draws), 2.9), layout="constrained")
    panels = figure.subplots(1, len(draws), squeeze=False)[0]
    for draw, axes in zip(draws, panels, strict=True):
        draw(axes, weight)
    text = f"{title(weight)}  {weight.type}  {by(weight.shape)}"
    figure.suptitle(text, fontsize=11, parse_math=False)
    return figure
