"""Dynamical low-rank approximation: exactness, order, step control, ranks, errors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt

from .cases import ANY_SHAPE, Case, assert_close, assert_orthonormal, cases, keep_all

SHAPE = (9, 8, 7)
RNG = np.random.default_rng(5)
# JAX compiles every operation for every shape and dtype: what does not ask for it goes without.
DTYPES = dict.fromkeys(ANY_SHAPE, ("float64", "float32")) | dict.fromkeys(
    ("jax", "cupy"), ("float64",)
)
any_shape = pytest.mark.parametrize("backend", ANY_SHAPE, indirect=True)
# Skew generators: the flow Y x_i exp(t W_i) keeps ranks and singular values.
SKEW = [(lambda m: (m - m.T) / 4)(RNG.standard_normal((n, n))) for n in SHAPE]


def turning(t, y):
    """Rotation of each mode and growth by cos t, as a sum of Tucker tensors."""
    core, factors = y
    turned = [
        (core, [w @ u if i == mode else u for i, u in enumerate(factors)])
        for mode, w in enumerate(SKEW)
    ]
    return gt.Sum([*turned, gt.scale(y, math.cos(t))])


def turned(start, time):
    """Solve `turning` by the eigenvectors of the skew matrices."""
    dense = gt.to_dense(start).astype(complex)
    for mode, w in enumerate(SKEW):
        values, vectors = np.linalg.eigh(1j * w)
        rotation = (vectors * np.exp(-1j * time * values)) @ vectors.conj().T
        dense = np.moveaxis(np.tensordot(rotation, dense, (1, mode)), 0, mode)
    return math.exp(math.sin(time)) * dense.real


def relative_error(result, expected):
    return np.linalg.norm(gt.to_dense(result.point) - expected) / np.linalg.norm(expected)


def slope_of(steps, errors):
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


# Exactness.


@given(data=st.data())
@pytest.mark.parametrize("order", [1, 2])
def test_a_path_of_fixed_ranks_is_reproduced(backend, data, order):
    """The path is of the degree in time that the one-step rule integrates: the order."""
    case = data.draw(cases(backend, min_order=3, max_order=4, dtypes=DTYPES[backend.name]))
    pieces = [case.pull(case.point(stream))[1] for stream in range(3)]
    core = case.pull(case.point())[0]

    def at(t, derivative=False):
        # The first factor moves, so that the ranks stay.
        first, second, third = (factors[0] for factors in pieces)
        moving = second + 2 * t * third if derivative else first + t * second + t**2 * third
        if order == 1:
            moving = second if derivative else first + t * second
        return case.put(core, [moving, *pieces[0][1:]])

    result = gt.integrate(
        lambda t, y: at(t, derivative=True), at(0.0), (0.0, 1.0), order=order, step=1.0
    )
    assert_close(case.dense(result.point), case.dense(at(1.0)), case.tol)
    assert_orthonormal(case, result.point)
    assert all(r <= s for r, s in zip(result.point.ranks, case.ranks, strict=True))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_paths_in_modes_larger_than_the_bases_of_a_step(order, mode):
    """At order 2 the second derivative points out of the bases of the first stage."""
    core, factors = gt.testing.random_point(SHAPE, (1, 1, 1), seed=1)
    others = [gt.testing.random_point(SHAPE, (1, 1, 1), seed=s).factors[mode] for s in (2, 3)]

    def at(t, derivative=False):
        powers = (0.0, 1.0, 2.0 * t) if derivative else (1.0, t, t**2)
        terms = zip(powers[: order + 1], (factors[mode], *others), strict=False)
        moving = sum(power * u for power, u in terms)
        return gt.TuckerPoint(core, (*factors[:mode], moving, *factors[mode + 1 :]))

    result = gt.integrate(
        lambda t, y: at(t, derivative=True), at(0.0), (0.0, 1.0), order=order, step=1.0
    )
    assert_close(gt.to_dense(result.point), gt.to_dense(at(1.0)), 1e-13)
    assert result.history[0].defect < 1e-7


@any_shape
@given(data=st.data())
@pytest.mark.parametrize("order", [1, 2])
def test_at_full_ranks_it_is_the_explicit_rule(backend, data, order):
    case = data.draw(cases(backend, max_order=3))
    matrix = case.normal(*case.shape, stream=7)

    def dense_field(t, y):
        return np.sin(y + t) + t * matrix

    def field(t, y):
        return case.array(dense_field(t, case.dense(y)))

    start = gt.hosvd(case.array(case.normal(*case.shape)), keep_all)
    y, h = case.dense(start), 0.25
    expected = y + h * dense_field(0.5, y)
    if order == 2:
        expected = y + h * dense_field(0.5 + h / 2, y + h / 2 * dense_field(0.5, y))
    result = gt.integrate(field, start, (0.5, 0.75), order=order, step=h, ranks=keep_all)
    assert_close(case.dense(result.point), expected, case.tol)
    (record,) = result.history
    assert record.defect <= math.sqrt(case.eps) * 10 * np.linalg.norm(dense_field(0.5, y))
    assert record.evaluations == order


@any_shape
def test_zero_is_left_and_reached(backend):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    there = case.point()
    zero = gt.scale(there, 0.0)
    for order in (1, 2):
        left = gt.integrate(lambda t, y: there, zero, (0, 1), order=order, tolerance=1e-3)
        assert_close(case.dense(left.point), case.dense(there), 1e-3)
        back = gt.integrate(lambda t, y: there, left.point, (1, 0), order=order, step=0.5)
        assert np.linalg.norm(case.dense(back.point)) <= 1e-10 * gt.norm(there)
        assert [record.length for record in back.history] == [-0.5, -0.5]


# The forms of a field.


@any_shape
@given(data=st.data())
def test_all_forms_of_a_field_are_one(backend, data):
    case = data.draw(cases(backend))
    start, a, b = case.point(), case.point(1), case.point(2)
    dense = case.array(case.dense(a) + case.dense(b))

    class Opaque:
        def contract(self, factors, skip):
            return gt.Sum([dense]).contract(factors, skip)

    values = {
        "dense": dense,
        "Tucker": gt.add(a, b),
        "sum": gt.Sum([a, b]),
        "mixed": gt.Sum([gt.Sum([case.array(case.dense(a))]), b]),
        "opaque": Opaque(),
    }
    results = {
        label: gt.integrate(lambda t, y, value=value: value, start, (0, 0.5), step=0.5)
        for label, value in values.items()
    }
    expected = results.pop("dense")
    size = np.linalg.norm(case.dense(expected.point))
    for label, result in results.items():
        got, wanted = result.history[0], expected.history[0]
        # New directions that are rounding only may differ, and with them what truncation cuts.
        assert abs(np.linalg.norm(case.dense(result.point)) - size) <= 100 * case.tol * size
        if label == "opaque":
            assert math.isnan(got.defect)
        else:
            assert got.defect == pytest.approx(wanted.defect, abs=20 * math.sqrt(case.eps) * size)


def test_the_defect_is_what_the_bases_do_not_hold():
    start = gt.testing.random_point((8, 7, 6), (2, 2, 2), seed=1)
    value = np.random.default_rng(2).standard_normal((8, 7, 6))
    for form in (value, gt.hosvd(value, 8), gt.Sum([value / 2, gt.hosvd(value / 2, 8)])):
        result = gt.integrate(
            lambda t, y, form=form: form, start, (0, 1), order=1, step=1, ranks=keep_all
        )
        left = gt.to_dense(result.point) - gt.to_dense(start)
        defect = np.linalg.norm(value - left)
        assert defect > 1.0
        assert result.history[0].defect == pytest.approx(defect, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_the_defect_of_a_sum_knows_no_scale_in_single_precision(scale):
    start = gt.testing.random_point((8, 7, 6), (2, 2, 2), seed=1)
    value = np.random.default_rng(2).standard_normal((8, 7, 6))

    def defect(dtype, scale):
        core, factors = gt.scale(start, scale)
        point = gt.TuckerPoint(core.astype(dtype), tuple(u.astype(dtype) for u in factors))
        field = gt.Sum([(scale * value).astype(dtype), point])
        return gt.integrate(lambda t, y: field, point, (0, 1), step=1).history[0].defect

    assert defect("f4", scale) == pytest.approx(scale * defect("f8", 1.0), rel=1e-3)


# Order.


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("smallest", [1.0, 1e-4, 1e-12])
def test_order_of_convergence(order, smallest):
    """The error does not know the singular values: it is the same for all of them."""
    values = np.geomspace(1.0, smallest, 4)
    start = gt.testing.random_point(SHAPE, (4, 4, 4), seed=1, singular_values=values)
    steps = [1 / 16, 1 / 32, 1 / 64]
    expected = turned(start, 1.0)
    errors = [
        relative_error(gt.integrate(turning, start, (0, 1), order=order, step=h), expected)
        for h in steps
    ]
    assert slope_of(steps, errors) == pytest.approx(order, abs=0.15)
    assert errors[-1] < (0.1 if order == 1 else 2e-3)


def test_order_in_the_time_of_the_field():
    """A field that depends on time alone shows where in the step it is asked for."""
    start, velocity = (gt.testing.random_point(SHAPE, (3, 3, 3), seed=s) for s in (1, 2))
    steps = [1 / 4, 1 / 8, 1 / 16]
    expected = gt.to_dense(start) + math.sin(2.0) * gt.to_dense(velocity)
    for order in (1, 2):
        errors = [
            relative_error(
                gt.integrate(
                    lambda t, y: gt.scale(velocity, math.cos(t)),
                    start,
                    (0, 2),
                    order=order,
                    step=h,
                    ranks=gt.Tolerance(1e-10),
                ),
                expected,
            )
            for h in steps
        ]
        assert slope_of(steps, errors) == pytest.approx(order, abs=0.15)


# Step control.


@pytest.mark.parametrize(("order", "tolerances"), [(1, (0.1, 0.03)), (2, (1e-2, 1e-3, 1e-4))])
def test_the_error_follows_the_tolerance(order, tolerances):
    start = gt.testing.random_point(SHAPE, (2, 2, 2), seed=3)
    expected = turned(start, 1.0)
    counts = []
    for tolerance in tolerances:
        result = gt.integrate(turning, start, (0, 1), order=order, tolerance=tolerance)
        error = relative_error(result, expected)
        assert tolerance / 50 <= error <= tolerance
        cut = sum(r.truncation for r in result.history) / gt.norm(start)
        assert cut <= 3 * tolerance  # the tensor grows by e
        counts.append(len(result.history))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_steps_grow_where_the_solution_is_smooth():
    """A fast transient, then nothing: the steps follow."""
    start = gt.testing.random_point((6, 5), (2, 2), seed=1)

    def field(t, y):
        return gt.scale(y, -50.0 if t < 0.1 else -0.1)

    result = gt.integrate(field, start, (0.0, 5.0), tolerance=1e-3)
    early = [r.length for r in result.history if r.time < 0.09]
    late = [r.length for r in result.history if r.time > 1.0]
    assert max(late) > 20 * max(early)
    assert result.history[-1].time == 5.0
    expected = math.exp(-5.0 - 0.49) * gt.to_dense(start)
    assert relative_error(result, expected) < 0.05


def test_a_first_step_too_long_is_taken_back():
    start = gt.testing.random_point((6, 5), (2, 2), seed=1)
    asked = []

    def field(t, y):
        asked.append(t)
        return gt.scale(y, -10.0)

    result = gt.integrate(field, start, (0.0, 1.0), step=1.0, tolerance=1e-3)
    assert result.history[0].rejected >= 2
    assert result.history[0].length < 0.1
    assert len(asked) == sum(r.evaluations for r in result.history)
    assert relative_error(result, math.exp(-10.0) * gt.to_dense(start)) < 1e-2


def test_a_step_into_infinity_is_taken_back():
    start = gt.testing.random_point((6, 5), (2, 2), seed=1)

    def field(t, y):
        value = -(gt.to_dense(y) ** 3)
        return value if np.abs(value).max() < 1e3 else value * np.inf

    result = gt.integrate(field, gt.scale(start, 2.0), (0.0, 1.0), step=1e3, tolerance=1e-2)
    assert np.isfinite(gt.to_dense(result.point)).all()
    with pytest.raises(gt.NonFiniteError, match="time 0: "):
        gt.integrate(field, gt.scale(start, 1e3), (0.0, 1e3), tolerance=1e-2)


def test_time_runs_backwards():
    start = gt.testing.random_point(SHAPE, (2, 2, 2), seed=3)
    there = gt.integrate(turning, start, (0, 1), tolerance=1e-4)
    back = gt.integrate(turning, there.point, (1, 0), tolerance=1e-4)
    assert back.history[-1].time == 0.0
    assert all(record.length < 0 for record in back.history)
    assert relative_error(back, gt.to_dense(start)) < 3e-4


def test_fixed_steps_do_not_gather_the_rounding_of_time():
    # Times are multiples of 2.4e-7 here.
    begin, end = 1.7e9, 1.7e9 + 1e-4
    result = gt.integrate(lambda t, y: gt.scale(y, -1.0), POINT, (begin, end), step=1e-6)
    count = len(result.history)
    assert count == pytest.approx(100, abs=1)
    assert [record.time for record in result.history] == [
        begin + (k + 1) * ((end - begin) / count) for k in range(count)
    ]


# Ranks.


def test_ranks_grow_and_shrink():
    """A source of rank 3 is switched off, then all decays but one direction."""
    n = 12
    rates = np.full(n, 5.0)
    rates[0] = 0.0
    source = gt.testing.random_point((n, n, n), (3, 3, 3), seed=4)

    def field(t, y):
        core, factors = y
        decays = [
            (core, [-rates[:, None] * u if i == mode else u for i, u in enumerate(factors)])
            for mode in range(3)
        ]
        return gt.Sum([*decays, gt.scale(source, 50.0 if t < 0.2 else 0.0)])

    start = gt.hosvd(np.ones((n, n, n)), 1)
    seen = []
    result = gt.integrate(
        field,
        start,
        (0.0, 3.0),
        tolerance=1e-2,
        callback=lambda *pair: seen.append(pair),
    )
    size = gt.norm(start)
    for point, record in seen:
        before, size = size, gt.norm(point)
        # The tolerance is spent once, and steps are short until the bases hold what is new.
        assert record.truncation <= 1.01e-2 * record.length / 3.0 * size
        assert record.length * record.defect <= 1.01e-2 * max(before, size)
    assert max(record.defect for record in result.history) > 1.0
    assert max(record.truncation for record in result.history) > 0.0
    most = max(max(record.ranks) for record in result.history)
    assert 4 <= most <= 6
    assert max(result.point.ranks) < most
    capped = gt.integrate(field, start, (0.0, 0.2), step=0.01, ranks=gt.Tolerance(1e-3, cap=2))
    assert max(max(record.ranks) for record in capped.history) == 2


@any_shape
def test_history_and_callback(backend):
    case = Case(backend, "float32", (5, 3, 4), (2, 2, 3), 0)
    seen = []

    def watch(point, record):
        seen.append((point, record))
        return len(seen) == 3

    result = gt.integrate(
        lambda t, y: gt.scale(y, -1.0), case.point(), (0, 1), step=0.26, callback=watch
    )
    assert result.stopped == "callback"
    assert result.history == [record for _, record in seen]
    assert result.point is seen[-1][0]
    assert [record.time for record in result.history] == pytest.approx([0.25, 0.5, 0.75])
    assert [record.length for record in result.history] == [0.25] * 3
    for point, record in seen:
        assert record.ranks == point.ranks
        assert record.truncation <= 1e-5
        assert all(array.dtype == case.point().core.dtype for array in (point.core, *point.factors))
    go_on = gt.integrate(lambda t, y: gt.scale(y, -1.0), result.point, (0.75, 1), step=0.25)
    assert go_on.stopped == "span"
    assert go_on.history[-1].time == 1


def test_rules_with_a_schedule_are_followed():
    start = gt.testing.random_point((8, 8), (4, 4))
    rule = gt.Budget(parameters=0.3, steps=4, start=1.0)
    result = gt.integrate(lambda t, y: gt.scale(y, -1.0), start, (0, 1), step=0.2, ranks=rule)
    sizes = [sum(record.ranks) for record in result.history]
    assert sizes[-1] < sizes[0]


def test_progress_bar(capsys):
    start = gt.testing.random_point((5, 4), (2, 2))
    result = gt.integrate(lambda t, y: y, start, (0, 1), step=0.5, progress=True)
    out, shown = capsys.readouterr()
    assert out == ""
    assert "100%" in shown
    assert "ranks (2, 2)" in shown
    quiet = gt.integrate(lambda t, y: y, start, (0, 1), step=0.5)
    assert capsys.readouterr() == ("", "")
    assert quiet.history[-1].ranks == result.history[-1].ranks


# Errors.

POINT = gt.testing.random_point((5, 4, 3), (2, 2, 2))
SINGLE = gt.TuckerPoint(POINT.core.astype("f4"), tuple(u.astype("f4") for u in POINT.factors))


def returns(value):
    return lambda t, y: value


class Contracts:
    def contract(self, factors, skip):
        return np.ones((1, 1, 1))


ERRORS = {
    "order": ({"order": 3}, ValueError, "order: expected 1 or 2, got 3"),
    "orders": ({"order": [1]}, ValueError, "order: expected 1 or 2, got [1]"),
    "three times": ({"span": (0, 1, 2)}, ValueError, "span: expected two numbers"),
    "no times": ({"span": 1.0}, ValueError, "span: expected two numbers, got 1.0"),
    "one time": ({"span": (1, 1)}, ValueError, "span: expected two different finite times"),
    "endless": ({"span": (0, math.inf)}, ValueError, "span: expected two different finite"),
    "no pace": ({"step": None}, ValueError, "step: expected a length, or a tolerance"),
    "step": ({"step": 0.0}, ValueError, "step: expected a positive number, got 0.0"),
    "step nan": ({"step": math.nan}, ValueError, "step: expected a positive number, got nan"),
    "step below the rounding of time": (
        {"span": (1.7e9, 1.7e9 + 1e-5), "step": 1e-7},
        gt.StepSizeError,
        "step: expected at least 3.8e-07, to which the times 1.7e+09 to 1.7e+09 are rounded",
    ),
    "tolerance": ({"tolerance": 1e-17}, ValueError, "tolerance: expected a number from 3.6e-15"),
    "loose": ({"tolerance": 1.0}, ValueError, "to 1, got 1.0"),
    "start": ({"start": 3.0}, gt.ShapeError, "point: expected a pair"),
    "ranks": ({"ranks": "many"}, gt.RankError, "ranks: expected a rank rule"),
    "too many ranks": ({"ranks": (2, 2)}, gt.RankError, "expected 3 positive integers"),
    "field's shape": (
        {"field": returns(np.ones((5, 4)))},
        gt.ShapeError,
        "field(0, Y): expected the shape (5, 4, 3) of the tensor, got (5, 4)",
    ),
    "field's dtype": (
        {"field": returns(np.ones((5, 4, 3), "f4"))},
        gt.BackendError,
        "field(0, Y): expected numpy float64",
    ),
    "no field": ({"field": returns(None)}, gt.BackendError, "field(0, Y): expected an array"),
    "term's shape": (
        {"field": returns(gt.Sum([POINT, np.ones((5, 4, 2))]))},
        gt.ShapeError,
        "field(0, Y).terms[1]: expected the shape (5, 4, 3)",
    ),
    "term's dtype": (
        {"field": returns(gt.Sum([gt.Sum([SINGLE])]))},
        gt.BackendError,
        "field(0, Y).terms[0].terms[0].core: expected numpy float64",
    ),
    "contraction": ({"field": returns(Contracts())}, gt.ShapeError, "gradient.contract(factors"),
    "field nan": (
        {"field": returns(np.full((5, 4, 3), np.nan))},
        gt.NonFiniteError,
        "time 0: field(0, Y): expected finite numbers",
    ),
    "later nan": (
        {"field": lambda t, y: gt.to_dense(y) * (1 if t < 0.5 else np.nan)},
        gt.NonFiniteError,
        "time 0.5: field(0.5, Y): expected finite numbers",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, kind, message = ERRORS[name]
    arguments = {
        "field": lambda t, y: gt.scale(y, -1.0),
        "start": POINT,
        "span": (0.0, 1.0),
        "step": 0.25,
    } | changes
    with pytest.raises(kind) as caught:
        gt.integrate(**arguments)
    assert message in str(caught.value)


def test_a_sum_needs_terms():
    with pytest.raises(ValueError, match="terms: expected at least one tensor, got none"):
        gt.Sum([])


def test_a_solution_that_blows_up_is_an_error():
    start = gt.hosvd(np.ones((3, 3)), 1)  # Y' = Y^2 entry by entry ends at time 1
    points = []
    with pytest.raises(gt.StepSizeError, match=r"time 1.* too short to move the time"):
        gt.integrate(
            lambda t, y: gt.to_dense(y) ** 2,
            start,
            (0.0, 2.0),
            tolerance=0.05,
            callback=lambda point, record: points.append(record.time),
        )
    assert 0.95 < points[-1] < 1.05


def test_errors_of_the_field_pass_unchanged():
    def field(t, y):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gt.integrate(field, POINT, (0, 1), step=0.5)
