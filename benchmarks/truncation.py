"""What does the truncation of one layer cost the loss, and is that foreseen? LeNet-5 on MNIST.

Run from the root of the repository, with the extra ``train`` installed::

    python benchmarks/truncation.py

The network is trained as in `benchmarks/compression.py`, linear layers as tensors, for three of the
twelve epochs, while its budget comes down. Then each mode of each layer is truncated alone, to each
rank that is left to it, and the loss is taken on training images before and after. Beside it stands
what `geotucker_torch.TDLRT` expects from the gradients that it has seen: ``B / 2 s A`` with the
size B of a batch, the sensitivity s of the layer, and the attenuation A of the truncation, which is
its squared relative error where that is small. `geotucker.Budget` minimises the sum of these.
Written to ``benchmarks/results/truncation.csv``. MNIST is downloaded, or read from the folder that
``GEOTUCKER_DATA_DIR`` names. Two and a half minutes of a core.
"""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from compression import PROBLEMS
from methods import START, budget
from tables import write
from torch import Tensor, nn
from torch.nn import functional as F
from training import batches, train

import geotucker as gt
from geotucker_torch import TDLRT, factorize
from geotucker_torch._train._data import load
from geotucker_torch._train._fetch import data_folder

KEPT, EPOCHS, BATCHES = 0.02, 3, 30
RESULTS = Path(__file__).parent / "results" / "truncation.csv"

Batches = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def mean_loss(model: nn.Module, images: Batches) -> float:
    """Return the loss, over all batches."""
    losses = [F.cross_entropy(model(x), y).item() for x, y in images]
    return sum(losses) / len(losses)


@torch.no_grad()
def truncations(model: nn.Module, optimizer: TDLRT, images: Batches) -> Iterator[dict[str, Any]]:
    """Truncate each mode of each layer to each rank, and put it back; yield what it costs."""
    before = mean_loss(model.eval(), images)
    size, means = len(images[0][1]), optimizer.state_dict()["tdlrt"]["sensitivities"]["means"]
    for name, sensitivity in means.items():
        layer: Any = model.get_submodule(name)
        whole = layer.core.detach().clone()
        point = gt.TuckerPoint(whole, [torch.eye(rank) for rank in whole.shape])
        for mode, values in enumerate(gt.spectrum(point).values):
            for rank in range(len(values) - 1, 0, -1):
                ranks = tuple(rank if i == mode else n for i, n in enumerate(whole.shape))
                (cut,) = gt.truncate([point], lambda spectra, ranks=ranks: [ranks])
                attenuation = -math.log((values[:rank] ** 2).sum() / (values**2).sum())
                layer.core.copy_(gt.to_dense(cut.point))
                yield {
                    "layer": name,
                    "mode": mode,
                    "rank": rank,
                    "of": len(values),
                    "attenuation": f"{attenuation:.6f}",
                    "expected": f"{0.5 * size * sensitivity * attenuation:.6f}",
                    "measured": f"{mean_loss(model, images) - before:.6f}",
                }
        layer.core.copy_(whole)


def main(
    epochs: Annotated[int, typer.Option(help="Of the twelve, to train.")] = EPOCHS,
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS,
) -> None:
    """Train, truncate and write the table."""
    torch.set_num_threads(1)
    problem = PROBLEMS["lenet5"]
    data = load(problem.data, data_folder(None))
    torch.manual_seed(problem.recipe.seed)
    model, rule = problem.build(), budget(KEPT, data, problem.recipe, START)
    model = factorize(model, rule, tensorise=problem.tensorise, verbose=False)
    optimizer = TDLRT(problem.recipe.sgd(model), model, rule)
    for epoch in train(model, optimizer, data, problem.recipe, range(epochs)):
        typer.echo(f"epoch {epoch.epoch}: {epoch.test_accuracy:.2f} %")
    seen = list(islice(batches(data, problem.recipe, epochs), BATCHES))
    write(out, list(truncations(model, optimizer, seen)))


if __name__ == "__main__":
    typer.run(main)
