"""Does a badly conditioned start harm? LeNet-5 on MNIST from two starts, by several methods.

Run from the root of the repository, with the extra ``train`` installed::

    python benchmarks/stability.py --jobs 2

Every layer has rank 20 (or as much as its shape allows), and keeps it. The ordinary start is
PyTorch's, truncated; in the decaying one the j-th singular value of every unfolding is about
``2^-j`` of the first (of a convolution's roughly), at the same norm, and in the steep one
``10^-j``. All methods start from the same function. Plain SGD with rate 0.01 and batches of 128,
for 20 epochs, as in Figure 2 of the paper (Zangrando et al., NeurIPS 2024). Written to
``benchmarks/results/stability.csv``, which is filled run by run: a run that is in it is not done
again. MNIST is downloaded, or read from the folder that ``GEOTUCKER_DATA_DIR`` names. A run takes
six to eight minutes of one core.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from decompositions import matrix, with_products
from networks import convert
from runs import by_run, fill
from torch import nn
from training import Epoch, Recipe, lenet5, row, train

from geotucker_torch import TDLRT, TuckerModule, densify
from geotucker_torch._train._data import DataSet, load
from geotucker_torch._train._fetch import data_folder

RANK = 20
# What each singular value of an unfolding is of the one before.
STARTS = {"ordinary": None, "decaying": 0.5, "steep": 0.1}
RESULTS = Path(__file__).parent / "results" / "stability.csv"


class Run(NamedTuple):
    """One run, as the first columns of the table name it."""

    start: str
    method: str
    seed: int
    epochs: int


@torch.no_grad()
def network(start: str, seed: int) -> nn.Sequential:
    """Return LeNet-5 with all layers in Tucker format, at one of the starts."""
    torch.manual_seed(seed)
    model = convert(lenet5(), RANK)
    ratio = STARTS[start]
    if ratio is not None:
        for layer in model:
            if isinstance(layer, TuckerModule):
                decay(layer.core, ratio)
    return model


def decay(core: nn.Parameter, ratio: float) -> None:
    """Let the singular values of every unfolding fall by about this ratio, at the same norm.

    The core of a matrix is diagonal, so its two modes have a half each.
    """
    norm, base = core.norm(), ratio if core.dim() > 2 else ratio**0.5
    for mode, rank in enumerate(core.shape):
        shape = [rank if i == mode else 1 for i in range(core.dim())]
        core.mul_(base ** torch.arange(rank).reshape(shape))
    core.mul_(norm / core.norm())


def dense(model: nn.Module, data: DataSet, recipe: Recipe) -> Iterator[Epoch]:
    """Descend on the weights that the Tucker layers stand for."""
    model = densify(model).to(memory_format=torch.channels_last)
    return train(model, recipe.sgd(model), data, recipe)


def plain(model: nn.Module, data: DataSet, recipe: Recipe) -> Iterator[Epoch]:
    """Descend on cores and factors as on any parameters."""
    return train(model.requires_grad_(True), recipe.sgd(model), data, recipe)


def matrices(model: nn.Module, data: DataSet, recipe: Recipe) -> Iterator[Epoch]:
    """Descend on U and V of every weight as a matrix of rank 20, ``U V^T``."""
    model = densify(model)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    products = {m: matrix(m, min(RANK, *m.weight.flatten(1).shape)) for m in layers}
    model = with_products(model, products).to(memory_format=torch.channels_last)
    return train(model, recipe.sgd(model), data, recipe)


def tdlrt(model: nn.Module, data: DataSet, recipe: Recipe, **options: Any) -> Iterator[Epoch]:
    """Train by geotucker's optimizer, with its defaults but for the options."""
    optimizer = TDLRT(recipe.sgd(model), model, **options)
    return train(model, optimizer, data, recipe, by_closure="one_pass" in options)


METHODS: dict[str, Callable[[nn.Module, DataSet, Recipe], Iterator[Epoch]]] = {
    "dense": dense,
    "TDLRT": tdlrt,
    "TDLRT, rate_power 1/4": partial(tdlrt, rate_power=0.25),
    "Tucker, plain descent": plain,
    "UV^T, plain descent": matrices,
    "TDLRT, whole gradient": partial(tdlrt, integrator="tdlrt", basis_every=1),
    "TDLRT, two passes": partial(tdlrt, one_pass=False, integrator="tdlrt", basis_every=1),
}


def work(run: Run) -> Iterator[dict[str, str | int]]:
    """Train one network and return its epochs."""
    data = load("mnist", data_folder(None))
    recipe = Recipe(run.epochs, 0.01, cosine=False, seed=run.seed)
    return map(row, METHODS[run.method](network(run.start, run.seed), data, recipe))


def main(
    jobs: Annotated[int, typer.Option(help="Runs side by side, one thread each.")] = 2,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 5,
    epochs: Annotated[int, typer.Option(help="Epochs of each run.")] = 20,
    methods: Annotated[str, typer.Option(help="Their names, between semicolons.")] = "",
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS,
) -> None:
    """Train what the table does not hold yet, and say where each method ended."""
    chosen = methods.split(";") if methods else METHODS
    runs = [
        Run(start, method, seed, epochs)
        for seed, method, start in product(range(seeds), chosen, STARTS)
    ]
    found = by_run(fill(out, runs, work, jobs), runs)
    for method, start in product(chosen, STARTS):
        ends = [
            float(rows[-1]["test_accuracy"])
            for run, rows in found.items()
            if (run.method, run.start) == (method, start)
        ]
        typer.echo(f"{method}, {start}: {mean(ends):.2f} % ({min(ends):.2f} to {max(ends):.2f})")


if __name__ == "__main__":
    typer.run(main)
