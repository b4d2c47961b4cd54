"""What data-parallel training costs: Tucker beside dense, time and bytes on the wire.

Run from the root of the repository, on Linux::

    python benchmarks/distributed.py

Gloo on the loopback of one machine, one thread a process, SGD with momentum, 16 images for each
process: three convolutions 3x3 with 256 channels on 8x8 and a linear layer 1024 to 1024, wrapped
in DistributedDataParallel; dense, and in Tucker format with 25, 10, 5 and 2 % of the dense
parameters, bases moving in every step. All kinds of training take a step in turns, so that what
slows the machine slows all of them. ``step_ms`` is the median, ``fastest_ms`` the minimum, and
``cpu_ms`` the median of the first process's own time. ``wire_bytes`` is what the loopback counts
in a step, of all processes together, the median of a few.

*Bytes.* In a ring, P processes send ``2 (P - 1) n`` bytes for n bytes of gradients
(``wire_model_bytes``), each ``1 / P`` of it.

*Time.* ``model_ms`` is what `predicted` says: computation, and an exchange that does not overlap
with it. The computation is the median of the same training on one process; latency and bandwidth
are those that a small and a large average have on the same loopback, among as many processes and
in the same turns. ``ratio`` is ``step_ms / model_ms``: how far the model may be trusted. Rows of
the kind "model" say what it has for more machines, of one process each, on a network of 1 Gbit/s
and 50 microseconds. The table is ``benchmarks/results/distributed.csv``.
"""

import os
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tables import write
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import geotucker as gt
from geotucker_torch import TDLRT, factorize

RESULTS = Path(__file__).parent / "results" / "distributed.csv"
KEPT = {"dense": None} | {f"Tucker, {100 - p} % saved": p / 100 for p in (25, 10, 5, 2)}
BEYOND = (4, 16, 64)
SMALL, LARGE = 16, 2**24  # bytes of the averages that latency and bandwidth are taken from
COUNTED = 5  # steps whose bytes are counted

Row = dict[str, Any]


class Network(NamedTuple):
    """What a ring runs on."""

    latency: float  # seconds a round
    bandwidth: float  # bytes a second, of each process


GIGABIT = Network(50e-6, 125e6)


def exchange(processes: int, messages: int, size: int, network: Network) -> float:
    """Return the seconds that a ring takes for messages of so many bytes together.

    Each takes ``2 (P - 1)`` rounds, in which every process sends ``1 / P`` of it.
    """
    rounds = 2 * (processes - 1)
    return rounds * (messages * network.latency + size / processes / network.bandwidth)


def predicted(
    computation: float, processes: int, messages: int, size: int, network: Network, cores: float
) -> float:
    """Return the seconds of a step, of which one process computes so many where it is alone.

    Processes share the cores of the machine, and nothing is exchanged while they compute.
    """
    crowd = max(1.0, processes / cores)
    return crowd * computation + exchange(processes, messages, size, network)


def fitted(processes: int, small: float, large: float) -> Network:
    """Return the network on which averages of `SMALL` and `LARGE` bytes take so many seconds."""
    if processes == 1:
        return Network(0.0, float("inf"))
    rounds = 2 * (processes - 1)
    seconds_per_byte = (large - small) / (LARGE - SMALL) * processes / rounds
    return Network(small / rounds - SMALL / processes * seconds_per_byte, 1 / seconds_per_byte)


def build(kept: float | None, channels: int) -> nn.Module:
    """Return the model, dense or in Tucker format."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 4 * channels)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(4 * channels, 10))
    return model if kept is None else factorize(model, gt.Budget(parameters=kept), verbose=False)


def training(kept: float | None, channels: int) -> tuple[Callable[[], None], dict[str, int]]:
    """Return a training step, and what processes exchange in it."""
    model = build(kept, channels)
    outer: Any = DistributedDataParallel(model)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    optimizer: Any = sgd if kept is None else TDLRT(sgd, model, basis_every=1)
    x, y = torch.randn(16, channels, 8, 8), torch.randint(0, 10, (16,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(outer(x), y).backward()
        optimizer.step()

    for _ in range(3):  # in the second one DistributedDataParallel makes its final buckets
        step()
    size = sum(p.numel() for p in model.parameters())
    buckets = len(str(outer._get_ddp_logging_data()["rebuilt_bucket_sizes"]).split(","))
    # Beside the buckets of dense parameters, one message of all Tucker tensors, and two that
    # compare bases.
    messages = buckets if kept is None else buckets + 3
    return step, {"parameters": size, "gradient_bytes": 4 * size, "messages": messages}


def measure(world: int, steps: int, channels: int) -> list[Row]:
    """Return a row for each kind of training, timed in turns, on all processes at once."""
    trainings = {name: training(kept, channels) for name, kept in KEPT.items()}
    small, large = torch.zeros(SMALL // 4), torch.zeros(LARGE // 4)
    calls = {name: step for name, (step, _) in trainings.items()}
    times = timed(
        {**calls, "small": lambda: dist.all_reduce(small), "large": lambda: dist.all_reduce(large)},
        steps,
    )
    seconds = {name: median(wall for wall, _ in own) for name, own in times.items()}
    network = fitted(world, seconds["small"], seconds["large"])
    return [
        {
            "kind": "measured",
            "training": name,
            "processes": world,
            "cores": len(os.sched_getaffinity(0)),
            "latency_ms": 1e3 * network.latency,
            "bandwidth": network.bandwidth,
            **sizes,
            "wire_bytes": round(counted(step)),
            "wire_model_bytes": 2 * (world - 1) * sizes["gradient_bytes"],
            "step_ms": 1e3 * seconds[name],
            "fastest_ms": 1e3 * min(wall for wall, _ in times[name]),
            "cpu_ms": 1e3 * median(cpu for _, cpu in times[name]),
        }
        for name, (step, sizes) in trainings.items()
    ]


def timed(
    calls: Mapping[str, Callable[[], Any]], turns: int
) -> dict[str, list[tuple[float, float]]]:
    """Return wall and processor seconds of calls that are made in turns, all processes at once."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def counted(step: Callable[[], None]) -> float:
    """Return how many bytes go over the loopback in a step."""
    found = []
    for _ in range(COUNTED):
        before = loopback_bytes()
        step()
        found.append(loopback_bytes() - before)
    return median(found)


def loopback_bytes() -> int:
    """Return how many bytes have gone over the loopback since the machine was started."""
    dist.barrier()
    lines = Path("/proc/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def compared(row: Row, alone: Row) -> Row:
    """Return a row with what the model has for it, from that of one process."""
    network = Network(1e-3 * row["latency_ms"], row["bandwidth"])
    return {**row, **_model(row, alone, network, row["cores"])}


def beyond(alone: Row, processes: int) -> Row:
    """Return the row that the model has for more machines, from that of one process."""
    sizes = {key: alone[key] for key in ("training", "parameters", "gradient_bytes", "messages")}
    row = {"kind": "model", "processes": processes, **sizes}
    row["wire_model_bytes"] = 2 * (processes - 1) * sizes["gradient_bytes"]
    return {**row, **_model(row, alone, GIGABIT, processes)}


def _model(row: Row, alone: Row, network: Network, cores: float) -> Row:
    processes, messages, size = row["processes"], row["messages"], row["gradient_bytes"]
    computation = 1e-3 * alone["step_ms"]
    model = 1e3 * predicted(computation, processes, messages, size, network, cores)
    of_exchange = 1e3 * exchange(processes, messages, size, network)
    found = {"exchange_model_ms": of_exchange, "model_ms": model}
    return found | ({"ratio": row["step_ms"] / model} if "step_ms" in row else {})


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
                rows = measure(world, steps, channels)
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
    parser.add_argument("--processes", default="2,4", help="besides one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worlds = [1, *map(int, options.processes.split(","))]
    measured = [forked(world, options.steps, options.channels) for world in worlds]
    rows = [compared(*pair) for own in measured for pair in zip(own, measured[0], strict=True)]
    rows += [beyond(alone, processes) for processes in BEYOND for alone in measured[0]]
    shown = [
        {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows
    ]
    write(options.out, [{**row, "torch": torch.__version__} for row in shown])


if __name__ == "__main__":
    main()
