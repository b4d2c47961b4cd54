"""Compressing what is trained: published ResNets, made smaller while they are fine-tuned.

Run from the root of the repository, with the extra ``train`` installed::

    python benchmarks/fine_tuning.py --trial --jobs 2
    python benchmarks/fine_tuning.py --jobs 2

ResNet20 or ResNet32 with weights from elsewhere (see `networks.pretrained`) are trained on, by one
recipe for all methods: SGD with momentum, cosine decay, the same images in the same order. The
learning rate is that which was best for the method in trials: short runs on few images, judged by
images of the training set that no run trains on. The dense network is the reference. Data and
weights are downloaded, or read from the folder that ``GEOTUCKER_DATA_DIR`` names. If CIFAR-10 is
there as its JPEG copy, the table says so: the weights were trained on lossless images, and lose
ten points on the copy before they are trained on it.

Methods are those of `methods.METHODS` and the ones below; names are separated by ";". The table is
``benchmarks/results/fine_tuning.csv``: a row for each epoch, none lost if the script is stopped.
Trials have rows of their own, and their column `held_out` is not 0.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from methods import METHODS, Method, cut, tdlrt
from networks import pretrained
from runs import by_run, fill
from tables import Row, read
from torch import nn
from training import Epoch, Recipe, accuracy, row, size, train

from geotucker_torch._train._data import DataSet, load
from geotucker_torch._train._fetch import data_folder

RESULTS = Path(__file__).parent / "results" / "fine_tuning.csv"
BUDGETS = (0.5, 0.25, 0.1, 0.05)
HELD_OUT = 5_000  # images of the training set that only trials look at
EPOCHS, IMAGES = 3, 20_000
TRIAL_EPOCHS, TRIAL_IMAGES, TRIAL_BUDGETS, TRIAL_RATES = 2, 8_000, (0.05, 0.25), (0.01, 0.05, 0.2)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation, of 1 for white


class Run(NamedTuple):
    """What a run is known by in the table."""

    network: str
    method: str
    kept: float
    images: int
    held_out: int
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
    "TDLRT, rate_power 1/4": partial(tdlrt, start=1.0, rate_power=1 / 4),
    "TDLRT, rate_power 1/3": partial(tdlrt, start=1.0, rate_power=1 / 3),
    "TDLRT, rate_power 1/2": partial(tdlrt, start=1.0, rate_power=1 / 2),
}
UNTRAINED = ("as it came", "HOSVD, not trained")
ALL: Mapping[str, Method] = {**METHODS, **WHOLE, **SMALL}
DEFAULT = [*WHOLE, *SMALL, *(name for name in METHODS if name.endswith("pruning"))]


def work(run: Run) -> Iterator[dict[str, Any]]:
    """Fine-tune a network; each epoch is a row, with the name of the data."""
    torch.manual_seed(run.seed)
    data = _some(images(), run.images, run.held_out)
    model = pretrained(run.network, data_folder(None)).to(memory_format=torch.channels_last)
    recipe = Recipe(run.epochs, run.rate, momentum=0.9, decay=1e-4, seed=run.seed)
    for epoch in ALL[run.method](model, run.kept, data, recipe):
        yield {"data": data.name, **row(epoch)}


@cache
def images() -> DataSet:
    """Return CIFAR-10, normalised as the networks expect it."""
    mean, deviation = (tuple(255.0 * number for number in numbers) for numbers in IMAGENET)
    return replace(load("cifar10", data_folder(None)), mean=mean, deviation=deviation)


def _some(data: DataSet, number: int, held_out: int) -> DataSet:
    """Return the data with so many training images, and those held out for test if there are any.

    The same in all runs, and none of the last `HELD_OUT` is trained on.
    """
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    chosen, other = order[:-HELD_OUT][:number], order[len(order) - held_out :]
    given, labels = data.train_images, data.train_labels
    if held_out:
        data = replace(data, test_images=given[other], test_labels=labels[other])
    return replace(data, train_images=given[chosen], train_labels=labels[chosen])


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(";") if number)


def best_rate(rows: list[Row], run: Run) -> float:
    """Return the rate that was best for a method in trials, at the nearest share of parameters."""
    trials = [
        row
        for row in rows
        if (row["network"], row["method"]) == (run.network, run.method)
        and row["held_out"] != "0"
        and row["epoch"] == row["epochs"]
        and row["test_accuracy"] != "nan"
    ]
    if not trials:
        raise typer.BadParameter(f"no trials of {run.method!r} in the table: begin with --trial")
    shares = {float(row["kept"]) for row in trials}
    nearest = min(shares, key=lambda share: abs(math.log(share / run.kept)))
    near = [row for row in trials if float(row["kept"]) == nearest]
    return float(max(near, key=lambda row: float(row["test_accuracy"]))["rate"])


def main(
    networks: Annotated[str, typer.Option(help='"resnet20", "resnet32" or both.')] = "resnet20",
    methods: Annotated[str, typer.Option(help='Names, separated by ";".')] = ";".join(DEFAULT),
    budgets: Annotated[str, typer.Option(help="Shares of the parameters to keep.")] = "",
    rates: Annotated[
        str, typer.Option(help="Learning rates at the start; by default what trials say.")
    ] = "",
    trial: Annotated[bool, typer.Option(help="Short runs, judged by held-out images.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Of fine-tuning.")] = None,
    images: Annotated[int | None, typer.Option(help="Of the training set.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 1,
    jobs: Annotated[int, typer.Option(help="Runs side by side, one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS,
) -> None:
    """Do the runs that the table does not hold yet, and say where each ended."""
    for method in methods.split(";"):
        if method not in ALL:
            raise typer.BadParameter(f"got {method!r}, expected some of {'; '.join(ALL)}")
    length = (TRIAL_IMAGES, HELD_OUT, TRIAL_EPOCHS) if trial else (IMAGES, 0, EPOCHS)
    asked = Run("", "", 0.0, images or length[0], length[1], epochs or length[2], 0.0, 0)
    shares = _numbers(budgets) or (TRIAL_BUDGETS if trial else BUDGETS)
    given = _numbers(rates) or (TRIAL_RATES if trial else ())
    found, todo = read(out), []
    for seed, network, method in product(range(seeds), networks.split(";"), methods.split(";")):
        for kept in (1.0,) if method in WHOLE else shares:
            run = asked._replace(network=network, method=method, kept=kept, seed=seed)
            if method not in UNTRAINED:
                own = given or (best_rate(found, run),)
                todo += [run._replace(rate=rate) for rate in own]
            elif not trial:
                todo.append(run)
    for *_, end in by_run(fill(out, todo, work, jobs), todo).values():
        typer.echo(
            f"{end['network']}, {end['method']}, {end['kept']}, rate {end['rate']}: "
            f"{end['test_accuracy']} %, {int(end['parameters']):,} parameters; {end['data']}"
        )


if __name__ == "__main__":
    typer.run(main)
