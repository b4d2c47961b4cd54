"""Time and kernel launches of a training step on a CUDA device, in Tucker format and dense.

Run from the root of the repository, with the extra ``train`` installed, where there is a GPU::

    python benchmarks/gpu.py

VGG16 and ResNet18 (CIFAR shapes, batch 128) with a tenth of the parameters: milliseconds of a step
(median, the device synchronised around it), launches of kernels in it, and peak memory; dense,
descent on core and factors, and TDLRT by its defaults, with the whole gradient, and between bases.
The table goes to ``benchmarks/results/gpu.csv``. Without a CUDA device nothing is measured; this
script has not been run on one yet.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from networks import NETWORKS, trainings
from tables import write
from torch import nn
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
FIELDS = ["network", "method", "ms", "launches", "peak_mib", "device", "torch"]
SETTINGS: dict[str, dict[str, Any]] = {
    "TDLRT, bases in every step": {"basis_every": 1},
    "TDLRT, default": {"basis_every": 2},  # what it is after the first 1000 steps
    "TDLRT, whole gradient": {"integrator": "tdlrt", "basis_every": 1},
    "TDLRT between bases": {"basis_every": 10**9},
}


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a function that takes one step on random images."""
    x = torch.randn(128, 3, 32, 32, device="cuda")
    labels = torch.randint(10, (128,), device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def milliseconds(step: Callable[[], None], repeats: int) -> float:
    """Return the median time of a step, over pairs: every second one may move bases."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began) / 2)
    return statistics.median(times)


def launches(step: Callable[[], None]) -> int:
    """Count the kernels that a step launches, by the mean of two."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step()
        step()
    events = record.key_averages()
    return sum(event.count for event in events if event.key == "cudaLaunchKernel") // 2


def main(
    repeats: Annotated[int, typer.Option(help="Pairs of steps that are timed.")] = 30,
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS,
) -> None:
    """Measure, write the table and print it."""
    if not torch.cuda.is_available():
        typer.echo("no CUDA device here: nothing is measured", err=True)
        raise typer.Exit(1)
    rows = []
    for network, build in NETWORKS.items():
        for name, (model, optimizer) in trainings(build().cuda(), SETTINGS).items():
            step = stepper(model, optimizer)
            for _ in range(3):
                step()
            torch.cuda.reset_peak_memory_stats()
            took, count = milliseconds(step, repeats), launches(step)
            peak = torch.cuda.max_memory_allocated() / 2**20
            device = torch.cuda.get_device_name()
            row = (network, name, round(took, 2), count, round(peak, 1), device, torch.__version__)
            rows.append(row)
            typer.echo("  ".join(map(str, row)))
    write(out, [dict(zip(FIELDS, row, strict=True)) for row in rows])


if __name__ == "__main__":
    typer.run(main)
