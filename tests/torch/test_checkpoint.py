"""Checkpoints: exact in a new process, whole or refused, and nothing changed by what is refused.

The file is also a program, for what needs another process: runs that are resumed there, and saves
that are killed by SIGKILL.
"""

import copy
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import geotucker as gt
from geotucker import _files as core_files
from geotucker_torch import (
    TDLRT,
    CheckpointError,
    _files,
    factorize,
    load_checkpoint,
    save_checkpoint,
)

STEPS, SAVED_AT = 13, 5

# optimizer, scheduler, arguments of TDLRT
SETTINGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "momentum": (
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
        {"ranks": gt.Budget(parameters=0.3, steps=8)},
    ),
    "adam": (
        lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
        lambda o: lr_scheduler.MultiStepLR(o, [4, 7, 7]),
        {"ranks": gt.Tolerance(0.1), "basis_every": 3, "integrator": "tdlrt"},
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, 0.01),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 2)], [4]
        ),
        {"ranks": {"0": gt.Budget(parameters=0.2, steps=10)}},
    ),
    "cycled": (
        lambda p: torch.optim.Adam(p, 0.01),
        lambda o: lr_scheduler.OneCycleLR(o, 0.02, STEPS),  # which changes betas too
        {"ranks": gt.Tolerance(0.1)},
    ),
    "factored": (
        lambda p: torch.optim.Adafactor(p, 0.01),
        lambda o: lr_scheduler.OneCycleLR(o, 0.02, STEPS, cycle_momentum=False),
        {},
    ),
}


def build(settings: str, ranks: Any = 6, seed: int = 0) -> tuple[nn.Module, TDLRT, Any]:
    """Return a model with two Tucker layers, batch norm and dropout, and what trains it."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()
    model = factorize(nn.Sequential(*layers, nn.Linear(144, 20)), ranks, verbose=False)
    make_optimizer, make_scheduler, arguments = SETTINGS[settings]
    optimizer = TDLRT(make_optimizer(model.parameters()), model, **arguments)
    return model, optimizer, make_scheduler(optimizer)


def advance(model: nn.Module, optimizer: TDLRT, scheduler: Any, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 8, 5, 5, generator=draw), torch.randn(16, 20, generator=draw)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()


def resume(folder: Path, settings: str) -> None:
    """Go on with a run that was saved in both forms, and save where it ends."""
    for form in ("checkpoint", "pickle"):
        parts = build(settings, ranks=2, seed=9)
        if form == "checkpoint":
            rng = load_checkpoint(folder / settings, *parts)["rng"]
        else:
            *states, rng = torch.load(folder / f"{settings}.pt", weights_only=True)
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        torch.set_rng_state(rng)
        advance(*parts, range(SAVED_AT, STEPS))
        save_checkpoint(folder / f"{settings} {form}", *parts)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make unbroken runs here, and resume copies of their middle in another process."""
    folder = tmp_path_factory.mktemp("runs")
    for settings in SETTINGS:
        parts = build(settings)
        advance(*parts, range(SAVED_AT))
        rng = torch.get_rng_state()
        save_checkpoint(folder / settings, *parts, rng=rng)
        torch.save([*(part.state_dict() for part in parts), rng], folder / f"{settings}.pt")
        advance(*parts, range(SAVED_AT, STEPS))
        save_checkpoint(folder / f"{settings} unbroken", *parts)
    run_program("resume", folder, threads=torch.get_num_threads())  # sums depend on it
    return folder


@pytest.mark.xdist_group("resumed in a new process")  # one worker starts it, once
@pytest.mark.parametrize("form", ["checkpoint", "pickle"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_run_resumed_in_a_new_process_ends_bit_identical(
    settings: str, form: str, resumed: Path
) -> None:
    ends = [(resumed / f"{settings} {name}").read_bytes() for name in ("unbroken", form)]
    assert ends[0] == ends[1]  # a checkpoint is a function of what is in it
    assert ends[0] != (resumed / settings).read_bytes()


def test_products_with_what_came_out_of_a_file_are_rounded_alike(tmp_path: Path) -> None:
    # Decompositions return arrays of other strides than files do.
    def parts() -> tuple[nn.Module, TDLRT]:
        torch.manual_seed(0)
        sizes = [nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 6)]
        model = factorize(nn.Sequential(*sizes).double(), 3, verbose=False)
        return model, TDLRT(torch.optim.Adam(model.parameters(), 0.01), model)

    def steps(model: nn.Module, optimizer: TDLRT, number: int) -> None:
        x, y = torch.randn(16, 32).double(), torch.randn(16, 6).double()
        for _ in range(number):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

    unbroken, resumed = parts(), parts()
    steps(*unbroken, 5)
    save_checkpoint(tmp_path / "file", *unbroken)
    load_checkpoint(tmp_path / "file", *resumed)
    for run in (unbroken, resumed):
        torch.manual_seed(1)
        steps(*run, 4)
    pairs = zip(unbroken[0].parameters(), resumed[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_ranks_over_time_are_saved_and_go_on(tmp_path: Path) -> None:
    parts = build("momentum")
    advance(*parts, range(SAVED_AT))
    history = parts[1].rank_history
    assert list(history) == ["0", "5"]
    assert list(history["5"]) == list(range(SAVED_AT + 1))
    assert history["5"][0] == (6, 6)
    assert {name: ranks[SAVED_AT] for name, ranks in history.items()} == parts[1].ranks
    assert len(set(history["0"].values())) > 1
    save_checkpoint(tmp_path / "file", *parts)
    again = build("momentum", ranks=2)
    load_checkpoint(tmp_path / "file", *again)
    assert again[1].rank_history == history
    advance(*again, range(1))
    assert list(again[1].rank_history["5"]) == list(range(SAVED_AT + 2))


def test_numbers_of_numpy_in_a_rule_leave_the_state_safe_to_load(tmp_path: Path) -> None:
    model, _, _ = build("adam")
    budget = gt.Budget(parameters=np.float64(0.2), start=np.float64(0.5), steps=9)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.1), model, budget)
    torch.save(optimizer.state_dict(), tmp_path / "file")
    optimizer.load_state_dict(torch.load(tmp_path / "file", weights_only=True))


@given(st.integers(0, 3000))
def test_histories_stay_small_and_do_not_depend_on_interruptions(steps: int) -> None:
    from geotucker_torch._history import RankHistory

    history = RankHistory({"a": ((0,),)})
    for step in range(1, steps + 1):
        history = history.after(step, {"a": (step,)})
        if step % 100 == 0:
            history = RankHistory.of_state(copy.deepcopy(history.state()))
    records = history.by_step()["a"]
    assert all(ranks == (step,) for step, ranks in records.items())
    assert list(records) == list(range(0, steps + 1, history.stride))
    assert min(steps + 1, 128) <= len(records) <= 256


# What comes back


EXTRA = {
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "empty": torch.empty(0),
    "scalar": torch.tensor(3, dtype=torch.int16),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "counts": Counter({4: 2, 1: 1}),
    "nested": [{0: (0.1, None, True), "a": [1 / 3, -0.0, 1e300, float("inf")]}],
    "name": "ä\u2028\x00",
}


def assert_same(a: Any, b: Any) -> None:
    """Compare trees exactly, types and order included."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


def test_extras_come_back_exactly(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "file", nn.Linear(2, 1), **EXTRA)
    assert_same(load_checkpoint(tmp_path / "file"), EXTRA)


def test_shared_memory_is_saved_apart(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    save_checkpoint(tmp_path / "file", nn.Linear(2, 1), a=tensor, b=tensor[:2])
    back = load_checkpoint(tmp_path / "file")
    assert back["b"].untyped_storage().nbytes() == 8
    assert torch.equal(back["a"], tensor)


def test_weights_are_a_plain_safetensors_file(tmp_path: Path) -> None:
    model, _, _ = build("adam")
    save_checkpoint(tmp_path / "file", model, epoch=3)
    fresh, _, _ = build("adam", ranks=2, seed=1)
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "file"))
    assert_same(fresh.state_dict(), model.state_dict())


def test_state_of_the_module_itself_and_its_versions_come_back(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        _version = 7
        calls = 3

        def get_extra_state(self) -> dict[str, int]:
            return {"calls": self.calls}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

        def _load_from_state_dict(self, *arguments: Any) -> None:
            self.seen = arguments[2]["version"]
            super()._load_from_state_dict(*arguments)

    source, target = Counting(2, 1), Counting(2, 1)
    source.calls = 11
    save_checkpoint(tmp_path / "file", nn.Sequential(source))
    load_checkpoint(tmp_path / "file", nn.Sequential(target))
    assert (target.calls, target.seen) == (11, 7)


def test_a_plain_optimizer_of_a_dense_model_is_saved_too(tmp_path: Path) -> None:
    def parts(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        return model, torch.optim.Adam(model.parameters())

    first, second = parts(0), parts(1)
    first[0](torch.ones(3)).sum().backward()
    first[1].step()
    save_checkpoint(tmp_path / "file", *first)
    assert load_checkpoint(tmp_path / "file", *second) == {}
    for a, b in zip(first, second, strict=True):
        assert_same(b.state_dict(), a.state_dict())


def test_a_checkpoint_amid_a_step_is_that_before_it(tmp_path: Path) -> None:
    parts = build("adam")
    advance(*parts, range(3))  # the next step moves the bases
    before = snapshot(*parts)
    torch.nn.functional.mse_loss(
        parts[0].eval()(torch.ones(2, 8, 5, 5)), torch.zeros(2, 20)
    ).backward()
    assert parts[1].ranks != before[1]["tdlrt"]["ranks"]
    save_checkpoint(tmp_path / "file", *parts)
    again = build("adam", ranks=2)
    load_checkpoint(tmp_path / "file", *again)
    assert_same(snapshot(*again), before)


# What is refused


def snapshot(*parts: Any) -> list[Any]:
    return copy.deepcopy([part.state_dict() for part in parts])


class Untouched:
    """Asserts that nothing of a training has changed, down to objects, memory and gradients."""

    def __init__(self, model: nn.Module, optimizer: TDLRT, scheduler: Any) -> None:
        self.parts = model, optimizer, scheduler
        self.before, self.now = self._everything(), snapshot(*self.parts)

    def _everything(self) -> list[tuple[Any, ...]]:
        model = self.parts[0]
        return [
            (name, id(t), t.data_ptr(), tuple(t.shape), t.requires_grad, id(t.grad))
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        ]

    def check(self) -> None:
        assert self._everything() == self.before
        assert_same(snapshot(*self.parts), self.now)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a training with moments."""
    path = tmp_path_factory.mktemp("file") / "checkpoint.safetensors"
    parts = build("momentum")
    advance(*parts, range(2))
    save_checkpoint(path, *parts, epoch=2)
    return path


@pytest.fixture(scope="module")
def other() -> tuple[nn.Module, TDLRT, Any]:
    """Return a training at other ranks, amid a step."""
    parts = build("momentum", ranks=3, seed=1)
    advance(*parts, range(2))
    parts[0](torch.ones(4, 8, 5, 5)).sum().backward()
    return parts


def safe_weights(path: Path) -> Any:
    tensors = safetensors.torch.load_file(path)
    names = build("momentum")[0].state_dict()
    return type(names)((name, tensors[name]) for name in names)


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3, 0.5, 0.9, 0.99999])
def test_truncated_files_are_refused(
    share: float, file: Path, other: tuple[nn.Module, TDLRT, Any], tmp_path: Path
) -> None:
    data, untouched = file.read_bytes(), Untouched(*other)
    (tmp_path / "cut").write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="cut: not a whole checkpoint"):
        load_checkpoint(tmp_path / "cut", *other)
    untouched.check()


@given(st.data())
def test_every_flipped_bit_is_seen(
    file: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    start, stop = data.draw(st.sampled_from([(0, 8), (8, header), (header, len(content))]))
    content[data.draw(st.integers(start, stop - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flipped") / "file"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint|expected a checkpoint of"):
        load_checkpoint(path)


@pytest.mark.parametrize("flipped", [200, -200])
def test_flipped_bytes_change_nothing(
    flipped: int, file: Path, other: tuple[nn.Module, TDLRT, Any], tmp_path: Path
) -> None:
    data, untouched = bytearray(file.read_bytes()), Untouched(*other)
    data[flipped] ^= 0xFF
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "file", *other)
    untouched.check()


def test_a_plain_safetensors_file_is_no_checkpoint(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="plain: not a whole checkpoint"):
        load_checkpoint(tmp_path / "plain")


def test_newer_formats_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("geotucker_torch._sections.FORMAT", 2)
        save_checkpoint(tmp_path / "new", nn.Linear(2, 1))
    with pytest.raises(
        CheckpointError, match="of format 1 or older, got 2, written by geotucker 0"
    ):
        load_checkpoint(tmp_path / "new")


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Attribute:
    """Is an attribute of something when it is unpickled, as enumerations once were."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def test_metadata_hold_members_of_enumerations_and_no_other_attributes() -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties

    from geotucker_torch._folder import _Unpickler

    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    pickled = pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, member.name))
    assert _Unpickler(io.BytesIO(pickled)).load() is member
    for owner, name in ((TensorProperties, "__init__"), (torch.Size, "__new__")):
        with pytest.raises(pickle.UnpicklingError, match="expected metadata of tensors"):
            _Unpickler(io.BytesIO(pickle.dumps(Attribute(owner, name)))).load()


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_pickles_are_not_run(write: Any, tmp_path: Path) -> None:
    path, mark = tmp_path / "bomb", tmp_path / "exploded"
    with open(path, "wb") as opened:
        write({"model": Bomb(mark)}, opened)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_checkpoint(path, nn.Linear(2, 1))
    assert not mark.exists()
    with open(path, "rb") as opened:  # it would have
        (pickle.load if write is pickle.dump else lambda f: torch.load(f, weights_only=False))(
            opened
        )
    assert mark.exists()


def test_missing_files_are_the_system_s_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint \(.*checkpoint.json"):
        load_checkpoint(tmp_path)  # a folder, but not one of a model in parts
    with pytest.raises(FileNotFoundError):
        save_checkpoint(tmp_path / "none" / "file", nn.Linear(2, 1))


def wider(model: nn.Module) -> nn.Module:
    model[5] = nn.Linear(144, 30)
    return model


def deeper(model: nn.Module) -> nn.Module:
    return model.append(nn.Linear(20, 2))


def shallower(model: nn.Module) -> nn.Module:
    return model[:5]


def finer(model: nn.Module) -> nn.Module:
    return model.double()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"size mismatch for 5.weight"),
        (deeper, r'Missing key\(s\).*"6.weight"'),
        (shallower, r'Unexpected key\(s\).*"5.core"'),
        (finer, r"expected torch.float64 for '0.core', got torch.float32"),
    ],
)
def test_other_models_are_refused(change: Any, message: str, file: Path) -> None:
    model = change(build("momentum", ranks=3, seed=1)[0])
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.1), model)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 3)
    untouched = Untouched(model, optimizer, scheduler)
    with pytest.raises(CheckpointError, match=rf"(?s)does not fit the model \(.*{message}"):
        load_checkpoint(file, model, optimizer, scheduler)
    untouched.check()


def test_models_without_memory_are_refused_and_loaded_once_they_have_some(file: Path) -> None:
    model = build("momentum")[0].to("meta")
    with pytest.raises(CheckpointError, match=r"got the meta device; call model.to_empty"):
        load_checkpoint(file, model)
    load_checkpoint(file, model.to_empty(device="cpu"))
    assert_same(model.state_dict(), safe_weights(file))


def test_other_kinds_of_optimizer_and_scheduler_are_refused(
    file: Path, other: tuple[nn.Module, TDLRT, Any], tmp_path: Path
) -> None:
    model, optimizer, _ = other
    step = lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), 3)
    untouched = Untouched(*other)
    with pytest.raises(CheckpointError, match="the state of SGD, got that of TDLRT of SGD"):
        load_checkpoint(file, model, optimizer.wrapped)
    with pytest.raises(CheckpointError, match="of StepLR, got that of CosineAnnealingLR"):
        load_checkpoint(file, model, optimizer, step)
    save_checkpoint(tmp_path / "weights", model)
    with pytest.raises(
        CheckpointError, match="optimizer: expected the state of TDLRT of SGD, got none"
    ):
        load_checkpoint(tmp_path / "weights", *other)
    with pytest.raises(TypeError, match="model: expected the model that was saved"):
        load_checkpoint(file, optimizer=optimizer)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        load_checkpoint(file, "model")  # type: ignore[arg-type]
    untouched.check()


@pytest.mark.parametrize("error", [RuntimeError("late"), KeyboardInterrupt()])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["model", "optimizer", "scheduler"])
def test_a_failure_at_any_point_puts_everything_back(
    part: int,
    error: BaseException,
    file: Path,
    other: tuple[nn.Module, TDLRT, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The last layer to be loaded, the wrapped optimizer, the scheduler: after all the rest.
    target, name = (
        (other[0][5].factors, "_load_from_state_dict"),
        (other[1].wrapped, "load_state_dict"),
        (other[2], "load_state_dict"),
    )[part]
    original, calls = getattr(target, name), []

    def fails_once(*arguments: Any) -> None:
        calls.append(arguments)
        original(*arguments)
        if len(calls) == 1:
            raise error

    untouched = Untouched(*other)
    monkeypatch.setattr(target, name, fails_once)
    expected = CheckpointError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(expected):
        load_checkpoint(file, *other)
    monkeypatch.undo()
    vars(target).pop(name, None)  # pytest 9.1 sets the method on the object, whose state shows it
    assert calls
    untouched.check()


def test_training_goes_on_after_a_failed_load_as_if_nothing_had_happened(
    file: Path, tmp_path: Path
) -> None:
    ends = []
    for fails in (False, True):
        parts = build("momentum", ranks=3, seed=1)
        advance(*parts, range(2))
        x = torch.ones(4, 8, 5, 5)
        parts[0](x).square().sum().backward()  # the lift that the coming step uses
        if fails:
            (tmp_path / "file").write_bytes(file.read_bytes())
            with pytest.raises(CheckpointError, match="does not fit the model"):
                load_checkpoint(tmp_path / "file", deeper(parts[0]), parts[1], parts[2])
            del parts[0][6]
        parts[1].step()
        ends.append(snapshot(*parts))
    assert_same(ends[1], ends[0])


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"a": object()}, r".extra.a: .*got object"),
        ({"a": [{1.5: 0}]}, r".extra.a.0: expected keys"),
        ({"a": {1: torch.ones(1), "1": torch.ones(1)}}, r".extra.a.1: .*two tensors"),
        ({"a": torch.ones(1, device="meta")}, r".extra.a: .*meta device"),
        ({"a": torch.eye(2).to_sparse()}, r".extra.a: .*sparse_coo"),
        ({"a": torch.optim.SGD([torch.ones(1)])}, r".extra.a: .*state_dict\(\)"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(
    extra: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=named):
        save_checkpoint(tmp_path / "file", nn.Linear(2, 1), **extra)
    assert not list(tmp_path.iterdir())


# Writing


def test_processes_may_write_one_file_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace = tmp_path / "file", os.replace
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def another_comes_first(*names: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        _files.write_atomically(path, b"of 1")
        assert path.read_bytes() == b"of 1"
        replace(*names)

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(os, "replace", another_comes_first)
    _files.write_atomically(path, b"of 0")
    assert path.read_bytes() == b"of 0"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    _files.write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="disk full"):
            _files.write_atomically(path, b"new content")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    _files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_whole_model_is_not_saved_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "checkpoint.json").touch()
    with pytest.raises(IsADirectoryError, match=r"folder: expected a file .* save to another path"):
        save_checkpoint(tmp_path / "folder", nn.Linear(2, 1))
    assert [entry.name for entry in tmp_path.rglob("*")] == ["folder", "checkpoint.json"]


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "last").symlink_to(tmp_path / "disk" / "file")
    save_checkpoint(tmp_path / "last", nn.Linear(2, 1), epoch=1)
    assert (tmp_path / "last").is_symlink()
    assert load_checkpoint(tmp_path / "disk" / "file") == {"epoch": 1}


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@needs_fork
def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    output = run_program("kill", tmp_path)
    # Half of the data written, all of it, renamed: only the last kill leaves the new one.
    assert output.split()[:3] == ["old", "old", "new"]
    assert set(output.split()[3:]) == {"whole"}
    assert len(output.split()) == 3 + 8
    assert len(list(tmp_path.iterdir())) <= 2  # what was half written is written over


def run_program(*arguments: Any, threads: int = 1) -> str:
    """Run this file as a program and return its output."""
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    program = [sys.executable, "-W", "ignore", __file__, *map(str, arguments)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill(folder: Path) -> None:
    """Kill children that save, at each moment of a write and at random ones; say what is left."""
    path, model = folder / "file", nn.Linear(400, 400)

    def in_child(action: Any, seconds: float | None = None) -> None:
        child = os.fork()
        if child == 0:
            action()
            os._exit(0)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(descriptor: int) -> None:
        os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
        die()

    save_checkpoint(path, model, name="old")
    for name, replacement in (("fsync", half), ("replace", die), ("sync_folder", die)):

        def save(name: str = name, replacement: Any = replacement) -> None:
            setattr(core_files if name == "sync_folder" else os, name, replacement)
            save_checkpoint(path, model, name="new")

        in_child(save)
        print(load_checkpoint(path, model)["name"])

    def save_for_ever() -> None:
        for number in range(10**9):
            save_checkpoint(path, nn.Linear(400, 400), number=number)

    draw = random.Random(0)
    for _ in range(8):
        in_child(save_for_ever, draw.uniform(0, 0.05))
        load_checkpoint(path, model)
        print("whole")


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    if sys.argv[1] == "kill":
        kill(folder)
    else:
        for settings in SETTINGS:
            resume(folder, settings)
