"""A report on a model as one HTML page that needs nothing else."""

from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from geotucker import __version__

from .._files import write_atomically
from .._spectra import Source, Spectra, WeightSpectra, spectra
from ._needs import needed_by
from ._plot import drawable
from ._tables import Table, energy, history, modes, values, weights
from ._text import by, percent
from ._text import title as title_of

__all__ = ["report"]

_PICTURES = 32  # weights; more would make a page that is long to draw and slow to show
_OPEN = 6  # sections that are unfolded from the start, if there are no more
_SIZE = (3.8, 2.6)  # inches; small, so that the text is read on a phone
_WIDE = 4.2


class _Picture(NamedTuple):
    svg: str
    caption: str = ""
    table: Table | None = None


class _Section(NamedTuple):
    id: str
    name: str
    about: str
    modes: Table
    figures: Sequence[_Picture]


def report(source: Source, path: Path | str, *, title: str = "Ranks and spectra") -> None:
    """Write a report on a model as one HTML file: ranks over time, singular values, sizes.

    The page needs no network and no scripts; it can be read on a phone, in light and dark, and
    without seeing the pictures, whose numbers stand beside them. It shows the figures of `plot`: an
    overview, and a section for each weight in Tucker format, with pictures for the 32 largest.

    Parameters
    ----------
    source : nn.Module, TDLRT or Spectra
        See `spectra`. Ranks over time are shown if the optimizer is given and has taken a step.
    path : path-like
        The file; replaced in one step.
    title : str
        Heading of the page.

    Raises
    ------
    TypeError, ValueError, geotucker.NonFiniteError
        If `source` cannot be measured, or is a model without weights; nothing is written then.
    OSError
        If the file cannot be written.
    ImportError
        Without matplotlib or jinja2.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from torch import nn
    >>> from geotucker_torch import factorize, report
    >>> path = Path(tempfile.mkdtemp()) / "report.html"
    >>> report(factorize(nn.Sequential(nn.Linear(100, 50)), 8, verbose=False), path)
    >>> path.read_text().startswith("<!DOCTYPE html>")
    True
    """
    measured = drawable(spectra(source))
    write_atomically(Path(path), _page(measured, title).encode())


def _page(measured: Spectra, title: str) -> str:
    with needed_by("report"):
        import jinja2
    template = files("geotucker_torch._views").joinpath("report.html.jinja")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    largest = sorted(measured.tucker, key=lambda weight: -weight.dense_parameters)[:_PICTURES]
    drawn = {weight.name for weight in largest}
    links = {weight.name: f"weight-{i}" for i, weight in enumerate(measured.tucker)}
    sections = [
        _section(weight, links[weight.name], weight.name in drawn) for weight in measured.tucker
    ]
    page = environment.from_string(template.read_text(encoding="utf-8")).render(
        title=title,
        version=__version__,
        facts=_facts(measured),
        overview=_overview(measured),
        weights=weights(measured, links),
        sections=sections,
        open=_OPEN,
        drawn=_PICTURES,
        left_out=len(sections) > _PICTURES,
    )
    return page.lstrip()


def _facts(measured: Spectra) -> list[tuple[str, str]]:
    steps = [step for weight in measured.tucker for step in weight.history]
    facts = [
        ("parameters", f"{measured.parameters:,}"),
        ("share of the dense model", percent(measured.parameters, measured.dense_parameters)),
        ("parameters if dense", f"{measured.dense_parameters:,}"),
        ("weights in Tucker format", f"{len(measured.tucker)} of {len(measured.weights)}"),
    ]
    if measured.tucker and all(weight.dense_flops for weight in measured.tucker):
        dense = sum(weight.dense_flops or 0 for weight in measured.tucker)
        now = sum(weight.flops or 0 for weight in measured.tucker)
        facts.append(("their multiply-adds, of dense", percent(now, dense)))
    return [*facts, ("steps", f"{max(steps):,}")] if steps else facts


def _overview(measured: Spectra) -> list[_Picture]:
    with needed_by("report"):
        from ._panels import adapted, draw_map, draw_sizes, map_height, sizes_height
        from ._svg import drawn
    pictures = []
    if adapted(measured):
        text = "Map of rank divided by dimension for each weight's output and input mode over time."
        size = (_WIDE, map_height(measured))
        svg = drawn(partial(draw_map, measured=measured), size, "map", text)
        caption = (
            "Ranks over time: yellow is full rank, dark blue is rank zero. The ranks at the start "
            "and now are in the table below."
        )
        pictures.append(_Picture(svg, caption))
    text = f"Bars of the parameters of each weight: {measured.parameters:,} now in the whole model."
    size = (_WIDE, sizes_height(measured))
    svg = drawn(partial(draw_sizes, measured=measured), size, "sizes", text)
    caption = (
        "Grey is the dense weight, blue what is left of it. All numbers are in the table below."
    )
    return [*pictures, _Picture(svg, caption)]


def _section(weight: WeightSpectra, identity: str, drawn: bool) -> _Section:
    share = percent(weight.parameters, weight.dense_parameters)
    assert weight.ranks is not None
    about = f"{weight.type}, {by(weight.shape)}, ranks {by(weight.ranks)}, {share} of dense"
    figures = _pictures(weight, identity) if drawn else []
    return _Section(identity, title_of(weight), about, modes(weight), figures)


def _pictures(weight: WeightSpectra, identity: str) -> list[_Picture]:
    with needed_by("report"):
        from ._panels import draw_energy, draw_ranks, draw_values
        from ._svg import drawn
    kinds: list[tuple[Any, str, Table]] = [
        (draw_values, "singular values of each mode", values(weight)),
        (draw_energy, "energy kept by each rank", energy(weight)),
    ]
    name = title_of(weight)
    if len(weight.history) > 1:
        kinds.append((draw_ranks, "ranks over time", history(weight)))
    return [
        _Picture(
            drawn(partial(draw, weight=weight), _SIZE, f"{identity}-{i}", f"{name}: {what}"),
            table=table,
        )
        for i, (draw, what, table) in enumerate(kinds)
    ]
