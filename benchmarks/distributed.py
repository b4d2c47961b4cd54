"""What data-parallel training costs: Tucker beside dense, time and bytes on the wire.

Run from the root of the repository, on Linux::

    python benchmarks/distributed.py

Gloo on the loopback of one machine, one thread a process, SGD with momentum, 16 images for each
process: three convolutions 3x3 with 256 channels on 8x8 and a linear layer 1024 to 1024, wrapped
in DistributedDataParallel; dense, and in Tucker format with 10 % and 2 % of the dense parameters,
bases moving in every step. ``step_ms`` is the time of the fastest step, ``cpu_ms`` the median of
the first process's own time; ``alone`` says the same of processes that run side by side and
exchange nothing. ``wire_bytes`` is what the loopback counts in a step, of all processes together.

In a ring, P processes send ``2 (P - 1) n`` bytes for n bytes of gradients, each ``1 / P`` of it,
and a message takes ``2 (P - 1)`` rounds: the bytes are checked against the loopback's. m messages
take ``2 (P - 1) (a m + n / (P b))`` at latency a and bandwidth b: rows of the kind "model" say what
that is for more machines, of one process each, on a network of 1 Gbit/s and 50 microseconds, after
a step of one process alone; nothing overlaps. The table is ``benchmarks/results/distributed.csv``.
"""

import os
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from tables import write
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import geotucker as gt
from geotucker_torch import TDLRT, factorize

RESULTS = Path(__file__).parent / "results" / "distributed.csv"
KEPT = {"dense": None, "Tucker, 90 % saved": 0.1, "Tucker, 98 % saved": 0.02}
NETWORK = (50e-6, 125e6)  # seconds, bytes per second
BEYOND = (4, 16, 64)

Row = dict[str, Any]


def build(kept: float | None, channels: int) -> nn.Module:
    """Return the model, dense or in Tucker format."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 4 * channels)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(4 * channels, 10))
    return model if kept is None else factorize(model, gt.Budget(parameters=kept), verbose=False)


def training(
    kept: float | None, channels: int, group: Any
) -> tuple[Callable[[], None], dict[str, int]]:
    """Return a training step of the processes of a group, and what they exchange in it."""
    model = build(kept, channels)
    outer: Any = DistributedDataParallel(model, process_group=group)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    optimizer: Any = sgd
    if kept is not None:
        optimizer = TDLRT(sgd, model, basis_every=1, process_group=group)
    x, y = torch.randn(16, channels, 8, 8), torch.randint(10, (16,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(outer(x), y).backward()
        optimizer.step()

    for _ in range(3):  # in the second one DistributedDataParallel makes its final buckets
        step()
    size = sum(p.numel() for p in model.parameters())
    buckets = len(str(outer._get_ddp_logging_data()["rebuilt_bucket_sizes"]).split(","))
    # Beside the buckets of dense parameters, one message of all Tucker tensors and one that checks.
    messages = buckets if kept is None else buckets + 2
    return step, {"parameters": size, "gradient_bytes": 4 * size, "messages": messages}


def measure(rank: int, world: int, steps: int, channels: int) -> list[Row]:
    """Time all kinds of training on all processes at once; rows are those of the first."""
    apart = [dist.new_group([other]) for other in range(world)][rank]
    rows: list[Row] = []
    for name, kept in KEPT.items():
        together, sizes = training(kept, channels, dist.group.WORLD)
        before = loopback_bytes()
        wall, cpu = timed(together, steps)
        sent = (loopback_bytes() - before) / steps
        wall_alone, cpu_alone = timed(training(kept, channels, apart)[0], steps)
        rows.append(
            {
                "kind": "measured",
                "training": name,
                "processes": world,
                **sizes,
                "wire_bytes": round(sent),
                "wire_model_bytes": 2 * (world - 1) * sizes["gradient_bytes"],
                "step_ms": wall,
                "step_alone_ms": wall_alone,
                "cpu_ms": cpu,
                "cpu_alone_ms": cpu_alone,
            }
        )
    return rows


def timed(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Return the shortest step and the median of its CPU time in ms, all processes at once."""
    walls, cpus = [], []
    for _ in range(steps):
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        walls.append(1e3 * (time.perf_counter() - wall))
        cpus.append(1e3 * (time.process_time() - cpu))
    return min(walls), median(cpus)


def loopback_bytes() -> int:
    """Return how many bytes have gone over the loopback since the machine was started."""
    dist.barrier()
    lines = Path("/proc/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def beyond(row: Row, processes: int) -> Row:
    """Return the row that the model has for more machines, from that of one process."""
    latency, bandwidth = NETWORK
    trips = 2 * (processes - 1)
    volume = trips * row["gradient_bytes"]
    exchange = 1e3 * (latency * trips * row["messages"] + volume / processes / bandwidth)
    return {
        **{key: row[key] for key in ("training", "parameters", "gradient_bytes", "messages")},
        "kind": "model",
        "processes": processes,
        "wire_model_bytes": volume,
        "step_ms": row["step_alone_ms"] + exchange,
        "step_alone_ms": row["step_alone_ms"],
    }


def forked(world: int, steps: int, channels: int) -> list[Row]:
    """Return the rows of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
                )
                rows = measure(rank, world, steps, channels)
                if rank == 0:
                    torch.save(rows, f"{folder}/rows")
                os._exit(0)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise RuntimeError(f"processes ended with {codes}")
        rows: list[Row] = torch.load(f"{folder}/rows")
        return rows


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for world in map(int, options.processes.split(","))
        for row in forked(world, options.steps, options.channels)
    ]
    rows += [
        beyond(row, processes) for processes in BEYOND for row in rows if row["processes"] == 1
    ]
    shown = [
        {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows
    ]
    write(options.out, [{**row, "torch": torch.__version__} for row in shown])


if __name__ == "__main__":
    main()
