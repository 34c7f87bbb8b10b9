from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outgrow.arch import LLAMA
from outgrow.checkpoint.lineage import read_lineage
from outgrow.config import load, parse
from outgrow.errors import Interrupted, OutgrowError
from outgrow.growth.operators import make_plan
from outgrow.growth.plan import GrowthPlan
from outgrow.lab.ancestry import flops_before, in_order, lineage, own_flops
from outgrow.lab.comparison import Comparison
from outgrow.lab.demo import BUILT_IN, open_comparison
from outgrow.lab.execute import execute
from outgrow.lab.outcome import cost, read_outcome
from outgrow.lab.report import sentence, write_report
from outgrow.lab.runs import final_checkpoint, finished, flops_done, place, read_result
from outgrow.lab.speedup import SpeedUp, equal_loss, flops_at, interval, over_seeds
from outgrow.lab.watch import Watch, execute_all
from outgrow.training.config import RunConfig, ScheduleConfig, Start
from outgrow.training.record import read_rows

from .conftest import ODD, write_corpus
from .test_training import Observer

BATCH = 64
COMMITTED_SEEDS = (0, 1, 2, 3, 4)


def tiny(corpus):
    """A comparison of a few dozen steps."""
    return Comparison(
        model={**ODD, "vocab_size": 300, "num_hidden_layers": 4, "initializer_range": 0.06},
        data={"corpus": str(corpus), "vocab": 300, "context": 16, "validation_share": 0.1, "validation_tokens": 256},
        factor=4,
        growth_tokens=10 * BATCH,
        budgets=(20 * BATCH, 40 * BATCH),
        decay_share=0.25,
        warmup_tokens=2 * BATCH,
        batch_tokens=BATCH,
        learning_rates={"base": 1e-2, "target": 1e-2, "scratch": 1e-2},
        validate_every=5 * BATCH,
    )


@pytest.fixture
def recipe(corpus):
    return tiny(corpus)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The tiny comparison, finished; whoever changes its files works on a copy."""
    folder = tmp_path_factory.mktemp("lab")
    recipe, root = tiny(write_corpus(folder / "corpus")), folder / "runs"
    for run in in_order(recipe.runs((0, 1))):
        execute(run, root, Observer())
    return read_outcome(recipe, (0, 1), root)


# --- the measure ----------------------------------------------------------------------------------------------------


def power_law(factor):
    return [(factor * 10.0**k, 5 * (10.0**k) ** -0.05) for k in range(10, 16)]


@given(st.floats(0.2, 5))
def test_a_known_speed_up_is_recovered(factor):
    """Two power laws apart by a factor in FLOPs; in log FLOPs the interpolation errs alike on both."""
    found = equal_loss(power_law(1.0), power_law(1 / factor))
    assert found.speed_up == pytest.approx(factor - 1, rel=1e-9, abs=1e-9)


def test_speed_up_and_saving_are_the_papers_pair():
    found = SpeedUp(2.0, 1.546, 1.0)
    assert found.speed_up == pytest.approx(0.546)
    assert found.saving == pytest.approx(0.353, abs=5e-4)


def test_nothing_is_extrapolated():
    scratch = [(1e12, 4.0), (2e12, 3.0)]
    assert equal_loss(scratch, [(1e12, 3.5), (2e12, 2.5)]).loss == 3.0
    assert equal_loss(scratch, [(1e12, 4.5), (2e12, 3.5)]).loss == 3.5
    assert equal_loss(scratch, [(1e12, 2.5), (2e12, 2.0)]) is None
    assert flops_at(scratch, 2.9) is None
    assert flops_at(scratch, 4.1) is None
    assert flops_at(scratch, 4.0) == 1e12
    assert flops_at(scratch, 3.5) == pytest.approx(math.sqrt(2) * 1e12)


def test_an_interval_needs_three_seeds():
    assert interval([0.1, 0.2]) is None
    low, high = interval([0.1, 0.2, 0.3])
    assert (low, high) == (pytest.approx(0.2 - 4.303 * 0.1 / 3**0.5, abs=1e-4), pytest.approx(0.2 + 4.303 * 0.1 / 3**0.5, abs=1e-4))


def test_the_sentence_says_both_numbers_and_how_sure():
    one = sentence(over_seeds([SpeedUp(2.5, 1.5, 1.0)]), 1)
    assert "50.0% faster" in one
    assert "saving 33.3%" in one
    assert "1 seed, so no interval" in one
    slower = sentence(over_seeds([SpeedUp(2.5, 0.75, 1.0)]), 1)
    assert "25.0% slower" in slower
    assert "taking 33.3% more of the FLOPs" in slower
    assert "95% interval" in sentence(over_seeds([SpeedUp(2.5, 1.5, 1.0)] * 3), 3)
    assert "no equal-loss speed-up" in sentence(over_seeds([SpeedUp(2.5, 1.5, 1.0), None]), 2)


# --- runs, lineage, ledger ------------------------------------------------------------------------------------------


def test_runs_come_after_their_parents_and_once(recipe):
    runs = in_order(recipe.runs((0,)))
    names = [run.name for run in runs]
    assert len(names) == len(set(names)) == 7  # base, two trunks, four branches
    for run in runs:
        ancestors = [ancestor.identity() for ancestor in lineage(run)]
        assert [one.identity() for one in runs if one.identity() in ancestors] == ancestors
    trunk = next(run for run in runs if run.name == "target-seed0")
    assert trunk.keep == (10 * BATCH, 15 * BATCH, 30 * BATCH)  # where it was grown, and where branches leave


def test_both_arms_read_the_same_tokens_and_differ_in_nothing_else(recipe):
    grown, scratch = recipe.branch("grown", 0, 40 * BATCH), recipe.branch("scratch", 0, 40 * BATCH)
    assert grown.data == scratch.data
    assert (grown.seed, grown.tokens, grown.batch_tokens) == (scratch.seed, scratch.tokens, scratch.batch_tokens)
    assert grown.schedule == scratch.schedule
    assert grown.optimizer == scratch.optimizer.model_copy(update={"learning_rate": recipe.learning_rates.target})


def test_the_ledger_counts_the_base(outcome):
    base, target = (outcome.result(run) for run in lineage(outcome.comparison.trunk("grown", 0)))
    scratch = outcome.result(outcome.comparison.trunk("scratch", 0))
    assert target.flops == own_flops(base.config) + own_flops(target.config) == flops_before(target.config) + own_flops(target.config)
    assert target.flops < scratch.flops == own_flops(scratch.config)
    branch = outcome.result(outcome.comparison.branch("grown", 0, 20 * BATCH))
    per_token = own_flops(target.config) / (20 * BATCH)
    assert branch.flops == own_flops(base.config) + 10 * BATCH * per_token


def test_the_target_begins_where_the_base_was_left(outcome):
    target = outcome.result(outcome.comparison.trunk("grown", 0))
    assert target.steps[0]["tokens"] == 11 * BATCH
    grown = target.directory / "start"
    receipt = read_lineage(grown)
    assert GrowthPlan.from_json(receipt.plan).layers == (0, 0, 0, 0)
    assert receipt.tokens == 10 * BATCH
    assert target.validation[0]["tokens"] == 10 * BATCH
    assert json.loads((grown / "config.json").read_text())["num_hidden_layers"] == 4


def test_a_branch_carries_the_optimizer_and_starts_at_its_trunks_loss(outcome):
    trunk, branch = (
        outcome.result(outcome.comparison.trunk("scratch", 0)),
        outcome.result(outcome.comparison.branch("scratch", 0, 40 * BATCH)),
    )
    same = next(row for row in trunk.validation if row["tokens"] == 30 * BATCH)
    assert branch.validation[0] == same


def test_a_branch_at_constant_rate_is_the_trunk_going_on(recipe, tmp_path):
    """Leaving a run with its optimizer's state and the same rate changes nothing, bit for bit."""
    whole = recipe.trunk("scratch", 0)
    half = whole.model_copy(update={"tokens": 16 * BATCH})
    start = Start(run=half, optimizer="carry")
    rest = whole.model_copy(update={"model": None, "start": start, "schedule": ScheduleConfig()})
    for run in in_order([whole, rest]):
        execute(run, tmp_path, Observer())
    assert read_result(rest, tmp_path).final_loss == read_result(whole, tmp_path).final_loss


def test_a_finished_run_is_never_run_twice(outcome):
    run = outcome.comparison.trunk("scratch", 0)
    root = outcome.result(run).directory.parent

    class Forbidden:
        def row(self, row):
            raise AssertionError("it ran again")

        def stop(self):
            return False

    assert execute(run, root, Forbidden()) is None
    assert read_result(run, root).rows == outcome.result(run).rows
    assert finished(run.model_copy(update={"name": "renamed"}), root)


def test_an_interrupted_comparison_goes_on(recipe, tmp_path):
    runs = in_order(recipe.runs((0,)))
    with pytest.raises(Interrupted):
        execute(runs[0], tmp_path, Observer(stop_after=4))
    for run in runs:
        execute(run, tmp_path, Observer())
    assert read_outcome(recipe, (0,), tmp_path).annealed("grown", 0)


def test_a_runs_own_file_is_a_run(outcome):
    """run.json, ancestors inside, is a valid argument of `outgrow train` with the same identity."""
    for result in outcome.runs():
        assert load(RunConfig, result.directory / "run.json").identity() == result.config.identity()


def test_a_start_that_does_not_fit_the_steps_is_refused(outcome, tmp_path):
    base = outcome.comparison.base(0)
    root = shutil.copytree(outcome.result(base).directory.parent, tmp_path / "runs")
    start = Start(checkpoint=str(final_checkpoint(base, root)), operator="stack", knobs={"factor": 4})
    for edits in ({"batch_tokens": 48, "tokens": 48 * 60}, {"tokens": 10 * BATCH}):
        run = RunConfig(start=start, data=base.data, optimizer=base.optimizer, **{"batch_tokens": BATCH, **edits})
        with pytest.raises(OutgrowError, match=r"starts at 640 tokens; its end \([\d,]+\) must lie beyond"):
            execute(run, root, Observer())


def test_runs_on_different_texts_are_not_mixed(outcome, tmp_path):
    base = outcome.comparison.base(0)
    root = shutil.copytree(outcome.result(base).directory.parent, tmp_path / "runs")
    environment = place(base, root) / "environment.json"
    environment.write_text(environment.read_text().replace(outcome.environment["corpus_hash"], "another"))
    with pytest.raises(OutgrowError, match=r"the corpus is not the one that '.*' was trained on"):
        read_outcome(outcome.comparison, (0, 1), root)
    other = outcome.comparison.trunk("grown", 0).model_copy(update={"tokens": 21 * BATCH})
    with pytest.raises(OutgrowError, match="the corpus is not the one"):
        execute(other, root, Observer())


def test_the_seed_moves_the_numbers(outcome):
    assert outcome.annealed("grown", 0) != outcome.annealed("grown", 1)
    assert [flops for flops, _ in outcome.annealed("grown", 0)] == [flops for flops, _ in outcome.annealed("grown", 1)]


def test_a_missing_checkpoint_of_a_parent_is_told(outcome, tmp_path):
    trunk, branch = outcome.comparison.trunk("scratch", 0), outcome.comparison.branch("scratch", 0, 40 * BATCH)
    root = shutil.copytree(outcome.result(trunk).directory.parent, tmp_path / "runs")
    shutil.rmtree(final_checkpoint(trunk, root).parent)
    shutil.rmtree(place(branch, root))
    with pytest.raises(OutgrowError, match=r"kept no checkpoint at 1,920 tokens; remove"):
        execute(branch, root, Observer())
    assert not finished(branch, root)


def test_training_starts_from_a_directory_grown_by_hand(outcome, tmp_path):
    from outgrow.checkpoint.grow import grow_directory
    from outgrow.checkpoint.huggingface import open_checkpoint

    base = outcome.comparison.base(0)
    root = shutil.copytree(outcome.result(base).directory.parent, tmp_path / "runs")
    source = final_checkpoint(base, root)
    grow_directory(source, tmp_path / "grown", make_plan("stack", LLAMA, open_checkpoint(source).config))
    trunk = outcome.comparison.trunk("grown", 0)
    by_hand = trunk.model_copy(update={"start": Start(checkpoint=str(tmp_path / "grown"))})
    execute(by_hand, root, Observer())
    result = read_result(by_hand, root)
    assert [row["loss"] for row in result.steps] == [row["loss"] for row in outcome.result(trunk).steps]
    assert result.flops == outcome.result(trunk).flops
    # Another checkpoint at its path is not what it was trained from.
    shutil.move(tmp_path / "grown", tmp_path / "kept")
    shutil.copytree(source, tmp_path / "grown")
    with pytest.raises(OutgrowError, match="grown' is not the checkpoint that '.*' began with; give that back, or remove"):
        execute(by_hand, root, Observer())
    shutil.rmtree(tmp_path / "grown")
    shutil.move(tmp_path / "kept", tmp_path / "grown")
    execute(by_hand, root, Observer())
    (tmp_path / "grown" / "tokenizer.json").write_text("{}")
    with pytest.raises(OutgrowError, match="has another tokenizer"):
        execute(by_hand.model_copy(update={"seed": 9}), root, Observer())


def test_two_processes_do_not_train_one_run(outcome, tmp_path):
    base = outcome.comparison.base(0)
    root = tmp_path / "runs"
    root.mkdir()
    with (root / f".{base.identity()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutgrowError, match=r"another process is training 'base-seed0' in '.*'; wait for it"):
            execute(base, root, Observer())
    with pytest.raises(Interrupted):
        execute(base, root, Observer(stop_after=2))


# --- recipes and reports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"factor": 3}, "4 layers are not a multiple of the growth factor 3"),
        ({"growth_tokens": 15 * BATCH}, r"growth_tokens \(960\) is not before the first decay, which starts at 960"),
        ({"budgets": []}, "'budgets' should"),
        ({"growth_tokns": 1}, r"unknown key 'growth_tokns'; did you mean 'growth_tokens'\?"),
        ({"learning_rates": {"base": 1, "target": 1, "scrach": 1}}, r"did you mean 'scratch'\?"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(recipe, edits, message):
    with pytest.raises(OutgrowError, match=message):
        parse(Comparison, {**recipe.model_dump(), **edits}, where="'recipe.yaml'")


def test_the_built_in_recipe_keeps_its_promises():
    """About 10 tokens per non-embedding parameter, g = 4, the head under a third of the FLOPs."""
    from outgrow.arch import LLAMA, flops_per_token, parameter_counts

    recipe = open_comparison(None)[0]
    counts = parameter_counts(LLAMA, recipe.model)
    assert recipe.factor == 4
    assert 9 <= max(recipe.budgets) / counts.non_embedding <= 12
    assert 6 * counts.head / flops_per_token(LLAMA, recipe.model, recipe.data.context) < 1 / 3
    assert BUILT_IN.exists()


def test_the_report_stands_alone_and_says_what_the_files_say(outcome, tmp_path):
    write_report(outcome, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script src=" not in page
    assert "<link" not in page
    for result in outcome.runs():
        assert result.config.identity() in page
        assert f"{result.final_loss:.4f}" in page
        row = cost(result)
        steps = sorted(step["tokens_per_second"] for step in read_rows(result.directory) if "loss" in step)
        assert steps[0] <= row.tokens_per_second <= steps[-1]
        assert row.seconds == pytest.approx(sum(BATCH / speed for speed in steps))
    assert outcome.environment["corpus_hash"] in page


def test_a_report_needs_its_runs(recipe, tmp_path):
    with pytest.raises(OutgrowError, match="is not finished in"):
        read_outcome(recipe, (0,), tmp_path)


def test_every_question_of_the_tuning_study_is_a_valid_recipe():
    """Dry run: each setting parses, and each question holds the chosen value among at least two others."""
    path = BUILT_IN.parents[4] / "studies" / "nano_tuning.py"
    specification = importlib.util.spec_from_file_location("nano_tuning", path)
    study = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(study)
    recipe = open_comparison(None)[0]
    for _, arm, setting, values in study.QUESTIONS:
        runs = [study.edited(recipe, setting, value).branch(arm, 0, max(recipe.budgets)) for value in values]
        assert len({run.identity() for run in runs}) == len(values)
        assert recipe.branch(arm, 0, max(recipe.budgets)).identity() in {run.identity() for run in runs}
        if "learning rate" in setting.replace("_", " "):
            assert len(values) >= 3


def test_the_committed_tuning_table_is_of_this_recipe():
    tried = json.loads(open_comparison(None)[1].read_text())
    recipe = open_comparison(None)[0]
    chosen = {row["run"] for row in tried["rows"] if row["chosen"]}
    assert chosen == {recipe.branch(arm, 0, max(recipe.budgets)).identity() for arm in ("scratch", "grown")}


def test_the_readme_quotes_what_the_committed_runs_say():
    """No number without its run: the README's finding is rebuilt from studies/results."""
    root = BUILT_IN.parents[4]
    outcome = read_outcome(open_comparison(None)[0], COMMITTED_SEEDS, root / "studies" / "results" / "nano")
    readme = " ".join((root / "README.md").read_text().replace("\n> ", "\n").split())
    assert sentence(over_seeds(outcome.speed_ups("annealed")), len(COMMITTED_SEEDS)) in readme
    constant = over_seeds(outcome.speed_ups("constant"))
    assert f"the same runs say {constant.speed_up:+.1%} ({constant.student[0]:.1%} to {constant.student[1]:.1%})" in readme


def test_the_bar_counts_what_is_left_to_spend(recipe, tmp_path, monkeypatch):
    """Each FLOP once: after an interruption the bar begins at what is done, and ends at the total."""
    runs = in_order(recipe.runs((0,)))
    execute(runs[0], tmp_path, Observer())
    with pytest.raises(Interrupted):
        execute(runs[1], tmp_path, Observer(stop_after=4))
    known = own_flops(runs[0]) + 4 * BATCH * own_flops(runs[1]) / (runs[1].tokens - 10 * BATCH)
    assert sum(flops_done(run, tmp_path) for run in runs) == pytest.approx(known)
    seen = []
    original = Watch.row

    def row(self, row):
        original(self, row)
        seen.append(self.progress.tasks[0].completed)

    monkeypatch.setattr(Watch, "row", row)
    execute_all(runs, tmp_path)
    assert known < seen[1] <= known * 1.2
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(sum(own_flops(run) for run in runs))
