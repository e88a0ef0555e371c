"""The order of the discretisation: slopes against theory, a learned lambda against its closed form, and the command."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import local_error, orders
from experiments.orders import FREE, LEARNED_ORDER, NUMBER, SCHEMES, STEP, SYSTEMS, System
from mamba3_jax import cli

# Small enough step sizes that the slopes are there, few enough that the run takes seconds.
DTS, COUNT = [2.0**-k for k in range(4, 9)], 256
OPTIONS = ["--dts", str(DTS), "--starts", "8", "--systems", str(COUNT), "--seeds", "[0]"]
# Of a measured slope from a whole number.
TOLERANCE = 0.1
CONSTANT, VARYING = ([n for n, system in SYSTEMS.items() if system.varying == varying] for varying in (False, True))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """What one run of the command leaves."""
    directory = tmp_path_factory.mktemp("results") / "small"
    assert cli.main(["experiment", "local_error", "--results_dir", str(directory), *OPTIONS]) == 0
    return directory


@pytest.fixture(scope="module")
def summary(results) -> dict:
    return json.loads((results / "summary.json").read_text())


@pytest.fixture(scope="module")
def slopes(summary) -> Callable[[str, str], dict[str, float]]:
    """(system, scheme) -> the slope of each error."""
    return lambda system, scheme: {k: v["slope"] for k, v in summary["fixed"][system][scheme].items()}


def test_the_command_leaves_its_files_and_reports_its_slopes(results, summary):
    assert {path.name for path in results.iterdir()} == {"summary.json", "order.png", "report.md"}
    report = (results / "report.md").read_text()
    assert f"    {summary['command']}\n" in report and "--systems 256" in summary["command"] and "order.png" in report
    for system, by_scheme in summary["fixed"].items():
        for quantity in ("integral", "step", "global"):
            cells = (f"{m[quantity]['slope']:.2f} ({m[quantity]['theory']})" for m in by_scheme.values())
            assert f"| {system} | {' | '.join(cells)} |\n" in report


def least_squares(system: System, times: jax.Array, rows: int | None = None) -> float:
    """The one lambda of least squared error over the first rows: the error is affine in it, two library calls do."""
    left, right = (orders.integral_error(system, times, lam)[:rows] for lam in (0.0, 1.0))
    return float(-jnp.vdot(right - left, left).real / jnp.vdot(right - left, right - left).real)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("scheme, order", [("exponential-Euler", 2), ("trapezoid", 3), ("lambda = 0.6", 2)])
def test_the_integrals_local_error_has_the_papers_order(slopes, system, scheme, order):
    assert abs(slopes(system, scheme)["integral"] - order) < TOLERANCE


@pytest.mark.parametrize("system", CONSTANT)
@pytest.mark.parametrize("scheme, order", [("exponential-Euler", 1), ("trapezoid", 2), ("lambda = 0.6", 1)])
def test_global_errors_are_one_order_lower_than_local_ones(slopes, system, scheme, order):
    found = slopes(system, scheme)
    assert abs(found["global"] - order) < TOLERANCE and abs(found["step"] - order - 1) < TOLERANCE


@pytest.mark.parametrize("system", VARYING)
@pytest.mark.parametrize("scheme, order", [("exponential-Euler", 1), ("trapezoid", 1), ("trapezoid, mean of A", 2)])
def test_a_rate_frozen_at_the_steps_end_costs_the_trapezoid_an_order_and_its_mean_does_not(
    slopes, system, scheme, order
):
    found = slopes(system, scheme)
    assert abs(found["global"] - order) < TOLERANCE and abs(found["step"] - order - 1) < TOLERANCE


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_theory_beside_each_slope_is_what_was_measured(summary, system, scheme):
    for found in summary["fixed"][system][scheme].values():
        assert abs(found["slope"] - found["theory"]) < TOLERANCE


@pytest.mark.parametrize("a", [-1.0, -0.5 + 2j])
def test_a_library_step_is_the_trapezoidal_rule(a):
    """Of int_0^dt exp(a (dt - s)) ds, whose value at the ends is exp(a dt) and 1; and exact decay of the state."""
    dt, lam = 0.3, 0.7
    with jax.enable_x64(True):
        times = jnp.array([[0.0, dt]])
        forced = System.constant(a, lambda s: -1 / a + 0 * s)  # u = 1
        given = orders.tokens(forced, times)
        reached = orders.advance(jnp.array([2.0 - 1.0j]), given, lam)
        expected = np.exp(a * dt) * (2 - 1j + (1 - lam) * dt) + lam * dt
        np.testing.assert_allclose(given.u, [[1, 1]], rtol=1e-14)
        np.testing.assert_allclose(reached, [expected], rtol=1e-14)
        error = orders.integral_error(forced, times, lam)
        exact = (np.exp(a * dt) - 1) / a
        np.testing.assert_allclose(error, [expected - np.exp(a * dt) * (2 - 1j) - exact], rtol=1e-12)


@pytest.mark.parametrize("dt", [2.0**-4, 2.0**-7])
@pytest.mark.parametrize("a, nu", [(-1.0, 0.0), (-2.0, 3.0), (-0.5 + 2j, 1.0)])
def test_least_squares_asks_for_half_plus_dt_A_over_12(a, nu, dt):
    """For input of one frequency, whatever it is."""
    with jax.enable_x64(True):
        system = System.constant(a, lambda s: jnp.exp(1j * nu * s))
        best = least_squares(system, jnp.array([[0.0, dt]]))
    assert abs((best - 0.5) / dt - np.real(a) / 12) < dt


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_is_affine_in_lambda(system):
    """On which training relies: errors at 0 and 1 give the error at any lambda."""
    with jax.enable_x64(True):
        times = jnp.array([[0.25, 0.5]])
        left, between, right = (orders.integral_error(SYSTEMS[system], times, lam) for lam in (0.0, 0.3, 1.0))
        np.testing.assert_allclose(between, 0.7 * left + 0.3 * right, atol=1e-15)


def test_a_lambda_trained_at_each_dt_is_the_least_squares_one_and_nears_half_linearly(summary):
    learned = summary["learned"]["varying A"][FREE]
    with jax.enable_x64(True):
        systems, start = orders.random_systems(jax.random.key(0), 2 * COUNT, 0.5), jnp.zeros(2 * COUNT)
        expected = [least_squares(systems, orders.one_step(start, dt), COUNT) for dt in DTS]
    np.testing.assert_allclose(learned["lam"], expected, atol=1e-6)
    assert abs(orders.slope(DTS, learned["distance"]) - 1) < TOLERANCE


def test_a_lambda_learned_from_the_step_finds_one_third_of_dt_A(summary):
    """sigmoid(w dt A) = 1/2 + w dt A / 4 where least squares asks for dt A / 12, but for the draw of systems."""
    [w] = summary["learned"]["constant A"][STEP]["weights"]
    np.testing.assert_allclose(w, [1 / 3, 0], atol=0.05)


@pytest.mark.parametrize("kind", ["constant A", "varying A"])
@pytest.mark.parametrize("name", [FREE, STEP])
def test_a_learned_lambda_that_goes_to_half_keeps_the_third_order(summary, name, kind):
    [slope] = summary["learned"][kind][name]["slopes"]
    assert LEARNED_ORDER[name] == 3 and abs(slope - 3) < TOLERANCE


def test_one_learned_number_for_all_dt_falls_back_to_the_second_order(summary):
    """Where its distance from 1/2 outweighs dt |A| / 12: below the step sizes that it was trained on."""
    lam, dts = summary["learned"]["varying A"][NUMBER]["lam"][0], [2.0**-k for k in range(10, 14)]
    with jax.enable_x64(True):
        system = SYSTEMS["constant A and omega"]
        errors = [orders.rms(orders.integral_error(system, jnp.array([[0.0, dt]]), lam)) for dt in dts]
        fitted = orders.slope(dts, errors)
    assert abs(lam - 0.5) > 1e-3 and abs(fitted - 2) < TOLERANCE


BAD_OPTIONS = {
    "too few step sizes": (["--dts", "[0.5, 0.25]"], "dts: got [0.5, 0.25]", "at least 4"),
    "growing step sizes": (["--dts", "[0.1, 0.2, 0.3, 0.4]"], "dts: got [0.1", "decreasing"),
    "horizon between steps": (["--horizon", "1.1"], "horizon: got 1.1", "multiple of every"),
    "positive A": (["--modulation", "1"], "modulation: got 1", "0 <= modulation < 1"),
    "no seed": (["--seeds", "[]"], "seeds: got none", "at least one"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_status_2(case, capsys, tmp_path):
    options, given, allowed = BAD_OPTIONS[case]
    with pytest.raises(SystemExit) as error:
        local_error.main(["--results_dir", str(tmp_path / "never"), *options])
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and given in message and allowed in message
    assert not (tmp_path / "never").exists()
