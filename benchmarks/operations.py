"""What a training step asks of a device: operations, decompositions, and waits of the host.

Run from the root of the repository, with the extra ``train`` installed; no GPU is needed::

    python benchmarks/operations.py

On a GPU each operation that is no view is a launch of a kernel or of a few, and takes some ten
microseconds however small its arrays are; a wait of the host for a number stops the queue. Both are
properties of the program, so that they are counted here for VGG16 and ResNet18 (CIFAR shapes, a
tenth of the parameters) on the processor: dense, descent on core and factors, and TDLRT in steps
that move the bases, at fixed ranks and by a rule, and in the steps between, as they are on CUDA
devices and with numbers that are not finite told at once. The table goes to
``benchmarks/results/operations.csv``; `gpu.py` measures the same on a device, with times.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from networks import NETWORKS, trainings
from tables import write
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import geotucker as gt
from geotucker import _ops

RESULTS = Path(__file__).parent / "results" / "operations.csv"
FIELDS = ["network", "method", "operations", "decompositions", "waits", "torch"]
NEVER = 10**9
SETTINGS: dict[str, dict[str, Any]] = {
    "TDLRT, moving bases": {"basis_every": 1, "late_check": True},
    "TDLRT, moving bases by a rule": {
        "basis_every": 1,
        "late_check": True,
        "ranks": gt.Tolerance(1e-6),
    },
    "TDLRT between bases": {"basis_every": NEVER, "late_check": True},
    "TDLRT between bases, checked at once": {"basis_every": NEVER, "late_check": False},
}
# Only new ways to look at memory.
_VIEWS = {
    *("view", "_unsafe_view", "view_as", "as_strided", "alias", "detach", "set_", "is_same_size"),
    *("t", "transpose", "permute", "movedim", "expand", "unsqueeze", "squeeze", "_reshape_alias"),
    *("slice", "select", "split", "unbind", "diagonal", "lift_fresh"),
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"),
}
_CONVERGING = {"_linalg_eigh", "linalg_eigh", "_linalg_svd"}
_DECOMPOSITIONS = {"linalg_qr", *_CONVERGING}


class _Counting(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[operation._schema.name.split("::")[1]] += 1
        return operation(*args, **(kwargs or {}))


@contextmanager
def _counted_waits(counts: "Counter[str]") -> Iterator[None]:
    """Count the places where the core of the library asks for numbers."""

    def counted(vectors: Any) -> Any:
        counts["waits"] += bool(vectors)
        return lists(vectors)

    lists = _ops.lists
    with patch.object(_ops, "lists", counted):
        yield


def count(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Return operations, decompositions and waits of one training step."""
    x, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    for _ in range(3):
        step()
    counting = _Counting()
    with counting, _counted_waits(counting.counts):
        step()
    counts = counting.counts
    # eigh and svd ask by themselves whether they have converged.
    waits = counts.pop("waits", 0) + counts["_local_scalar_dense"]
    waits += sum(counts[name] for name in _CONVERGING)
    operations = sum(number for name, number in counts.items() if name not in _VIEWS)
    return operations, sum(counts[name] for name in _DECOMPOSITIONS), waits


def main(out: Annotated[Path, typer.Option(help="The table.")] = RESULTS) -> None:
    """Count, write the table and print it."""
    rows: list[tuple[Any, ...]] = []
    for network, build in NETWORKS.items():
        torch.manual_seed(0)
        for name, (model, optimizer) in trainings(build(), SETTINGS).items():
            rows.append((network, name, *count(model, optimizer), torch.__version__))
            typer.echo("  ".join(map(str, rows[-1])))
    write(out, [dict(zip(FIELDS, row, strict=True)) for row in rows])


if __name__ == "__main__":
    typer.run(main)
