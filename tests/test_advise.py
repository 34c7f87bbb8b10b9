"""The planner and the fits of our own runs: shapes, budgets, evidence, recipes that the engine takes, pilots."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from outgrow.arch import LLAMA, arch_for, parameter_counts, step_flops
from outgrow.errors import OutgrowError
from outgrow.lab.advise import advise, quantity
from outgrow.lab.ancestry import model_of
from outgrow.lab.recipe import read_runs
from outgrow.lab.table import Ended, pilot_mixing, pilots, read_ended, rows
from outgrow.lab.tiny import TINY
from outgrow.scaling.shapes import PAPER_SHAPES, growth_factors, target_config, with_layers
from outgrow.scaling.strategies import budget_of, expected_from_paper, learning_rate, strategies
from outgrow.training.config import RunConfig

from .conftest import ODD
from .processes import outgrow
from .test_extensions import run as cli  # noqa: F401

NANO = Path(__file__).parents[1] / "studies" / "results" / "nano"
RECORDS = NANO.with_suffix(".jsonl")


@pytest.mark.parametrize("size", PAPER_SHAPES)
def test_the_papers_sizes_have_the_papers_shapes_and_rates(size):
    config = target_config(size)
    layers, hidden, ffn, heads, kv = PAPER_SHAPES[size]
    assert [config[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")] == [layers, hidden, ffn]
    assert [config[key] for key in ("num_attention_heads", "num_key_value_heads")] == [heads, kv]
    assert learning_rate(size) == {0.41e9: 6e-4, 1.1e9: 3e-4, 3e9: 1.6e-4, 7e9: 1e-4}[size]


@pytest.mark.parametrize("size", [2e7, 6e7, 1.6e8, 8e8, 2e9, 5e9, 13e9, 30e9, 70e9, 180e9])
def test_other_sizes_have_shapes_that_divide(size):
    config = target_config(size)
    assert parameter_counts(LLAMA, config).total == pytest.approx(size, rel=0.25)
    assert config["hidden_size"] % config["num_attention_heads"] == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert 4 in growth_factors(LLAMA, config)
    assert 16 < config["hidden_size"] / config["num_hidden_layers"] < 300
    assert learning_rate(size) <= 3e-3


def test_a_size_that_its_vocabulary_exceeds_is_refused():
    with pytest.raises(OutgrowError, match="no shape has 1e\\+06 parameters with a vocabulary of 32,000.*--vocab"):
        target_config(1e6)
    assert parameter_counts(LLAMA, target_config(1e6, vocab=1024)).total == pytest.approx(1e6, rel=0.25)


def test_strategies_add_up():
    budget = budget_of(target_config(7e9), 300e9, 2048, 7e9)
    found = {one.name: one for one in strategies(budget)}
    assert list(found) == ["scratch", "g-stack", "late", "gradual"]
    for one in found.values():
        assert sum(phase.tokens for phase in one.phases) == budget.tokens
        assert all(phase.tokens % budget.batch_tokens == 0 for phase in one.phases)
        assert one.phases[-1].layers == 32
        for phase, flops in zip(one.phases, one.flops, strict=True):
            config = with_layers(budget.config, phase.layers)
            of_step = step_flops(LLAMA, config, 2048, budget.batch_tokens, one.optimizer)
            assert flops == pytest.approx(phase.tokens / budget.batch_tokens * of_step)
    stacked, late = found["g-stack"], found["late"]
    assert stacked.growth_tokens == pytest.approx(20.5e9, rel=0.01)  # the paper's law at 7B and 300B
    assert [phase.layers for phase in stacked.phases] == [8, 32]
    assert stacked.expected.speed_up == pytest.approx(0.546)
    assert stacked.expected.saving == pytest.approx(0.353, abs=1e-3)  # 54.6% speed-up is a 35.3% saving
    assert (stacked.expected.low, stacked.expected.high) == pytest.approx((0.31, 0.553))
    assert late.expected.saving == pytest.approx(0.78, abs=0.03)  # the head counted, FACTS derives 78% at 7B
    assert late.growth_tokens == pytest.approx(0.8 * 300e9, rel=1e-3)
    assert any("221" in warning for warning in stacked.warnings)


def test_expectations_follow_the_papers_table():
    assert expected_from_paper(0.41e9, 400e9).speed_up == pytest.approx(0.531)
    assert expected_from_paper(0.41e9, 700e9).speed_up == pytest.approx(0.31)
    assert 0.31 < expected_from_paper(0.41e9, 550e9).speed_up < 0.531
    assert expected_from_paper(7e9, 9e12).speed_up == pytest.approx(0.546)  # clamped, and said to be outside


def test_evidence_says_how_far_outside_one_is():
    budget = budget_of(target_config(70e9), 2e12, 2048, 70e9)
    paper = strategies(budget)[1].evidence[0]
    assert paper.distance(70e9, 2e12) == ["you have 10.0 times the most parameters it has seen (7e+09)"]
    assert paper.distance(1.1e9, 100e9) == paper.distance(7e9, 300e9) == paper.distance(3e9, 200e9) == []
    assert "1/4.1 of the least parameters" in paper.distance(1e8, 1e11)[0]
    # Of 410M the paper has 400B and 700B tokens: that other sizes have seen fewer a parameter says nothing of it.
    assert paper.distance(0.41e9, 10e9) == ["you have 1/40.0 of the least tokens per parameter it has seen at such sizes (976)"]
    assert any("learning rates are the paper's of" in warning for warning in strategies(budget)[1].warnings)
    assert any("the base has 1.81e+10 parameters" in warning for warning in strategies(budget)[1].warnings)
    late, gradual = strategies(budget)[2:]
    assert "how many tokens per parameter it covers is not known" in late.evidence[0].distance(1e9, 1e10)
    assert gradual.evidence[0].distance(1e9, 1e10) == ["what sizes it covers is not known"]


def test_a_target_that_no_base_divides_is_refused():
    budget = budget_of({**target_config(1.1e9), "num_hidden_layers": 23}, 100e9, 2048)
    with pytest.raises(OutgrowError, match="no base divides a target of 23 layers.*take a target of 24 layers"):
        strategies(budget)
    with pytest.raises(OutgrowError, match="cannot be grown x5 to 24 layers; it divides by 2, 3, 4, 6, 8"):
        strategies(budget_of(target_config(1.1e9), 100e9, 2048), factor=5)


def test_patterns_of_layers_stay_whole():
    """Gemma 2 alternates local and global attention: a base has whole pairs, and late expansion begins with one."""
    config = {
        "model_type": "gemma2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 6,
    }  # fmt: skip
    assert growth_factors(arch_for(config), config) == [3, 2, 6]
    found = {one.name: one for one in strategies(budget_of(config, 1e8, 64))}
    assert found["late"].phases[0].layers == 2
    assert with_layers(config, 4)["layer_types"] == ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize(("text", "value"), [("7B", 7e9), ("1.5T", 1.5e12), ("410m", 4.1e8), ("2_000", 2000), ("1e21", 1e21), ("3K", 3000)])
def test_quantities(text, value):
    assert quantity(text, "--params") == value


@pytest.mark.parametrize("text", ["7GB", "0", "-7B", "seven", "", "B", "nan", "inf", "1e400x", "0B"])
def test_nonsense_units_are_refused(text):
    with pytest.raises(OutgrowError, match="--tokens takes a number above zero with K, M, B or T"):
        quantity(text, "--tokens")


def test_recipes_are_what_the_engine_takes(tmp_path, cli):  # noqa: F811
    """A target of one's own: every recipe is read back, grows to the target, and costs what the table says."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**ODD, "num_hidden_layers": 8}))
    status, out, _ = cli(
        "advise", "--target", config, "--tokens", "4M", "--context", "64", "--output", tmp_path / "plans", "--hardware", "a100:2", "--json"
    )
    assert status == 0
    found = json.loads(out)
    for strategy in found["strategies"]:
        runs = read_runs(tmp_path / "plans" / f"{strategy['recipe']['name']}.yaml", [])
        assert model_of(runs[-1])["num_hidden_layers"] == 8
        assert runs[-1].tokens == found["tokens"]
        assert runs[-1].optimizer.kind == ("muon" if strategy["name"] == "late" else "adamw")
        assert strategy["rank_bytes"] > 0
        assert strategy["accelerator_hours"] == pytest.approx(strategy["flops"] / (312e12 * 0.4) / 3600)
        for phase in strategy["phases"][1:]:
            assert phase["grow"]
    assert (
        cli("advise", "--target", config, "--tokens", "4M", "--context", "64", "--output", tmp_path / "plans", "--hardware", "a100:2")[0]
        == 0
    )
    status, _, err = cli("advise", "--target", config, "--tokens", "5M", "--context", "64", "--output", tmp_path / "plans")
    assert status == 1
    assert "exists already and differs" in err


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_that_trains_is_planned_with_recipes_that_train(family, tmp_path, cli):  # noqa: F811
    config = tmp_path / "config.json"
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    config.write_text(json.dumps({**TINY[family], depth: 8, "pad_token_id": None}))
    status, out, err = cli("advise", "--target", config, "--tokens", "1M", "--output", tmp_path / "has space", "--json")
    if family in ("qwen3_moe", "mixtral", "gpt_neox"):
        assert status == 1
        assert "cannot be trained: " in err
        assert ": transformers keeps" in err
        return
    assert status == 0, err
    found = json.loads(out)
    assert found["context"] <= 2048
    for strategy in found["strategies"]:
        assert f"outgrow train '{strategy['recipe_file']}'" in strategy["commands"]
        assert strategy["commands"][0].startswith("outgrow data prepare TEXTS")
        assert cli("train", strategy["recipe_file"], "--dry-run")[0] == 0


def test_memory_is_held_against_the_machine_and_late_expansion_is_not_called_equal_loss(cli):  # noqa: F811
    status, out, _ = cli("advise", "--params", "70B", "--tokens", "2T", "--hardware", "h200:8", "--json")
    assert status == 0
    found = {one["name"]: one for one in json.loads(out)["strategies"]}
    assert not found["scratch"]["fits_in_memory"]
    assert any("a H200 has at most 141 GB" in warning for warning in found["scratch"]["warnings"])
    assert found["late"]["equal_loss_flops"] is None
    assert found["g-stack"]["equal_loss_flops"] > 0
    out = cli("advise", "--params", "70B", "--tokens", "2T", "--hardware", "h200:8")[1]
    assert "* at equal tokens, and not at equal loss" in out
    assert "6ND: 8.4e+23 FLOPs" in out
    assert "11 layers (18.1B parameters)" in out
    assert cli("advise", "--params", "1B", "--tokens", "20B", "--hardware", "h100:12", "--batch", "1572864")[0] == 0


def test_a_pilot_of_a_study_has_as_many_seeds_as_were_trained():
    """Sweeps of the learning rate and other arms are no seeds."""
    found = [one for one in pilots(RECORDS) if one.operator == "stack(factor=4)" and one.annealed]
    assert max(len(one.speed_ups) for one in found) == 3
    plain = next(one for one in found if one.params > 300_000 and one.growth_share == pytest.approx(0.25, abs=0.01))
    assert sorted(plain.speed_ups) == pytest.approx([0.116, 0.203, 0.208], abs=1e-3)  # as the study's own report has them
    advice = advise("1M", "20M", vocab=1024, context=256, pilot=RECORDS, factor=2)
    assert advice.pilot.growth_factor == pytest.approx(2, abs=0.01)
    assert len(advice.pilot.speed_ups) == 3
    (own, *_) = advice.plans[1].strategy.evidence
    assert own.source == "your pilot"
    assert any("times the most parameters" in one for one in own.distance(1e6, 20e6))
    plain = advise("124M", "2.5B", pilot=RECORDS).pilot  # of many that grow fourfold at a quarter, the one trained as the plan is
    assert (plain.optimizer, plain.restarts, plain.state, plain.params) == ("adamw", True, "reset", 320_304)


def test_records_are_rows_with_what_was_tuned():
    found = [row for _, row in rows(RECORDS)]
    assert {"true", "false"} == {row["tuned"] for row in found}
    scratch = [row for row in found if row["name"].startswith("scratch-rate") and row["params"] > 300_000]
    ends = [row for row in scratch if row["annealed"] == row["tuned"] == "true"]
    assert {row["learning_rate"] for row in ends} == {0.012}
    assert {row["seed"] for row in ends} == {0, 1, 2}
    grown = [row for row in found if row["operator"] == "stack(factor=4)" and row["annealed"] == "true"]
    assert all(row["growth_factor"] == pytest.approx(4, abs=0.02) for row in grown)


def test_a_base_that_is_cut_off_at_full_rate_is_not_annealed(tmp_path):
    content = {"kind": "cosine", "end": 10_000_000, "warmup_tokens": 0, "final": 0.1}
    run = {
        "model": {**ODD, "vocab_size": 300},
        "tokens": 409_600,
        "batch_tokens": 4096,
        "optimizer": {"learning_rate": 0.01},
        "schedule": content,
    }
    for tokens, annealed in ((409_600, False), (10_000_000 // 4096 * 4096, True)):
        one = Ended("x", RunConfig.model_validate({**run, "tokens": tokens}), ((tokens, 1.0, 1.0),))
        assert one.annealed == annealed


def test_a_pilot_stands_in_for_the_paper():
    found = pilots(NANO)
    annealed = [one for one in found if one.annealed]
    assert len(annealed) == 1
    assert len(annealed[0].speed_ups) == 5
    assert sum(annealed[0].speed_ups) / 5 == pytest.approx(0.193, abs=5e-4)  # the figures of the README
    assert annealed[0].between == pytest.approx((0.132, 0.255), abs=5e-4)
    constant = [one for one in found if not one.annealed]
    assert sum(constant[0].speed_ups) / 5 == pytest.approx(0.466, abs=5e-4)
    advice = advise("1M", "20M", vocab=1024, context=256, pilot=NANO)
    expected = advice.plans[1].strategy.expected
    assert expected.speed_up == pytest.approx(0.193, abs=5e-4)
    assert "your pilot of 320K parameters" in expected.source
    assert "annealed, 5 seeds, 95% interval" in expected.kind
    assert pilot_mixing(NANO) is None  # none of these runs was expanded late
    mixing = pilot_mixing(RECORDS)  # those at 80% and 90% never came down to scratch's loss
    assert 0 < mixing.met < mixing.tried
    late = next(one.strategy for one in advise("1M", "20M", vocab=1024, context=256, pilot=RECORDS).plans if one.strategy.name == "late")
    assert "until 80% of the run" in late.summary
    assert any(f"of the {mixing.tried} late expansions of your pilot {mixing.met} came down" in one for one in late.warnings)


def test_runs_are_rows():
    entries = read_ended(NANO)
    assert {entry.operator for entry in entries} == {"", "stack"}
    assert sum(entry.annealed for entry in entries) == 30
    with pytest.raises(OutgrowError, match="holds no finished run"):
        read_ended(NANO.parent)
    with pytest.raises(OutgrowError, match="there is no directory"):
        read_ended(NANO / "nowhere")


def test_fit_of_runs_and_tables(tmp_path):
    """`outgrow fit`: our runs by operator, a user's columns, JSON, a page and a picture."""
    done = outgrow("fit", NANO, "--law", "power", "--only", "annealed=true", "--by", "operator", "--resamples", "50", "--json")
    assert done.returncode == 0, done.stderr
    by_operator = {one["operator"]: one["figures"] for one in json.loads(done.stdout)}
    assert set(by_operator) == {"scratch", "stack"}
    for figures in by_operator.values():
        low, high = figures["b"]["interval"]
        assert low < figures["b"]["value"] < high < 0
    table = tmp_path / "runs.csv"
    rows = [(10 ** (7 + i % 7 / 2), 10 ** (9 + i * 0.37 % 3)) for i in range(40)]
    text = [f"{n},{d},{1.69 + 406.4 / n**0.34 + 410.7 / d**0.28}" for n, d in rows]
    table.write_text("\n".join(["N,D,val", *text[:7], f"{rows[7][0]},{rows[7][1]},3.9", *text[8:]]))
    columns = [part for name in ("params=N", "tokens=D", "loss=val") for part in ("--column", name)]
    page, picture = tmp_path / "fit.html", tmp_path / "fit.png"
    done = outgrow("fit", table, *columns, "--flops", "1e21", "--resamples", "50", "--output", page, "--figure", picture)
    assert done.returncode == 0, done.stderr
    assert "outlier: " in done.stdout
    assert "runs.csv:9" in done.stdout
    assert "optimal params" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    html = page.read_text()
    assert "runs.csv:9" in html
    assert 'src="http' not in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", NANO, "--law", "chinchila"], "unknown law 'chinchila'; did you mean 'chinchilla'"),
        (["fit", NANO, "--only", "annealed=true"], "all points have the same params"),
        (["fit", NANO, "--law", "speed-up"], "all points have the same growth_factor"),
        (["fit", NANO, "--only", "annealing=true"], "no column 'annealing' for --only"),
        (["fit", NANO, "--only", "annealed"], "--only takes NAME=VALUE"),
        (["fit", NANO, "--law", "power", "--by", "arm"], "there is no column 'arm' for --by"),
        (["fit", NANO, "--law", "power", "--flops", "1e21"], "'power' does not"),
        (["fit", NANO, "--law", "power", "--grid"], "is linear in its coefficients"),
        (["fit", NANO, "--figure", "a.gif"], "ends in .png, .svg or .pdf"),
        (["fit", NANO, "--column", "params=N"], "there is no column 'N'"),
        (["fit", "nowhere.csv"], "there is no file 'nowhere.csv'"),
        (["advise", "--tokens", "7B"], "say what to train with --params 7B, or with --target"),
        (["advise", "--params", "0", "--tokens", "1B"], "--params takes a number above zero"),
        (["advise", "--params", "7B", "--tokens", "1K"], "too few to plan a run of"),
        (["advise", "--params", "7B", "--tokens", "300B", "--hardware", "h201:8"], "unknown accelerator 'h201'; did you mean 'H200'"),
        (["advise", "--params", "7B", "--tokens", "300B", "--hardware", "h200:many"], "takes a kind and how many"),
        (["advise", "--params", "7B", "--tokens", "300B", "--hardware", "h200:7"], "does not divide over 7 accelerators"),
        (["advise", "--params", "7B", "--tokens", "300B", "--hardware", "h200:8", "--batch", "512K"], "--batch 524288 does"),
        (["advise", "--params", "7B", "--tokens", "300B", "--hardware", "h200:8", "--mfu", "45"], "--mfu takes a share"),
        (["advise", "--params", "7B", "--tokens", "300B", "--mfu", "0.45"], "--mfu has no effect without --hardware"),
        (["advise", "--target", "config.json", "--tokens", "1B", "--vocab", "32000"], "--vocab has no effect with --target"),
        (["advise", "--params", "7B", "--tokens", "300B", "--factor", "5"], "cannot be grown x5 to 32 layers"),
        (
            ["advise", "--params", "7B", "--tokens", "300B", "--pilot", "nowhere"],
            "there is no directory of runs and no file of records 'nowhere'",
        ),
        (["advise", "--target", RECORDS.parents[1] / "timing.yaml", "--tokens", "1B"], "is not valid JSON"),
    ],
)
def test_bad_input_is_one_sentence(cli, arguments, message):  # noqa: F811
    status, _, err = cli(*arguments)
    assert status == 1
    assert err.startswith("outgrow: ")
    assert "Traceback" not in err
    assert re.search(message, err), err


def test_scratch_of_one_budget_is_not_what_others_are_read_against():
    """A baseline tried at the largest budget alone, and better there by chance, has no loss to interpolate at."""
    from outgrow.lab.table import _scratch_of, _ways, read_ended

    ways = _ways(read_ended(RECORDS))
    arms = [way.tuned(way.longest.run.tokens) for way in ways.values()]
    grown = next(arm for arm in arms if arm.annealed and arm.longest.run.name.startswith("direct-depth-"))
    scratch = _scratch_of(grown.longest, ways, annealed=True)
    single = next(arm for arm in arms if arm.annealed and arm.longest.run.name.startswith("decay-60-"))
    assert single.longest.loss < scratch.longest.loss
    assert len(scratch.curve(0)) > 2 > len(single.curve(0))
