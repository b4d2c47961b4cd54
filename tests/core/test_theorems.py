"""The theorems of arXiv:2305.19059 as properties: descent, convergence, order, robustness."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt

from . import reference
from .cases import Case, assert_close, cases, keep_all, quadratic, step, taus

SMALL = [
    pytest.param((6, 5), (2, 2), id="matrix"),
    pytest.param((5, 3, 4), (2, 2, 3), id="order3"),
]


def ill_conditioned(case, smallest):
    """Return a point with singular values from 1 to `smallest` in bases that hide them."""
    core, factors = case.pull(case.point())
    turns = [
        np.linalg.qr(case.normal(r, r, stream=60 + r + i))[0] for i, r in enumerate(core.shape)
    ]
    scales = [smallest ** np.linspace(0.0, 1.0, r) for r in core.shape]
    core = reference.transform(core, [m * s for m, s in zip(turns, scales, strict=True)])
    return case.put(core / np.linalg.norm(core), factors)


@pytest.mark.parametrize("integrator", [gt.TDLRT, gt.Standard, gt.Tangent])
@given(
    data=st.data(),
    share=st.floats(0.05, 0.95),
    smallest=st.sampled_from([1.0, 1e-6, 1e-12]),
)
def test_theorem_3_1_descent(backend, data, integrator, share, smallest):
    # L is 1-smooth and lr < 1/L: L(W1) <= L(W0) - alpha lr + beta tau, where alpha and beta do
    # not know the singular values of W0.
    case, tau = data.draw(cases(backend, dtypes=["float64"])), data.draw(taus(backend))
    weights = np.abs(case.normal(*case.shape, stream=41)) / 6 + 0.1
    weights, smoothness, lr = weights / weights.max(), 1.0, share
    objective, gradient = quadratic(case, case.normal(*case.shape, stream=42), weights)
    point = ill_conditioned(case, smallest)
    before = objective(point)[0]
    whole = step(integrator(lr), point, objective, keep_all).point
    result = step(integrator(lr), point, objective, gt.Tolerance(tau))
    # The projected gradient is a part of the one seen through the augmented bases.
    alpha = (1 - smoothness * lr / 2) * result.report.gradient_norm**2
    size = np.linalg.norm(case.dense(whole))
    slope = np.linalg.norm(gradient(case.dense(whole)))
    beta = slope * size + smoothness / 2 * tau * size**2
    assert objective(whole)[0] <= before - alpha * lr + 1e-10 * before
    assert objective(result.point)[0] <= before - alpha * lr + beta * tau + 1e-10 * before


@pytest.mark.parametrize("integrator", [gt.TDLRT, gt.Tangent])
@pytest.mark.parametrize(("shape", "ranks"), SMALL)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_theorem_3_2_convergence(backend, integrator, shape, ranks, noise):
    # Robbins-Monro steps: sum lr = inf, sum lr^2 < inf, gradients true in the mean. At a constant
    # step TDLRT would stop at O(lr): from order 3 on, HOSVD truncation turns the bases by lr^2.
    case = Case(backend, "float64", shape, ranks, 0)
    target = case.dense(case.point(1)) + 0.1 * case.normal(*shape, stream=42)
    exact, gradient = quadratic(case, target)
    rng = np.random.default_rng(1)

    def objective(w):
        loss, _ = exact(w)
        z = gradient(case.dense(w)) + noise * rng.standard_normal(shape)
        return loss, case.array(z)

    result = gt.minimize(
        objective,
        case.point(),
        integrator=integrator(lambda k: 0.8 / (1 + 0.1 * k) ** 0.8),
        ranks=ranks,
        steps=300 if backend.name == "numpy" else 60,  # enough to see that others do the same
    )
    slopes = []
    for point in (case.point(), result.point):
        z = gradient(case.dense(point))
        slopes.append(np.linalg.norm(reference.project(*case.pull(point), z)))
    assert slopes[1] < (2e-3 if noise == 0.0 else 0.1) * slopes[0]


def distance(case, point, integrator, rule, objective, steps, exact):
    """Return the distance to the flow after a time of 1."""
    result = gt.minimize(objective, point, integrator=integrator, ranks=rule, steps=steps)
    return np.linalg.norm(case.dense(result.point) - exact)


@pytest.mark.parametrize("integrator", [gt.TDLRT, gt.Standard])
@pytest.mark.parametrize(("shape", "ranks"), SMALL)
def test_theorem_3_3_order_against_the_full_flow(backend, shape, ranks, integrator):
    # dW/dt = A - W stays in ranks 2r, which the integrator is free to take: no eps, and with
    # tau ~ lr^2 the distance c1 eps + c2 lr + c3 tau / lr is of order one.
    case = Case(backend, "float64", shape, ranks, 3)
    point, target = case.point(), case.dense(case.point(1))
    objective, _ = quadratic(case, target)
    exact = target + math.exp(-1.0) * (case.dense(point) - target)
    for tau in (0.0, 0.1):
        rules = [gt.Tolerance(max(tau / steps**2, 1e-12)) for steps in (8, 16)]
        errors = [
            distance(case, point, integrator(1 / steps), rule, objective, steps, exact)
            for steps, rule in zip((8, 16), rules, strict=True)
        ]
        assert 1.6 < errors[0] / errors[1] < 2.5
        assert errors[0] < 0.2 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "integrator",
    [gt.TDLRT, gt.Standard, lambda lr: gt.Standard(lr, augmented=False), gt.Tangent],
    ids=["tdlrt", "standard", "unconventional", "tangent"],
)
@pytest.mark.parametrize(("shape", "ranks"), SMALL)
def test_theorem_3_3_order_against_the_projected_flow(backend, shape, ranks, integrator):
    case = Case(backend, "float64", shape, ranks, 1)
    point = case.point()
    objective, gradient = quadratic(case, 0.5 * case.normal(*shape, stream=42))
    exact = reference.flow(case.dense(point), ranks, gradient, 1.0, 80)
    errors = [
        distance(case, point, integrator(1 / steps), ranks, objective, steps, exact)
        for steps in (16, 32)
    ]
    assert 1.6 < errors[0] / errors[1] < 2.5


@pytest.mark.parametrize(
    ("integrator", "worst"),
    [
        pytest.param(gt.TDLRT, 2.0, id="tdlrt"),
        pytest.param(gt.Standard, 2.0, id="standard"),
        pytest.param(gt.Tangent, 5.0, id="tangent"),  # its bound has more of c1 eps
    ],
)
@pytest.mark.parametrize(("shape", "ranks"), SMALL)
def test_the_error_of_a_step_ignores_singular_values(backend, shape, ranks, integrator, worst):
    case, lr = Case(backend, "float64", shape, ranks, 0), 0.02
    errors = []
    for smallest in (0.25, 1e-3, 1e-6, 1e-9, 1e-12):
        point = ill_conditioned(case, smallest)
        bases = [
            np.linalg.qr(u + 1e-2 * case.normal(*u.shape, stream=90 + i))[0]
            for i, u in enumerate(case.pull(point)[1])
        ]
        target = reference.reconstruct(case.normal(*ranks, stream=95), bases)
        objective, gradient = quadratic(case, target)
        exact = reference.flow(case.dense(point), ranks, gradient, lr, 40)
        moved = step(integrator(lr), point, objective, ranks).point
        errors.append(np.linalg.norm(case.dense(moved) - exact))
    assert max(errors) <= worst * errors[0], errors
    assert errors[0] <= lr**2 * np.linalg.norm(target)


@pytest.mark.parametrize("integrator", [gt.TDLRT, gt.Tangent, gt.Standard])
@pytest.mark.parametrize("smallest", [1e-12, 1e-16, 0.0])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_no_direction_is_lost_with_a_singular_value(backend, dtype, smallest, integrator):
    # P(W) Z lies in the new bases, also where W is rank-deficient and any row space will do.
    case = Case(backend, dtype, (6, 5), (2, 2), 0)
    point = ill_conditioned(case, smallest)
    tangent = gt.project(point, case.array(case.normal(6, 5, stream=3)))
    z = case.array(case.normal(6, 5, stream=3))
    bases = case.pull(step(integrator(0.1), point, lambda w: (0.0, z), keep_all).point)[1]
    expected = case.tangent(point, tangent)
    assert_close(reference.seen_through(expected, bases), expected, case.tol)
