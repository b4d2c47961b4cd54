"""The command ``geotucker``: it finds its sub-commands through entry points.

The core knows no binding, so a sub-command is whatever function (or typer application) a
distribution declares in the entry-point group ``geotucker.commands``. Typer is imported when
the command runs, because the library itself does not need it.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Annotated, Any, NoReturn

from ._version import __version__

__all__ = ["main"]

GROUP = "geotucker.commands"
USAGE_ERROR = 2  # the exit code of a command that cannot run as it was called
INTERRUPTED = 130  # what shells report for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows the command's name; by default that of this process.

    Raises
    ------
    SystemExit
        Always: 0 on success, 2 if the call is wrong or a needed package is missing, 130 if it is
        interrupted before the sub-command runs, else what the sub-command says.

    Examples
    --------
    >>> from geotucker._cli import main
    >>> try:
    ...     main(["--version"])
    ... except SystemExit as end:
    ...     print(end.code)
    geotucker ...
    0
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:  # needs no typer
        print(f"geotucker {__version__}")
        raise SystemExit(0)
    found = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    # Loading a sub-command may import a whole array library: load the one that is asked for,
    # and all of them only for the help page, which shows what each one does.
    asked = [point for point in found if arguments and point.name == arguments[0]]
    try:
        app = _application(_import_typer(), asked or found)
    except KeyboardInterrupt:  # imports take seconds
        _fail("interrupted", INTERRUPTED)
    app(arguments or ["--help"], prog_name="geotucker")


def _fail(message: str, code: int = USAGE_ERROR) -> NoReturn:
    print(f"geotucker: {message}", file=sys.stderr)
    raise SystemExit(code)


def _import_typer() -> ModuleType:
    try:
        import typer
    except ModuleNotFoundError as error:
        _fail(f"the command line needs {error.name}: pip install 'geotucker[command]'")
    return typer


def _application(typer: ModuleType, points: Iterable[EntryPoint]) -> Any:
    """Build the typer application that has one sub-command per entry point."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    version_option = typer.Option("--version", help="Show the version and leave.")

    @app.callback()  # type: ignore[untyped-decorator]
    def geotucker(version: Annotated[bool, version_option] = False) -> None:
        """Train networks, decompose and fit tensors in Tucker format."""

    for point in points:
        try:
            command = point.load()
        except ModuleNotFoundError as error:
            _register_missing(app, point, error)
            continue
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=point.name)
        else:
            app.command(point.name)(command)
    return app


def _register_missing(app: Any, point: EntryPoint, error: ModuleNotFoundError) -> None:
    """Register a sub-command that says which package it lacks, and how to install it."""
    package = point.dist.name if point.dist else "geotucker"
    extras = point.dist.metadata.get_all("Provides-Extra", []) if point.dist else [point.name]
    extra = point.name if point.name in extras else "command"
    remedy = f"needs {error.name}: pip install '{package}[{extra}]'"

    def missing() -> None:
        _fail(f"{point.name} {remedy}")

    accept_anything: dict[str, bool] = {"allow_extra_args": True, "ignore_unknown_options": True}
    register: Callable[[Callable[[], None]], Any] = app.command(
        point.name,
        help=f"(not available: {remedy})",
        context_settings=accept_anything,
    )
    register(missing)
