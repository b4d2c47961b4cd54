"""Figures as SVG that lies inside an HTML page, and takes its colours and fonts."""

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["drawn"]

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
# A style sheet in an inline picture would be one for the whole page.
_NOT_KEPT = (f"{_SVG}metadata", f"{_SVG}style")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_DIGITS = re.compile(r"(-?\d+\.\d\d)\d+")  # a hundredth of a point is not seen
_FONT = re.compile(r"font-family: [^;]*;? ?")
_COORDINATES = ("d", "x", "y", "points")  # but not a transform, which magnifies
# Text stays text, so that it can be read out and takes the page's font; ids are the same each time.
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "geotucker", "font.size": 9.0}


def drawn(draw: Callable[[Axes], None], size: tuple[float, float], identity: str, text: str) -> str:
    """Return one panel as an ``svg`` element.

    Parameters
    ----------
    draw : callable
        Draws on the axes that it is given.
    size : tuple of float
        Width and height in inches.
    identity : str
        Unique in the page: the element's ids begin with it.
    text : str
        What the picture shows, for those who do not see it.

    Returns
    -------
    str
        Black is ``currentColor``, the colour of the text around it.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's style is: the page has its own
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _tidy(root, identity)
    root.set("role", "img")
    root.set("aria-label", text)
    return ElementTree.tostring(root, encoding="unicode")


def _tidy(root: ElementTree.Element, identity: str) -> None:
    """Leave what a page needs: no metadata, no ids but those in use, which are its own."""
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in _NOT_KEPT:
                parent.remove(child)
    used = set(_used(root))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        href = element.attrib.pop(_HREF, None)
        if href is not None:
            element.set("href", f"#{identity}-{href[1:]}" if href.startswith("#") else href)
        if element.get("id") in used:
            element.set("id", f"{identity}-{element.get('id')}")
        else:
            element.attrib.pop("id", None)
        if element.tag != "text":
            element.text = element.tail = None
        for key, value in element.attrib.items():
            value = _FONT.sub("", value) if key == "style" else value
            value = _REFERENCE.sub(rf"url(#{identity}-\1)", value)
            value = value.replace("#000000", "currentColor")
            element.set(key, _DIGITS.sub(r"\1", value) if key in _COORDINATES else value)
    root.set("xmlns", _SVG[1:-1])


def _used(root: ElementTree.Element) -> list[str]:
    """Return the ids that something refers to."""
    found = []
    for element in root.iter():
        for key, value in element.attrib.items():
            found += [value[1:]] if key == _HREF and value.startswith("#") else []
            found += _REFERENCE.findall(value)
    return found
