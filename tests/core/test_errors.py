"""Every error of the public interface, by its type and by what it says."""

import re

import numpy as np
import pytest
import torch

import geotucker as gt

RNG = np.random.default_rng(0)
POINT = gt.testing.random_point((5, 4, 3), (2, 2, 2))
MATRIX = gt.testing.random_point((5, 4), (2, 2))
TENSOR = RNG.standard_normal((5, 4, 3))
TANGENT = gt.project(POINT, TENSOR)


def single(point):
    core, factors = point
    return core.astype("f4"), [u.astype("f4") for u in factors]


def with_factor(mode, factor):
    return POINT.core, [factor if i == mode else u for i, u in enumerate(POINT.factors)]


class Contracts:
    def __init__(self, result):
        self.result = result

    def contract(self, factors, skip):
        return self.result


ERRORS = {
    # Shapes.
    "no pair": (lambda: gt.as_point(3.0), gt.ShapeError, "point: expected a pair (core, factors)"),
    "three": (lambda: gt.as_point((1, 2, 3)), gt.ShapeError, "expected a pair (core, factors)"),
    "a dense array": (lambda: gt.to_dense(TENSOR[:2]), gt.ShapeError, "expected one factor per"),
    "a tangent vector": (lambda: gt.to_dense(TANGENT), gt.ShapeError, "tangent_to_point"),
    "too few factors": (
        lambda: gt.norm((POINT.core, POINT.factors[:2])),
        gt.ShapeError,
        "got 2 factors for a core of shape (2, 2, 2)",
    ),
    "order 0": (lambda: gt.as_point((np.ones(()), [])), gt.ShapeError, "order at least 1"),
    "factor columns": (
        lambda: gt.orthonormalise(with_factor(1, np.ones((4, 3)))),
        gt.ShapeError,
        "point.factors[1]: expected shape (n, 2)",
    ),
    "a vector for a factor": (
        lambda: gt.round(with_factor(0, np.ones(2)), 1),
        gt.ShapeError,
        "point.factors[0]: expected shape (n, 2)",
    ),
    "empty": (
        lambda: gt.as_point(with_factor(2, np.ones((0, 2)))),
        gt.ShapeError,
        "point.factors[2]: expected at least one entry, got shape (0, 2)",
    ),
    "inner": (lambda: gt.inner(POINT, MATRIX), gt.ShapeError, "b: expected a tensor of shape"),
    "add": (lambda: gt.add(POINT, MATRIX), gt.ShapeError, "b: expected a tensor of shape"),
    "gradient": (
        lambda: gt.project(POINT, TENSOR[:4]),
        gt.ShapeError,
        "gradient: expected the shape (5, 4, 3) of the tensor, got (4, 4, 3)",
    ),
    "factored gradient": (
        lambda: gt.project(POINT, MATRIX),
        gt.ShapeError,
        "gradient: expected the shape (5, 4, 3) of the tensor, got (5, 4)",
    ),
    "gradient's factors": (
        lambda: gt.project(POINT, with_factor(0, np.ones((5, 3)))),
        gt.ShapeError,
        "gradient.factors[0]: expected shape (n, 2)",
    ),
    "contraction": (
        lambda: gt.project(POINT, Contracts(np.ones((2, 2, 2)))),
        gt.ShapeError,
        "gradient.contract(factors, skip=0): expected an array of shape (5, 2, 2)",
    ),
    "transport": (
        lambda: gt.transport(POINT, TANGENT, MATRIX),
        gt.ShapeError,
        "gradient: expected the shape (5, 4)",
    ),
    "scalar": (lambda: gt.hosvd(np.ones(()), 1), gt.ShapeError, "expected order at least 1"),
    "scalar, st": (lambda: gt.st_hosvd(np.ones(()), 1), gt.ShapeError, "order at least 1"),
    # Libraries and dtypes.
    "a list": (lambda: gt.hosvd([[1.0]], 1), gt.BackendError, "tensor: expected an array of NumPy"),
    "a list core": (
        lambda: gt.as_point(([[1.0]], POINT.factors)),
        gt.BackendError,
        "point.core: expected an array of NumPy, PyTorch, JAX or CuPy, got builtins.list",
    ),
    "no gradient": (lambda: gt.project(POINT, None), gt.BackendError, "gradient: expected an"),
    "integers": (
        lambda: gt.hosvd(np.ones((2, 2), int), 1),
        gt.BackendError,
        "tensor: expected a real floating dtype, got int64",
    ),
    "complex": (
        lambda: gt.as_point(with_factor(0, np.ones((5, 2), complex))),
        gt.BackendError,
        "point.factors[0]: expected a real floating dtype, got complex128",
    ),
    "a mask": (
        lambda: gt.hosvd(np.ma.masked_array(TENSOR, TENSOR > 0), 1),
        gt.BackendError,
        "tensor: expected an array without a mask, which would be ignored",
    ),
    "numpy.matrix": (
        lambda: gt.norm((MATRIX.core.view(np.matrix), MATRIX.factors)),
        gt.BackendError,
        "point.core: expected an array, got numpy.matrix",
    ),
    "a sparse array": (
        lambda: gt.hosvd(torch.eye(3, dtype=torch.float64).to_sparse(), 1),
        gt.BackendError,
        "tensor: expected a dense array, got one of layout torch.sparse_coo; convert it",
    ),
    "another byte order": (
        lambda: gt.hosvd(TENSOR.astype(">f8"), 1),
        gt.BackendError,
        "tensor: expected a real floating dtype, got >f8 (convert it first)",
    ),
    "booleans": (lambda: gt.st_hosvd(TENSOR > 0, 1), gt.BackendError, "real floating dtype"),
    "strings": (lambda: gt.hosvd(np.array(["a"]), 1), gt.BackendError, "real floating dtype"),
    "mixed factors": (
        lambda: gt.norm(with_factor(1, POINT.factors[1].astype("f4"))),
        gt.BackendError,
        "point.factors[1]: expected numpy float64 as the other arrays, got numpy float32",
    ),
    "mixed inner": (lambda: gt.inner(POINT, single(POINT)), gt.BackendError, "b: expected numpy"),
    "mixed add": (lambda: gt.add(single(POINT), POINT), gt.BackendError, "b: expected numpy float"),
    "mixed gradient": (
        lambda: gt.project(POINT, TENSOR.astype("f4")),
        gt.BackendError,
        "gradient: expected numpy float64 as the other arrays, got numpy float32",
    ),
    "mixed factored gradient": (
        lambda: gt.project(POINT, single(POINT)),
        gt.BackendError,
        "gradient.core: expected numpy float64",
    ),
    "mixed contraction": (
        lambda: gt.project(POINT, Contracts(np.ones((5, 2, 2), "f4"))),
        gt.BackendError,
        "gradient.contract(...): expected numpy float64",
    ),
    # Numbers that are not finite.
    "nan": (
        lambda: gt.as_point((POINT.core * np.nan, POINT.factors)),
        gt.NonFiniteError,
        "point.core: expected finite numbers, got NaN or infinity. Nothing was changed",
    ),
    "infinite factor": (
        lambda: gt.norm(with_factor(2, np.full((3, 2), np.inf))),
        gt.NonFiniteError,
        "point.factors[2]: expected finite",
    ),
    "nan tensor": (lambda: gt.hosvd(TENSOR * np.nan, 1), gt.NonFiniteError, "tensor: expected"),
    "inf tensor": (lambda: gt.st_hosvd(TENSOR / 0.0, 1), gt.NonFiniteError, "tensor: expected"),
    "nan scale": (lambda: gt.scale(POINT, np.nan), gt.NonFiniteError, "number * core: expected"),
    "nan truncate": (
        lambda: gt.truncate(
            [MATRIX, gt.TuckerPoint(POINT.core * np.nan, POINT.factors)], gt.Fixed(1)
        ),
        gt.NonFiniteError,
        "core: expected finite",
    ),
    "nan direction": (
        lambda: gt.augment(MATRIX, [np.ones((5, 1)), np.full((4, 1), np.nan)]),
        gt.NonFiniteError,
        "directions[1]: expected finite",
    ),
    "nan gradient": (lambda: gt.project(POINT, TENSOR * np.nan), gt.NonFiniteError, "gradient: "),
    "nan contraction": (
        lambda: gt.project(POINT, Contracts(np.full((5, 2, 2), np.nan))),
        gt.NonFiniteError,
        "gradient: expected finite",
    ),
    "nan velocity": (
        lambda: gt.retract(POINT, TANGENT._replace(core=TANGENT.core * np.nan)),
        gt.NonFiniteError,
        "tangent.core: expected finite",
    ),
    "nan tangent factor": (
        lambda: gt.retract(POINT, TANGENT._replace(factors=[k * np.nan for k in TANGENT.factors])),
        gt.NonFiniteError,
        "tangent.factors[0]: expected finite",
    ),
    # Settings.
    "lr 0": (lambda: gt.TDLRT(0.0), ValueError, "lr: expected a positive number or a schedule"),
    "lr < 0": (lambda: gt.Standard(lr=-1.0), ValueError, "lr: expected a positive number"),
    "lr nan": (lambda: gt.Tangent(np.nan), ValueError, "lr: expected a positive number"),
    "momentum 1": (lambda: gt.HeavyBall(1.0), ValueError, "momentum: expected a number in [0, 1)"),
    "momentum < 0": (lambda: gt.HeavyBall(-0.1), ValueError, "momentum: expected a number in"),
    "substeps": (lambda: gt.Flow(0.1, substeps=0), ValueError, "substeps: expected a positive"),
    "flow's lr": (lambda: gt.Flow(0.0), ValueError, "lr: expected a positive number"),
    "window": (lambda: gt.when_flat(window=0), ValueError, "window: expected a positive integer"),
}


@pytest.mark.parametrize("what", ERRORS)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_error(what):
    call, kind, message = ERRORS[what]
    with pytest.raises(kind, match=re.escape(message)) as caught:
        call()
    if kind is not ValueError:
        assert type(caught.value) is kind
        assert isinstance(caught.value, gt.GeotuckerError)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (gt.ShapeError, ValueError),
        (gt.RankError, ValueError),
        (gt.NonFiniteError, ArithmeticError),
        (gt.BackendError, TypeError),
    ],
)
def test_errors_are_builtin_ones_too(kind, builtin):
    assert issubclass(kind, builtin)
    assert issubclass(kind, gt.GeotuckerError)


@pytest.mark.parametrize("integrator", [gt.TDLRT(), gt.Tangent(), gt.Standard(), gt.Flow()])
def test_integrators_check_the_gradient(integrator):
    for gradient, kind in [(TENSOR[:4], gt.ShapeError), (TENSOR.astype("f4"), gt.BackendError)]:
        with pytest.raises(kind, match="gradient: expected"):
            integrator.step(POINT, lambda w, z=gradient: (0.0, z), gt.State(0, ()), gt.Fixed(2))


@pytest.mark.parametrize("state", [None, gt.State(0, ())])
def test_minimize_checks_the_start(state):
    bad = (POINT.core * np.nan, POINT.factors)
    with pytest.raises(gt.NonFiniteError, match="core: expected finite"):
        gt.minimize(lambda w: (0.0, TENSOR), bad, integrator=gt.TDLRT(), state=state)


def test_libraries_do_not_mix(backend):
    if backend.name == "numpy":
        pytest.skip("NumPy is what the others are mixed with")
    core, factors = POINT
    there = backend.array(core), [backend.array(u) for u in factors]
    message = f"expected {backend.name} float64 as the other arrays, got numpy float64"
    mixed = {
        "point.factors[1]": lambda: gt.as_point((there[0], [there[1][0], *factors[1:]])),
        "b": lambda: gt.inner(there, POINT),
        "b ": lambda: gt.add(there, POINT),
        "gradient": lambda: gt.project(there, TENSOR),
        "gradient.core": lambda: gt.project(there, POINT),
        "gradient.contract(...)": lambda: gt.project(there, Contracts(np.ones((5, 2, 2)))),
    }
    for name, call in mixed.items():
        with pytest.raises(gt.BackendError, match=re.escape(f"{name.strip()}: {message}")):
            call()
    for bad in (backend.array(np.ones((2, 2), int)), backend.array(np.ones((2, 2), complex))):
        with pytest.raises(gt.BackendError, match="tensor: expected a real floating dtype"):
            gt.hosvd(bad, 1)


def test_a_module_is_no_array():
    with pytest.raises(gt.BackendError, match=r"got torch\.nn\.modules\.linear\.Linear"):
        gt.hosvd(torch.nn.Linear(2, 2), 1)
