"""Tables that fill up run by run, and go on from where they were left."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from filelock import FileLock  # which torch depends on
from rich.progress import track
from tables import Row, read, write

R = TypeVar("R", bound=NamedTuple)


def fill(
    path: Path, runs: Sequence[R], work: Callable[[R], Iterable[Mapping[str, Any]]], jobs: int
) -> list[Row]:
    """Do the runs that a table does not hold yet, each in a process with one thread.

    The table is on disk, whole, after every run. Rows of runs that are not asked for stay, and so
    do those that another process adds.

    Parameters
    ----------
    path : Path
        The table, as CSV. Its first columns are the fields of a run.
    runs : sequence of NamedTuple
        In the order in which they start.
    work : callable
        A function of a module, that takes a run and returns its results, one row or several with
        the same columns.
    jobs : int
        Runs side by side.

    Returns
    -------
    list of dict
        All rows of the table, as text.

    Raises
    ------
    ValueError
        If the table has other columns.
    Exception
        What ended a run, after all others are done.
    """
    rows, first = read(path), list(runs[0]._fields)
    if rows and list(rows[0])[: len(first)] != first:
        raise ValueError(
            f"path: expected a table that begins with {', '.join(first)}, got {path} with "
            f"{', '.join(rows[0])}; move it away to begin a new one"
        )
    done = by_run(rows, runs)
    todo = [run for run in runs if run not in done]
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        started = [pool.submit(_rows, work, run) for run in todo]
        for ended in track(as_completed(started), path.stem, len(todo)):
            if ended.exception() is None:
                _add(path, ended.result())
    for ended in started:
        ended.result()  # raises what ended it
    return read(path)


def by_run(rows: Sequence[Row], runs: Sequence[R]) -> dict[R, list[Row]]:
    """Return the rows that each of some runs has in a table, those of one without any left out."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.values())[: len(runs[0])], []).append(row)
    keys = {run: tuple(map(str, run)) for run in runs}
    return {run: found[key] for run, key in keys.items() if key in found}


def _add(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a table, which other processes may fill too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        write(path, [*read(path), *rows])


def _rows(work: Callable[[R], Iterable[Mapping[str, Any]]], run: R) -> list[Row]:
    """Return what a run gives, as text, each row with the run in front."""
    key = run._asdict()
    return [{k: str(v) for k, v in {**key, **row}.items()} for row in work(run)]
