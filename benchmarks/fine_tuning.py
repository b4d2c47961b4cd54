"""Compressing what is trained: published ResNets, made smaller while they are fine-tuned.

Run from the root of the repository, with the extra ``train`` installed::

    python benchmarks/fine_tuning.py --jobs 2

ResNet20 or ResNet32 with weights from elsewhere (see `networks.pretrained`) are trained on, by one
recipe for all methods: SGD with momentum, cosine decay, the same images in the same order. The
dense network is the reference. Data and weights are downloaded, or read from the folder that
``GEOTUCKER_DATA_DIR`` names. If CIFAR-10 is there as its JPEG copy, the table says so: the weights
were trained on lossless images, and lose ten points on the copy before they are trained on it.

Methods are those of `methods.METHODS` and the ones below; names are separated by ";". The table is
``benchmarks/results/fine_tuning.csv``: a row for each epoch, none lost if the script is stopped.
Trials on a few images (``--images 5000``) have rows of their own.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from methods import METHODS, Method, cut, tdlrt
from networks import pretrained
from runs import by_run, fill
from torch import nn
from training import Epoch, Recipe, accuracy, row, size, train

from geotucker_torch._train._data import DataSet, load
from geotucker_torch._train._fetch import data_folder

RESULTS = Path(__file__).parent / "results" / "fine_tuning.csv"
BUDGETS = (0.5, 0.25, 0.1, 0.05)
# In trials of 126 steps on 8,000 images, at 5 %, TDLRT gained up to a rate of 0.1, and descent on
# core and factors lost beyond 0.03; the dense network did better with 0.01 than with 0.05.
EPOCHS, RATE, IMAGES = 3, 0.03, 50_000
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation, of 1 for white


class Run(NamedTuple):
    """What a run is known by in the table."""

    network: str
    method: str
    kept: float
    images: int
    epochs: int
    rate: float
    seed: int


def untouched(model: nn.Module, kept: float, data: DataSet, recipe: Recipe) -> Iterator[Epoch]:
    """Look at the dense network as it came."""
    yield Epoch(0, size(model), math.nan, accuracy(model, data), 0.0)


def truncated(model: nn.Module, kept: float, data: DataSet, recipe: Recipe) -> Iterator[Epoch]:
    """Truncate to the budget, and train nothing."""
    return untouched(cut(model, kept, rescale=False), kept, data, recipe)


def descent(model: nn.Module, kept: float, data: DataSet, recipe: Recipe) -> Iterator[Epoch]:
    """Truncate to the budget, and descend on core and factors."""
    model = cut(model, kept, rescale=False).requires_grad_(True)
    return train(model, recipe.sgd(model), data, recipe)


WHOLE: Mapping[str, Method] = {"as it came": untouched, "dense": METHODS["dense"]}
SMALL: Mapping[str, Method] = {
    "HOSVD, not trained": truncated,
    "HOSVD, fine-tuned": descent,
    # A network that works has something to lose: it begins at the size that it has.
    "TDLRT": partial(tdlrt, start=1.0),
    "TDLRT, truncated at once": partial(tdlrt, start=0.0),
}
ALL: Mapping[str, Method] = {**METHODS, **WHOLE, **SMALL}
DEFAULT = [*WHOLE, *SMALL, *(name for name in METHODS if name.endswith("pruning"))]


def work(run: Run) -> Iterator[dict[str, Any]]:
    """Fine-tune a network; each epoch is a row, with the name of the data."""
    torch.manual_seed(run.seed)
    data = _some(images(), run.images)
    model = pretrained(run.network, data_folder(None)).to(memory_format=torch.channels_last)
    recipe = Recipe(run.epochs, run.rate, momentum=0.9, decay=1e-4, seed=run.seed)
    for epoch in ALL[run.method](model, run.kept, data, recipe):
        yield {"data": data.name, **row(epoch)}


@cache
def images() -> DataSet:
    """Return CIFAR-10, normalised as the networks expect it."""
    mean, deviation = (tuple(255.0 * number for number in numbers) for numbers in IMAGENET)
    return replace(load("cifar10", data_folder(None)), mean=mean, deviation=deviation)


def _some(data: DataSet, number: int) -> DataSet:
    """Return the data with so many training images, the same in all runs."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:number]
    return replace(
        data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen]
    )


def main(
    networks: Annotated[str, typer.Option(help='"resnet20", "resnet32" or both.')] = "resnet20",
    methods: Annotated[str, typer.Option(help='Names, separated by ";".')] = ";".join(DEFAULT),
    budgets: Annotated[str, typer.Option(help="Shares of the parameters to keep.")] = ";".join(
        map(str, BUDGETS)
    ),
    epochs: Annotated[int, typer.Option(help="Of fine-tuning.")] = EPOCHS,
    rate: Annotated[float, typer.Option(help="Learning rate at the start.")] = RATE,
    images: Annotated[int, typer.Option(help="Of the training set; fewer for trials.")] = IMAGES,
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 1,
    jobs: Annotated[int, typer.Option(help="Runs side by side, one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS,
) -> None:
    """Do the runs that the table does not hold yet, and say where each ended."""
    for method in methods.split(";"):
        if method not in ALL:
            raise typer.BadParameter(f"got {method!r}, expected some of {'; '.join(ALL)}")
    todo = [
        Run(network, method, kept, images, epochs, rate, seed)
        for seed in range(seeds)
        for network in networks.split(";")
        for method in methods.split(";")
        for kept in ([1.0] if method in WHOLE else map(float, budgets.split(";")))
    ]
    for *_, found in by_run(fill(out, todo, work, jobs), todo).values():
        typer.echo(
            f"{found['network']}, {found['method']}, {found['kept']}: {found['test_accuracy']} %, "
            f"{int(found['parameters']):,} parameters; {found['data']}"
        )


if __name__ == "__main__":
    typer.run(main)
