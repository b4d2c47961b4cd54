"""The driver: history, stopping, callbacks, going on, the progress bar, errors that name a step."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt

from . import reference
from .cases import ANY_SHAPE, Case, arrays_in, assert_close, assert_orthonormal, cases, quadratic

TDLRT = gt.TDLRT(0.3)


def problem(backend, dtype="float64"):
    case = Case(backend, dtype, (5, 3, 4), (2, 2, 3), 0)
    return case, quadratic(case, case.normal(5, 3, 4, stream=42))[0]


@pytest.fixture
def numpy_problem():
    """Return a point and an objective where the array library does not matter."""
    target = np.random.default_rng(0).standard_normal((5, 4))

    def objective(w):
        residual = gt.to_dense(w) - target
        return float(np.sum(residual**2)) / 2, residual

    return gt.testing.random_point((5, 4), (2, 2)), objective


@given(data=st.data())
def test_a_tensor_of_low_rank_is_found(backend, data):
    case = data.draw(cases(backend))
    target = case.dense(case.point(1))
    objective, _ = quadratic(case, target)
    start = case.point()
    rule = gt.Tolerance(1e-8 if case.dtype == "float64" else 1e-4)
    rule = rule if backend.name in ANY_SHAPE else case.ranks
    result = gt.minimize(objective, start, integrator=gt.TDLRT(0.6), ranks=rule, steps=40)
    size = np.linalg.norm(target)
    assert_close(case.dense(result.point), target, 1e-6 if case.dtype == "float64" else 1e-2)
    assert abs(result.loss - objective(result.point)[0]) <= case.tol * size**2
    assert_orthonormal(case, result.point)


def test_history_reports_every_step(backend):
    case, objective = problem(backend)
    seen = []
    result = gt.minimize(
        objective,
        case.point(),
        integrator=TDLRT,
        ranks=gt.Tolerance(0.1, cap=3),
        steps=5,
        callback=lambda point, report: seen.append((point, report)),
    )
    assert result.stopped == "steps"
    assert result.state.step == 5
    assert [report for _, report in seen] == result.history
    assert seen[-1][0] is result.point
    before = [case.point(), *(point for point, _ in seen[:-1])]
    for point, (after, report) in zip(before, seen, strict=True):
        assert report.loss == pytest.approx(objective(point)[0], rel=1e-12)
        assert report.ranks == after.ranks
        tensor = case.dense(point) - 0.3 * reference.seen_through(
            objective(point)[1], reference.augmented_bases(*case.pull(point), objective(point)[1])
        )
        assert np.linalg.norm(case.dense(after) - tensor) <= report.error_bound * (1 + 1e-9)
    assert result.loss == pytest.approx(objective(result.point)[0], rel=1e-12)
    assert result.loss < result.history[-1].loss


def test_going_on_from_a_state_equals_an_unbroken_run(backend):
    case, objective = problem(backend)
    settings = {"integrator": gt.TDLRT(lambda k: 0.2 / (1 + k), gt.HeavyBall(0.9)), "ranks": 2}
    unbroken = gt.minimize(objective, case.point(), steps=6, **settings)
    half = gt.minimize(objective, case.point(), steps=3, **settings)
    rest = gt.minimize(objective, half.point, steps=3, state=half.state, **settings)
    assert half.history + rest.history == unbroken.history
    assert rest.loss == unbroken.loss
    assert rest.state.step == unbroken.state.step == 6
    assert len(rest.state.moments) == 1
    ends = [arrays_in((result.point, result.state.moments)) for result in (rest, unbroken)]
    for got, expected in zip(*ends, strict=True):
        assert np.array_equal(backend.numpy(got), backend.numpy(expected))


def test_start_need_not_be_orthonormal(backend):
    case, objective = problem(backend)
    core, factors = case.pull(case.point())
    loose = case.put(2.0 * core, [u @ np.diag(np.arange(1.0, u.shape[1] + 1)) for u in factors])
    result = gt.minimize(objective, loose, integrator=TDLRT, steps=0)
    assert result.history == []
    assert result.stopped == "steps"
    assert_orthonormal(case, result.point)
    assert_close(case.dense(result.point), case.dense(loose), 1e-13)
    assert result.loss == pytest.approx(objective(loose)[0], rel=1e-12)
    result = gt.minimize(objective, loose, integrator=TDLRT, steps=2)
    assert result.point.ranks == case.ranks  # by default those of the start


@pytest.mark.parametrize("answer", [True, np.True_, np.array(True), 1])
def test_callback_can_stop(numpy_problem, answer):
    start, objective = numpy_problem
    calls = []

    def callback(point, report):
        calls.append(report)
        return answer if len(calls) == 3 else None

    result = gt.minimize(objective, start, integrator=TDLRT, callback=callback)
    assert result.stopped == "callback"
    assert len(result.history) == len(calls) == 3


def test_stop_sees_the_history(numpy_problem):
    start, objective = numpy_problem
    lengths = []

    def stop(history):
        lengths.append(len(history))
        return history[-1].loss < 0.8 * history[0].loss

    result = gt.minimize(objective, start, integrator=TDLRT, stop=stop)
    assert result.stopped == "stop"
    assert lengths == list(range(1, len(result.history) + 1))
    losses = [report.loss for report in result.history]
    assert losses[-1] < 0.8 * losses[0] <= losses[-2]


def reports(losses, norms=None):
    norms = [1.0] * len(losses) if norms is None else norms
    return [gt.Report(a, b, (1,), 0.0, 1) for a, b in zip(losses, norms, strict=True)]


def test_when_flat():
    small = gt.when_flat(gradient_norm=0.1)
    assert not small(reports([1.0, 1.0], [1.0, 0.11]))
    assert small(reports([1.0, 1.0], [1.0, 0.1]))
    flat = gt.when_flat(relative_change=0.01, window=2)
    assert not flat(reports([1.0, 1.0]))  # the window is longer than the history
    assert flat(reports([5.0, 1.0, 1.0, 1.0]))
    assert flat(reports([-1.0, -1.005, -1.0]))
    assert not flat(reports([1.0, 1.02, 1.0]))  # it moved and came back
    assert not flat(reports([5.0, 1.0, 1.0]))
    never = gt.when_flat()
    assert not never(reports([1.0] * 30))
    assert never(reports([1.0], [0.0]))


def test_when_flat_ends_a_run(numpy_problem):
    start, objective = numpy_problem
    rule = gt.when_flat(gradient_norm=1e-6)
    result = gt.minimize(objective, start, integrator=TDLRT, stop=rule, steps=1000)
    assert result.stopped == "stop"
    assert result.history[-1].gradient_norm <= 1e-6 < result.history[-2].gradient_norm


def test_progress_bar(numpy_problem, capsys):
    start, objective = numpy_problem
    quiet = gt.minimize(objective, start, integrator=TDLRT, steps=4)
    assert capsys.readouterr().out == ""
    result = gt.minimize(objective, start, integrator=TDLRT, steps=4, progress=True)
    shown = capsys.readouterr().out
    assert f"loss {result.history[-1].loss:.3e}" in shown
    assert "ranks (2, 2)" in shown
    assert "100%" in shown
    assert result.history == quiet.history


def test_progress_bar_survives_an_early_end(numpy_problem, capsys):
    start, objective = numpy_problem
    stopped = gt.minimize(
        objective, start, integrator=TDLRT, progress=True, stop=lambda history: len(history) == 2
    )
    assert len(stopped.history) == 2
    with pytest.raises(RuntimeError, match="mine"):
        gt.minimize(fail_with(RuntimeError("mine")), start, integrator=TDLRT, progress=True)
    assert "minimize" in capsys.readouterr().out


def fail_with(error):
    def objective(w):
        raise error

    return objective


def test_progress_bar_needs_rich(numpy_problem, monkeypatch):
    start, objective = numpy_problem
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match="pip install rich"):
        gt.minimize(objective, start, integrator=TDLRT, progress=True)
    gt.minimize(objective, start, integrator=TDLRT, steps=1)


@pytest.mark.parametrize(
    ("loss", "gradient", "message"),
    [
        (np.nan, 1.0, r"step 2: loss: expected a finite number, got nan"),
        (np.inf, 1.0, r"step 2: loss: expected a finite number, got inf"),
        (1.0, np.nan, r"step 2: gradient: expected finite numbers"),
        (1.0, np.inf, r"step 2: gradient: expected finite numbers"),
    ],
)
def test_errors_name_the_step(numpy_problem, loss, gradient, message):
    start, objective = numpy_problem
    points = []

    def failing(w):
        z = objective(w)[1]
        return (1.0, z) if len(points) < 2 else (loss, gradient * z)

    with pytest.raises(gt.NonFiniteError, match=message):
        gt.minimize(
            failing, start, integrator=TDLRT, callback=lambda point, report: points.append(point)
        )
    assert len(points) == 2
    assert all(np.isfinite(gt.to_dense(point)).all() for point in points)


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_divergence_is_told(backend, ridge):
    # The loss leaves the numbers before the tensor does.
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    fit = gt.least_squares(case.array(case.normal(*case.shape)), ridge=ridge)
    message = r"step \d+: loss: expected a finite number, got inf"
    with pytest.raises(gt.NonFiniteError, match=message):
        gt.minimize(fit, case.point(), integrator=gt.TDLRT(lr=1e10), steps=50)


def test_a_state_of_another_point_is_refused(numpy_problem):
    start, objective = numpy_problem
    done = gt.minimize(objective, start, integrator=gt.ConjugateGradient(), steps=1)
    other = gt.round(start, 1)
    with pytest.raises(gt.ShapeError, match=r"state: expected moments of the ranks \(1, 1.*"):
        gt.minimize(objective, other, integrator=gt.ConjugateGradient(), state=done.state)


def test_the_last_loss_is_checked_too(numpy_problem):
    start, _ = numpy_problem
    with pytest.raises(gt.NonFiniteError, match=r"after 0 steps: loss: .* got nan"):
        gt.minimize(lambda w: (np.nan, None), start, integrator=TDLRT, steps=0)


def test_other_errors_pass_unchanged(numpy_problem):
    start, _ = numpy_problem
    with pytest.raises(KeyError, match="mine"):
        gt.minimize(fail_with(KeyError("mine")), start, integrator=TDLRT)
    with pytest.raises(ValueError, match="steps: expected a number of at least 0, got -1"):
        gt.minimize(fail_with(KeyError("mine")), start, integrator=TDLRT, steps=-1)


@pytest.mark.parametrize("spare", [0, 1])
def test_ranks_grow_where_new_directions_may(spare):
    # A new direction is as small as the step, below the tolerance, when it appears.
    u, v = gt.testing.random_point((6, 7), (3, 3), seed=1).factors
    wanted = u @ np.diag([3.0, 2.0, 1.0]) @ v.T

    def objective(w):
        residual = gt.to_dense(w) - wanted
        return 0.5 * np.sum(residual**2), residual

    start, rule = gt.hosvd(wanted, 1), gt.Tolerance(0.1, spare=spare)
    result = gt.minimize(objective, start, integrator=gt.TDLRT(lr=0.05), ranks=rule, steps=200)
    assert result.point.ranks == ((4, 4) if spare else (1, 1))
    error = np.linalg.norm(gt.to_dense(result.point) - wanted)
    assert (error < 0.2) == bool(spare)
