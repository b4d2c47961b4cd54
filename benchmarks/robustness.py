"""Does Tucker training work wherever dense training does? A small LeNet on MNIST.

Run from the root of the repository, with the extra ``train`` installed::

    python benchmarks/robustness.py --jobs 2

One epoch with every optimizer at five learning rates over two decades, constant, batch 128; the
weights at PyTorch's start and with singular values that decay exponentially from 1 to 1e-12. Beside
the dense network: all layers in Tucker format, trained by `TDLRT` with its defaults, at fixed ranks
2 and 8 and at full ranks, and from rank 2 with ranks that grow by a tolerance of 0.1 with four
spare directions. What ends ten points behind a dense network that trains is trained anew for five
epochs: is it slow, or does it fail? Where full ranks end two points behind, both are trained from
four more seeds: is it chance? Written to ``benchmarks/results/robustness.csv``, which is
filled run by run: a run that is in it is not done again. MNIST is downloaded, or read from the
folder that ``GEOTUCKER_DATA_DIR`` names. Two hours for a seed on two cores with nothing else to do.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, product
from pathlib import Path
from statistics import mean
from typing import Annotated, NamedTuple

import torch
import typer
from networks import convert
from runs import by_run, fill
from torch import nn
from training import Recipe, train

import geotucker as gt
from geotucker_torch import TDLRT
from geotucker_torch._train._data import load
from geotucker_torch._train._fetch import data_folder

RATES = {
    "SGD": (0.01, 0.03, 0.1, 0.3, 1.0),
    "SGD, momentum 0.9": (0.001, 0.003, 0.01, 0.03, 0.1),
    "Adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "AdamW": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
STARTS = ("PyTorch's", "decaying")
NETWORKS = ("dense", "full ranks", "rank 8", "rank 2, growing", "rank 2")
TRAINS, BEHIND, LONGER = 75.0, 10.0, 5
LOWER, SEEDS = 2.0, 5
RESULTS = Path(__file__).parent / "results" / "robustness.csv"


class Run(NamedTuple):
    """One row of the table before it has its result."""

    optimizer: str
    rate: float
    start: str
    network: str
    seed: int
    epochs: int


def lenet() -> nn.Sequential:
    """Return LeNet-5 in its original size: 61,706 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


@torch.no_grad()
def decay(model: nn.Module) -> None:
    """Give every weight singular values from its largest down to 1e-12 of it."""
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            s = s[0] * torch.logspace(0, -12, len(s))
            layer.weight.copy_(((u * s) @ v).reshape(layer.weight.shape))


def build_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """Return the run's optimizer, wrapped unless the network is dense."""
    parameters = model.parameters()
    inner: torch.optim.Optimizer
    if run.optimizer.startswith("SGD"):
        inner = torch.optim.SGD(parameters, run.rate, 0.9 if "momentum" in run.optimizer else 0.0)
    else:
        inner = getattr(torch.optim, run.optimizer)(parameters, run.rate)
    if run.network == "dense":
        return inner
    return TDLRT(inner, model, gt.Tolerance(0.1, spare=4) if "growing" in run.network else None)


def work(run: Run) -> Iterator[dict[str, str]]:
    """Return the test accuracy in percent after the last epoch; nan if training broke down."""
    torch.manual_seed(run.seed)
    data, model = load("mnist", data_folder(None)), lenet()
    if run.start == "decaying":
        decay(model)
    if run.network != "dense":
        convert(model, {"full ranks": 10_000, "rank 8": 8}.get(run.network, 2))
    recipe = Recipe(epochs=run.epochs, rate=run.rate, cosine=False, seed=run.seed)
    *_, last = train(model, build_optimizer(run, model), data, recipe)
    yield {"test_accuracy": f"{last.test_accuracy:.2f}"}


def main(
    jobs: Annotated[int, typer.Option(help="Runs side by side, one thread each.")] = 2,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 1,
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS,
) -> None:
    """Train what the table does not hold yet, and say where Tucker training failed."""
    pairs = [(name, rate) for name, rates in RATES.items() for rate in rates]
    runs = [
        Run(*pair, start, network, seed, epochs=1)
        for seed, pair, start, network in product(range(seeds), pairs, STARTS, NETWORKS)
    ]
    scores = accuracies(out, runs, jobs)
    trains = [run for run in runs if scores[dense(run)] > TRAINS]
    failed = [run for run in trains if not scores[run] > scores[dense(run)] - BEHIND]
    failed.sort(key=lambda run: NETWORKS.index(run.network))
    longer = [run._replace(epochs=LONGER) for run in failed]
    later = accuracies(out, beside_dense(longer), jobs)
    for run, again in zip(failed, longer, strict=True):
        typer.echo(
            f"{', '.join(map(str, run[:-2]))}: {scores[run]:.2f}, dense {scores[dense(run)]:.2f}; "
            f"after {LONGER} epochs {later[again]:.2f}, dense {later[dense(again)]:.2f}"
        )
    full = [run for run in trains if run.network == "full ranks" and run.seed == 0]
    lower = [run for run in full if not scores[run] > scores[dense(run)] - LOWER]
    more = [[run._replace(seed=seed) for seed in range(1, SEEDS)] for run in lower]
    scores |= accuracies(out, beside_dense(chain(*more)), jobs)
    for run, others in zip(lower, more, strict=True):
        seeds_that_train = [one for one in (run, *others) if scores[dense(one)] > TRAINS]
        gains = [scores[one] - scores[dense(one)] for one in seeds_that_train]
        typer.echo(
            f"{', '.join(map(str, run[:-2]))}: {mean(gains):+.2f} beside a dense network that "
            f"trains ({', '.join(f'{gain:+.2f}' for gain in gains)})"
        )


def dense(run: Run) -> Run:
    """Return the run of the dense network beside one."""
    return run._replace(network="dense")


def beside_dense(runs: Iterable[Run]) -> list[Run]:
    """Return runs and those of the dense network beside them."""
    return [one for run in runs for one in (run, dense(run))]


def accuracies(out: Path, runs: list[Run], jobs: int) -> dict[Run, float]:
    """Return the accuracies of some runs, which are done where the table does not hold them."""
    runs = list(dict.fromkeys(runs))
    found = by_run(fill(out, runs, work, jobs), runs) if runs else {}
    return {run: float(row["test_accuracy"]) for run, (row,) in found.items()}


if __name__ == "__main__":
    typer.run(main)
