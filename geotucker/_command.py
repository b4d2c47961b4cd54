"""The commands ``geotucker decompose`` and ``geotucker reconstruct``."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ._errors import GeotuckerError
from ._files import load, replacing, write
from ._ranks import Fixed, ModeRule, Tolerance
from ._streaming import decompose_file, reconstruct_file
from ._tensor import TuckerPoint

__all__ = ["decompose", "reconstruct"]

_ENDING = ".tucker.npz"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_FAILURE = 2

_Memory = Annotated[str, typer.Option(help="What arrays may take, as 500M or 4G (powers of 1024).")]
_Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")]


def decompose(
    data: Annotated[Path, typer.Argument(help="A .npy file of real numbers.")],
    tolerance: Annotated[
        float | None,
        typer.Option(help="Relative error, at most.", show_default=False),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Instead: the rank of each mode, 10,10,5, or of every mode, 10.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help=f"[default: the name of DATA with {_ENDING}]", show_default=False),
    ] = None,
    memory: _Memory = "1G",
    force: _Force = False,
    quiet: _Quiet = False,
) -> None:
    """Decompose a tensor, which may be larger than memory, into Tucker format.

    The file is read piece by piece, a few times over. The result appears when it is complete.
    """
    with _failing():
        rule, limit = _rule(tolerance, ranks), _bytes(memory)
        if data.is_dir():  # which may have no name to derive the result's from
            raise IsADirectoryError(f"{data}: expected the name of a file, got a folder")
        target = out or data.with_name(data.name.removesuffix(".npy") + _ENDING)
        with replacing(target, force) as file:  # what cannot be written fails before the work
            result = decompose_file(data, rule, memory=limit, progress=not quiet)
            write(file, result.point)
    if not quiet:
        typer.echo(_description(result.point))
        typer.echo(f"relative error  {result.error:.3e}")
        typer.echo(f"written         {target}")


def reconstruct(
    data: Annotated[Path, typer.Argument(help=f"A {_ENDING} file.")],
    out: Annotated[
        Path | None,
        typer.Option(help="[default: the name of DATA with .full.npy]", show_default=False),
    ] = None,
    memory: _Memory = "1G",
    force: _Force = False,
    quiet: _Quiet = False,
) -> None:
    """Write the full tensor of a decomposed one, which may be larger than memory."""
    with _failing():
        limit, point = _bytes(memory), load(data)
        target = out or data.with_name(data.name.removesuffix(_ENDING) + ".full.npy")
        reconstruct_file(point, target, memory=limit, overwrite=force, progress=not quiet)
    if not quiet:
        typer.echo(_description(point))
        typer.echo(f"written         {target}")


@contextmanager
def _failing() -> Iterator[None]:
    """Turn errors that the user can mend into one line and an exit code."""
    try:
        yield
    except (GeotuckerError, OSError, MemoryError, ValueError) as error:
        typer.echo(f"geotucker: {error or type(error).__name__}", err=True)
        raise typer.Exit(_FAILURE) from error


def _rule(tolerance: float | None, ranks: str | None) -> ModeRule:
    if (tolerance is None) == (ranks is None):
        raise ValueError("expected either --tolerance or --ranks")
    if ranks is None:
        assert tolerance is not None
        return Tolerance(tolerance)
    try:
        numbers = tuple(int(rank) for rank in ranks.split(","))
    except ValueError:
        raise ValueError(f"--ranks: expected numbers such as 10,10,5, got {ranks!r}") from None
    return Fixed(numbers if "," in ranks else int(ranks))


def _bytes(memory: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", memory.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"--memory: expected a size such as 500M or 4G, got {memory!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _description(point: TuckerPoint) -> str:
    full = math.prod(point.shape)
    return (
        f"shape           {_times(point.shape)}\n"
        f"ranks           {_times(point.ranks)}\n"
        f"compression     {full / point.size:.4g} ({full} entries in {point.size})"
    )


def _times(numbers: tuple[int, ...]) -> str:
    return " x ".join(map(str, numbers))
