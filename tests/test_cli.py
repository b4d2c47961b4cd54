"""The command ``geotucker``: sub-commands come from entry points, missing extras are named."""

import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

import geotucker
from geotucker import _cli


def command(size: int = 3) -> None:
    """Print a number."""
    print(f"size {size}")


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declare one sub-command that works and one whose extra is missing."""
    works = EntryPoint("works", f"{__name__}:command", _cli.GROUP)
    lacks = EntryPoint("lacks", "a_package_that_nobody_has:command", _cli.GROUP)
    monkeypatch.setattr(_cli, "entry_points", lambda group: [works, lacks])


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    """Run the command line; return exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as end:
        _cli.main(arguments)
    streams = capsys.readouterr()
    return end.value.code, streams.out, streams.err


@pytest.mark.usefixtures("declared")
def test_runs_a_declared_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "works", "--size", "5") == (0, "size 5\n", "")


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_shows_help_with_all_commands(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "Print a number." in out
    assert "lacks" in out


@pytest.mark.usefixtures("declared")
def test_missing_extra_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "lacks", "--anything", "else")
    assert code == 2
    assert out == ""
    assert err == (
        "geotucker: lacks needs a_package_that_nobody_has: pip install 'geotucker[lacks]'\n"
    )


@pytest.mark.usefixtures("declared")
def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "nonsense")
    assert code == 2
    assert "nonsense" in err


@pytest.mark.usefixtures("declared")
def test_an_interrupted_import_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: EntryPoint) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EntryPoint, "load", interrupted)
    assert run(capsys, "works") == (130, "", "geotucker: interrupted\n")


def test_missing_typer_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    code, out, err = run(capsys, "train")
    assert (code, out) == (2, "")
    assert err == "geotucker: the command line needs typer: pip install 'geotucker[command]'\n"


def test_version_needs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    assert run(capsys, "--version") == (0, f"geotucker {geotucker.__version__}\n", "")
