"""Sensitivities: what they are made of, and whether they predict what truncation costs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt
from geotucker._integrators._base import observed
from geotucker._ranks import Sensitivities, sensitivity
from geotucker._ranks._sensitivity import MEMORY


@given(seed=st.integers(0, 2**16), ranks=st.sampled_from([(2, 3), (3, 2, 4), (2, 2, 2, 2)]))
def test_they_are_observed_in_the_bases_before_these_were_extended(seed, ranks):
    rng = np.random.default_rng(seed)
    wide = tuple(2 * rank for rank in ranks)
    core, gradient, step = (rng.standard_normal(wide) for _ in range(3))
    core[tuple(slice(rank, None) for rank in ranks)] = 0.0
    (facts,) = observed([core], [gradient], [step], [ranks])
    narrow = gradient[tuple(slice(rank) for rank in ranks)]
    expected = np.sum(core**2) * np.mean(narrow**2)
    assert facts.sensitivity == pytest.approx(expected, rel=1e-12)
    assert facts.previous == ranks


@given(seed=st.integers(0, 2**16))
def test_they_do_not_depend_on_the_gauge(seed):
    rng = np.random.default_rng(seed)
    core, gradient = rng.standard_normal((2, 3, 4, 2))
    turns = [np.linalg.qr(rng.standard_normal((n, n)))[0] for n in core.shape]
    turned = [np.einsum("ijk,ai,bj,ck->abc", t, *turns) for t in (core, gradient)]
    one, other = (
        observed([c], [g], [g], [c.shape])[0].sensitivity for c, g in ((core, gradient), turned)
    )
    assert one == pytest.approx(other, rel=1e-12)


@given(values=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=MEMORY))
def test_the_mean_is_one_of_all_at_first(values):
    seen = Sensitivities()
    for value in values:
        seen = seen.after({"a": value, "b": None})
    assert seen.means == pytest.approx({"a": np.mean(values)}, rel=1e-9, abs=1e-9)
    assert seen.counts == {"a": len(values)}


def test_the_mean_forgets():
    seen = Sensitivities()
    for _ in range(MEMORY):
        seen = seen.after({"a": 1.0})
    for _ in range(10 * MEMORY):
        seen = seen.after({"a": 2.0})
    assert seen.means["a"] == pytest.approx(2.0, rel=1e-3)
    assert seen.counts == {"a": MEMORY}


@pytest.mark.parametrize("norms", [(np.inf, 1.0), (np.nan, 1.0), (1e200, 1e200)])
def test_what_is_no_number_is_left_out(norms):
    assert sensitivity(*norms, 4) is None


def test_they_predict_what_noise_in_a_tensor_costs():
    """A sum of two least squares, at its minimum, with samples of different scales."""
    rng = np.random.default_rng(0)
    scales, costs, found = (1.0, 5.0), [], []
    for scale in scales:
        x = scale * rng.standard_normal((4000, 6))
        w = rng.standard_normal((6, 3))
        residuals = rng.standard_normal((4000, 3))  # of the outputs, with variance 1
        gradients = -x[:, :, None] * residuals[:, None, :]  # of 1/2 |y - w^T x|^2, per sample
        found.append(np.mean([sensitivity(np.linalg.norm(w), np.linalg.norm(g), g.size)
                              for g in gradients]))  # fmt: skip
        errors = rng.standard_normal((50, 6, 3))
        errors *= 0.1 * np.linalg.norm(w) / np.linalg.norm(errors, axis=(1, 2), keepdims=True)
        costs.append(np.mean([0.5 * np.mean(np.sum((x @ e) ** 2, axis=1)) for e in errors]))
    # A relative error e costs e^2 s / 2: the Fisher information is the Hessian here.
    assert costs == pytest.approx([0.5 * 0.1**2 * s for s in found], rel=0.15)


def test_a_rule_is_told():
    seen = []

    def rule(spectra):
        seen.append(spectra[0].facts.sensitivity)
        return [(2, 2)]

    def objective(w):
        residual = gt.to_dense(w) - target
        return float(np.sum(residual**2)) / 2, residual

    target = np.diag([3.0, 2.0, 1.0])
    start = gt.hosvd(np.eye(3), 2)
    gt.minimize(objective, start, integrator=gt.TDLRT(0.1), ranks=rule, steps=2)
    assert all(number > 0.0 for number in seen)
