"""A run that is killed at any moment and resumed ends bit by bit like an unbroken one.

The file is also a program: it forks a child per attempt, because a fork starts in no time
where a fresh process imports torch for seconds. The children are ended by SIGKILL, which no
handler sees and after which nothing is tidied up.
"""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.xdist_group("resumed runs"),  # one worker makes them, once
]

SETTINGS: dict[str, list[str]] = {
    # one checkpoint per epoch, the published algorithm
    "sgd": ["--tolerance", "0.3", "--ranks", "32", "--optimizer", "sgd"],
    # checkpoints between truncations, moments that are lifted and rotated
    "adam": [
        *("--tolerance", "0.3", "--ranks", "0.3", "--optimizer", "adam"),
        *("--basis-every", "3", "--checkpoint-every", "2"),
    ],
}
COMMON = ["--model", "convnet", "--batch-size", "100", "--epochs", "2", "--threads", "1", "--quiet"]


DATA: list[Any] = []  # few images, loaded once before the forks


def few_digits() -> Any:
    """Return four batches of digits and a small test set."""
    from geotucker_torch._train._data import load

    data = load("digits", None)
    cut = {"train_images": 400, "train_labels": 400, "test_images": 100, "test_labels": 100}
    return replace(data, **{name: getattr(data, name)[:size] for name, size in cut.items()})


def with_dropout(build: Callable[..., Any]) -> Callable[..., Any]:
    """Return a builder of a network that draws random numbers at every step."""
    from torch import nn

    def builder(*shape: int) -> nn.Module:
        layers = dict(build(*shape).named_children())
        return nn.Sequential(OrderedDict(dropout=nn.Dropout(0.2), **layers))

    return builder


def train(arguments: list[str]) -> int:
    """Run the command in this process and return its exit code."""
    import typer
    from typer.testing import CliRunner

    from geotucker_torch._train.command import train as command

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    sys.stderr.write(result.output)
    return int(result.exit_code)


def in_child(action: Callable[[], int], seconds: float | None = None) -> bool:
    """Run an action in a child, killed after some seconds; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        os._exit(action())
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def kill_at(moment: int) -> None:
    """Arm this process: it dies at the given one of the moments at which a file is written."""
    count = 0

    def passed() -> None:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    class HalfWritten:
        """A file that passes a moment when half of the data is on the disk."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "HalfWritten":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            passed()
            self.file.write(data[len(data) // 2 :])

    def replace(source: Path, target: Path) -> None:
        passed()
        os_replace(source, target)
        passed()

    def path_open(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        file = open_path(path, mode, *arguments, **named)
        return HalfWritten(file) if mode == "wb" else file

    os_replace, open_path = os.replace, Path.open
    Path.open = path_open  # type: ignore[method-assign,assignment]
    os.replace = replace  # type: ignore[assignment]


def attempt(folder: Path, settings: str, moment: int = 0) -> int:
    """Start the run, or go on with it, and die at a moment of writing if one is given."""
    from geotucker_torch._files import write_atomically
    from geotucker_torch._train import _main, _models, _run

    _main.draw = lambda *_: None  # pictures take longer than the training
    _main.report = lambda _, path, **__: write_atomically(path, b"a page")
    _run.load = lambda *_: DATA[0]
    _models.MODELS["convnet"] = (with_dropout(_models.MODELS["convnet"][0]), 2)
    if moment:
        kill_at(moment)
    if (folder / "config.json").exists():
        return train(["--resume", str(folder), "--quiet"])
    return train([*COMMON, *SETTINGS[settings], "--out", str(folder)])


def compare(root: Path, settings: str, seed: int) -> None:
    """Make three runs of the same settings: unbroken, killed while writing, killed at random."""
    began = time.monotonic()
    assert in_child(lambda: attempt(root / "unbroken", settings))
    duration = time.monotonic() - began
    moment, kills = 1, 0
    while not in_child(lambda: attempt(root / "writing", settings, moment)):
        # Small steps first, which die in the first files again and again, then larger ones.
        moment += 1 if moment < 8 else 7
        kills += 1
    print(f"{settings}: killed {kills} times while writing")
    assert kills >= 8
    draw = random.Random(seed)
    for _ in range(4):
        in_child(lambda: attempt(root / "random", settings), draw.uniform(0, duration))
    assert in_child(lambda: attempt(root / "random", settings))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics without the timings."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make all runs in a process of their own, and return the folder that they are in."""
    root = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-W", "ignore", __file__, str(root)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.mark.parametrize("broken", ["writing", "random"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_killed_and_resumed_runs_end_bit_identical(settings: str, broken: str, runs: Path) -> None:
    unbroken, resumed = runs / settings / "unbroken", runs / settings / broken
    for name in ("model.safetensors", "dense.safetensors"):
        assert (resumed / name).read_bytes() == (unbroken / name).read_bytes()
    assert len(metrics(unbroken)) == 4
    assert metrics(resumed) == metrics(unbroken)
    assert sorted(entry.name for entry in resumed.iterdir()) == sorted(
        entry.name for entry in unbroken.iterdir()
    )


if __name__ == "__main__":
    # What a child needs and has not imported yet, each would import anew; torch._dynamo comes
    # with the first optimizer.
    for module in ("sklearn.datasets", "torch._dynamo", "typer.testing"):
        importlib.import_module(module)
    importlib.import_module("geotucker_torch._train._main")
    assert train(["--epochs", "ten"]) == 2  # typer imports more to read what it is given
    DATA.append(few_digits())
    for number, key in enumerate(SETTINGS):
        compare(Path(sys.argv[1]) / key, key, seed=number)
