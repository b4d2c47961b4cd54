"""Traps of the array libraries: global state, threads, autograd, memory layout, in-place writes."""

import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorly as tl
from tensorly.backend import BackendManager

import geotucker as gt
from geotucker import _ops

from .cases import Case, arrays_in, assert_close, quadratic, step

NAMES = ("numpy", "pytorch", "jax")  # what TensorLy's global backend may be set to here
SCHEME = gt.HeavyBall(0.5)
INTEGRATORS = [
    gt.TDLRT(0.1, SCHEME),
    gt.Tangent(0.1, SCHEME),
    gt.Standard(0.1, SCHEME),
    gt.Standard(0.1, SCHEME, augmented=False),
    gt.Flow(0.1, SCHEME, substeps=2),
]


@pytest.fixture
def global_backend():
    """Give TensorLy's global backend back as it was."""
    before = tl.get_backend()
    yield tl.set_backend
    tl.set_backend(before)


def case_for(backend):
    return Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)


def everything(case):
    """Call all that computes, and return the arrays by name."""
    point, other = case.point(), case.point(1)
    z = case.array(case.normal(*case.shape))
    objective, _ = quadratic(case, case.normal(*case.shape))
    tangent = gt.project(point, z)
    results = {
        "to_dense": gt.to_dense(point),
        "hosvd": gt.hosvd(z, 2),
        "st_hosvd": gt.st_hosvd(z, 2),
        "orthonormalise": gt.orthonormalise(other),
        "round": gt.round(gt.add(point, other), gt.Tolerance(0.1)),
        "scale": gt.scale(point, 2.0),
        "tangent": tangent,
        "as_point": gt.tangent_to_point(point, tangent),
        "retract": gt.retract(point, tangent),
        "transport": gt.transport(point, tangent, other),
        "augment": gt.augment(point, tangent.factors),
    }
    field = gt.Sum([z, other])
    results["integrate"] = gt.integrate(lambda t, y: field, point, (0, 0.1), step=0.1).point
    for integrator in INTEGRATORS:
        result = step(integrator, point, objective, point.ranks)
        results[f"{integrator}"] = (result.point, result.state.moments)
    numbers = [gt.norm(point), gt.inner(point, other), gt.inner_tangent(tangent, tangent)]
    return {name: list(arrays_in(result)) for name, result in results.items()}, numbers


@pytest.mark.parametrize("name", NAMES)
def test_the_global_backend_plays_no_part(backend, name, global_backend):
    case = case_for(backend)
    expected, numbers = everything(case)
    global_backend(name)
    got, again = everything(case)
    assert tl.get_backend() == name
    kind = type(case.array(0.0))
    for label in expected:
        for a, b in zip(got[label], expected[label], strict=True):
            assert isinstance(a, kind), label
            assert np.array_equal(backend.numpy(a), backend.numpy(b)), label
    assert again == numbers


def test_the_global_backend_is_neither_read_nor_set(backend, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("TensorLy's global backend was asked for or set")

    case = case_for(backend)
    for name in ("current_backend", "get_backend", "set_backend"):
        monkeypatch.setattr(BackendManager, name, never)
    everything(case)


def test_threads_may_have_backends_of_their_own(backend, global_backend):
    # As in autograd's threads: TensorLy's thread-local choice is another one, or none.
    case = case_for(backend)
    expected, _ = everything(case)
    found = {}

    def work(name):
        try:
            tl.set_backend(name, local_threadsafe=True)
            results, _ = everything(case)
            found[name] = (tl.get_backend(), results)
        except BaseException as error:
            found[name] = (error, None)

    threads = [threading.Thread(target=work, args=(name,)) for name in NAMES]
    before = tl.get_backend()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tl.get_backend() == before
    for name in NAMES:
        seen, results = found[name]
        assert seen == name
        for label in expected:
            for a, b in zip(results[label], expected[label], strict=True):
                assert np.array_equal(backend.numpy(a), backend.numpy(b)), label


def test_nothing_that_is_passed_in_is_changed(backend):
    case = case_for(backend)
    core, factors = case.pull(case.point())
    shared = (case.array(core), [case.array(u) for u in factors])
    z = case.array(case.normal(*case.shape))
    moment = gt.project(shared, case.array(case.normal(*case.shape, stream=5)))
    arrays = list(arrays_in((shared, z, moment)))
    before = [backend.numpy(array) for array in arrays]
    tangent = gt.project(shared, z)
    gt.add(gt.scale(shared, 2.0), gt.round(shared, 1))
    gt.transport(shared, tangent, gt.retract(shared, tangent))
    gt.hosvd(z, 2), gt.st_hosvd(z, 2), gt.orthonormalise(shared), gt.augment(shared, shared[1])
    for integrator in INTEGRATORS:
        state = gt.State(0, (moment,))
        step(integrator, gt.as_point(shared), lambda w: (0.0, z), gt.Fixed(2), state)
    gt.minimize(lambda w: (0.0, z), shared, integrator=INTEGRATORS[0], steps=2)
    for array, copied in zip(arrays, before, strict=True):
        assert np.array_equal(backend.numpy(array), copied)
    assert isinstance(shared[1], list)
    assert len(shared[1]) == 3


def test_read_only_arrays_all_the_way():
    # NumPy alone can forbid writing: freeze what a step returns and go on from there.
    def freeze(*results):
        for array in arrays_in(results):
            array.setflags(write=False)

    point, z = gt.testing.random_point((5, 3, 4), (2, 2, 3)), np.ones((5, 3, 4))
    freeze(point, z)
    for integrator in INTEGRATORS:
        state = integrator.init(point)
        for rule in (gt.Fixed((2, 2, 3)), gt.Tolerance(0.0)):
            freeze(state.moments)
            after, state, _ = integrator.step(point, lambda w: (0.0, z), state, rule)
            freeze(after)
    wide = gt.augment(point, [np.zeros((n, 1)) for n in (5, 3, 4)])
    freeze(wide)
    tangent = gt.project(wide, gt.add(point, wide))
    freeze(tangent)
    gt.retract(wide, tangent)
    gt.transport(wide, tangent, point)
    gt.truncate([wide, point], gt.Fixed(1))


def test_memory_layout_does_not_matter(backend):
    case = case_for(backend)
    z = case.normal(4, 3, 5)
    array = _ops.moveaxis(case.array(z), 0, 2)
    plain = case.array(np.ascontiguousarray(np.moveaxis(z, 0, 2)))
    for decompose in (gt.hosvd, gt.st_hosvd):
        expected = case.dense(decompose(plain, 2))
        assert_close(case.dense(decompose(array, 2)), expected, 1e-12)
    point = gt.hosvd(plain, (2, 2, 3))
    turned = gt.TuckerPoint(point.core, tuple(case.array(backend.numpy(u).T).T for u in point[1]))
    for pair in (point, turned):
        moved = step(INTEGRATORS[0], gt.as_point(pair), lambda w: (0.0, array), 2).point
        expected = step(INTEGRATORS[0], point, lambda w: (0.0, plain), 2).point
        assert_close(case.dense(moved), case.dense(expected), 1e-12)


def test_axes_move_as_numpy_moves_them(backend):
    values = np.arange(24.0).reshape(2, 3, 4)
    array = backend.array(values)
    for source, destination in itertools.product(range(-3, 3), repeat=2):
        moved = backend.numpy(_ops.moveaxis(array, source, destination))
        assert np.array_equal(moved, np.moveaxis(values, source, destination))


X64 = """
import jax
jax.config.update("jax_enable_x64", {before})
import jax.numpy as jnp, geotucker as gt
from threading import Thread
first = [Thread(target=gt.norm, args=((jnp.ones(1), [jnp.ones((1, 1))]),)) for _ in range(4)]
[thread.start() for thread in first], [thread.join() for thread in first]
point = gt.hosvd(jnp.ones((3, 4)), 1)
gt.TDLRT(0.1).step(point, lambda w: (0.0, jnp.ones((3, 4))), gt.State(0, ()), gt.Fixed(1))
print(jax.config.jax_enable_x64, point.core.dtype, jnp.ones(1).dtype)
"""


@pytest.mark.parametrize(("before", "dtype"), [(False, "float32"), (True, "float64")])
def test_the_64_bit_flag_of_jax_stays(before, dtype):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", X64.format(before=before)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(before), dtype, dtype]
