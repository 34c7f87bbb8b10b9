"""Laws: known coefficients recovered, the paper's golden values, intervals that cover, what cannot be fitted said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from outgrow.errors import OutgrowError
from outgrow.lab.fitting import Fitted, fit_files, fit_lines
from outgrow.scaling import LAWS, compute_optimal, fit, growth_timing, mixing_tokens, points_of, read_table, stage_tokens
from outgrow.scaling.fit import _objective, _solve
from outgrow.scaling.growth import LARGEST_SHARE, WHY_NO_FACTOR_LAW
from outgrow.scaling.laws import hoffmann_grid
from outgrow.scaling.points import matching

HOFFMANN = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}  # arXiv 2203.15556


def points(count=240, noise=0.0, seed=0, law=HOFFMANN):
    rng = np.random.default_rng(seed)
    params, tokens = 10 ** rng.uniform(7, 10, count), 10 ** rng.uniform(9, 11.5, count)
    loss = law["E"] + law["A"] / params ** law["alpha"] + law["B"] / tokens ** law["beta"]
    return {"params": params, "tokens": tokens, "loss": loss * np.exp(rng.normal(0, noise, count))}


@pytest.mark.parametrize("count", [12, 240])
def test_hoffmanns_coefficients_are_recovered_to_four_digits(count):
    found = fit(LAWS["chinchilla"], points(count))
    assert found.coefficients == pytest.approx(HOFFMANN, rel=1e-5)
    assert found.objective < 1e-15
    assert found.outliers == []


@pytest.mark.parametrize("law", [{**HOFFMANN, "alpha": 0.7, "A": 5e5}, {**HOFFMANN, "beta": 0.12, "B": 20.0}, {**HOFFMANN, "E": 0.4}])
def test_other_coefficients_are_recovered_too(law):
    assert fit(LAWS["chinchilla"], points(law=law)).coefficients == pytest.approx(law, rel=1e-4)


def test_both_roads_lead_to_one_optimum():
    """Variable projection, and L-BFGS from starts of Hoffmann's grid."""
    columns = points(80, noise=0.01)
    projected = fit(LAWS["chinchilla"], columns)
    grid = fit(LAWS["chinchilla"], columns, starts=lambda columns: hoffmann_grid(columns)[::90])
    assert len(hoffmann_grid(columns)) == 4500
    assert projected.objective <= grid.objective * (1 + 1e-9)
    assert grid.coefficients == pytest.approx(projected.coefficients, rel=1e-4)


def test_the_objective_is_the_sum_of_huber_losses_and_its_gradient_is_right():
    columns, law = points(30, noise=0.02), LAWS["chinchilla"]
    found = fit(law, columns)
    predicted = sum(
        (
            found.coefficients["E"],
            found.coefficients["A"] / columns["params"] ** found.coefficients["alpha"],
            found.coefficients["B"] / columns["tokens"] ** found.coefficients["beta"],
        )
    )
    error = np.abs(np.log(predicted) - np.log(columns["loss"]))
    assert found.objective == pytest.approx(np.where(error <= 1e-3, error**2 / 2, 1e-3 * (error - 5e-4)).sum(), rel=1e-9)
    theta = found.theta * 1.01
    assert (
        optimize.check_grad(lambda t: law.prediction(t, columns)[0].sum(), lambda t: law.prediction(t, columns)[1].sum(axis=0), theta)
        < 1e-3
    )


def test_intervals_cover_the_truth_and_narrow_with_points():
    few, many = (fit(LAWS["chinchilla"], points(count, noise=0.005), resamples=200) for count in (40, 400))
    for name, (low, high) in many.intervals.items():
        assert low < HOFFMANN[name] < high
        assert high - low < few.intervals[name][1] - few.intervals[name][0]
    again = fit(LAWS["chinchilla"], points(400, noise=0.005), resamples=200)
    assert again.intervals == many.intervals


def test_an_outlier_is_named_and_hardly_moves_the_law():
    columns = points(100, noise=0.002)
    columns["loss"][17] *= 1.3
    found = fit(LAWS["chinchilla"], columns)
    assert found.outliers[0] == 17
    assert len(found.outliers) <= 2
    assert found.coefficients["alpha"] == pytest.approx(0.34, rel=0.03)


def test_compute_optimal_is_the_least_of_the_law():
    params, tokens = compute_optimal(HOFFMANN, 5.76e23)
    assert 6 * params * tokens == pytest.approx(5.76e23)

    def loss(log_params):
        return 1.69 + 406.4 / math.exp(log_params) ** 0.34 + 410.7 / (5.76e23 / 6 / math.exp(log_params)) ** 0.28

    assert math.exp(optimize.minimize_scalar(loss, bounds=(20, 30), method="bounded").x) == pytest.approx(params, rel=1e-3)


def test_linear_laws_are_recovered():
    flops = np.geomspace(1e18, 1e22, 12)
    power = fit(LAWS["power"], {"flops": flops, "loss": 30 * flops**-0.05})
    assert power.coefficients == pytest.approx({"a": 30, "b": -0.05})
    instants = np.array([1e9, 3e9, 1e10, 2e10, 5e10])
    parabola = fit(LAWS["parabola"], {"growth_tokens": instants, "loss": 2.2 + 0.03 * (np.log10(instants) - 10.1) ** 2})
    assert parabola.derived["best growth_tokens"] == pytest.approx(10**10.1)
    bump = fit(LAWS["parabola"], {"growth_tokens": instants, "loss": 2.2 - 0.03 * (np.log10(instants) - 10.1) ** 2})
    assert math.isnan(bump.derived["best growth_tokens"])  # a hill has no best instant
    noise = 0.02 * np.random.default_rng(3).normal(size=15)
    flat = {"growth_tokens": np.repeat(instants, 3), "loss": 2.2 + noise + 0.004 * (np.log10(np.repeat(instants, 3)) - 10.1) ** 2}
    unsure = fit(LAWS["parabola"], flat, resamples=200)
    assert math.isfinite(fit(LAWS["parabola"], flat).derived["best growth_tokens"])
    assert math.isnan(unsure.derived["best growth_tokens"])  # resamples are hills as often as valleys
    assert "best growth_tokens" not in unsure.intervals
    text = "\n".join(fit_lines(Fitted("", unsure, ("x",) * 15), None, None))
    assert "not settled by these points" in text
    rng = np.random.default_rng(1)
    N, D = 10 ** rng.uniform(8, 10, 20), 10 ** rng.uniform(10, 12, 20)
    timing = fit(
        LAWS["timing"], {"params": N, "tokens": D, "growth_tokens": [growth_timing(n, d).by_law for n, d in zip(N, D, strict=True)]}
    )
    assert timing.coefficients == pytest.approx({"a": 0.88, "b": 163.27, "c": -5.74}, rel=1e-6)


def test_the_speed_up_law_finds_the_best_factor_and_share():
    rng = np.random.default_rng(2)
    factor, share, tokens = 2 ** rng.uniform(0.5, 4, 60), rng.uniform(0.02, 0.6, 60), rng.uniform(5, 200, 60)
    speed_up = 0.4 - 0.1 * (np.log2(factor) - 2) ** 2 - 0.03 * (np.log2(share) + 3) ** 2 - 0.02 * np.log2(tokens)
    columns = {"growth_factor": factor, "growth_share": share, "tokens_per_param": tokens, "speed_up": speed_up}
    found = fit(LAWS["speed-up"], columns, resamples=50)
    assert found.derived == pytest.approx({"best growth_factor": 4, "best growth_share": 0.125})
    assert found.intervals["best growth_factor"] == pytest.approx((4, 4))


def test_values_that_differ_by_embeddings_alone_are_one():
    """Counted without embeddings a factor of four is 3.99 or 4.00; through two of them a parabola has any top."""
    rng = np.random.default_rng(0)
    factor = rng.choice([1.998, 1.999, 3.990, 3.995, 3.997], 60)
    share, tokens = rng.choice([0.125, 0.25, 0.5], 60), rng.uniform(5, 200, 60)
    columns = {"growth_factor": factor, "growth_share": share, "tokens_per_param": tokens, "speed_up": rng.normal(0.3, 0.1, 60)}
    with pytest.raises(OutgrowError, match="only 2 different values of growth_factor, and the law 'speed-up' needs 3"):
        fit(LAWS["speed-up"], columns)


def test_a_resample_is_fitted_from_starts_of_its_own():
    """All points have an E of nothing, and half the resamples have more; from there, where its slope is next to nothing, none would find it."""
    rng, law = np.random.default_rng(1), LAWS["chinchilla"]
    params, tokens = np.repeat([2.8e4, 5.6e4, 1.1e5, 2.2e5], 9), np.tile(np.repeat([5.5e5, 1.1e6, 2.2e6], 3), 4) * rng.uniform(0.9, 1.1, 36)
    loss = (18 / params**0.19 + 30 / tokens**0.2) * np.exp(rng.normal(0, 0.01, 36))
    columns = {"params": params, "tokens": tokens, "loss": loss}
    found = fit(law, columns, resamples=25)
    assert found.coefficients["E"] < 1e-3
    rng = np.random.default_rng(0)
    for theta in found.draws:
        chosen = rng.integers(0, 36, 36)
        drawn = {name: values[chosen] for name, values in columns.items()}
        lowest = min(_objective(law, _solve(law, drawn, start), drawn)[0] for start in law.starts(drawn))
        assert _objective(law, theta, drawn)[0] <= 1.1 * lowest


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"params": [1e9] * 240}, "all points have the same params"),
        ({"params": [1e9, 2e9] * 120}, "only 2 different values of params"),
        ({"loss": [math.nan] + [2.0] * 239}, "'loss' of point 1 is nan, and must be a finite number above zero: mend or remove it"),
        ({"loss": [2.0, -2.0] + [2.0] * 238}, "'loss' of point 2 is -2"),
        ({"tokens": [0.0] * 240}, "240 points are so"),
    ],
)
def test_degenerate_points_are_refused_in_a_sentence(edit, message):
    with pytest.raises(OutgrowError, match=message):
        fit(LAWS["chinchilla"], {**points(), **edit})


def test_too_few_or_tangled_points_are_refused():
    with pytest.raises(OutgrowError, match="5 coefficients, so it needs 6 points or more, not 5"):
        fit(LAWS["chinchilla"], points(5))
    columns = points(20)
    with pytest.raises(OutgrowError, match="needs a column 'tokens'"):
        fit(LAWS["chinchilla"], {name: columns[name] for name in ("params", "loss")})
    tied = np.geomspace(2, 16, 30)
    with pytest.raises(OutgrowError, match="cannot be told apart"):
        fit(LAWS["speed-up"], {"growth_factor": tied, "growth_share": tied / 20, "tokens_per_param": tied, "speed_up": tied})


@pytest.mark.parametrize(
    ("params", "tokens", "golden"), [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)]
)
def test_growth_timing_has_the_papers_values(params, tokens, golden):
    found = growth_timing(params, tokens)
    assert found.tokens == found.by_law == pytest.approx(golden, rel=1e-3)
    assert len(found.warnings) == 2  # N and C both lie outside of where the law was fitted


def test_growth_timing_is_silent_inside_and_bounded_outside_its_domain():
    assert growth_timing(1.1e9, 100e9).warnings == ()
    small = growth_timing(124e6, 2.5e9)
    assert small.by_law == pytest.approx(20.8e9, rel=5e-3)
    assert small.tokens == LARGEST_SHARE * 2.5e9
    assert "8.34 times the run" in small.warnings[-1]
    for params in np.geomspace(1e4, 1e13, 30):
        for tokens in np.geomspace(1e5, 1e15, 30):
            assert 0 < growth_timing(params, tokens).tokens <= tokens / 4
    for params, tokens in ((0, 1e9), (1e9, 0), (-1, 1e9), (math.nan, 1e9), (1e9, math.inf)):
        with pytest.raises(OutgrowError, match="must be a number above zero"):
            growth_timing(params, tokens)
    assert "221" in WHY_NO_FACTOR_LAW


def test_mixing_time_is_when_the_gap_stays_closed():
    fixed = [(t, 4 - t / 100) for t in range(0, 101, 10)]
    grown = [(50, 4.2), (60, 3.41), (70, 3.5), (75, 3.26), (90, 3.1), (200, 2.0)]
    assert mixing_tokens(fixed, grown) == 25  # at 60 the gap closes, and opens again
    assert mixing_tokens(fixed, [(50, 4.2), (60, 4.2)]) is None
    with pytest.raises(OutgrowError, match="validate more often"):
        mixing_tokens(fixed, [])


def test_stages_share_the_tokens_by_prop_alpha():
    assert stage_tokens(1000, 3, alpha=1, batch_tokens=1) == [167, 333, 500]
    assert stage_tokens(1000, 3, alpha=2, batch_tokens=10) == [70, 290, 640]
    assert stage_tokens(40, 4, alpha=5, batch_tokens=10) == [10, 10, 10, 10]
    with pytest.raises(OutgrowError, match="3 batches, and 4 stages need one each"):
        stage_tokens(30, 4, batch_tokens=10)


def test_tables_are_read_in_three_forms(tmp_path):
    csv, lines, listed = tmp_path / "a.csv", tmp_path / "a.jsonl", tmp_path / "a.json"
    csv.write_text("N,D,loss,arm\n1e9,2e10,2.5,x\n2e9,4e10,2.25,y\n")
    lines.write_text('{"N": 1e9, "D": 2e10, "loss": 2.5, "arm": "x"}\n\n{"N": 2e9, "D": 4e10, "loss": 2.25, "arm": "y"}\n')
    listed.write_text('[{"N": 1e9, "D": 2e10, "loss": 2.5, "arm": "x"}, {"N": 2e9, "D": 4e10, "loss": 2.25, "arm": "y"}]')
    named = {"params": "N", "tokens": "D"}
    for path in (csv, lines, listed):
        found = points_of(read_table(path), ("params", "flops", "tokens_per_param", "loss"), named)
        assert found.columns["loss"].tolist() == [2.5, 2.25]
        assert found.columns["flops"].tolist() == [6 * 1e9 * 2e10, 6 * 2e9 * 4e10]
        assert found.columns["tokens_per_param"].tolist() == [20, 20]
    only = points_of(matching(read_table(csv), {"arm": "y*"}), ("loss",))
    assert (only.columns["loss"].tolist(), only.labels) == ([2.25], (f"{csv}:3",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params,loss\n1,x\n", "a.csv:2: 'loss' is 'x', which is no number"),
        ("params,los\n1,2\n", "there is no column 'loss'; did you mean 'los'.*--column loss=THEIRS"),
        ("params,loss\n", "there is no row to fit"),
        ("params,loss\n1,000,2\n", "a.csv:2: the row has more values than the header has names"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(OutgrowError, match=message):
        points_of(read_table(path), ("params", "loss"))


def test_files_that_are_no_tables_are_refused(tmp_path):
    with pytest.raises(OutgrowError, match="there is no file"):
        read_table(tmp_path / "nowhere.csv")
    (tmp_path / "a.txt").write_text("just words")
    (tmp_path / "b.jsonl").write_text("[1, 2]")
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe\x00\x01")
    for name, message in (("a.txt", "neither CSV .* nor JSON lines"), ("b.jsonl", "must be an object"), ("c.csv", "is not text")):
        with pytest.raises(OutgrowError, match=message):
            read_table(tmp_path / name)


def test_points_that_follow_no_law_are_refused():
    """Loss that rises with size and tokens, random loss, and tokens in one proportion to parameters."""
    rng = np.random.default_rng(0)
    params, tokens = (10 ** rng.uniform(6, 9, 40) for _ in range(2))
    falls = 1.69 + 406.4 / params**0.34 + 410.7 / tokens**0.28
    for loss in (20 - falls, rng.uniform(2, 4, 40)):
        with pytest.raises(OutgrowError, match="the points do not follow 'chinchilla'"):
            fit(LAWS["chinchilla"], {"params": params, "tokens": tokens, "loss": loss})
    with pytest.raises(OutgrowError, match="cannot be told apart: vary its inputs"):
        fit(
            LAWS["chinchilla"],
            {"params": params, "tokens": 20 * params, "loss": 1.69 + 406.4 / params**0.34 + 410.7 / (20 * params) ** 0.28},
        )


def test_cells_that_are_no_numbers_are_named(tmp_path):
    for text, says in (("params,tokens,loss\n1e6,,3\n", "'tokens' is empty"), ("params,tokens,loss\n1e6,x,3\n", "'x', which is no number")):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(OutgrowError, match=f"t.csv:2: .*{says}"):
            points_of(read_table(tmp_path / "t.csv"), ("params", "tokens", "loss"))
    (tmp_path / "t.jsonl").write_text('{"params": ' + "9" * 400 + ', "tokens": 1, "loss": 1}\n')
    with pytest.raises(OutgrowError, match="which is no number"):
        points_of(read_table(tmp_path / "t.jsonl"), ("params",))


def test_rows_are_chosen_before_they_are_grouped(tmp_path):
    """A group of which `only` leaves nothing is no reason to fit none of the others."""
    path = tmp_path / "a.csv"
    lines = [f"{10.0**power},{30 * 10.0 ** (power * -0.05)},a,yes" for power in range(18, 23)]
    path.write_text("\n".join(["flops,loss,arm,annealed", *lines, "1e18,3,b,no"]) + "\n")
    found = fit_files([path], "power", only={"annealed": "yes"}, by="arm", resamples=0)
    assert [one.group for one in found] == ["a"]
    with pytest.raises(OutgrowError, match="there is no row to fit: none of 6 matches --only"):
        fit_files([path], "power", only={"annealed": "maybe"})
