"""Complex tensors are refused, by every function that takes arrays, with an error that says so."""

import numpy as np
import pytest

import geotucker as gt

REAL = gt.testing.random_point((5, 4, 3), (2, 2, 2))
DENSE = gt.to_dense(REAL)
TANGENT = gt.project(REAL, DENSE)
INTEGRATORS = [
    gt.TDLRT(0.1),
    gt.Tangent(0.1),
    gt.Standard(0.1),
    gt.Standard(0.1, augmented=False),
    gt.Flow(0.1, substeps=2),
    gt.ConjugateGradient(),
]


def half(pair):
    """Make the core complex and leave the factors real."""
    return pair._replace(core=pair.core + 0j)


def other_half(pair):
    """Make the last factor complex and leave the rest real."""
    return pair._replace(factors=(*pair.factors[:-1], pair.factors[-1] + 0j))


def objective(loss, gradient):
    return lambda w: (loss, gradient)


def entries(values):
    return gt.completion([[0, 1], [0, 1], [0, 1]], values, (5, 4, 3))


FIT = gt.least_squares(DENSE)
SAMPLES = np.ones((2, 5, 4, 3))

CALLS = {
    "as_point": lambda make: gt.as_point(make(REAL)),
    "to_dense": lambda make: gt.to_dense(make(REAL)),
    "norm": lambda make: gt.norm(make(REAL)),
    "inner": lambda make: gt.inner(REAL, make(REAL)),
    "inner, first": lambda make: gt.inner(make(REAL), REAL),
    "add": lambda make: gt.add(REAL, make(REAL)),
    "scale": lambda make: gt.scale(make(REAL), 2.0),
    "orthonormalise": lambda make: gt.orthonormalise(make(REAL)),
    "round": lambda make: gt.round(make(REAL), 1),
    "spectrum": lambda make: gt.spectrum(make(REAL)),
    "truncate": lambda make: gt.truncate([make(REAL)], gt.Fixed(1)),
    "augment": lambda make: gt.augment(make(REAL), TANGENT.factors),
    "project": lambda make: gt.project(make(REAL), DENSE),
    "project, gradient": lambda make: gt.project(REAL, make(REAL)),
    "inner_tangent": lambda make: gt.inner_tangent(TANGENT, make(TANGENT)),
    "inner_tangent, first": lambda make: gt.inner_tangent(make(TANGENT), TANGENT),
    "tangent_to_point": lambda make: gt.tangent_to_point(make(REAL), TANGENT),
    "tangent_to_point, tangent": lambda make: gt.tangent_to_point(REAL, make(TANGENT)),
    "retract": lambda make: gt.retract(make(REAL), TANGENT),
    "retract, tangent": lambda make: gt.retract(REAL, make(TANGENT)),
    "transport": lambda make: gt.transport(make(REAL), TANGENT, REAL),
    "transport, tangent": lambda make: gt.transport(REAL, make(TANGENT), REAL),
    "transport, target": lambda make: gt.transport(REAL, TANGENT, make(REAL)),
    "minimize": lambda make: gt.minimize(FIT, make(REAL), integrator=INTEGRATORS[0]),
    "an objective": lambda make: FIT(make(REAL)),
    "completion": lambda make: entries(np.ones(2))(make(REAL)),
    "regression": lambda make: gt.regression(SAMPLES, np.ones(2))(make(REAL)),
    "autodiff": lambda make: gt.Autodiff(gt.to_dense)(make(REAL)),
    "save": lambda make: gt.save("nowhere.npz", make(REAL)),
    "convert": lambda make: gt.convert(make(REAL), np),
    "reconstruct_file": lambda make: gt.reconstruct_file(make(REAL), "nowhere.npy"),
    "integrate": lambda make: gt.integrate(lambda t, y: REAL, make(REAL), (0, 1), step=0.5),
    "integrate, field": lambda make: gt.integrate(lambda t, y: make(REAL), REAL, (0, 1), step=0.5),
    "check_orthonormal": lambda make: gt.testing.check_orthonormal(make(REAL)),
    "gradient_slope": lambda make: gt.testing.gradient_slope(FIT, make(REAL)),
} | {
    f"step of {integrator}": lambda make, it=integrator: it.step(
        make(REAL), FIT, it.init(REAL), gt.Fixed(2)
    )
    for integrator in INTEGRATORS
}

ARRAYS = {
    "hosvd": lambda: gt.hosvd(DENSE + 0j, 2),
    "st_hosvd": lambda: gt.st_hosvd(DENSE + 0j, 2),
    "augment": lambda: gt.augment(REAL, [u + 0j for u in TANGENT.factors]),
    "project": lambda: gt.project(REAL, DENSE + 0j),
    "scale": lambda: gt.scale(REAL, 1j),
    "turn": lambda: gt.truncate([REAL], gt.Fixed(1))[0].turn(REAL.core + 0j),
    "integrate": lambda: gt.integrate(lambda t, y: DENSE + 0j, REAL, (0, 1), step=0.5),
    "least_squares": lambda: gt.least_squares(DENSE + 0j),
    "completion": lambda: entries(np.ones(2) + 0j),
    "Fit": lambda: gt.Fit(gt.Full((5, 4, 3)), DENSE + 0j),
    "complete": lambda: gt.complete([np.arange(2), np.arange(2)], np.ones(2) + 0j, (2, 2)),
    "regression, inputs": lambda: gt.regression(SAMPLES + 0j, np.ones(2)),
    "regression, outputs": lambda: gt.regression(SAMPLES, np.ones(2) + 0j),
    "Samples": lambda: gt.Samples(SAMPLES + 0j),
    "loss of gradient_slope": lambda: gt.testing.gradient_slope(objective(1j, DENSE), REAL),
    "last loss": lambda: gt.minimize(
        objective(1j, DENSE), REAL, integrator=INTEGRATORS[0], steps=0
    ),
} | {
    f"{what} of {integrator}": lambda it=integrator, f=f: gt.minimize(
        f, REAL, integrator=it, steps=1
    )
    for integrator in INTEGRATORS
    for what, f in (
        ("loss", objective(np.complex128(1j), DENSE)),
        ("gradient", objective(1.0, DENSE + 0j)),
        ("factored gradient", objective(1.0, half(REAL))),
    )
}


@pytest.mark.parametrize("make", [half, other_half])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_complex_points_and_tangents_are_refused(call, make):
    with pytest.raises(gt.BackendError, match=r"complex128 \(complex tensors are not supported\)"):
        call(make)


@pytest.mark.parametrize("call", ARRAYS.values(), ids=ARRAYS)
def test_complex_arrays_and_numbers_are_refused(call):
    with pytest.raises(gt.BackendError, match=r"complex\w* \(complex tensors are not supported\)"):
        call()


def test_complex_indices_and_likes_are_refused():
    with pytest.raises(gt.BackendError, match=r"indices\[0\]: expected integers, got complex128"):
        gt.completion([np.array([0j]), np.array([0])], np.ones(1), (2, 2))
    with pytest.raises(gt.BackendError, match="like: expected a real floating dtype"):
        gt.Entries([[0], [0]], (2, 2), np.ones(1) + 0j)


def test_no_function_of_arrays_was_forgotten():
    covered = {name.partition(",")[0].partition(" ")[0] for name in (*CALLS, *ARRAYS)}
    functions = {
        name
        for name in gt.__all__
        if callable(getattr(gt, name)) and not isinstance(getattr(gt, name), type)
    }
    # These take no arrays; files of complex ones are refused in test_streaming.py.
    others = {"as_rule", "when_flat", "decompose_file", "load"}
    assert functions - covered == others


def test_files_of_complex_points_are_refused(tmp_path):
    path = tmp_path / "complex.tucker.npz"
    np.savez(path, core=REAL.core + 0j, **{f"factor_{i}": u for i, u in enumerate(REAL.factors)})
    with pytest.raises(gt.BackendError, match="complex128"):
        gt.load(path)


def test_complex_arrays_of_every_library(backend):
    z = backend.array(np.ones((3, 4)), "complex64")
    for call in (lambda: gt.hosvd(z, 1), lambda: gt.least_squares(z), lambda: gt.regression(z, z)):
        with pytest.raises(gt.BackendError, match="complex64"):
            call()
