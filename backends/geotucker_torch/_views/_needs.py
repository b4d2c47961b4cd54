"""Packages that only pictures and pages need."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needed_by"]


@contextmanager
def needed_by(function: str) -> Iterator[None]:
    """Say which extra is missing if an import fails within."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{function}: needs the package {error.name}: pip install 'geotucker[report]'"
        ) from error
