"""Following a step at fixed ranks without a decomposition; many tensors at once."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt
from geotucker import _ops
from geotucker._geometry import augment_all, right_bases, right_bases_of
from geotucker._hosvd import follow

from .cases import Case, assert_close, assert_orthonormal, cases


def stepped(case, point, step):
    """Return the point after a step in the tangent space, in wide bases."""
    z = case.array(case.normal(*case.shape, stream=5))
    tangent = gt.project(point, z)
    wide = gt.augment(point, tangent.factors)
    moved = gt.add(point, gt.scale(gt.tangent_to_point(point, tangent), step))
    # What lies in the tangent space lies in the wide bases.
    core = _ops.multi_mode_product(
        moved.core, [w.T @ u for w, u in zip(wide.factors, moved.factors, strict=True)]
    )
    return gt.TuckerPoint(core, wide.factors)


@given(data=st.data())
def test_keeps_ranks_and_orthonormal_bases(backend, data):
    case = data.draw(cases(backend))
    point = case.point()
    wide = stepped(case, point, 0.1)
    (cut,) = follow([wide], [point.ranks], [right_bases(point.core)])
    assert cut.point.ranks == point.ranks and cut.error_bound == math.inf
    assert_orthonormal(case, cut.point)
    # The truncation is the projection on the bases U_i P_i.
    turned = [
        backend.numpy(u).astype(np.float64) @ backend.numpy(p).astype(np.float64)
        for u, p in zip(wide.factors, cut.rotations, strict=True)
    ]
    seen = case.dense(wide)
    for mode, u in enumerate(turned):
        seen = np.moveaxis(np.tensordot(u @ u.T, seen, (1, mode)), 0, mode)
    assert_close(case.dense(cut.point), seen, case.tol)


@given(data=st.data())
def test_without_a_step_nothing_changes(backend, data):
    case = data.draw(cases(backend))
    point = case.point()
    wide = stepped(case, point, 0.0)
    (cut,) = follow([wide], [point.ranks], [right_bases(point.core)])
    assert_close(case.dense(cut.point), case.dense(point), case.tol)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 7)])
def test_agrees_with_the_best_truncation_to_first_order(backend, shape):
    # Both are retractions: their difference, and that from the step itself, is of second order.
    case = Case(backend, "float64", shape, (3,) * len(shape), 1)
    point = case.point()
    errors = []
    for step in (1e-2, 1e-3):
        wide = stepped(case, point, step)
        (cut,) = follow([wide], [point.ranks], [right_bases(point.core)])
        (best,) = gt.truncate([wide], gt.Fixed(point.ranks))
        errors.append(np.linalg.norm(case.dense(cut.point) - case.dense(best.point)))
        away = np.linalg.norm(case.dense(cut.point) - case.dense(wide))
        assert away <= 10 * np.linalg.norm(case.dense(best.point) - case.dense(wide)) + 1e-12
    assert errors[1] <= 0.02 * errors[0] + 1e-12


def test_a_basis_may_turn_completely(backend):
    # The new direction is all that is left in its column of K = U S.
    case = Case(backend, "float64", (6, 5), (1, 1), 0)
    point = case.point()
    wide = gt.augment(point, [case.array(case.normal(n, 1, stream=9)) for n in case.shape])
    core = case.array(np.array([[0.0, 0.0], [2.0, 0.0]]))
    right = right_bases(point.core)
    (cut,) = follow([gt.TuckerPoint(core, wide.factors)], [(1, 1)], [right])
    new = backend.numpy(wide.factors[0])[:, 1]
    assert abs(abs(new @ backend.numpy(cut.point.factors[0])[:, 0]) - 1) < 1e-12


def test_many_points_at_once_are_as_one_by_one(backend):
    shapes = [(5, 3, 4), (5, 3, 4), (6, 5), (6, 5)]
    many = [
        Case(backend, "float64", shape, (2,) * len(shape), seed)
        for seed, shape in enumerate(shapes)
    ]
    points = [case.point() for case in many]
    directions = [
        [case.array(case.normal(n, 2, stream=3 + i)) for i, n in enumerate(case.shape)]
        for case in many
    ]
    wides = augment_all(points, directions)
    found = right_bases_of([(p.core, range(p.order)) for p in points])
    cuts = follow(wides, [p.ranks for p in points], [list(f.values()) for f in found])
    together = gt.truncate(wides, gt.Fixed(2))
    for i, (case, point) in enumerate(zip(many, points, strict=True)):
        alone = gt.augment(point, directions[i])
        for a, b in zip(wides[i].factors, alone.factors, strict=True):
            assert_close(backend.numpy(a), backend.numpy(b), case.tol)
        (one,) = follow([alone], [point.ranks], [right_bases(point.core)])
        assert_close(case.dense(cuts[i].point), case.dense(one.point), case.tol)
        (one,) = gt.truncate([alone], gt.Fixed(2))
        assert_close(case.dense(together[i].point), case.dense(one.point), case.tol)


def test_one_that_is_not_finite_spoils_no_other(backend):
    case = Case(backend, "float64", (6, 5), (2, 2), 0)
    points = [case.point(), case.point(stream=1), case.point(stream=2)]
    good = [case.normal(n, 2, stream=3) for n in case.shape]
    bad = [good[0], np.where(np.arange(2) == 1, np.nan, good[1])]
    stacks = [[case.array(d) for d in own] for own in (good, bad, good)]
    wides = augment_all(points, stacks)
    assert wides[1] is None
    for index in (0, 2):
        assert_orthonormal(case, wides[index])
        assert_close(case.dense(wides[index]), case.dense(points[index]), case.tol)


def test_one_question_answers_for_many_arrays(backend):
    case = Case(backend, "float64", (3,), (1,), 0)
    arrays = [case.array(np.array(values)) for values in ([1.0, -7.0], [np.inf, 1.0], [])]
    assert _ops.largest([*arrays, case.array(np.array([np.nan, 9.0]))])[:3] == [7.0, math.inf, 0.0]
    assert math.isnan(_ops.largest([case.array(np.array([np.nan, 9.0]))])[0])


def test_dependent_directions_get_orthonormal_completions_among_others(backend):
    case = Case(backend, "float64", (8, 7), (2, 2), 0)
    points = [case.point(), case.point(stream=1)]
    inside = [u @ u.T @ u for u in points[0].factors]  # nothing new in them
    wides = augment_all(points, [inside, [case.array(case.normal(n, 2)) for n in (8, 7)]])
    for wide, point in zip(wides, points, strict=True):
        assert wide.ranks == (4, 4)
        assert_orthonormal(case, wide)
        assert_close(case.dense(wide), case.dense(point), case.tol)
