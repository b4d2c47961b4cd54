"""How weights are written in pictures and pages."""

from collections.abc import Sequence

from .._spectra import WeightSpectra

__all__ = ["by", "percent", "title"]


def by(sizes: Sequence[int]) -> str:
    """Return sizes as 64x32x3x3."""
    return "x".join(map(str, sizes))


def percent(part: int | None, whole: int | None) -> str:
    """Return a share as text; nothing where there is nothing to share."""
    return f"{100 * (part or 0) / whole:.1f} %" if whole else ""


def title(weight: WeightSpectra) -> str:
    """Return the name of a weight; that of the model itself is empty."""
    return weight.name or "(the model)"
