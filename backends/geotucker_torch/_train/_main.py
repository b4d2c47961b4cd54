"""From the command's options to a finished run: which settings, which folder, which files."""

import sys
from collections.abc import Mapping, Set
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from geotucker import GeotuckerError

from .. import TDLRT, Spectra, report, spectra
from ._config import Config
from ._errors import OptionError, ResumeError, RunError
from ._picture import draw
from ._progress import Display
from ._report import print_report
from ._run import CHECKPOINT, CONFIG, METRICS, Run, read_config, start, train
from ._weights import save_weights

__all__ = ["finish", "main"]

_INTERRUPTED = 130  # what shells report for Ctrl-C
# What does not change a run's results may be given anew when it is resumed.
_NEW_ON_RESUME = {"data_dir", "checkpoint_every"}
_NO_SETTINGS = {"resume", "quiet", "out"}


def main(options: Mapping[str, Any], given: Set[str]) -> int:
    """Do what the command line asks for, and return the exit code.

    Parameters
    ----------
    options : mapping of str to Any
        The command's parameters by name.
    given : set of str
        Names of those that were typed, as opposed to defaults.
    """
    console = Console(highlight=False)
    folder: Path | None = None
    try:
        resume = options["resume"] is not None
        config, folder = _resumed(options, given) if resume else _fresh(options)
        run = start(config, folder, resume)
        folder = run.folder
        if not options["quiet"]:
            console.print(Text(f"results go to {folder}"), soft_wrap=True)
        with Display(run, console, options["quiet"]) as display:
            train(run, display)
        measured = _measured(run)
        files = finish(run, measured)
        if not options["quiet"]:
            print_report(run, measured, console, files)
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED, folder)
    except (OptionError, ResumeError) as error:  # to resume would end in the same way
        return _fail(str(error), error.exit_code, None)
    except RunError as error:
        return _fail(str(error), error.exit_code, folder)
    except (GeotuckerError, OSError) as error:  # the system's: a full disk, say
        return _fail(str(error), 1, folder)
    return 0


def finish(run: Run, measured: Spectra) -> list[Path]:
    """Write weights, picture and report of a run whose epochs are done; return all its files."""
    files = []
    for network in run.networks:
        name = "model" if network is run.tucker else network.name
        files.append(run.folder / f"{name}.safetensors")
        save_weights(files[-1], network, run.config, run.data)
    picture, page = run.folder / "picture.png", run.folder / "report.html"
    draw(run, measured, picture)
    report(measured, page, title=f"{run.config.model} on {run.data.name}")
    return [*files, picture, page, *(run.folder / name for name in (METRICS, CONFIG, CHECKPOINT))]


def _measured(run: Run) -> Spectra:
    """Measure the Tucker network, ranks over time too."""
    optimizer = run.tucker.optimizer
    assert isinstance(optimizer, TDLRT)
    return spectra(optimizer)


def _fresh(options: Mapping[str, Any]) -> tuple[Config, Path | None]:
    """Return settings of a new run, and its folder if one is asked for."""
    names = {field.name for field in fields(Config)}
    values = {name: value for name, value in options.items() if name in names}
    config = Config(**{**values, "ranks": tuple(values["ranks"] or ())})
    if options["out"] is None:
        return config, None
    folder = Path(options["out"])
    if folder.exists() and not folder.is_dir():
        raise OptionError("--out", folder, "a folder, but this is a file")
    return config, folder


def _resumed(options: Mapping[str, Any], given: Set[str]) -> tuple[Config, Path]:
    """Return settings and folder of a run to go on with."""
    path = Path(options["resume"])
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise ResumeError(f"--resume: no folder {folder}")
    config = read_config(folder)
    for name in sorted(given - _NEW_ON_RESUME - _NO_SETTINGS):
        value, saved = options[name], getattr(config, name)
        value = tuple(value) if isinstance(value, list) else value
        if value != saved and (name, value) != ("device", "auto"):
            option = f"--{'no-' if name == 'baseline' and not value else ''}{name}"
            raise OptionError(
                option.replace("_", "-"),
                value,
                f"{saved}, as the run in {folder} has it (leave the option out, or start another "
                f"run with --out)",
            )
    if options["out"] is not None and Path(options["out"]).resolve() != folder.resolve():
        raise OptionError("--out", options["out"], f"{folder}, the folder of the run to go on with")
    new = {name: options[name] for name in given & _NEW_ON_RESUME}
    return replace(config, **new), folder


def _fail(message: str, code: int, folder: Path | None) -> int:
    """Print one line, and how to go on if there is something to go on with."""
    print(f"geotucker train: {message}", file=sys.stderr)
    if folder is not None and (folder / CHECKPOINT).exists():
        print(f"the last checkpoint is kept; to go on: --resume {folder}", file=sys.stderr)
    return code
