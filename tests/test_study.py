"""Studies: what they stand for, sweeps, records, what is found; and one that is really trained, killed, and gone on with."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from outgrow.arch import arch_for, step_flops
from outgrow.config import parse
from outgrow.errors import Interrupted, OutgrowError
from outgrow.files import read_json
from outgrow.lab.ancestry import lineage, model_of
from outgrow.lab.campaign import refuse_arms, run_study
from outgrow.lab.figures import Figure, Series, as_plotly, save_figures
from outgrow.lab.findings import findings, rank_correlation
from outgrow.lab.recipe import SHIPPED
from outgrow.lab.records import Record, Records, diverged_record
from outgrow.lab.speedup import bootstrap, bound, loss_at
from outgrow.lab.studies import Studied, budget_table, main_table, quoted, read_studies, sentences, sweep_table
from outgrow.lab.study import Scale, Study, open_study, trial
from outgrow.lab.study_figures import best_instants, curves, fitted_laws, pictures
from outgrow.lab.study_page import fit_rows
from outgrow.lab.sweep import MOST_RATES, sweep, wanted
from outgrow.training.config import first_token

from .processes import outgrow
from .recipes import write
from .test_extensions import OWN, refused
from .test_extensions import run as cli  # noqa: F401

STUDIES = Path(__file__).parent.parent / "studies"
NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml"))
SCALES = sorted(path.stem for path in (STUDIES / "scales").glob("*.yaml"))
ISSUE = {"operators", "factor", "timing", "sizes", "longer", "patterns", "state", "late"}
TINY_SCALE = """\
model: {{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4, num_attention_heads: 2,
         num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 16, initializer_range: 0.06}}
data: {{corpus: {corpus}, vocab: 300, context: 16, validation_share: 0.1, validation_tokens: 256}}
budgets: [1280, 1920, 2560]
growth: 0.25
decay_share: 0.4
warmup_tokens: 128
batch_tokens: 64
rates: [0.005, 0.01, 0.02]
validate_every: 320
"""
TINY_STUDY = """\
name: pair
asks: Does it run?
paper: made up
arms:
  scratch: {{says: alone, paper: 0}}
  stack: {{says: grown, base: {{num_hidden_layers: 0.25}}, growths: [{{grow: stack(factor=4)}}], paper: 0.5}}
"""


@pytest.fixture
def folder(corpus, tmp_path) -> Path:
    """A folder of studies with one small one, as a user would write it."""
    made = tmp_path / "studies"
    (made / "scales").mkdir(parents=True)
    write(made / "scales" / "tiny.yaml", TINY_SCALE, corpus=corpus)
    write(made / "pair.yaml", TINY_STUDY)
    return made


def nano(name: str) -> tuple[Study, Scale]:
    return open_study(name, "nano", STUDIES)


def made_up(study: Study, scale: Scale, path: Path, loss, seeds: int = 3, skip=lambda arm, rate: False) -> Records:
    """Records as if `loss(arm, seed, rate, run, flops)` had been seen; wants until nothing is wanted."""
    records = Records(path)
    while runs := wanted(study, scale, seeds, records):
        for run in runs:
            if run.identity() not in records:
                records.add(_record(run, records, loss))
    return records


def _record(run, records, loss) -> Record:
    arm, _, _ = run.name.partition("-rate")
    config = model_of(run)
    per_token = step_flops(arch_for(config), config, run.data.context, run.batch_tokens, run.optimizer.kind) / run.batch_tokens
    before = records[run.start.run.identity()] if run.start else None
    begin = first_token(run)
    spent = next(flops for tokens, flops, *_ in before.points if tokens == begin) if before else 0.0  # by its ancestors
    clocks = sorted({begin, (begin + run.tokens) // 2, run.tokens, *(clock for clock in run.keep if clock >= begin)})
    rate = run.optimizer.learning_rate
    points = []
    for clock in clocks:
        flops = spent + (clock - begin) * per_token
        points.append([clock, flops, loss(arm, run.seed, rate, run, max(flops, 1.0)), 1.0])
    blank = diverged_record(run, {"commit": "none", "machine": "none", "corpus_hash": "none"}, "")
    return replace(blank, points=points, seconds=1.0, tokens_per_second=1000.0)


def power(arm: str, seed: int, rate: float, run, flops: float, gain: dict[str, float]) -> float:
    """L = 400 (C (1 + gain))^-0.15 at rate 0.012, a little worse elsewhere, seeds a little apart."""
    return 400 * (flops * (1 + gain.get(arm, 0.0))) ** -0.15 * (1 + 0.02 * abs(math.log2(rate / 0.012))) * (1 + 0.001 * seed)


# -- what studies stand for


def test_the_issue_is_all_there():
    assert set(NAMES) >= ISSUE
    assert {"nano", "micro", "small", "410m"} <= set(SCALES)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_study_stands_for_runs_at_every_scale(name, scale):
    study, size = open_study(name, scale, STUDIES)
    for arm in study.arms:
        one = trial(study, size, arm, 0, size.rates[0])
        runs = one.runs()
        target = arch_for(model_of(runs[-1])).layers(model_of(runs[-1]))
        assert target >= 1
        assert all(run.tokens > first_token(run) for run in runs)
        for budget, branch in one.branches.items():
            assert branch.tokens == budget
            assert branch.schedule.decay_tokens == budget - first_token(branch)
            assert branch.tokens > first_token(branch)


def test_arms_of_one_study_train_one_target_or_say_against_what():
    for name in NAMES:
        study, scale = nano(name)
        for arm in study.arms:
            mine, theirs = (trial(study, scale, one, 0, 0.01) for one in (arm, study.against(arm)))
            ours, others = (model_of(next(iter(one.branches.values()))) for one in (mine, theirs))
            same = all(ours[key] == others[key] for key in scale.model if key != "initializer_range")  # a lift may change a norm's eps
            assert same or name == "longer", f"{name}: {arm}"


def test_studies_share_the_runs_that_they_have_in_common():
    ends = [trial(*nano(study), arm, 1, 0.012).runs()[-1].identity()
            for study, arm in (("operators", "direct-depth"), ("timing", "at-25"), ("state", "reset-restart"), ("factor", "deep-4"))]  # fmt: skip
    assert len(set(ends)) == 1


def test_growth_at_zero_starts_from_untrained_weights():
    one = trial(*nano("timing"), "at-0", 0, 0.012)
    trunk = next(iter(one.trunks.values()))
    assert trunk.start.tokens == 0
    assert any(0 in run.keep for run in one.runs())


def test_settings_of_an_arm_stand_in_for_the_scales():
    study, scale = nano("baseline")
    arm = {name: trial(study, scale, name, 0, 0.01).runs()[-1] for name in study.arms}
    assert arm["muon-half-batch"].optimizer.kind == "muon"
    assert arm["muon-half-batch"].batch_tokens == scale.batch_tokens // 2
    assert arm["decay-20"].schedule.decay_tokens < arm["scratch"].schedule.decay_tokens
    assert model_of(arm["wide-init"])["initializer_range"] == 0.1
    late = Study(name="x", asks="?", arms={"scratch": {}, "b": {"settings": {"rates": [1, 2, 3]}}})
    assert sweep(late, scale, "b", 3, Records(Path("none"))).lacking == ((1, 0), (2, 0), (3, 0))


def test_late_arms_have_a_trunk_for_every_budget():
    study, scale = nano("late")
    assert len({run.identity() for run in trial(study, scale, "one-80", 0, 0.01).trunks.values()}) == len(scale.budgets)
    assert len({run.identity() for run in trial(study, scale, "scratch", 0, 0.01).trunks.values()}) == 1


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"arms": {"a": {}, "b": {}}}, "'scratch', which is no arm"),
        ({"arms": {"scratch": {}, "b": {"base": {"num_hidden_layers": 0.5}}}}, "never grows"),
        ({"arms": {"scratch": {}}}, "arms"),
        ({"arms": {"scratch": {}, "b": {"settings": {"budgets": [100]}}}}, "sets 'budgets', which all arms share"),
        ({"arms": {"scratch": {}, "b": {"growth": []}}}, "did you mean 'growths'"),
    ],
)
def test_bad_studies_are_told_in_one_sentence(edit, says):
    with pytest.raises(OutgrowError, match="(?s).*") as caught:
        parse(Study, {"name": "x", "asks": "?", **edit}, where="here")
    assert says in str(caught.value)


def test_sizes_that_are_not_whole_or_not_there_and_growth_in_the_decay_are_refused():
    scale = nano("operators")[1]
    for arm, says in (
        ({"target": {"num_hidden_layers": 0.3}}, "is 2.4, not a whole number"),
        ({"target": {"layers": 2}}, "the model has no 'layers'"),
        ({"settings": {"decay_shares": 0.2}}, "the scale has no 'decay_shares'; did you mean 'decay_share'"),
        ({"settings": {"decay_share": 2}}, "decay_share"),
        ({"base": {"num_hidden_layers": 0.5}, "growths": [{"grow": "stack(factor=2)", "at": 0.9}]}, "grow earlier"),
    ):
        wrong = parse(Study, {"name": "x", "asks": "?", "arms": {"scratch": {}, "b": arm}}, where="here")
        with pytest.raises(OutgrowError, match=says):
            trial(wrong, scale, "b", 0, 0.01)
    with pytest.raises(OutgrowError, match="did you mean 'operators'"):
        open_study("operator", "nano", STUDIES)


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_study_can_be_trained(name):
    refuse_arms(*nano(name))


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        (
            {"base": {"num_hidden_layers": 0.5}, "growths": [{"grow": "stack(factor=3)", "at": 0.1}]},
            "it ends with 6 of 'layer', and its target has 4",
        ),
        ({"base": {"hidden_size": 0.5}, "growths": [{"grow": "direct-width(hidden={hidden_size})"}]}, "of 'head', and its target has 16"),
        (
            {"base": {"num_hidden_layers": 0.25}, "growths": [{"grow": "stack(factor=2)"}, {"grow": "stack(factor=2)", "at": 0.1}]},
            "must lie beyond",
        ),
        ({"base": {"num_hidden_layers": 0.5}, "growths": [{"grow": "stak(factor=2)"}]}, "unknown operator 'stak'"),
    ],
)
def test_arms_that_cannot_be_trained_are_named_before_any_is(folder, edits, says):
    study, scale = open_study("pair", "tiny", folder)
    study = parse(Study, {**study.model_dump(), "arms": {"scratch": {}, "odd": edits}}, where="here")
    with pytest.raises(OutgrowError, match="the study 'pair' cannot be trained: arm 'odd': ") as caught:
        refuse_arms(study, scale)
    assert says in str(caught.value)


# -- sweeps


def test_a_sweep_goes_on_beyond_an_edge_and_stops(tmp_path):
    study, scale = nano("operators")
    only = study.model_copy(update={"arms": {name: study.arms[name] for name in ("scratch", "direct-depth")}})
    inside = made_up(only, scale, tmp_path / "inside.jsonl", lambda *a: power(*a, gain={}), seeds=1)
    assert sweep(only, scale, "scratch", 1, inside).best == 0.012
    assert set(sweep(only, scale, "scratch", 1, inside).losses) == set(scale.rates)
    rising = made_up(only, scale, tmp_path / "edge.jsonl", lambda arm, seed, rate, run, flops: 5 - rate, seeds=1)
    found = sweep(only, scale, "scratch", 1, rising)
    assert found.at_edge
    assert len(found.losses) == MOST_RATES
    assert found.best == max(found.losses) == max(scale.rates) * 2 ** (MOST_RATES - len(scale.rates))


def test_rates_that_one_seed_does_not_tell_apart_are_told_by_all(tmp_path):
    """Seed 0 is lucky with 0.012 by less than seeds differ; over three seeds 0.006 is better, and is what the arm is run at."""
    study, scale = nano("operators")
    scale = scale.model_copy(update={"close": 0.01})
    only = study.model_copy(update={"arms": {name: study.arms[name] for name in ("scratch", "direct-depth")}})

    def loss(arm, seed, rate, run, flops):
        unlucky = 0.2 if rate == 0.012 and seed else 0.0
        return power(arm, seed, 0.012, run, flops, {}) + {0.006: 0.005, 0.012: 0.0}.get(rate, 0.5) + unlucky

    records = made_up(only, scale, tmp_path / "all.jsonl", loss)
    found = sweep(only, scale, "scratch", 3, records)
    assert found.best == 0.006
    assert set(found.means) == {0.006, 0.012}
    assert found.means[0.012] - found.means[0.006] == pytest.approx(0.4 / 3 - 0.005)
    assert sweep(only, scale, "scratch", 1, records).best == 0.012  # all that one seed says
    row = findings(only, scale, 3, records)[0]
    assert {one.rate for one in row.trials} == {0.006}
    assert {record.name for record in row.records} >= {f"scratch-rate0.012-seed{seed}-trunk" for seed in range(3)}
    some = Records(tmp_path / "some.jsonl")
    for key, record in records.items():
        if "seed2" not in record.name:
            dict.__setitem__(some, key, record)
    assert sweep(only, scale, "scratch", 3, some).lacking == ((0.006, 2), (0.012, 2))
    assert not wanted(only, scale, 3, records)


def test_what_all_seeds_said_stands_where_the_sweep_goes_further(tmp_path):
    """Over three seeds 0.006 is better than 0.012, so the sweep goes on below; there seed 0 alone is lucky with 0.003."""
    study, scale = nano("operators")
    scale = scale.model_copy(update={"close": 0.01})
    only = study.model_copy(update={"arms": {name: study.arms[name] for name in ("scratch", "direct-depth")}})
    worse = {0.003: (-0.1, 0.3, 0.3), 0.006: (0.001, 0.0, 0.0), 0.012: (0.0, 0.2, 0.2)}

    def loss(arm, seed, rate, run, flops):
        return power(arm, seed, 0.012, run, flops, {}) + worse.get(rate, (0.5, 0.5, 0.5))[seed]

    records = made_up(only, scale, tmp_path / "all.jsonl", loss)
    found = sweep(only, scale, "scratch", 3, records)
    assert found.best == 0.006
    assert set(found.means) == {0.003, 0.006, 0.012}
    assert not wanted(only, scale, 3, records)


def test_jobs_that_were_handed_over_are_not_left_behind(folder, tmp_path, monkeypatch):
    """Ctrl-C cancels them; where one fails, the others end first."""
    from outgrow.lab import campaign

    study, scale = open_study("pair", "tiny", folder)
    made = []

    class Job:
        def __init__(self, number):
            self.number, self.asked, self.cancelled = number, 0, False

        def done(self):
            if stop and len(made) == 3:
                raise KeyboardInterrupt
            self.asked += 1
            return self.asked > self.number

        def cancel(self):
            self.cancelled = True

        def result(self):
            raise OutgrowError("job 1 failed")

    def submit(call, run, root, operators):
        made.append(Job(len(made)))
        return made[-1]

    monkeypatch.setattr(campaign.time, "sleep", lambda seconds: None)
    for stop, error in ((False, OutgrowError), (True, Interrupted)):
        made.clear()
        with pytest.raises(error, match="the same command goes on from their last checkpoints" if stop else "job 1 failed"):
            run_study(study, scale, 3, tmp_path / "runs", Records(tmp_path / "none"), 3, 1, print, submit)
        assert len(made) == 3
        assert [one.cancelled for one in made] == [stop] * 3
        assert stop or all(one.asked > one.number for one in made)


def test_what_diverges_is_kept_and_never_chosen(tmp_path):
    study, scale = nano("operators")
    only = study.model_copy(update={"arms": {"scratch": study.arms["scratch"], "direct-depth": study.arms["direct-depth"]}})
    records = Records(tmp_path / "records.jsonl")
    while runs := wanted(only, scale, 1, records):
        for run in runs:
            if run.identity() in records or any(one.diverged for one in records.of(lineage(run))):
                continue
            if run.optimizer.learning_rate > 0.02 and "trunk" in run.name:
                records.add(diverged_record(run, {"corpus_hash": "none"}, "the loss is not a number"))
            else:
                records.add(_record(run, records, lambda *a: power(*a, gain={})))
    tried = sweep(only, scale, "scratch", 1, records)
    assert math.isinf(tried.losses[0.024])
    assert tried.best == 0.012
    rows = findings(only, scale, 1, Records(records.path))
    assert [why for row in rows for _, why in row.diverged] == ["the loss is not a number"] * 2


# -- what is found


def test_a_known_speed_up_is_found_with_its_intervals(tmp_path):
    study, scale = nano("operators")
    gain = {"direct-depth": 0.3, "zero-depth": 0.2, "random-depth": -0.2, "learn-depth": 0.1}
    records = made_up(study, scale, tmp_path / "records.jsonl", lambda *a: power(*a, gain=gain))
    rows = {row.name: row for row in findings(study, scale, 3, Records(records.path))}
    for arm, known in gain.items():
        figure = rows[arm].speed_ups["annealed"]
        assert figure.speed_up == pytest.approx(known, abs=4e-3)  # losses are interpolated between validations
        assert figure.student[0] <= figure.speed_up <= figure.student[1]
        assert figure.bootstrap[0] <= figure.speed_up <= figure.bootstrap[1]
        assert rows[arm].speed_ups["un-annealed"].speed_up == pytest.approx(known, abs=2e-2)
        assert rows[arm].sweep.best == 0.012
    assert rows["scratch"].speed_ups["annealed"] is None
    assert rank_correlation(list(rows.values()), "annealed")[1] == 9
    assert rows["direct-depth"].end.gap[0] == pytest.approx(
        np.mean(rows["direct-depth"].end.losses) - np.mean(rows["scratch"].end.losses), abs=1e-12
    )


def test_a_study_of_made_up_runs_is_reported(tmp_path):
    study, scale = nano("timing")
    gain = {f"at-{share}": 0.3 - 0.4 * (math.log10(share / 15)) ** 2 for share in (5, 10, 18, 25)}
    records = made_up(study, scale, tmp_path / "records.jsonl", lambda *a: power(*a, gain=gain))
    one = Studied(study, scale, "nano", 3, records, tuple(findings(study, scale, 3, records)))
    assert one.best.name in gain
    rows = {row["arm"]: row for row in main_table(one)}
    assert rows[one.best.name]["annealed"].startswith(f"{gain[one.best.name]:+.1%}"[:3])
    assert len(budget_table(one)) == sum(len(row.budgets) for row in one.rows) == 3 * len(study.arms)
    rates, tried = sweep_table(one)
    assert rates == sorted(scale.rates)
    assert all(best == 1 for _, _, best in tried)
    assert any("gains most over" in text for text in sentences(one))
    fits = best_instants(one)
    assert len(fits) == 3
    for made in fits.values():
        assert 0.08 < made.derived["best growth_tokens"] / max(scale.budgets) < 0.2
    titles = [picture.title for picture in pictures(one)]
    assert titles == [
        "timing: held-out loss",
        "timing: speed-up",
        "timing: annealed speed-up",
        "timing: parabolas at equal FLOPs",
        "timing: loss after growth",
    ]


def test_laws_of_sizes_are_found(tmp_path):
    study, scale = nano("sizes")
    gain = {name: 0.25 for name in study.arms if name.endswith("stack")}
    records = made_up(study, scale, tmp_path / "records.jsonl", lambda *a: power(*a, gain=gain))
    one = Studied(study, scale, "nano", 3, records, tuple(findings(study, scale, 3, records)))
    fits = fitted_laws(one, resamples=20)
    for kind in ("scratch", "grown"):
        assert fits[kind]["power"].coefficients["b"] == pytest.approx(-0.15, abs=1e-3)
    # Models of one budget say nothing of tokens: that is said, and the page is made all the same.
    short = study.model_copy(update={"arms": {name: arm.model_copy(update={"budgets": (1,)}) for name, arm in study.arms.items()}})
    records = made_up(short, scale, tmp_path / "short.jsonl", lambda *a: power(*a, gain=gain))
    one = Studied(short, scale, "nano", 3, records, tuple(findings(short, scale, 3, records)))
    assert "same tokens" in fitted_laws(one, resamples=0)["grown"]["chinchilla"]
    assert any("not fitted" in value for *_, value, _ in fit_rows(one))
    ratio = fits["grown"]["power"].coefficients["a"] / fits["scratch"]["power"].coefficients["a"]
    assert ratio == pytest.approx(1.25**-0.15, rel=5e-3)


def test_a_gain_that_fades_is_seen(tmp_path):
    study, scale = nano("longer")
    records = made_up(study, scale, tmp_path / "records.jsonl", lambda *a: power(*a, gain={"stack": 0.2, "small-grown": 0.1}))
    rows = {row.name: row for row in findings(study, scale, 3, records)}
    read = [one.speed_up for one in rows["stack"].budgets]
    assert read[0] is None
    assert all(one.speed_up == pytest.approx(0.2, abs=0.01) for one in read[1:])
    one = Studied(study, scale, "nano", 3, records, tuple(rows.values()))
    assert "longer: does the gain fade?" in [picture.title for picture in pictures(one)]


def test_curves_that_share_no_loss_bound_the_speed_up(tmp_path):
    better, worse = [(1.0, 2.0), (2.0, 1.0)], [(1.0, 5.0), (3.0, 4.0)]
    assert bound(worse, better) == (pytest.approx(3.0 / 1.0 - 1), ">")
    assert bound(better, worse) == (pytest.approx(1.0 / 3.0 - 1), "<")
    assert bound(better, [(1.0, 1.5), (2.0, 0.5)]) is None
    assert bound([(2.0, 3.4)], [(2.0, 3.3)]) == (
        pytest.approx(0.0),
        ">",
    )  # one budget at equal cost: better is faster, by nobody knows how much
    assert bound([(2.0, 3.3)], [(2.0, 3.4)]) == (pytest.approx(0.0), "<")
    assert bound([(1.0, 3.9), (1.4, 3.7)], [(1.6, 3.6), (2.0, 3.5)]) == (
        pytest.approx(1.4 / 1.6 - 1),
        ">",
    )  # below scratch from its first point on
    spiked = bound([(1.0, 3.9), (2.0, 3.5)], [(1.0, 3.4), (1.2, 3.7), (2.0, 3.2)])
    assert spiked == (pytest.approx(1.0), ">")
    study, scale = nano("operators")
    records = made_up(study, scale, tmp_path / "records.jsonl", lambda *a: power(*a, gain={"direct-depth": 9.0}))
    row = next(row for row in findings(study, scale, 3, records) if row.name == "direct-depth")
    assert quoted(row.speed_ups["annealed"]).startswith("> +")
    assert row.speed_ups["annealed"].student is None


def test_seeds_that_bound_a_speed_up_differently(tmp_path):
    study, scale = nano("operators")

    def figure(gains):
        loss = lambda arm, seed, *a: power(arm, 0, *a, gain={"direct-depth": gains[seed]})  # noqa: E731
        rows = findings(study, scale, 3, made_up(study, scale, tmp_path / f"{gains}.jsonl", loss))
        return next(row for row in rows if row.name == "direct-depth").speed_ups["annealed"]

    assert quoted(figure((0.2, -0.9, -0.9))).startswith("< ")
    assert quoted(figure((0.2, 9.0, 9.0))).startswith("> ")
    assert figure((9.0, -0.9, 0.2)) is None


def test_gaps_are_of_one_seed(tmp_path):
    """Seeds that are not trained yet, another in each arm, leave one in common: the gap is that one's, not of two different seeds."""
    study, scale = nano("operators")
    only = study.model_copy(update={"arms": {name: study.arms[name] for name in ("scratch", "direct-depth")}})
    loss = {
        ("scratch", 0): 3.0,
        ("scratch", 1): 4.0,
        ("scratch", 2): 5.0,
        ("direct-depth", 0): 3.1,
        ("direct-depth", 1): 4.2,
        ("direct-depth", 2): 5.3,
    }
    records = made_up(only, scale, tmp_path / "all.jsonl", lambda arm, seed, rate, *a: loss[arm, seed] + 20 * abs(rate - 0.012))
    some = Records(tmp_path / "some.jsonl")
    for key, record in records.items():
        gone = (record.name.startswith("scratch") and "seed1" in record.name) or (
            record.name.startswith("direct") and "seed2" in record.name
        )
        if not gone:
            dict.__setitem__(some, key, record)
    rows = tuple(findings(only, scale, 3, some))
    assert rows[1].end.gap[0] == pytest.approx(0.1)
    assert pictures(Studied(only, scale, "nano", 3, some, rows))  # drawn, though the best arm has a seed that scratch lacks


def test_a_seed_that_diverges_is_told_and_takes_the_interval_with_it(tmp_path):
    """Two seeds of three would flatter the arm whose third has no end; its losses stand, and so do the other arms' figures."""
    study, scale = nano("operators")
    names = ("scratch", "direct-depth", "zero-depth")
    only = study.model_copy(update={"arms": {name: study.arms[name] for name in names}})
    records = made_up(only, scale, tmp_path / "all.jsonl", lambda *a: power(*a, gain={}))
    some = Records(tmp_path / "some.jsonl")
    for key, record in records.items():
        gone = record.name.startswith("direct-depth-rate0.012-seed2-annealed")
        dict.__setitem__(some, key, replace(record, points=[], diverged="it did") if gone else record)
    rows = tuple(findings(only, scale, 3, some))
    assert [row.lost for row in rows] == [(), (2,), ()]
    assert rows[1].speed_ups == {"annealed": None, "un-annealed": None}
    assert (rows[1].end.gap, rows[1].end.speed_up, len(rows[1].end.losses)) == (None, None, 2)
    assert rows[2].speed_ups["annealed"].student
    told = "\n".join(sentences(Studied(only, scale, "nano", 3, some, rows)))
    assert "Diverged: direct-depth-rate0.012-seed2-annealed" in told
    assert "Not finished" not in told


def test_seeds_validated_at_other_clocks_are_drawn_where_they_meet(tmp_path):
    """How often a run is validated is not part of what it is, and may be changed half-way through a study."""
    study, scale = nano("operators")
    only = study.model_copy(update={"arms": {name: study.arms[name] for name in ("scratch", "direct-depth")}})
    records = made_up(only, scale, tmp_path / "all.jsonl", lambda *a: power(*a, gain={}))
    key, trunk = next((k, r) for k, r in records.items() if r.name.startswith("scratch-rate0.012-seed1-trunk"))
    dict.__setitem__(records, key, replace(trunk, points=[trunk.points[0], *trunk.points[2:]]))
    rows = tuple(findings(only, scale, 3, records))
    drawn = curves(Studied(only, scale, "nano", 3, records, rows))
    assert drawn
    dashed = next(one for one in drawn.series if one.name == "scratch" and one.dashed)
    assert len(dashed.x) == len(dashed.also["tokens"]) == len(dashed.also["hours"]) == len(trunk.points) - 2
    assert dashed.also["hours"] == sorted(dashed.also["hours"])


def test_studies_share_runs_and_their_checkpoints():
    """A run that several studies of a scale have keeps what each of them starts from, whichever is trained first."""
    kept: dict[str, set[tuple[int, ...]]] = {}
    for name in NAMES:
        study, scale = nano(name)
        for arm in study.arms:
            for run in trial(study, scale, arm, 0, scale.rates[0]).runs():
                kept.setdefault(run.identity(), set()).add(run.keep)
    assert [key for key, ways in kept.items() if len(ways) > 1] == []


def test_arms_that_make_no_sense_are_told(tmp_path):
    study, scale = nano("timing")
    arm = study.arms["at-25"]
    with pytest.raises(OutgrowError, match="growths must stand in the order of their 'at'"):
        parse(
            Study,
            {**study.model_dump(), "arms": {"scratch": {}, "a": {"growths": [{"grow": "stack", "at": 0.5}, {"grow": "stack", "at": 0.2}]}}},
            where="it",
        )
    braces = arm.model_copy(update={"growths": (arm.growths[0].model_copy(update={"grow": "stack(factor={layers})"}),)})
    with pytest.raises(OutgrowError, match=r"has braces around what is no key of the target \('layers'\)"):
        trial(study.model_copy(update={"arms": {"scratch": study.arms["scratch"], "a": braces}}), scale, "a", 0, 0.01)
    tables = {"model_type": "qwen3", "layer_types": ["full_attention"] * 8, "head_dim": 24}
    hybrid = scale.model_copy(update={"model": {**scale.model, **tables}})
    assert model_of(trial(study, hybrid, "at-25", 0, 0.01).runs()[0])["layer_types"] == ["full_attention"] * 2


def test_small_figures():
    assert bootstrap([0.1, 0.2]) is None
    low, high = bootstrap([0.1, 0.2, 0.3])
    assert 0.1 <= low < 0.2 < high <= 0.3
    assert loss_at([(1.0, 3.0), (100.0, 1.0)], 10.0) == pytest.approx(2.0)
    assert loss_at([(1.0, 3.0), (100.0, 1.0)], 200.0) is None


# -- records


def test_records_survive_a_kill_and_refuse_what_was_edited(tmp_path):
    study, scale = nano("operators")
    only = study.model_copy(update={"arms": {name: study.arms[name] for name in ("scratch", "direct-depth")}})
    path = tmp_path / "records.jsonl"
    records = made_up(only, scale, path, lambda *a: power(*a, gain={}), seeds=1)
    whole = path.read_text()
    path.write_text(whole[:-40])
    cut = Records(path)
    assert len(cut) == len(records) - 1
    assert path.read_text() == whole[:-40]  # who only reads writes nothing: another process may be at that line
    cut.add(list(records.values())[-1])
    assert path.read_text() == whole
    path.write_text(whole.replace('"environment": {', '"environment": null, "diverged": {', 1))
    with pytest.raises(OutgrowError, match=":1 is no record of a run"):
        Records(path)
    path.write_text(whole.replace('"batch_tokens": 2048', '"batch_tokens": 4096', 1))
    with pytest.raises(OutgrowError, match=r":1: the settings of .* are not those of its identity"):
        Records(path)
    path.write_text("{}\n" + whole)
    with pytest.raises(OutgrowError, match="is no record of a run"):
        Records(path)


def test_two_studies_at_once_keep_every_run_once(tmp_path):
    study, scale = nano("operators")
    only = study.model_copy(update={"arms": {"scratch": study.arms["scratch"]}})
    source = made_up(only, scale, tmp_path / "source.jsonl", lambda *a: power(*a, gain={}), seeds=1)
    first, second, *_ = source.values()
    path = tmp_path / "records.jsonl"
    mine, other = Records(path), Records(path)
    mine.add(first)
    with path.open("a") as file:
        file.write('{"identity": "cut sho')
    other.add(second)
    other.add(first)
    mine.add(second)
    assert [*Records(path)] == [first.identity, second.identity]
    assert mine.keys() == other.keys() == Records(path).keys()


def test_the_readme_quotes_what_the_studies_say():
    readme = " ".join((STUDIES.parent / "README.md").read_text().split())

    def found(name, arm, against, scale="nano"):
        (studied,) = read_studies([name], scale, 3, STUDIES, against)
        return next(row for row in studied.rows if row.name == arm).speed_ups["annealed"]

    over_muon, over_adamw = (found("recipe", "later", against) for against in ("scratch-muon", "scratch"))
    for one, whom in ((over_muon, "the best-tuned scratch run, Muon's"), (over_adamw, "tuned AdamW")):
        assert f"{one.speed_up:.1%} ({100 * one.student[0]:.1f} to {100 * one.student[1]:.1f}) faster than {whom}" in readme
    larger = found("recipe", "later", "scratch-muon", "micro")
    assert (
        f"is {larger.speed_up:.1%} ({100 * larger.student[0]:.1f} to {100 * larger.student[1]:.1f}) faster than scratch under Muon"
        in readme
    )
    muon = f"is worth {found('baseline', 'muon', 'scratch').speed_up:+.1%} over this baseline"
    assert f"Muon, which was not, {muon}" in readme
    assert f"Muon was not tried here; it {muon}" in read_json(SHIPPED / "nano_tuning.json")["rule"]


# -- really trained


def test_a_study_of_an_operator_of_ones_own(folder, tmp_path, cli):  # noqa: F811
    """Trained by workers that know it, reported with it, refused without it; other Python is another arm's run."""
    (folder / "pair.yaml").write_text(TINY_STUDY.format().replace("stack(factor=4)", "last-twice(times=4)"))
    file = tmp_path / "own.py"
    file.write_text(OWN)
    with_it = ("--operator-file", file)
    place = ("pair", "--scale", "tiny", "--folder", folder)
    where = ("--seeds", 1, "--runs", tmp_path / "runs", "--jobs", 2)
    refused(cli("study", *place, *where), "unknown operator 'last-twice'", "those of a file given with --operator-file")
    status, out, _ = cli("study", *place, *where, *with_it)
    assert (status, "left: 0 runs now, 0 FLOPs" in out) == (0, True), out
    page = ("--output", tmp_path / "page.html")
    refused(cli("report", *place, "--seeds", 1, *page), "unknown operator 'last-twice'")
    assert cli("report", *place, "--seeds", 1, *page, *with_it)[0] == 0
    fitted = ("fit", folder / "results" / "tiny.jsonl", "--law", "power", "--resamples", 0)
    refused(cli(*fitted), "unknown operator 'last-twice'")
    status, _, err = cli(*fitted, *with_it)
    assert "operator" not in err, err
    Records(folder / "results" / "tiny.jsonl")  # can be read without it, as records of other studies are
    file.write_text(OWN + "# another version\n")
    status, out, _ = cli("study", *place, *where, *with_it, "--list")
    assert (status, "left: 0 runs" in out) == (0, False), out


@pytest.mark.parametrize(
    ("arm", "settings", "message"),
    [
        ("half batch", "settings: {optimizer: muon}", "the run 'half batch-rate0.005-seed0-trunk': 'name' should"),
        ("m", "settings: {batch_tokens: 100}", "batch_tokens (100) is not a multiple of data.context (16)"),
        ("m", "target: {num_attention_heads: 3}", "the run 'm-rate0.005-seed0-trunk': "),
    ],
)
def test_an_arm_that_makes_no_run_is_a_sentence(folder, tmp_path, cli, arm, settings, message):  # noqa: F811
    (folder / "pair.yaml").write_text(TINY_STUDY.format() + f"  {arm}: {{says: x, {settings}}}\n")
    refused(cli("study", "pair", "--scale", "tiny", "--folder", folder, "--runs", tmp_path / "runs", "--list"), message)


def test_a_study_is_trained_killed_gone_on_with_and_reported(folder, tmp_path):
    command = ["study", "pair", "--scale", "tiny", "--folder", str(folder), "--runs", str(tmp_path / "runs"), "--seeds", "1", "--jobs", "2"]
    path = folder / "results" / "tiny.jsonl"
    first = subprocess.Popen(
        [sys.executable, "-m", "outgrow", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, cwd=tmp_path
    )
    end = time.monotonic() + 120
    while time.monotonic() < end and not (path.exists() and path.read_text().count("\n") >= 3):
        time.sleep(0.05)
    first.kill()
    first.communicate()  # ends when the workers, who hold its pipes, have ended too
    kept = path.read_text().splitlines()
    again = outgrow(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert path.read_text().splitlines()[: len(kept) - 1] == kept[:-1]
    study, scale = open_study("pair", "tiny", folder)
    records = Records(path)
    assert not wanted(study, scale, 1, records)
    assert "left: 0 runs now, 0 FLOPs" in again.stdout
    assert "; about 0 min left" in again.stdout
    said = list[str]()
    run_study(study, scale, 1, tmp_path / "runs", records, 1, 1, said.append)
    assert said == []
    # A study again, elsewhere, undisturbed and one run at a time, finds the same losses.
    other = tmp_path / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("results"))
    fresh = [{str(folder): str(other), str(tmp_path / "runs"): str(tmp_path / "fresh")}.get(part, part) for part in command[:-1]]
    done = outgrow(*fresh, 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    twin = Records(other / "results" / "tiny.jsonl")
    assert {key: one.points for key, one in twin.items()} == {key: one.points for key, one in records.items()}
    # The report needs the files of the studies alone.
    shutil.rmtree(tmp_path / "runs")
    page = tmp_path / "page.html"
    where = ("--folder", folder, "--output", page, "--pictures", tmp_path / "pictures")
    shown = outgrow("report", "pair", "--scale", "tiny", "--seeds", 1, *where)
    assert shown.returncode == 0, shown.stderr
    row = next(row for row in read_studies(["pair"], "tiny", 1, folder)[0].rows if row.name == "stack")
    loss = f"{np.mean(row.end.losses):.4f}"
    assert loss in shown.stdout
    assert loss in page.read_text()
    assert "src=" not in page.read_text().split("<body>")[0]
    assert {path.suffix for path in (tmp_path / "pictures").iterdir()} == {".png", ".svg"}


def test_a_study_without_results_is_told_what_makes_them(folder):
    with pytest.raises(OutgrowError, match="'outgrow study pair --scale tiny' trains it"):
        read_studies(["pair"], "tiny", 3, folder)
    with pytest.raises(OutgrowError, match="no study in"):
        read_studies(["all"], "tiny", 3, folder)


def test_figures_switch_their_axes_and_share_a_legend(tmp_path):
    one = Series("a", [1.0, 2.0], [3.0, 2.0], also={"tokens": [10.0, 20.0]})
    figure = Figure("t", "FLOPs", "loss", [one, replace(one, dashed=True), Series("b", [1.0], [2.0])], log_x=True, ticks=("x", "y"))
    drawn = as_plotly(figure)
    buttons = [button["label"] for menu in drawn.layout.updatemenus for button in menu["buttons"]]
    assert buttons[:2] == ["FLOPs", "tokens"]
    assert json.loads(drawn.to_json())["layout"]["updatemenus"][0]["buttons"][1]["args"][0]["x"] == [[10.0, 20.0], [10.0, 20.0], [1.0]]
    assert [trace.showlegend for trace in drawn.data] == [True, False, True]
    save_figures([figure], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1


def test_scales_must_rise(folder):
    content = yaml.safe_load((folder / "scales" / "tiny.yaml").read_text())
    with pytest.raises(OutgrowError, match="must rise"):
        parse(Scale, {**content, "rates": [0.02, 0.01, 0.005]}, where="here")


def test_every_arm_may_be_compared_with_another():
    (own,) = read_studies(["recipe"], "nano", 3, STUDIES)
    (usual,) = read_studies(["recipe"], "nano", 3, STUDIES, "scratch")
    assert own.study.against("later") == "scratch-muon"
    assert {usual.study.against(name) for name in usual.study.arms} == {"scratch"}
    assert usual.row("scratch").speed_ups == {"annealed": None, "un-annealed": None}
    gains = [one.row("later").speed_ups["annealed"] for one in (own, usual)]
    assert gains[0].speed_up + 0.2 < gains[1].speed_up
    with pytest.raises(OutgrowError, match=r"'recipe' has no arm 'scrach'; did you mean 'scratch'\?"):
        read_studies(["recipe"], "nano", 3, STUDIES, "scrach")


def test_budgets_that_differ_by_the_rounding_of_a_batch_are_one():
    (studied,) = read_studies(["recipe"], "nano", 3, STUDIES, "scratch-small-batch")
    ours, theirs = studied.row("later").end, studied.row("scratch-small-batch").end
    assert ours.tokens != theirs.tokens
    assert ours.gap[0] == pytest.approx(np.mean(ours.losses) - np.mean(theirs.losses))
    assert ours.speed_up == studied.row("later").speed_ups["annealed"]
