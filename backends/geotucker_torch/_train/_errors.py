"""What can go wrong before and during a run, each with the exit code that it stands for."""

from geotucker import GeotuckerError

__all__ = ["DataError", "DivergedError", "OptionError", "ResumeError", "RunError"]


class RunError(GeotuckerError):
    """Base of the errors that the command shows as one line, without a traceback."""

    exit_code = 1


class OptionError(RunError, ValueError):
    """A command-line option with a value that cannot be used.

    Parameters
    ----------
    option : str
        The option's name as it is typed, for example ``"--lr"``.
    got : object
        The value.
    expected : str
        What is allowed, and what to try next.

    Examples
    --------
    >>> print(OptionError("--lr", -1.0, "a positive number"))
    --lr: got -1.0, expected a positive number
    """

    exit_code = 2

    def __init__(self, option: str, got: object, expected: str) -> None:
        super().__init__(f"{option}: got {got}, expected {expected}")
        self.option = option


class DataError(RunError):
    """A data set that is missing, damaged, or cannot be downloaded."""


class ResumeError(RunError):
    """A run that cannot be continued."""


class DivergedError(RunError, ArithmeticError):
    """A loss, a gradient or a weight became NaN or infinite."""
