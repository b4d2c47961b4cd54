"""How processes meet: at a store that a process of its own keeps, as under torchrun."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed as dist

Scenario: TypeAlias = Callable[[Path, int, int], Any]  # with its number and that of all of them

TIMEOUT = timedelta(seconds=20)
STORE: dict[str, Any] = {}  # where processes meet: the port, and a name for each job


def join(rank: int, world: int) -> None:
    """Meet the others, as under torchrun, at a store that another process keeps."""
    store = dist.TCPStore("127.0.0.1", STORE["port"], timeout=TIMEOUT)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(STORE["job"], store),
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )


def keep_store(folder: Path) -> int:
    """Keep the store at which others meet, in a process of its own; return its id.

    A store has threads, and who has threads cannot fork others that are sure to run.
    """
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        store = publish_store(folder / "port of all")
        while store and os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)
    STORE["port"] = read_port(folder / "port of all")
    return child


def publish_store(path: Path) -> dist.TCPStore:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    path.with_suffix(".part").write_text(str(store.port))
    path.with_suffix(".part").rename(path)
    return store


def read_port(path: Path) -> int:
    while not path.exists():
        time.sleep(0.01)
    return int(path.read_text())
