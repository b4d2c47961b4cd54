"""Exceptions: each kind of failure has its own type, and all share one base."""

__all__ = [
    "BackendError",
    "FileFormatError",
    "GeotuckerError",
    "MemoryLimitError",
    "NonFiniteError",
    "RankError",
    "ShapeError",
    "StepSizeError",
]


class GeotuckerError(Exception):
    """Base of every exception that geotucker raises on purpose.

    Examples
    --------
    >>> import geotucker as gt
    >>> try:
    ...     gt.Tolerance(-1.0)
    ... except gt.GeotuckerError as error:
    ...     print(error)
    tau: expected a number in [0, 1), got -1.0
    """


class ShapeError(GeotuckerError, ValueError):
    """Arrays whose shapes do not fit together."""


class RankError(GeotuckerError, ValueError):
    """Ranks, or a rank rule, that cannot be used."""


class NonFiniteError(GeotuckerError, ArithmeticError):
    """NaN or infinity where only finite numbers may go on.

    It is raised before anything is changed, so that the tensor, and with the
    bindings the model and its optimizer, are as they were before the call.
    """


class StepSizeError(GeotuckerError, ArithmeticError):
    """A step size below the rounding of the time, given or adapted to."""


class BackendError(GeotuckerError, TypeError):
    """Arrays of an unknown library, of mixed libraries, or of an unusable dtype."""


class FileFormatError(GeotuckerError, ValueError):
    """A file that does not hold what it should."""


class MemoryLimitError(GeotuckerError, MemoryError):
    """A tensor that cannot be worked on within the memory that was allowed."""
