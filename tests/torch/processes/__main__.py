"""Run scenarios on processes of their own.

    python -m processes FOLDER WORLD:SCENARIO ...

Processes are forked, so that torch is imported once. What a scenario returns, or the error that it
raises, is left for each process in a file of the folder.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from . import SCENARIOS
from .meeting import STORE, join, keep_store


def work(folder: Path, rank: int, world: int, name: str) -> None:
    """Run a scenario in a process of its own, and leave its result in a file."""
    try:
        if name not in ("late", "killed_with_the_store"):
            join(rank, world)
        result = SCENARIOS[name](folder, rank, world)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, folder / f"{name}.{world}.{rank}")
    os._exit(0)


def main(folder: Path, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    keeper = keep_store(folder)
    for job in jobs:
        STORE["job"] = job
        number, name = job.split(":")
        children = []
        for rank in range(int(number)):
            child = os.fork()
            if child == 0:
                work(folder, rank, int(number), name)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
    os.kill(keeper, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
