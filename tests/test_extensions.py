"""The command line on operators and families, the built-in ones and a user's own."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import outgrow
from outgrow.arch import FAMILIES, LLAMA, arch_for, parameter_counts
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.cli import main
from outgrow.errors import OutgrowError
from outgrow.extensions import load_family, load_operators
from outgrow.growth.operators import OPERATORS, make_plan
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.lab.check import cell, check, default_knobs, markdown
from outgrow.lab.tiny import TINY, shrunk, write_tiny

OWN = '''
from outgrow.arch import Arch, Config
from outgrow.growth.plan import Claims, GrowthPlan


def last_twice(arch: Arch, config: Config, times: int = 2) -> GrowthPlan:
    """Repeats the last layer."""
    count = arch.layers(config)
    layers = (*range(count), *[count - 1] * (times - 1))
    return GrowthPlan("last-twice", {"times": times}, arch, config, layers, Claims(preserves=False, trains=True), "mine")


def liar(arch: Arch, config: Config) -> GrowthPlan:
    plan = last_twice(arch, config)
    return GrowthPlan("liar", {}, arch, config, plan.layers, Claims(preserves=True, trains=True), "mine")
'''


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line, in this process: (status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["outgrow", *map(str, arguments)])
        known = dict(OPERATORS)
        with pytest.raises(SystemExit) as stop:
            main()
        OPERATORS.clear()
        OPERATORS.update(known)
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def refused(done, *words):
    status, out, err = done
    assert status == 1, (out, err)
    line = err.strip().splitlines()[-1]
    assert line.startswith("outgrow: ")
    assert all(word in line for word in words), line


@pytest.fixture
def source(tmp_path):
    write_tiny(tmp_path / "source", TINY["llama"], dtype=torch.float32)
    return tmp_path / "source"


def test_a_layer_list_from_the_command_line_with_its_connection_rate(run, source, tmp_path):
    status, out, _ = run("grow", source, tmp_path / "target", "--layers", "0-3,2-3", "--no-measure")
    assert status == 0
    assert "layer map: 0 1 2 3 2 3" in out
    assert "connection rate: 0.80 of the neighbouring layers were neighbours before" in out
    assert json.loads((tmp_path / "target" / "config.json").read_text())["num_hidden_layers"] == 6
    assert run("grow", source, tmp_path / "paper", "--layers", "12-34*2", "--dry-run")[1].startswith("arrange(layers=12-34*2)")


def test_a_receipt_holds_plan_hashes_claims_and_the_measured_difference(run, source, tmp_path):
    status, out, err = run("grow", source, tmp_path / "target", "--operator", "stack(factor=2), direct-width(hidden=48)")
    assert (status, err) == (0, "")
    receipt = json.loads((tmp_path / "target" / "outgrow.json").read_text())
    assert receipt["plan"]["after"]["operator"] == "stack"
    assert receipt["plan"]["claims"] == {"preserves": False, "trains": True, "dual": False}  # of the stack and what follows
    assert list(receipt["parents"]) == ["model.safetensors"]
    assert receipt["measured"]["logit_difference"] > 1e-2  # the stack changed it
    assert "measured: logits differ by at most" in out
    assert "the function changes" in out
    run("grow", source, tmp_path / "wide", "--operator", "direct-width", "--knob", "hidden=36", "--knob", "kv=4")
    measured = json.loads((tmp_path / "wide" / "outgrow.json").read_text())["measured"]
    assert 0 < measured["logit_difference"] < 1e-4 * measured["logit_deviation"]  # stored in fp32


def test_a_false_claim_of_preserving_writes_nothing(run, source, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    arguments = ("--operator-file", tmp_path / "own.py", "--operator", "liar")
    refused(run("grow", source, tmp_path / "target", *arguments), "claims to preserve", "nothing was written")
    assert not (tmp_path / "target").exists()
    assert run("grow", source, tmp_path / "target", *arguments, "--no-measure")[0] == 0


def test_a_model_too_large_for_memory_is_not_measured(run, source, tmp_path, monkeypatch):
    import outgrow.models.measure

    monkeypatch.setattr(outgrow.models.measure, "_free_bytes", lambda: 1000)
    assert "not measured: float64 needs about" in run("grow", source, tmp_path / "target", "--factor", "2", "--measure")[1]


def test_an_operator_of_ones_own(run, source, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = ("--operator-file", tmp_path / "own.py")
    status, out, _ = run("grow", source, tmp_path / "target", *own, "--operator", "last-twice(times=3), stack(factor=2)", "--no-measure")
    assert status == 0
    assert "layers: 4 -> 6 (x1.5)" in out
    assert "layers: 6 -> 12 (x2)" in out
    refused(run("grow", source, tmp_path / "x", *own, "--operator", "last-twice(time=3)"), "has no knob 'time'; it has: times")
    refused(run("check", *own, "--operator", "liar", "--family", "llama"), "1 claims are not backed: liar on llama claims to preserve")


def test_what_is_asked_for_and_not_measured_is_no_success(run, source, tmp_path):
    (tmp_path / "own.py").write_text(
        OWN.replace("times: int = 2", "times: int").replace("last_twice(arch, config)", "last_twice(arch, config, 2)")
    )
    own = ("--operator-file", tmp_path / "own.py", "--family", "llama")
    done = run("check", *own, "--operator", "last-twice")
    refused(done, "last-twice was refused everywhere: the operator 'last-twice' needs the knob 'times'")
    assert run("check", *own, "--operator", "last-twice", "--knob", "times=3")[0] == 0
    refused(run("check", *own, "--knob", "times=3"), "a knob of a single operator")
    refused(run("check", "--operator", "upcycle", "--family", "gpt2"), "upcycle was refused everywhere")
    (tmp_path / "lama.yaml").write_text(yaml.safe_dump(FAMILY))
    strange = ("--family-file", tmp_path / "lama.yaml", "--source", renamed(source, tmp_path / "strange"))
    status, out, _ = run("check", *strange)
    assert (status, "the table alone was checked, and no operator: transformers cannot run" in out) == (0, True)
    refused(run("check", *strange, "--operator", "stack"), "'stack' was not tried: transformers cannot run")
    refused(run("check", *strange, "--family", "llama"), "--family has no effect with --family-file")
    refused(run("check", *strange, "--markdown", tmp_path / "t.md"), "--markdown has no effect with --family-file")
    refused(run("check", *strange[:2], "--operator", "stack"), "give --source too")


LARGE = {
    "llama": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": 128256, "eos_token_id": 128001},
    "gemma2": {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16, "vocab_size": 256000,
               "num_key_value_heads": 8, "head_dim": 256, "layer_types": ["sliding_attention", "full_attention"] * 21},
    "gpt2": {"n_embd": 1600, "n_head": 25, "n_layer": 48, "vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256},
    "mixtral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", LARGE)
def test_a_large_config_is_tried_shrunk(family):
    config = {"model_type": family, **LARGE[family]}
    small = shrunk(arch_for(config), config)
    assert parameter_counts(arch_for(config), small).total < 1 << 22
    assert arch_for(config).sizes(small)["head"] == arch_for(config).sizes(config)["head"]
    verdict = check("direct-width", small)
    assert (verdict.refusal, verdict.broken) == ("", [])
    assert shrunk(arch_for(config), TINY[family]) == TINY[family]


@pytest.mark.parametrize(
    "edits",
    [
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4},
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1, "num_hidden_layers": 5},
        {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3},
    ],
)
def test_the_knobs_that_are_tried_suit_other_sizes_than_ours(edits):
    for family in ("llama", "olmo2", "mixtral"):
        config = {**TINY[family], **edits}
        for name in OPERATORS.keys() - {"upcycle", "more-experts"}:
            plan = make_plan(name, arch_for(config), config, default_knobs(name, arch_for(config), config))
            assert parameter_counts(plan.arch, plan.target_config).total >= parameter_counts(plan.arch, config).total
            assert "width" not in name or "kv" in plan.lifts or "staged" in name or (family == "olmo2" and name != "direct-width"), name


def test_knobs_have_the_types_that_an_operator_says(run, source, tmp_path):
    (tmp_path / "own.py").write_text(
        "from outgrow.growth.operators import arrange\n"
        "def some(arch, config, block: int | None = None, order: list[int] = [0, 1]):\n"
        "    return arrange(arch, config, layers=','.join(map(str, order * (block or 1))))\n"
        "def nothing(arch, config):\n    return None\n"
    )
    own = ("--operator-file", tmp_path / "own.py", "--dry-run", "--operator")
    for call in ("some", "some(block=2)", "some(block=None)", "some(order=[0, 1, 0, 1])"):
        assert run("grow", source, tmp_path / "target", *own, call)[0] == 0, call
    refused(run("grow", source, tmp_path / "x", *own, "some(block='2')"), "the knob 'block' of 'some' must be of type int | None, not '2'")
    refused(run("grow", source, tmp_path / "x", *own, "some(order='01')"), "must be of type list[int], not '01'")
    refused(run("grow", source, tmp_path / "x", *own, "nothing"), "the operator 'nothing' returned 'None', and must return a GrowthPlan")


def test_an_operator_file_may_be_written_as_python_is_today(run, source, tmp_path):
    (tmp_path / "json.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import TYPE_CHECKING, ClassVar, Literal\n"
        "from outgrow.growth.operators import arrange\n"
        "if TYPE_CHECKING:\n"
        "    from outgrow import GrowthPlan\n"
        "    from outgrow.arch import Arch, Config, Spec\n"
        "@dataclass\n"
        "class Order:\n"
        "    orders: ClassVar[dict[str, str]] = {'top': '0-3,3', 'bottom': '0,0-3'}\n"
        "    end: str\n"
        "def twice(arch: Arch, config: Config, end: Literal['top', 'bottom'] = 'top', spec: Spec | None = None) -> GrowthPlan:\n"
        "    return arrange(arch, config, Order.orders[Order(end).end])\n"
    )
    own = ("--operator-file", tmp_path / "json.py", "--dry-run", "--operator")
    assert "layer map: 0 0 1 2 3" in run("grow", source, tmp_path / "target", *own, "twice(end='bottom')")[1]
    assert "layer map: 0 1 2 3 3" in run("grow", source, tmp_path / "target", *own, "twice")[1]
    refused(run("grow", source, tmp_path / "x", *own, "twice(end='middle')"), "must be of type Literal['top', 'bottom'], not 'middle'")
    assert json is sys.modules["json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "defines no operator"),
        ("def f(:", "cannot be run: SyntaxError"),
        ("import missing_module", "cannot be run: ModuleNotFoundError"),
        ("def other(config, factor): pass", "defines no operator"),
    ],
)
def test_operator_files_that_do_not_work_are_said(run, source, tmp_path, text, words):
    (tmp_path / "own.py").write_text(text)
    refused(run("grow", source, tmp_path / "target", "--operator-file", tmp_path / "own.py"), words)


def test_there_is_no_such_operator_file(run, source, tmp_path):
    refused(run("grow", source, tmp_path / "target", "--operator-file", tmp_path / "nowhere.py"), "there is no Python file")
    assert {"last-twice", "liar", "stack"} <= load_operators(_written(tmp_path / "own.py", OWN)).keys()


def _written(path, text):
    path.write_text(text)
    return str(path)


# A family as a user would write it: Llama's tensors under other names.
FAMILY = {
    "family": "lama",
    "model_types": ["lama"],
    "like": "llama",
    "layer_prefix": "blocks.{}.",
    "top": {
        "embed": "hidden <- vocab | stored vocab hidden",
        "norm": "gain hidden | before tied head",
        "head": "vocab <- hidden | tied embed",
    },
    "layer": {key: line for key, line in LLAMA.layer.items() if not key.endswith("bias")},
}


def renamed(source, target):
    """The checkpoint under the names of that family."""
    names = {"model.embed_tokens.weight": "embed", "model.norm.weight": "norm", "lm_head.weight": "head"}
    tensors = load_file(source / "model.safetensors")
    target.mkdir()
    save_file({names.get(k, k.replace("model.layers.", "blocks.")): v for k, v in tensors.items()}, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    return target


def test_a_family_of_ones_own_grows_without_transformers_knowing_it(run, source, tmp_path):
    strange = renamed(source, tmp_path / "strange")
    refused(run("grow", strange, tmp_path / "x"), "unknown architecture 'lama'", "--family-file")
    file = tmp_path / "lama.yaml"
    file.write_text(yaml.safe_dump(FAMILY))
    operator = ("--operator", "stack(factor=2), direct-width(hidden=36)")
    status, out, err = run("grow", strange, tmp_path / "target", "--family-file", file, *operator)
    assert status == 0, err
    assert "not measured: transformers cannot run it" in out
    run("grow", source, tmp_path / "known", *operator, "--no-measure")
    ours, theirs = load_file(tmp_path / "target" / "model.safetensors"), load_file(tmp_path / "known" / "model.safetensors")
    assert torch.equal(ours["blocks.5.mlp.up_proj.weight"], theirs["model.layers.5.mlp.up_proj.weight"])


def test_a_plan_may_end_in_a_family_of_ones_own(run, source, tmp_path):
    (tmp_path / "lama.yaml").write_text(yaml.safe_dump({**FAMILY, "family": "own", "top": dict(LLAMA.top)}))
    own, before = load_family(tmp_path / "lama.yaml"), open_checkpoint(source)
    plan = GrowthPlan(
        "rename", {}, before.arch, before.config, (0, 1, 2, 3), Claims(True, True), "mine", target_arch=own, config={"model_type": "lama"}
    )
    outgrow.grow(source, tmp_path / "target", plan)
    known = ("--family-file", tmp_path / "lama.yaml")
    assert "all 39 tensors" in run("verify", tmp_path / "target", "--source", source, *known)[1]
    (tmp_path / "plan.json").write_text(json.dumps(plan.as_json()))
    assert run("grow", source, tmp_path / "again", "--plan", tmp_path / "plan.json", "--no-measure", *known)[0] == 0
    refused(run("grow", source, tmp_path / "x", "--plan", tmp_path / "plan.json"), "of the family 'own', which is not known")


def test_the_checker_says_what_a_family_lacks(run, source, tmp_path):
    file = tmp_path / "own.yaml"
    strange = renamed(source, tmp_path / "strange")

    def checked(*arguments, **edits):
        file.write_text(yaml.safe_dump({**FAMILY, **edits}))
        return run("check", "--family-file", file, *arguments)

    assert "is whole in itself; give --source" in checked()[1]
    lines = dict(FAMILY["layer"])
    del lines["mlp.gate_proj.weight"]
    lines["mlp.up_proj.weight"] = "hidden <- ffn"
    lines["mlp.extra.weight"] = "ffn <- hidden"
    done = checked("--source", strange, layer=lines)
    refused(done, "does not describe", "12 lines to mend")
    assert "the files hold no 'blocks.0.mlp.extra.weight' [37, 24], which the family lists" in done[1]
    assert "the family lacks a line for 'blocks.0.mlp.gate_proj.weight' [37, 24]" in done[1]
    assert "'blocks.0.mlp.up_proj.weight' has shape [37, 24] in the files, and [24, 37] by its line" in done[1]
    refused(checked(layer={"a": "hidden <- width"}), "'a' uses the space 'width', which 'spaces' does not declare", "ends branch")
    swapped = {name: {"size": LLAMA.spaces[name].size} for name in ("group", "kv", "hidden", "vocab", "head", "ffn")}
    refused(checked(spaces=swapped), "the size of 'group' uses 'kv', which must stand before it in 'spaces'", "no space says that RMSNorm")
    refused(checked(layer={"a": "hidden width"}), "needs 'writes <- reads'")
    for prefix in ("blocks.", "blocks.{}.{}.", "blocks.{0}.", "blocks.{}.}"):
        refused(checked(layer_prefix=prefix), "'layer_prefix' needs {} once, where the number of a layer stands, and no other brace")
    refused(checked(likes="llama"), "unknown key 'likes'", "did you mean 'like'")
    refused(checked(like="lamma"), "starts from the family 'lamma'; known: llama")
    refused(checked("--source", source), "is a 'llama', and the family 'lama' describes lama")
    refused(run("check", "--source", source), "--source is what --family-file is held against")


def test_a_family_file_that_transformers_knows_is_checked_by_the_laws(run, source, tmp_path):
    """The built-in Llama, written out by hand under its own name."""
    content = {
        "family": "mine", "model_types": ["llama"], "norm_eps": "rms_norm_eps", "products": {"num_attention_heads": ["kv", "group"]},
        "spaces": {name: {"size": s.size, "edit": list(s.edit), "admits": s.admits} for name, s in LLAMA.spaces.items()},
        "top": dict(LLAMA.top), "layer": dict(LLAMA.layer),
    }  # fmt: skip
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    status, out, err = run("check", "--family-file", file, "--source", source, "--operator", "direct-width", "--operator", "stack")
    assert status == 0, err
    assert "'mine' describes all 39 tensors" in out
    assert re.search(r"changes \de\+0\d trains", out)
    wrong = {**content, "spaces": {**content["spaces"], "hidden": {"size": "hidden_size", "edit": ["hidden_size"], "admits": "LayerNorm"}}}
    file.write_text(yaml.safe_dump(wrong, sort_keys=False))
    refused(run("check", "--family-file", file, "--source", source, "--operator", "direct-width"), "claims to preserve, and logits differ")


def test_every_built_in_family_can_be_written_as_a_file(tmp_path):
    from dataclasses import asdict

    for arch in FAMILIES:
        content = json.loads(json.dumps(asdict(arch)))
        file = tmp_path / f"{arch.family}.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        assert load_family(file) == arch or json.loads(json.dumps(asdict(load_family(file)))) == content


def test_knobs_on_the_command_line(run, source, tmp_path):
    target = tmp_path / "target"
    refused(run("grow", source, target, "--knob", "factor"), "--knob takes NAME=VALUE, not 'factor'")
    refused(run("grow", source, target, "--operator", "direct-width", "--factor", "2"), "has no knob 'factor'")
    for option, known in (("--optimizer", "'reset', 'carry', 'fresh-new'"), ("--form", "'huggingface', 'dcp', 'torchtitan'")):
        status, _, err = run("grow", source, target, option, "pickle")
        assert (status, f"Invalid value for '{option}'" in err, f"'pickle' is not one of {known}" in err) == (2, True, True)
    with pytest.raises(OutgrowError, match="optimizer takes reset, carry, fresh-new, not 'keep'"):
        outgrow.grow(source, target, optimizer="keep")
    refused(run("grow", source, target, "--optimizer", "carry"), "carries no optimizer state")
    refused(run("grow", source, target, "--operator", "learn-depth"), "are not trained yet; 'outgrow learn' writes a plan")
    refused(
        run("grow", source, target, "--operator", "direct-width", "--knob", "head=20"), "has no knob 'head'; it has: hidden, ffn, kv, group"
    )
    (tmp_path / "plan.json").write_text("[1]")
    refused(run("grow", source, target, "--plan", tmp_path / "plan.json"), "not one that outgrow wrote")
    refused(run("grow", source, target, "--plan", tmp_path / "plan.json", "--factor", "2"), "--plan says everything")
    assert not target.exists()


def test_learned_maps_from_the_command_line(run, corpus, tmp_path, monkeypatch):
    from tests.recipes import TINY_RUN, write

    monkeypatch.chdir(tmp_path)
    config = write(tmp_path / "base.yaml", TINY_RUN, corpus=corpus, tokens=640)
    out = run("train", config)[1]
    checkpoint = out.strip().split("; ")[1]
    (tmp_path / "data.yaml").write_text(f"{{corpus: {corpus}, vocab: 300, context: 16, validation_share: 0.1, validation_tokens: 256}}")
    data = ("--data", "data.yaml", "--batch-tokens", "64")
    status, out, err = run("learn", checkpoint, "plan.json", "--operator", "learn-depth", "--factor", "2", "--steps", "3", *data)
    assert status == 0, err
    assert "3 steps" in out
    assert run("grow", checkpoint, "grown", "--plan", "plan.json")[0] == 0
    receipt = json.loads((tmp_path / "grown" / "outgrow.json").read_text())
    before = json.loads((tmp_path / checkpoint / "outgrow.json").read_text())
    assert receipt["flops"] == before["flops"] + receipt["plan"]["flops"] > before["flops"]
    refused(run("learn", checkpoint, "other.json", "--operator", "stack", *data), "'stack' has no maps to learn")
    for rate, words in (("0", "'learning_rate' should be greater than 0, not 0.0"), ("inf", "'learning_rate' should be a finite number")):
        refused(run("learn", checkpoint, "other.json", "--factor", "2", "--learning-rate", rate, *data), words)
    assert len(load_file(tmp_path / "grown" / "model.safetensors")) == 39


def test_the_page_of_operators_says_what_is_measured_today(tmp_path):
    """docs/operators.md is generated; its words (not its numbers' last digits) are those of a fresh measurement of one family."""
    from pathlib import Path

    from outgrow.growth.operators import OPERATORS

    page = (Path(__file__).parents[1] / "docs" / "operators.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")]
    families = [name.strip() for name in table[0].strip("|").split("|")][1:]
    assert families == list(TINY)
    written = {
        cells[0]: dict(zip(families, cells[1:], strict=True))
        for cells in ([c.strip() for c in row.strip("|").split("|")] for row in table[1:])
    }
    assert list(written) == list(OPERATORS)
    for operator in OPERATORS:
        for family in ("opt",):
            fresh = cell(check(operator, TINY[family])).split()
            assert [w for w in fresh if w.isalpha()] == [w for w in written[operator][family].split() if w.isalpha()]
        assert f"- `{operator}`: " in page
    assert "BROKEN" not in page


def test_cells_and_pages():
    verdict = check("direct-width", TINY["llama"])
    assert cell(verdict).endswith("trains dual alike")
    assert "| direct-width | " in markdown({"direct-width": {"llama": verdict}})
    assert cell(check("upcycle", TINY["gpt2"])) == "-"


def test_operators_of_ones_own_are_taken_at_their_word(tmp_path):
    """One that fails; one that changes the config; one that takes anything."""
    file = tmp_path / "own.py"
    file.write_text(
        OWN
        + """

def fails(arch: Arch, config: Config) -> GrowthPlan:
    return config["nothing"]


def mutates(arch: Arch, config: Config) -> GrowthPlan:
    config["rope_theta"] = 12345.0
    return last_twice(arch, config)


def anything(arch: Arch, config: Config, **knobs) -> GrowthPlan:
    return last_twice(arch, config)
"""
    )
    own, config = load_operators(str(file)), dict(TINY["llama"])
    with pytest.raises(OutgrowError, match="the operator 'fails' fails for llama: KeyError: 'nothing'"):
        make_plan("fails", LLAMA, config, {}, own)
    assert "KeyError" in check("fails", TINY["llama"], operators=own).refusal
    make_plan("mutates", LLAMA, config, {}, own)
    assert config == TINY["llama"]
    with pytest.raises(OutgrowError, match="takes any 'knobs'; let it name its knobs"):
        make_plan("anything", LLAMA, config, {}, own)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        (
            {"depth_maps": {"self_attn.q_proj.weight": torch.full((4, 4), 0.25).numpy()}},
            "is no module of llama; its modules: .*self_attn.q_proj",
        ),
        ({"keys": {"mlp.up_proj": "mlp.gate_proj.weight"}}, "the plan says what makes 'mlp.up_proj', which is no tensor of llama"),
        ({"layers": (0.0, 1.0, 2.0, 3.0)}, "must hold whole numbers"),
        ({"ends": (1.0, 1.0, float("nan"), 1.0)}, "must by finite numbers"),
    ],
)
def test_plans_that_would_do_nothing_or_harm_are_refused_when_they_are_made(edits, says):
    given = {"layers": (0, 1, 2, 3), **edits}
    with pytest.raises(OutgrowError, match=says):
        GrowthPlan("mine", {}, LLAMA, dict(TINY["llama"]), claims=Claims(preserves=False, trains=True), citation="mine", **given)
