"""The option ``--ranks``: which layers take the Tucker format, and at which ranks."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from geotucker import Budget, Fixed, RankError

from ._errors import OptionError

__all__ = ["RankPlan", "Ranks", "parse_budget", "parse_ranks"]

Ranks: TypeAlias = int | float | tuple[int, ...]

_EXPECTED = (
    "a rank (10), a fraction of the dense layer (0.1), one rank per mode (8,8,5,5), or "
    "pattern=ranks for layers by name ('conv*=0.2;fc1=9;fc2=dense')"
)


@dataclass(frozen=True)
class RankPlan:
    """Ranks of the layers, by name.

    Parameters
    ----------
    default : int, float, tuple of int or None
        For layers that no pattern matches; None leaves them dense.
    patterns : tuple of (str, ranks or None)
        Shell-style patterns (``conv*``); the first that matches a layer's name decides, and
        None leaves it dense.
    """

    default: Ranks | None
    patterns: tuple[tuple[str, Ranks | None], ...] = ()

    def for_layer(self, name: str) -> Ranks | None:
        """Return the ranks for a layer, or None if it is to stay dense."""
        for pattern, ranks in self.patterns:
            if fnmatchcase(name, pattern):
                return ranks
        return self.default

    def for_model(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Ranks]:
        """Return the ranks of every layer that is to take the Tucker format.

        Parameters
        ----------
        shapes : mapping of str to tuple of int
            Names and weight shapes of the layers that can take it.

        Raises
        ------
        OptionError
            If a pattern matches no layer, ranks do not fit a layer's shape, or nothing
            would be left to factorise.
        """
        for pattern, _ in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in shapes):
                known = ", ".join(shapes)
                raise OptionError("--ranks", repr(pattern), f"a pattern for one of: {known}")
        plan = {name: ranks for name in shapes if (ranks := self.for_layer(name)) is not None}
        if not plan:
            raise OptionError("--ranks", "no layer to factorise", f"one of: {', '.join(shapes)}")
        for name, ranks in plan.items():
            if isinstance(ranks, tuple) and len(ranks) != len(shapes[name]):
                raise OptionError(
                    "--ranks",
                    ",".join(str(rank) for rank in ranks),
                    f"{len(shapes[name])} ranks for layer {name} of shape {shapes[name]}",
                )
        return plan


def parse_ranks(items: Iterable[str], default: Ranks | None) -> RankPlan:
    """Read the values of ``--ranks``.

    Parameters
    ----------
    items : iterable of str
        The option's values, each of which may hold several parts separated by ``;``.
    default : int, float, tuple of int or None
        For all layers if there is no item at all. Items that are all of the form
        ``pattern=ranks`` leave the layers that they do not name dense.

    Raises
    ------
    OptionError
        If a part cannot be read or two parts give ranks for all layers.

    Examples
    --------
    >>> parse_ranks(["conv2=8,8,5,5;fc1=9"], default=None).for_layer("conv2")
    (8, 8, 5, 5)
    >>> parse_ranks(["0.1"], default=None).for_layer("fc1")
    0.1
    """
    parts = [part.strip() for item in items for part in item.split(";") if part.strip()]
    if not parts:
        return RankPlan(default)
    patterns: list[tuple[str, Ranks | None]] = []
    common: list[Ranks | None] = []
    for part in parts:
        pattern, equals, value = part.rpartition("=")
        if equals and not pattern.strip():
            raise OptionError("--ranks", repr(part), _EXPECTED)
        if equals:
            patterns.append((pattern.strip(), _parse_value(value.strip(), part)))
        else:
            common.append(_parse_value(part, part))
    if len(common) > 1:
        raise OptionError("--ranks", " and ".join(map(repr, parts)), "one value for all layers")
    return RankPlan(common[0] if common else None, tuple(patterns))


def parse_budget(text: str) -> int | float:
    """Read the value of ``--budget``: ``3%``, a fraction in (0, 1], or a number of parameters.

    Raises
    ------
    OptionError
        If it is none of these.

    Examples
    --------
    >>> parse_budget("3%"), parse_budget("0.03"), parse_budget("20000")
    (0.03, 0.03, 20000)
    """
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else _number(text)
        Budget(parameters=value)  # checks the ranges
    except (ValueError, RankError):
        expected = "a share of the dense network (3% or 0.03) or a number of parameters (20000)"
        raise OptionError("--budget", repr(text), expected) from None
    return value


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"\d{1,18}", text) else float(text)  # as torch's, of 64 bits


def _parse_value(value: str, part: str) -> Ranks | None:
    """Read a rank, a fraction, a comma-separated tuple, or the word ``dense``."""
    if value == "dense":
        return None
    try:
        ranks: Ranks
        if re.fullmatch(r"\d+", value):
            ranks = int(value)
        elif re.fullmatch(r"\d+(\s*,\s*\d+)+", value):
            ranks = tuple(int(rank) for rank in value.split(","))
        else:
            ranks = float(value)
        Fixed(ranks)  # checks the ranges
    except (ValueError, RankError):
        raise OptionError("--ranks", repr(part), _EXPECTED) from None
    return ranks
