"""The commands that decompose and reconstruct files, as a shell sees them."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import geotucker as gt
from geotucker import _cli, _command

TENSOR = gt.to_dense(gt.testing.random_point((12, 14, 16), (3, 4, 5), seed=1))


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that holds the tensor."""
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", TENSOR)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[Any, str, str]:
    """Run a command line; return exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as end:
        _cli.main(line.split())
    streams = capsys.readouterr()
    return end.value.code, streams.out, streams.err


def test_there_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "decompose data.npy --tolerance 0.05 --memory 150K")
    assert code == 0
    point = gt.load("data.tucker.npz")
    assert point.ranks == (3, 4, 5)
    assert "shape           12 x 14 x 16\nranks           3 x 4 x 5\n" in out
    assert f"compression     {2688 / point.size:.4g} (2688 entries in {point.size})" in out
    assert "relative error  " in out
    assert "written         data.tucker.npz" in out
    assert "100%" in err
    assert run(capsys, "reconstruct data.tucker.npz --quiet") == (0, "", "")
    assert np.allclose(np.load("data.full.npy"), TENSOR, atol=1e-13)
    code, out, _ = run(capsys, "reconstruct data.tucker.npz --out again.npy --memory 1.5MiB")
    assert code == 0
    assert "written         again.npy" in out
    assert Path("again.npy").read_bytes() == Path("data.full.npy").read_bytes()


@pytest.mark.parametrize(("ranks", "expected"), [("2,3,4", (2, 3, 4)), ("3", (3, 3, 3))])
def test_ranks(capsys: pytest.CaptureFixture[str], ranks: str, expected: tuple[int, ...]) -> None:
    code, out, _ = run(capsys, f"decompose data.npy --ranks {ranks} --out small")
    point = gt.load("small")
    assert (code, point.ranks) == (0, expected)
    error = np.linalg.norm(gt.to_dense(point) - TENSOR) / np.linalg.norm(TENSOR)
    assert f"relative error  {error:.3e}" in out


def test_existing_files_are_replaced_on_request_only(capsys: pytest.CaptureFixture[str]) -> None:
    Path("data.tucker.npz").write_text("precious")
    code, out, err = run(capsys, "decompose data.npy --ranks 3")
    assert (code, out) == (2, "")
    assert err.startswith("geotucker: data.tucker.npz: exists already")
    assert Path("data.tucker.npz").read_text() == "precious"
    assert run(capsys, "decompose data.npy --ranks 3 --force --quiet") == (0, "", "")
    assert gt.load("data.tucker.npz").ranks == (3, 3, 3)


FAILURES = {
    "decompose data.npy": "expected either --tolerance or --ranks",
    "decompose data.npy --ranks 3 --tolerance 0.1": "expected either --tolerance or --ranks",
    "decompose data.npy --ranks 3,x": "--ranks: expected numbers such as 10,10,5, got '3,x'",
    "decompose data.npy --ranks 3,3": "ranks: expected 3 positive integers",
    "decompose data.npy --ranks 0": "ranks: expected a positive integer",
    "decompose data.npy --tolerance 2": "tau: expected a number in [0, 1), got 2.0",
    "decompose data.npy --ranks 3 --memory much": "--memory: expected a size such as 500M or 4G",
    "decompose data.npy --ranks 3 --memory 1K": "memory: a piece of a tensor",
    "decompose nothing.npy --ranks 3": "No such file or directory: 'nothing.npy'",
    "decompose data.npy --ranks 3 --out no/folder": "no/folder: there is no folder",
    "decompose data.npy --ranks 3 --out . --force": ".: expected the name of a file",
    "decompose complex.npy --ranks 3": "expected real numbers of at most 64 bits, got complex128",
    "decompose nan.npy --ranks 3": "nan.npy: expected finite numbers",
    "decompose damaged.npy --ranks 3": "damaged.npy: expected a .npy file",
    "decompose . --ranks 3": ".: expected the name of a file, got a folder",
    "reconstruct data.npy": "data.npy: expected a Tucker tensor",
    "reconstruct nothing.npz": "No such file or directory: 'nothing.npz'",
}


@pytest.mark.parametrize("line", FAILURES)
def test_failures_are_one_line_and_leave_nothing(
    capsys: pytest.CaptureFixture[str], data: Path, line: str
) -> None:
    np.save("complex.npy", TENSOR + 1j)
    np.save("nan.npy", TENSOR * np.nan)
    Path("damaged.npy").write_bytes(Path("data.npy").read_bytes().replace(b"}", b"\xfe"))
    before = sorted(data.iterdir())
    code, out, err = run(capsys, f"{line} --quiet")
    assert (code, out) == (2, "")
    assert err.startswith("geotucker: ")
    assert FAILURES[line] in err
    assert err.count("\n") == 1
    assert sorted(data.iterdir()) == before


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_result(data: Path, number: int) -> None:
    """The process is ended while it writes, which it is made to do slowly."""
    code = (
        # Who is started in the background of a shell ignores this signal, and so do its children.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, time; from geotucker import _command as c\n"
        "def write(file, point):\n"
        "    file.write(b'half'); file.flush(); print('writing', flush=True); time.sleep(60)\n"
        "c.write = write; from geotucker._cli import main\n"
        "main(['decompose', 'data.npy', '--ranks', '3', '--quiet'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(number)
        assert process.wait(30) != 0
    left = {path.name for path in data.iterdir()} - {"data.npy"}
    assert "data.tucker.npz" not in left
    if number == signal.SIGINT:
        assert left == set()


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "decompose --help")
    assert code == 0
    for option in ("--tolerance", "--ranks", "--out", "--memory", "--force", "--quiet"):
        assert option in out


def test_sizes() -> None:
    got = [_command._bytes(text) for text in ("12", "1K", "1.5M", "2GiB", "1tb", " 3 ".strip())]
    assert got == [12, 1024, 3 * 2**19, 2**31, 2**40, 3]
