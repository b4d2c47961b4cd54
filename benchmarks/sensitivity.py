"""What each setting of TDLRT does to accuracy and size: LeNet-5 on MNIST, one setting at a time.

Run from the root of the repository, with the extra ``train`` installed::

    python benchmarks/sensitivity.py --jobs 2

The settings that do not vary are those of `benchmarks/compression.py`: a budget of 5 % of the
parameters, SGD with rate 0.05 and momentum 0.9, batches of 128, cosine decay; but three epochs.
A tolerance takes the budget's place as the rule, and its ranks begin where the budget's do. Each
optimizer has the rate that is usual for it. Written to ``benchmarks/results/sensitivity.csv``,
which is filled run by run: a run that is in it is not done again. MNIST is downloaded, or read
from the folder that ``GEOTUCKER_DATA_DIR`` names. A run takes about a minute of one core.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from methods import START, budget
from runs import by_run, fill
from training import Recipe, lenet5, row, train

import geotucker as gt
from geotucker_torch import TDLRT, factorize
from geotucker_torch._train._data import load
from geotucker_torch._train._fetch import data_folder

KEPT = 0.05
RECIPE = Recipe(epochs=3, rate=0.05, momentum=0.9)
VALUES: dict[str, tuple[Any, ...]] = {
    "learning rate": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    "tolerance": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    "initial size": (0.05, 0.1, 0.2, 0.4, 0.8),  # share of the dense parameters
    "weight decay": (0.0, 1e-5, 1e-4, 1e-3, 1e-2),
    "basis_every": (1, 2, 5, 10, 20),
    "optimizer": ("SGD", "SGD, momentum", "Adam", "AdamW", "RMSprop"),
    "seed": (0, 1, 2, 3, 4),
}
RATES = {"SGD": 0.2, "SGD, momentum": 0.05, "Adam": 1e-3, "AdamW": 1e-3, "RMSprop": 1e-3}
RESULTS = Path(__file__).parent / "results" / "sensitivity.csv"


class Run(NamedTuple):
    """One run, as the first columns of the table name it."""

    setting: str
    value: Any
    seed: int
    epochs: int


def work(run: Run) -> Iterator[dict[str, Any]]:
    """Train one network and return its epochs."""
    given = {run.setting: run.value}
    name = given.get("optimizer", "SGD, momentum")
    recipe = replace(
        RECIPE,
        epochs=run.epochs,
        rate=given.get("learning rate", RATES[name]),
        decay=given.get("weight decay", 0.0),
        momentum=0.0 if name == "SGD" else RECIPE.momentum,
        seed=given.get("seed", run.seed),
    )
    torch.manual_seed(recipe.seed)
    data, model = load("mnist", data_folder(None)), lenet5()
    schedule = budget(KEPT, data, recipe, given.get("initial size", START))
    rule = gt.Tolerance(given["tolerance"]) if "tolerance" in given else schedule
    model = factorize(model, schedule, verbose=False)
    parameters = model.parameters()
    inner = (
        recipe.sgd(model)
        if name.startswith("SGD")
        else getattr(torch.optim, name)(parameters, recipe.rate, weight_decay=recipe.decay)
    )
    optimizer = TDLRT(inner, model, rule, basis_every=given.get("basis_every"))
    return map(row, train(model, optimizer, data, recipe))


def main(
    jobs: Annotated[int, typer.Option(help="Runs side by side, one thread each.")] = 2,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs of each run.")] = RECIPE.epochs,
    settings: Annotated[str, typer.Option(help="Which, between semicolons.")] = ";".join(VALUES),
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS,
) -> None:
    """Train what the table does not hold yet, and say where each run ended."""
    runs = [
        Run(setting, value, seed, epochs)
        for seed, setting in product(range(seeds), settings.split(";"))
        for value in VALUES[setting]
        if setting != "seed" or seed == 0
    ]
    for *_, end in by_run(fill(out, runs, work, jobs), runs).values():
        typer.echo("{setting} {value}: {parameters} parameters, {test_accuracy} %".format(**end))


if __name__ == "__main__":
    typer.run(main)
