"""Accuracy against compression: TDLRT beside its baselines, by one recipe.

Run from the root of the repository, with the extras ``train`` and ``tltorch`` installed::

    python benchmarks/compression.py --jobs 2

LeNet-5 on MNIST by default; ``--problem`` names others. Every method of `methods` trains the same
network from the same start, sees the same images as often, and keeps the same share of the
parameters, of which all count: biases, bases and what is not factorised. Written to
``benchmarks/results/compression.csv``, which is filled run by run: a run that is in it is not done
again, so that the table can be made in parts (``--methods``, ``--kept``, ``--seeds``). A learning
rate of its own for a method (``--rate``) makes a run of its own. Data are downloaded, or read from
the folder that ``GEOTUCKER_DATA_DIR`` names. A run of LeNet-5 takes about four minutes of a core.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from methods import AS_TENSORS, METHODS, Method
from networks import resnet18, vgg16
from runs import by_run, fill
from torch import nn
from training import Epoch, Recipe, lenet5, row

import geotucker as gt
from geotucker_torch._train._data import load
from geotucker_torch._train._fetch import data_folder
from geotucker_torch._train._models import build

RESULTS = Path(__file__).parent / "results" / "compression.csv"
SHARES = "0.05,0.02,0.01,0.1,0.25,0.5"
DENSE = "dense"


@dataclass(frozen=True)
class Problem:
    """A network, its data, the recipe, and linear layers that may be taken as tensors."""

    data: str
    build: Callable[[], nn.Module]
    recipe: Recipe
    tensorise: dict[str, Any] = field(default_factory=dict)


CIFAR = Recipe(epochs=10, rate=0.05, momentum=0.9, decay=5e-4)
PROBLEMS = {
    "lenet5": Problem(
        "mnist",
        lenet5,
        Recipe(epochs=12, rate=0.05, momentum=0.9),
        {"7": ((20, 25), (50, 16)), "9": ((10,), (20, 25))},  # 800: channels, places
    ),
    "vgg8": Problem(
        "cifar10",
        partial(build, "vgg8", 3, 32, 10),
        CIFAR,
        {"fc1": ((16, 16), (256, 16))},  # 4096: channels, places
    ),
    "resnet20": Problem("cifar10", partial(build, "resnet20", 3, 32, 10), CIFAR),
    "vgg16": Problem("cifar10", vgg16, replace(CIFAR, epochs=100)),  # for a GPU
    "resnet18": Problem("cifar10", resnet18, replace(CIFAR, epochs=100)),  # for a GPU
}


class Run(NamedTuple):
    """One run, as the first columns of the table name it."""

    problem: str
    method: str
    kept: float
    rate: float
    seed: int
    epochs: int


def methods_of(problem: Problem) -> dict[str, Method]:
    """Return the methods that can train a problem's network."""
    tensors = AS_TENSORS if problem.tensorise else {}
    return METHODS | {
        f"{name}, layers as tensors": partial(method, tensorise=problem.tensorise)
        for name, method in tensors.items()
    }


def work(run: Run, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Train one network and return its epochs: one without numbers if the share cannot be met."""
    problem = PROBLEMS[run.problem]
    data = load(problem.data, data_folder(None)).to(torch.device(device))
    recipe = replace(problem.recipe, rate=run.rate, epochs=run.epochs, seed=run.seed)
    torch.manual_seed(run.seed)
    model = problem.build().to(device, memory_format=torch.channels_last)
    try:
        epochs = iter(methods_of(problem)[run.method](model, run.kept, data, recipe))
        first = next(epochs)
    except (ValueError, gt.RankError):  # rank one, or what cannot be pruned, takes more
        nothing = Epoch(run.epochs, 0, math.nan, math.nan, math.nan)
        yield {"data": data.name, **row(nothing)}
        return
    for epoch in chain([first], epochs):
        yield {"data": data.name, **row(epoch)}


def main(
    problem: Annotated[str, typer.Option(help=f"One of {', '.join(PROBLEMS)}.")] = "lenet5",
    methods: Annotated[str, typer.Option(help="Their names, between semicolons.")] = "",
    kept: Annotated[
        str, typer.Option(help="Shares of the parameters.")
    ] = "0.05,0.02,0.01,0.1,0.25,0.5",
    rate: Annotated[float | None, typer.Option(help="Learning rate, if not the problem's.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Epochs, if not the problem's.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side, one thread each.")] = 2,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS,
) -> None:
    """Train what the table does not hold yet, and say where each method ended."""
    chosen = methods.split(";") if methods else methods_of(PROBLEMS[problem])
    recipe = PROBLEMS[problem].recipe
    shares = [float(share) for share in kept.split(",")]
    runs = [
        Run(problem, method, share, rate or recipe.rate, seed, epochs or recipe.epochs)
        for seed, share, method in product(range(seeds), shares, chosen)
    ]
    dense = [run._replace(kept=1.0) for run in runs if run.method == DENSE]
    runs = list(dict.fromkeys(dense + [run for run in runs if run.method != DENSE]))
    rows = fill(out, runs, partial(work, device=device), jobs)
    for *_, end in by_run(rows, runs).values():
        typer.echo("{method}, {parameters} parameters, {test_accuracy} %".format(**end))


if __name__ == "__main__":
    typer.run(main)
