"""Decompose a tensor of 10 GiB in 2 GiB of address space, and show what it took.

Run from the root of the repository, with the extra ``command`` installed::

    python benchmarks/large_tensor.py

A .npy file of 5120 x 512 x 512 float64 numbers is generated, a tensor of ranks (12, 10, 8) and
noise of a hundredth of its norm. ``geotucker decompose`` runs on it in a process whose address
space is limited, which no memory map of the file would fit into. Time, peak memory, ranks and
errors go to ``benchmarks/results/large_tensor.csv``; the file is deleted. Needs 12 GiB of free
disk and a few minutes.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tables import write

import geotucker as gt
from geotucker.testing import random_point

RANKS, NOISE, GIB = (12, 10, 8), 0.01, 2**30
RESULTS = Path(__file__).parent / "results" / "large_tensor.csv"


def generate(path: Path, shape: tuple[int, ...]) -> None:
    """Write the tensor, some rows at a time."""
    truth = random_point(shape, RANKS)
    # Every entry of the noise has the same variance, and its norm is NOISE of the whole.
    deviation = NOISE * gt.norm(truth) / np.sqrt(float(np.prod(shape)))
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, "w+", np.float64, shape)
    first, *others = truth.factors
    for start in range(0, shape[0], 64):
        piece = gt.to_dense((truth.core, (first[start : start + 64], *others)))
        rows[start : start + 64] = piece + deviation * rng.standard_normal(piece.shape)
    rows.flush()


def limited(command: list[str], limit: int) -> tuple[float, int]:
    """Run a command within so many bytes of address space; return seconds and peak memory."""

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, preexec_fn=restrict)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main(
    rows: Annotated[int, typer.Option(help="Of 512 x 512 numbers, 2 MiB each.")] = 5120,
    address_space: Annotated[float, typer.Option(help="GiB, for the command.")] = 2.0,
    memory: Annotated[str, typer.Option(help="What the command is told.")] = "1G",
    tolerance: Annotated[float, typer.Option(help="Relative error.")] = 0.05,
    folder: Annotated[Path | None, typer.Option(help="Where the tensor is put.")] = None,
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS,
) -> None:
    """Generate, decompose, measure, write the table."""
    shape = (rows, 512, 512)
    size = 8 * rows * 512 * 512
    if shutil.disk_usage(folder or tempfile.gettempdir()).free < 1.2 * size:
        raise SystemExit(f"expected {1.2 * size / GIB:.1f} GiB of free disk")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        data, result = Path(name, "large.npy"), Path(name, "large.tucker.npz")
        generate(data, shape)
        options = ["--tolerance", str(tolerance), "--memory", memory, "--out", str(result)]
        command = [sys.executable, "-m", "geotucker", "decompose", str(data), *options]
        seconds, peak = limited(command, int(address_space * GIB))
        point = gt.load(result)
        # The distance from the tensor without noise, which only its factors are needed for.
        truth = random_point(shape, RANKS)
        distance = gt.norm(gt.add(point, gt.scale(truth, -1.0))) / gt.norm(truth)
        row = {
            "shape": "x".join(map(str, shape)),
            "tensor_gib": f"{size / GIB:.2f}",
            "address_space_gib": address_space,
            "memory_option": memory,
            "peak_resident_gib": f"{peak / GIB:.3f}",
            "seconds": f"{seconds:.0f}",
            "tolerance": tolerance,
            "ranks": "x".join(map(str, point.ranks)),
            "distance_from_truth": f"{distance:.2e}",
            "result_kib": f"{result.stat().st_size / 1024:.0f}",
        }
    write(out, [row])
    typer.echo("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    typer.run(main)
