"""Where each process of a group is, told as it goes, and asked for when one of them is lost.

A process that is killed says nothing any more, so each says beforehand which phase it enters: in
the store at which the processes have met, where that is a TCPStore. To say so takes some
microseconds, as the store does not answer. It outlives all processes where ``torchrun`` keeps it,
elsewhere all but the first.
"""

import threading
from typing import Any

import torch.distributed as dist

__all__ = ["Whereabouts", "last_heard"]

Group = Any  # torch.distributed.ProcessGroup

# Documented, but missing where torch is built without, and not in its lists of names.
_PREFIXED: Any = getattr(dist, "PrefixStore", ())
_FAST: Any = getattr(dist, "TCPStore", ())

_KEY = "geotucker/phase/{}"  # by rank in the group, which has a prefix of its own
_PATIENCE = 2.0  # seconds; a store whose machine is lost may be silent for minutes
_NAMED = 8  # processes in one phase; of many more the number says enough


class Whereabouts:
    """Tells where this process is.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup

    Attributes
    ----------
    phase : str
        What was told last.
    """

    def __init__(self, group: Group) -> None:
        self.phase = ""
        self._store = _store_of(group)
        self._key = _KEY.format(dist.get_rank(group))

    def tell(self, phase: str, steps: int) -> None:
        """Say that a phase begins, so many steps having been taken; never raises."""
        self.phase = phase
        if self._store is not None:
            try:
                self._store.set(self._key, f"{phase} after step {steps}")
            except RuntimeError:  # whoever kept it is lost, as the next exchange will say
                self._store = None


def last_heard(group: Group) -> str:
    """Return a sentence about where the other processes of a group said that they were."""
    found: dict[int, str] = {}
    # In a thread, since the store may not answer.
    asking = threading.Thread(target=_ask, args=(group, found), daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    phases: dict[str, list[int]] = {}
    for process, phase in sorted(found.copy().items()):
        phases.setdefault(phase, []).append(process)
    if not phases:
        return "Where the others were is not known."
    # A phase that few are in is where to look.
    told = sorted(phases.items(), key=lambda item: len(item[1]))
    return f"Last heard of: {'; '.join(f'{_names(who)} in {phase}' for phase, who in told)}."


def _names(processes: list[int]) -> str:
    if len(processes) > _NAMED:
        return f"{len(processes)} processes"
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, processes))}"


def _ask(group: Group, found: dict[int, str]) -> None:
    store, own = _store_of(group), dist.get_rank(group)
    if store is None:
        return
    try:
        for process in range(dist.get_world_size(group)):
            key = _KEY.format(process)
            if process != own and store.check([key]):
                found[process] = store.get(key).decode()
    except RuntimeError:
        return


def _store_of(group: Group) -> Any:
    """Return the store of a group, None if there is none that takes messages at no cost."""
    try:
        store = group.get_group_store()  # which older versions lack
    except (AttributeError, RuntimeError):
        return None
    kept = store
    while isinstance(kept, _PREFIXED):
        kept = kept.underlying_store
    return store if isinstance(kept, _FAST) else None  # a FileStore keeps every message
