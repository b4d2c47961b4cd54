"""A progress bar for those who want one and have rich; the library itself does not need it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

__all__ = ["Advance", "bar"]

Advance: TypeAlias = Callable[[float, str], None]
"""Called with what has been done since the last call, and a text."""


@contextmanager
def bar(label: str, total: float, shown: bool) -> Iterator[Advance]:
    """Yield a function that moves a progress bar on standard error, or does nothing.

    Raises
    ------
    ImportError
        If the bar is to be shown and rich is not installed.
    """
    if not shown:
        yield lambda amount, text: None
        return
    try:
        from rich.console import Console  # optional: the core needs NumPy and TensorLy only
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError("a progress bar needs the package rich: pip install rich") from error
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda amount, text: progress.update(task, advance=amount, description=text)
