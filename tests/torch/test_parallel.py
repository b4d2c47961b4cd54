"""Many processes train as one does on the joined batch, and fail together."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import geotucker as gt
from geotucker_torch import (
    TDLRT,
    CheckpointError,
    ProcessError,
    _folder,
    _whereabouts,
    distribute,
    factorize,
    load_checkpoint,
)
from geotucker_torch._collectives import exchange, fingerprint, phase
from geotucker_torch._sections import _digest

from .processes import SCENARIOS, checkpoints, faults, trainings

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.xdist_group("processes"),  # one worker starts them, once
]

# Sums are taken in another order, and Adam divides small numbers by small ones.
TOLERANCE = 1e-9

# What is saved is resumed by other numbers of processes, and so comes first.
FIRST = ["4:saved", "1:saved_parts", "2:saved_parts"]
OF_ONE = ["1:resumed parts of 2"]
OF_FOUR = [  # of the trainings those that tell most for their time
    "momentum",
    "adam",
    "whole",
    "accumulation",
    "alone accumulation",
    "seldom accumulation",
    "sharded",
    "two passes alone",
    "budget",
    "growing",
    *(f"killed in {phase}" for phase in faults.PHASES),
    "broken_input",
    "broken_between",
    "broken_part",
    "other_bases",
    "other_truncation",
    "resumed parts of 2",
    "teams",
]
ELSEWHERE = {"saved", "saved_parts", "resumed parts of 2", "teams"}
OF_TWO = [name for name in SCENARIOS if name not in ELSEWHERE]
JOBS = [*FIRST, *OF_ONE, *(f"4:{name}" for name in OF_FOUR), *(f"2:{name}" for name in OF_TWO)]

Results = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run everything that needs several processes, in one program."""
    folder = tmp_path_factory.mktemp("processes")
    path = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    program = [sys.executable, "-W", "ignore", "-m", "processes", str(folder), *JOBS]
    done = subprocess.run(  # in another folder, since what is in this one can be imported there
        program,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def results(folder: Path) -> Results:
    """Return what the processes have found, each its own."""

    def load(name: str, world: int = 2) -> list[Any]:
        return [torch.load(folder / f"{name}.{world}.{rank}") for rank in range(world)]

    return load


@cache
def alone(name: str) -> dict[str, Any]:
    """Train on one process; of several tests the first does."""
    return trainings.train(0, 1, **trainings.TRAININGS[name])


def assert_alike(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in found:
        assert isinstance(result, dict), result
        assert result["history"] == expected["history"]
        for key in ("weights", "biases"):
            torch.testing.assert_close(result[key], expected[key], rtol=0, atol=TOLERANCE)
        assert result["norms"] == pytest.approx(expected["norms"], abs=TOLERANCE)
        torch.testing.assert_close(
            result["moments"], expected["moments"], rtol=TOLERANCE, atol=TOLERANCE
        )
        # Among themselves to the last bit, bases and all.
        assert all(map(torch.equal, result["arrays"], found[0]["arrays"]))
    assert_same_curve(found, expected)


def assert_same_curve(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Compare losses, and the samples that they are of, as far as steps have been taken."""
    for step in found[0]["losses"]:
        loss = sum(result["losses"][step] for result in found) / len(found)
        assert loss == pytest.approx(expected["losses"][step], abs=TOLERANCE)
        samples = sorted(entry for result in found for entry in result["seen"][step])
        assert samples == sorted(expected["seen"][step])


@pytest.mark.parametrize("job", [job for job in JOBS if job[2:] in trainings.TRAININGS])
def test_processes_train_as_one(job: str, results: Results) -> None:
    world, name = int(job[0]), job[2:]
    expected = alone(name)
    assert any(len(set(ranks.values())) > 1 for ranks in expected["history"].values())
    assert_alike(results(name, world), expected)


def test_four_processes_save_what_two_and_one_resume(folder: Path, results: Results) -> None:
    expected = trainings.train(0, 1, **checkpoints.ELASTIC, steps=9)
    ranks = {name: list(ranks.values()) for name, ranks in expected["history"].items()}
    for name in ("0", "2"):  # by a schedule and by growth, before the save and after it
        assert len(set(ranks[name][:4])) > 1 and len(set(ranks[name][3:])) > 1
    forgetful = checkpoints.ELASTIC["rule"] | {"5": gt.Tolerance(0.6)}
    without = trainings.train(0, 1, **{**checkpoints.ELASTIC, "rule": forgetful}, steps=9)
    assert ranks["5"][:4] == list(without["history"]["5"].values())[:4]
    assert ranks["5"] != list(without["history"]["5"].values())
    assert [expected["seen"][k] for k in range(4)] != [expected["seen"][k] for k in range(4, 8)]

    assert_same_curve(results("saved", 4), expected)
    for found in results("resumed"), [checkpoints.resumed(folder, 0, 1)]:
        assert list(found[0]["losses"]) == [3, 4, 5, 6, 7, 8]
        assert_alike(found, expected)


def test_groups_save_and_resume_apart(results: Results) -> None:
    expected, found = trainings.train(0, 1, **checkpoints.ELASTIC, steps=9), results("teams", 4)
    for team in (found[:2], found[2:]):
        assert_alike(team, expected)


def test_processes_load_one_checkpoint_or_none(results: Results) -> None:
    for rank, found in enumerate(results("other_files")):
        assert isinstance(found, list), found
        (absent, *first), second, (other, *third) = found
        assert re.search(("process 1 of 2 failed .*No such file", "No such file")[rank], absent)
        assert second == ("{'step': 1}", False)
        assert "expected the same checkpoint on all processes, got others than" in other
        assert "on process 0 on [1]" in other
        assert first == third == [True]  # nothing has changed


def assert_resumed(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    ranks = [list(history.values()) for history in expected["history"].values()]
    assert any(r[0] != r[3] for r in ranks) and any(r[3] != r[-1] for r in ranks)
    assert_alike(found, expected)


@pytest.mark.parametrize(("saved", "resumed"), [(1, 2), (2, 1), (2, 4)])
def test_models_in_parts_are_resumed_by_other_numbers_of_processes(
    saved: int, resumed: int, results: Results
) -> None:
    assert all(isinstance(result, dict) for result in results("saved_parts", saved))
    expected = trainings.train(0, 1, **checkpoints.PARTS)
    assert_resumed(results(f"resumed parts of {saved}", resumed), expected)


def test_what_was_in_parts_is_resumed_whole_and_the_reverse(folder: Path, results: Results) -> None:
    expected = trainings.train(0, 1, **checkpoints.PARTS)
    assert_resumed([checkpoints.resumed_parts("parts of 2")(folder, 0, 1)], expected)
    assert load_checkpoint(folder / "parts of 2") == {"step": 3, "rank": 0}
    expected = trainings.train(0, 1, **checkpoints.ELASTIC, steps=9)
    assert_alike(results("resumed checkpoint"), expected)


def test_a_folder_holds_one_checkpoint(folder: Path) -> None:
    names = sorted(entry.name for entry in (folder / "parts of 2").iterdir())
    assert len(names) == 2 and names[0] == "checkpoint.json"


def test_failed_saves_leave_the_last_checkpoint_and_nothing_else(results: Results) -> None:
    for found in results("failed_parts"):
        assert isinstance(found, list), found
        (parts, *first), (index, *second), third, fourth = found
        assert "process 1" in parts and "disk full" in parts and first == [0, 1]
        assert "disk full" in index and second == [0, 1]
        assert third == ("saved", 3, 2)  # the old tensors could not be removed
        assert fourth == ("saved", 4, 1)


def test_models_in_parts_on_some_processes_are_saved_by_these(results: Results) -> None:
    for rank, found in enumerate(results("own_parts")):
        assert isinstance(found, dict), found
        assert found["joint"] == ({"who": 0}, True)
        own = ["each", "each alone", *(["first"] if rank == 0 else [])]
        assert all(found[name] == ({"who": rank}, True) for name in own)
        assert found["folders"] == own
        assert found["refused"] == ["joint"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("trained by all", r"parts on processes \[0, 1\], on which TDLRT .* got them on \[{}\]"),
        ("trained by one", r"parts on processes \[{}\], on which TDLRT .* got them on \[0, 1\]"),
        ("unknown", r"a mesh of one dimension, got them on processes \[{}\] and a mesh of more"),
    ],
)
def test_models_in_parts_on_other_processes_are_refused(
    case: str, message: str, results: Results
) -> None:
    for rank, found in enumerate(results("own_parts")):
        saving, loading_alike = found[case]
        assert re.search(message.format(rank), saving)
        assert loading_alike


@pytest.mark.parametrize(
    ("index", "kept"),
    [(None, ""), (json.dumps({"tensors": {"folder": "tensors-" + "a" * 32}}), "a"), ("{", "ab")],
)
def test_tensors_that_an_index_may_name_are_kept(
    index: str | None, kept: str, tmp_path: Path
) -> None:
    (tmp_path / "tensors-of-others").mkdir()
    for letter in "ab":
        (tmp_path / f"tensors-{letter * 32}").mkdir()
    if index is not None:
        (tmp_path / "checkpoint.json").write_text(index)
    _folder._sweep(tmp_path)
    left = sorted(entry.name for entry in tmp_path.glob("tensors-*"))
    assert left == [*(f"tensors-{letter * 32}" for letter in kept), "tensors-of-others"]


REFUSED = {
    "absent": r"FileNotFoundError .*nowhere",
    "absent on one": r"nowhere",
    "no index": r"no index: not a whole checkpoint .*checkpoint\.json",
    "no metadata": r"no metadata: not a whole checkpoint .*\.metadata",
    "no part": r"no part: not a whole checkpoint .*distcp",
    "cut": r"cut: not a whole checkpoint",
    "flipped": r"flipped: not a whole checkpoint .*distcp does not have the checksum",
    "newer": r"newer: expected a checkpoint of format 1 or older, got 2",
    "other model": r"(?s)does not fit the model .*Unexpected key",
    "other rule": r"does not fit the optimizer .*expected budgets for the patterns \[\]",
    "save unknown": r"TypeError .*got object",
    "save nowhere": r"No such file or directory",
    "save file": r"expected a folder for a model in parts, got a file",
}


@pytest.mark.parametrize("case", REFUSED)
def test_all_processes_refuse_what_one_cannot_load_or_save(case: str, results: Results) -> None:
    for messages in results("refused_parts"):
        assert isinstance(messages, dict), messages
        assert re.search(REFUSED[case], messages[case])


def test_metadata_in_a_folder_run_no_code(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "parts of 2", tmp_path / "copy")
    (metadata,) = tmp_path.glob("copy/*/.metadata")
    index = json.loads((tmp_path / "copy" / "checkpoint.json").read_text())
    mark = tmp_path / "exploded"
    data = pickle.dumps(Bomb(mark))
    metadata.write_bytes(data)
    index["tensors"]["files"][".metadata"] = hashlib.sha256(data).hexdigest()
    del index["sha256"]
    index = {"sha256": _digest(index, {}), **index}
    (tmp_path / "copy" / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint .*got posix\.mkdir"):
        load_checkpoint(tmp_path / "copy")
    assert not mark.exists()
    pickle.loads(data)  # it would have
    assert mark.exists()


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("killed", "survivor"), [("parts", 0), ("index", 1)])
def test_a_process_killed_while_parts_are_saved_leaves_the_last_checkpoint(
    killed: str, survivor: int, folder: Path
) -> None:
    assert not (folder / f"killed with {killed}.2.{1 - survivor}").exists()
    message = torch.load(folder / f"killed with {killed}.2.{survivor}")
    assert message.startswith(f"ProcessError checkpoint: process {survivor} of 2 has lost")
    assert f"Last heard of: process {1 - survivor} in checkpoint after step 1." in message
    assert load_checkpoint(folder / f"parts before {killed}", trainings.network()) == {"step": 1}


@pytest.mark.parametrize("name", ["unused_layers", "unused_layers alone"])
def test_layers_that_some_or_all_processes_leave_out(name: str, results: Results) -> None:
    expected = trainings.unused_layers(0, 1)
    for result in results(name):
        assert isinstance(result, dict), result
        torch.testing.assert_close(result["weight"], expected["weight"], rtol=0, atol=TOLERANCE)
        for key, value in result["state"].items():
            assert torch.equal(value, results(name)[0]["state"][key])


@pytest.mark.parametrize("world", [2, 4])
def test_nan_on_one_process_stops_the_step_on_all(world: int, results: Results) -> None:
    for result in results("broken_input", world):
        assert isinstance(result, dict), result
        assert "expected finite numbers" in result["message"]
        assert result["same"]
        assert result["scales"] == [1024.0, 512.0, 512.0]  # skipped by a GradScaler, and stepped
        assert result["ranks"] == results("broken_input", world)[0]["ranks"]


@pytest.mark.parametrize("world", [2, 4])
def test_nan_on_one_process_between_bases_is_taken_back_on_all(
    world: int, results: Results
) -> None:
    found = results("broken_between", world)
    for result in found:
        assert isinstance(result, dict), result
        ((step, message),) = result["told"]
        assert step == 3 and "in the step before" in message
        assert result["kept"] == [False, False, True, True, False, False]
        assert result["ranks"] == found[0]["ranks"]
        for name, weight in result["weights"].items():
            assert torch.equal(weight, found[0]["weights"][name])


@pytest.mark.parametrize("world", [2, 4])
def test_nan_in_a_part_of_one_process_stops_the_step_on_all(world: int, results: Results) -> None:
    for messages in results("broken_part", world):
        assert len(messages) == world
        assert all("expected finite numbers" in message for message in messages)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("index", range(len(trainings.OTHER_BASES)), ids=trainings.OTHER_BASES)
def test_processes_that_extend_bases_differently_take_those_of_the_first(
    index: int, world: int, results: Results
) -> None:
    expected = alone(trainings.OTHER_BASES[index])
    assert_alike([found[index] for found in results("other_bases", world)], expected)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_that_truncate_differently_take_what_the_first_has(
    world: int, results: Results
) -> None:
    assert_alike(results("other_truncation", world), alone("adam"))


def test_a_process_is_back_when_a_save_is_refused(results: Results) -> None:
    between = "the time between steps"
    first, second = results("refused_save")
    assert first == (between, "refused", between)
    assert second == (between, between)  # the first one alone writes


def test_errors_of_one_s_own_are_no_lost_processes(results: Results) -> None:
    own = "RuntimeError its own"
    assert results("own_errors") == [
        [own, "TypeError process 1 of 2 failed (RuntimeError: its own)"],
        [own, own],
    ]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.linalg.LinAlgError, ValueError])
def test_errors_of_other_kinds_pass_through_an_exchange(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^its own$"), exchange(None):
        raise kind("its own")


@pytest.mark.parametrize("kind", [RuntimeError, dist.DistBackendError, dist.DistNetworkError])
def test_an_exchange_that_fails_has_lost_the_others(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda group: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    message = r"^step: process 2 of 3 has lost the others\. .* Here: closed by peer$"
    with pytest.raises(ProcessError, match=message), phase("step"), exchange(None):
        raise kind("closed by peer")


def test_a_wrapper_that_was_not_told_is_refused(results: Results) -> None:
    for message in results("not_told"):
        assert "expected DistributedDataParallel to leave 0.0.core, 0.2.core, 0.5.core" in message


def test_models_that_differ_are_refused(results: Results) -> None:
    for message in results("other_models"):
        assert "expected the same on all processes" in message and "on process 1" in message


def test_groups(results: Results) -> None:
    for result in results("other_groups"):
        other, kind = result["messages"]
        assert "expected a group that this process is in" in other
        assert "expected a torch.distributed.ProcessGroup, got str" in kind
    # A group of one trains alone, from a start of its own.
    for rank, result in enumerate(results("other_groups")):
        torch.manual_seed(rank)
        expected = trainings.train(0, 1)
        torch.testing.assert_close(result["weights"], expected["weights"], rtol=0, atol=TOLERANCE)


def test_an_optimizer_that_was_there_before_the_processes_is_refused(results: Results) -> None:
    for message in results("late"):
        assert "expected torch.distributed to be initialised before TDLRT is built" in message


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("killed", "waited", "step"),
    [
        ("start", "start", 0),
        ("forward", "synchronisation", 2),
        ("backward", "synchronisation", 2),
        ("synchronisation", "synchronisation", 2),
        ("step", "truncation", 2),
        ("truncation", "truncation", 2),
        ("checkpoint", "synchronisation", 3),
    ],
)
def test_a_killed_process_ends_the_others_with_an_error_that_says_where_it_was(
    killed: str, waited: str, step: int, world: int, folder: Path
) -> None:
    victim = 0 if killed == "checkpoint" else world - 1
    assert not (folder / f"killed in {killed}.{world}.{victim}").exists()
    for survivor in set(range(world)) - {victim}:
        message = torch.load(folder / f"killed in {killed}.{world}.{survivor}")
        lost = f"ProcessError {waited}: process {survivor} of {world} has lost the others"
        assert message.startswith(lost)
        heard = rf"Last heard of: [^.]*\b{victim} in {killed} after step {step}[.;]"
        assert re.search(heard, message), message
    if killed != "start":  # what was saved last is whole
        saved = folder / f"before {killed} of {world}"
        assert load_checkpoint(saved, trainings.network()) == {"step": 1}


def test_where_processes_were_may_be_lost_with_the_store(folder: Path) -> None:
    message = torch.load(folder / "killed_with_the_store.2.1")
    assert message.startswith("ProcessError synchronisation: process 1 of 2 has lost the others")
    assert "Where the others were is not known." in message


def test_means(results: Results) -> None:
    for (everywhere, somewhere, nowhere), same, other in results("means"):
        torch.testing.assert_close(everywhere, [torch.full((2, 2), 1.5)])
        torch.testing.assert_close(
            somewhere, [torch.full((3,), 0.5, dtype=torch.float64), torch.ones(0)]
        )
        assert nowhere is None
        assert same and not other


# On one process.


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(2, 5)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    data=st.data(),
)
def test_fingerprints(shape: tuple[int, int], dtype: torch.dtype, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    matrix = torch.randn(shape).to(dtype)
    number = fingerprint([matrix, matrix])
    assert number == fingerprint([matrix.clone(), matrix.t().contiguous().t()])
    assert 0 <= number < 2**62
    i, j = (data.draw(st.integers(0, n - 1)) for n in shape)
    flipped = matrix.clone()
    flipped[i, j] = -flipped[i, j]
    for other in (flipped, matrix.roll(1, 1), matrix.t()):
        if other.shape != matrix.shape or not torch.equal(other, matrix):
            assert fingerprint([matrix, other]) != number


def test_distribute_names_all_tucker_tensors() -> None:
    inner = factorize(nn.Sequential(nn.Linear(20, 20)), 3, verbose=False)
    names = set(inner._ddp_params_and_buffers_to_ignore)
    assert names == {"0.core", "0.factors.0", "0.factors.1"}
    outer: Any = nn.Sequential(inner, nn.Linear(20, 2))
    outer._ddp_params_and_buffers_to_ignore = ["1.bias"]  # what others have asked for
    for _ in range(2):
        assert distribute(outer) is outer
        names = set(outer._ddp_params_and_buffers_to_ignore)
        assert names == {"1.bias", "0.0.core", "0.0.factors.0", "0.0.factors.1"}
    alone: Any = factorize(nn.Linear(20, 20), 3, verbose=False)
    assert {"core", ".core"} <= set(alone._ddp_params_and_buffers_to_ignore)


def test_distribute_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        distribute(3)  # type: ignore[type-var]


def test_a_group_without_torch_distributed_is_refused() -> None:
    model = trainings.network()
    with pytest.raises(ValueError, match=r"process_group: expected None without"):
        TDLRT(trainings.OPTIMIZERS["sgd"](model), model, process_group="gloo")


class Store(dist.HashStore):
    """Takes a while to answer."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(self.seconds)
        return super().check(keys)


def heard(monkeypatch: pytest.MonkeyPatch, told: dict[int, str], seconds: float = 0.0) -> str:
    """Return what process 0 of 20 has heard of those that have told something."""
    store: Any = Store()
    store.seconds = seconds
    monkeypatch.setattr(_whereabouts, "_store_of", lambda group: store)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 20)
    for process, where in told.items():
        monkeypatch.setattr(dist, "get_rank", lambda group, process=process: process)
        _whereabouts.Whereabouts(None).tell(where, 7)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    return _whereabouts.last_heard(None)


def test_phases_that_few_are_in_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {0: "step", 1: "backward", **dict.fromkeys(range(2, 11), "synchronisation")}
    told |= {11: "forward", 12: "forward"}
    assert heard(monkeypatch, told) == (
        "Last heard of: process 1 in backward after step 7; processes 11, 12 in forward after "
        "step 7; 9 processes in synchronisation after step 7."
    )
    assert heard(monkeypatch, {}) == "Where the others were is not known."


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_whereabouts, "_PATIENCE", 0.2)
    start = time.perf_counter()
    assert heard(monkeypatch, {1: "step"}, 1.0) == "Where the others were is not known."
    assert time.perf_counter() - start < 0.9


def test_nothing_is_told_where_a_message_would_be_kept(tmp_path: Path) -> None:
    class Group:
        def get_group_store(self) -> Any:
            return dist.PrefixStore("group", dist.FileStore(str(tmp_path / "file"), 1))

    assert _whereabouts._store_of(Group()) is None
    assert _whereabouts._store_of(object()) is None  # of older versions
