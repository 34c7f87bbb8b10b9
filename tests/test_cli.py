from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

from outgrow import __version__
from outgrow.cli import app
from outgrow.cli.show import short_names

from .processes import COMMAND_LINE, Process, outgrow
from .recipes import TINY_COMPARISON, TINY_RUN, write
from .test_extensions import run as cli  # noqa: F401

ROOT = Path(__file__).parents[1]


def refused(done, message, status=1):
    """One sentence on stderr, the right exit status, no traceback."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert re.match(r"outgrow: ", lines[0])
    assert re.search(message, lines[0]), lines[0]


@pytest.fixture
def recipe(corpus, tmp_path):
    return write(tmp_path / "comparison.yaml", TINY_COMPARISON, corpus=corpus)


def test_demo_runs_reports_and_finds_what_is_done(recipe, tmp_path):
    """The README's demo in a smaller form."""
    first = outgrow("demo", "--comparison", recipe, "--runs", tmp_path / "runs")
    assert first.returncode == 0, first.stderr
    assert re.search(r"growth is [\d.]+% (faster|slower) than scratch|share no loss", " ".join(first.stdout.split()))
    assert "Traceback" not in first.stderr
    report = tmp_path / "runs" / "report.html"
    page = report.read_text()
    assert "Growth against scratch" in page
    metrics = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*/metrics.jsonl")}
    assert len(metrics) == 7
    second = outgrow("demo", "--comparison", recipe, "--runs", tmp_path / "runs")
    assert second.stdout == first.stdout
    assert {path: path.read_bytes() for path in metrics} == metrics
    report.unlink()
    again = outgrow("report", "--comparison", recipe, "--runs", tmp_path / "runs")
    assert again.returncode == 0
    without_ids = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")  # plotly names its figure at random
    assert without_ids.sub("", report.read_text()) == without_ids.sub("", page)


def test_train_grow_inspect_and_train_on(corpus, tmp_path):
    base = write(tmp_path / "base.yaml", TINY_RUN, corpus=corpus, tokens=640)
    done = outgrow("train", base, "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    checkpoint = Path(done.stdout.strip().split("; ")[1])

    dry = outgrow("grow", checkpoint, tmp_path / "grown", "--operator", "stack", "--factor", "4", "--dry-run")
    assert not (tmp_path / "grown").exists()
    assert "layers: 2 -> 8 (x4)" in dry.stdout
    assert "model.layers.7.mlp.up_proj.weight [48, 32] <- model.layers.1.mlp.up_proj.weight" in dry.stdout
    assert re.search(r"parameters: [\d,]+ -> [\d,]+", dry.stdout)
    assert re.search(r"training FLOPs per token at context 16: [\d,]+ -> [\d,]+", dry.stdout)

    assert outgrow("grow", checkpoint, tmp_path / "grown", "--factor", "4").returncode == 0
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "grown")(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 300)
    facts = json.loads(outgrow("inspect", tmp_path / "grown", "--json").stdout)
    assert facts["layers"] == 8
    assert facts["trained tokens"] == 640
    assert "stack {'factor': 4}" in facts["grown by"]
    assert "family" in outgrow("inspect", tmp_path / "grown").stdout

    text = TINY_RUN[: TINY_RUN.index("model:")] + TINY_RUN[TINY_RUN.index("data:") :] + "start: {{checkpoint: {grown}}}\n"
    target = write(tmp_path / "target.yaml", text, corpus=corpus, tokens=1280, grown=tmp_path / "grown")
    done = outgrow("train", target, "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert "at 1,280 tokens" in done.stdout


def test_ctrl_c_saves_and_says_how_to_go_on(corpus, tmp_path):
    config = write(tmp_path / "run.yaml", TINY_RUN + "save_every: 10000000\n", corpus=corpus, tokens=64 * 400)
    config.write_text(config.read_text().replace("validation_tokens: 256", "validation_tokens: 256, epochs: 1000"))
    with Process(*COMMAND_LINE, "train", config, "--runs", tmp_path / "runs") as process:
        for _ in range(600):
            records = list((tmp_path / "runs").glob("tiny-*/metrics.jsonl"))
            if records and records[0].stat().st_size > 500:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert re.search(r"'tiny' is saved at [\d,]+ tokens; the same command goes on from there", errors)
    saved = [path for path in (tmp_path / "runs").glob("tiny-*/checkpoints/*") if path.name.isdigit()]
    assert len(saved) == 1
    assert not list((tmp_path / "runs").glob("tiny-*/finished.json"))
    done = outgrow("train", config, "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    tokens = [json.loads(line)["tokens"] for line in records[0].read_text().splitlines() if '"loss"' in line]
    assert tokens == list(range(64, 64 * 400 + 1, 64))


def test_ctrl_c_before_anything_is_trained(tmp_path):
    code = (
        "import sys, outgrow.config; sys.argv = ['outgrow', 'train', 'run.yaml']\n"
        "def interrupted(*arguments):\n    raise KeyboardInterrupt\n"
        "outgrow.config.read_yaml = interrupted\n"
        "from outgrow.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    refused(done, "the same command goes on from what is whole", status=130)


def test_bad_input_is_one_sentence(make_checkpoint, corpus, recipe, tmp_path, cli):  # noqa: F811
    def outgrow(*arguments):  # in this process: two dozen imports of torch are half a minute
        return subprocess.CompletedProcess(arguments, *cli(*arguments))

    source = make_checkpoint()
    nowhere = tmp_path / "nowhere"
    refused(outgrow("grow", nowhere, tmp_path / "target"), "there is no directory")
    refused(outgrow("inspect", nowhere), "there is no directory")
    refused(outgrow("grow", source, source), "exists already")
    refused(outgrow("grow", source, tmp_path / "target", "--operator", "stak"), "unknown operator 'stak'; known: stack")
    refused(outgrow("grow", source, tmp_path / "target", "--factor", "1"), "growth factor must be at least 2, not 1")
    refused(outgrow("grow", source, tmp_path / "target", "--max-shard-size", "big"), "--max-shard-size takes a size such as")
    refused(outgrow("grow", source, tmp_path / "target", "--factor", "x"), "see 'outgrow grow --help'", status=2)
    refused(outgrow("grow", source), "target", status=2)
    refused(outgrow("grwo"), "Did you mean 'grow'", status=2)
    refused(outgrow("train", nowhere), "there is no file")
    refused(outgrow("train", write(tmp_path / "a.yaml", "tokens: [")), "is not YAML")
    refused(outgrow("train", write(tmp_path / "b.yaml", "just words")), "must hold keys and values")
    run = write(tmp_path / "c.yaml", TINY_RUN + "lerning_rate: 3\n", corpus=corpus, tokens=640)
    refused(outgrow("train", run, "--runs", tmp_path / "runs"), "unknown key 'lerning_rate'")
    run = write(tmp_path / "d.yaml", TINY_RUN.replace("hidden_size", "hiden_size"), corpus=corpus, tokens=640)
    refused(outgrow("train", run, "--runs", tmp_path / "runs"), "did you mean 'hidden_size'")
    run = write(tmp_path / "e.yaml", TINY_RUN, corpus=corpus, tokens=64 * 10**6)
    refused(outgrow("train", run, "--runs", tmp_path / "runs"), r"reads 64,000,000 tokens, and the corpus has")
    run = write(tmp_path / "f.yaml", TINY_RUN, corpus=nowhere, tokens=640)
    refused(outgrow("train", run, "--runs", tmp_path / "runs"), "the corpus '.*nowhere' does not exist")
    refused(outgrow("demo", "--comparison", recipe, "--seeds", "a"), "--seeds takes how many, such as 3, or which, such as 0,2,3")
    recipe.write_text(recipe.read_text().replace("factor: 4", "factor: 3"))
    refused(outgrow("demo", "--comparison", recipe, "--runs", tmp_path / "runs"), "not a multiple of the growth factor 3")
    refused(outgrow("report", "--runs", nowhere), "is not finished in")
    assert not (tmp_path / "target").exists()
    assert not list((tmp_path / "runs").glob("*/finished.json"))


def test_a_missing_extra_is_one_sentence(tmp_path):
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['outgrow', 'train', 'run.yaml']; from outgrow.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    refused(done, r"needs 'torch', which is not installed; pip install 'outgrow\[train,report\]'")


@pytest.mark.parametrize("command", ["demo", "train", "grow", "report", "inspect", "eval", "loss", "sample"])
def test_help(command):
    done = outgrow(command, "--help")
    assert done.returncode == 0
    assert "Usage: outgrow" in done.stdout or "Usage:" in done.stdout


def test_the_readmes_commands_run(corpus, recipe, tmp_path):
    """Every `outgrow` line of the README, on tiny files of the names it uses."""
    text = (ROOT / "README.md").read_text()
    lines = [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]
    assert ["make", "demo"] in commands
    assert ["make", "test"] in commands
    write(tmp_path / "run.yaml", TINY_RUN, corpus=corpus, tokens=640)
    base = outgrow("train", "run.yaml", cwd=tmp_path).stdout.strip().split("; ")[1]
    os.symlink(tmp_path / base, tmp_path / "base")
    os.symlink(ROOT / "studies", tmp_path / "studies")
    for command in commands:
        if command[0] != "outgrow":
            assert command[0] == "make", command
            continue
        arguments = command[1:] + (["--comparison", str(recipe)] if command[1] in ("demo", "report") else [])
        done = outgrow(*arguments, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)


def test_the_rest_of_the_readme_is_understood(tmp_path, cli):  # noqa: F811
    """What takes a cluster or hours: every option is there, and the recipe that it shows can be trained."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    commands = [line[line.index("outgrow") + 1 :] for line in lines if "outgrow" in line]
    assert {command[0] for command in commands} >= {"train", "submit", "study", "report", "eval", "loss"}
    for command in commands:
        known, arguments = typer.main.get_command(app), command
        while isinstance(known, typer.core.TyperGroup):
            known, arguments = known.commands[arguments[0]], arguments[1:]
        known.make_context("outgrow", list(arguments))  # raises where it has no such option
    (shown,) = re.findall(r"```yaml\n(# run.yaml\n.*?)```", text, re.DOTALL)
    (tmp_path / "run.yaml").write_text(shown)
    status, out, err = cli("train", tmp_path / "run.yaml", "--dry-run")
    assert status == 0, err
    assert "in all" in out


def test_the_version_is_told(cli):  # noqa: F811
    assert cli("--version") == (0, f"outgrow {__version__}\n", "")


@pytest.mark.parametrize("group", [(), ("data",)])
def test_nothing_asked_for_is_answered_with_the_help(cli, group):  # noqa: F811
    status, out, err = cli(*group)
    assert (status, out) == (2, "")
    assert err == cli(*group, "--help")[1].rstrip("\n") + "\n"


def test_make_sets_up_what_the_readme_promises():
    """The two commands exist and install from the constraints, so that a clean clone needs nothing else."""
    done = subprocess.run(["make", "--dry-run", "--always-make", "demo", "test"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--constraint constraints.txt --editable '.[dev]'" in done.stdout
    assert "-m pytest" in done.stdout
    assert "outgrow demo" in done.stdout
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a/b/c"], ["c"]),
        (["runs/x-1/checkpoints/005", "runs/y-2/checkpoints/005"], ["x-1", "y-2"]),
        (["runs/x/checkpoints/005", "runs/x/checkpoints/010"], ["005", "010"]),
        (["grown", "base"], ["grown", "base"]),
        (["a/b", "a/b/c"], ["b", "b/c"]),
        (["a", "a/b/a"], ["a", "a/b/a"]),
    ],
)
def test_paths_are_shown_by_what_tells_them_apart(names, short):
    assert short_names(names) == short
