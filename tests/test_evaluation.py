"""Checkpoints asked: suites, tasks of our own, the harness against hand-computed log-likelihoods, loss, samples, evaluation in training."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tokenize

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from outgrow.checkpoint.grow import grow_directory
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.cli import app
from outgrow.config import load
from outgrow.data import tokenizer as bpe
from outgrow.data.corpus import Document, is_held_out, read
from outgrow.errors import Interrupted, OutgrowError
from outgrow.evaluation import harness, results
from outgrow.evaluation.code_tasks import make_questions, python_tokens
from outgrow.evaluation.local_tasks import files_hash, made_tasks, read_task, write_tasks
from outgrow.evaluation.loss import corpus_loss
from outgrow.evaluation.model import open_model, weights_hash
from outgrow.evaluation.sample import sample
from outgrow.evaluation.suite import Suite, presets, read_suite
from outgrow.growth.operators import make_plan
from outgrow.lab.ancestry import in_order
from outgrow.lab.comparison import Comparison
from outgrow.lab.evaluating import evaluator
from outgrow.lab.execute import execute
from outgrow.lab.outcome import read_outcome
from outgrow.lab.report import write_report
from outgrow.lab.runs import read_result
from outgrow.lab.speedup import equal_accuracy
from outgrow.lab.tiny import TINY, write_tiny
from outgrow.training.config import EvaluateConfig, RunConfig

from .processes import outgrow
from .recipes import TINY_COMPARISON, TINY_RUN, write
from .test_cli import refused
from .test_training import Observer

CODE = '''\
class Shape{n}:
    """Shape number {n}."""

    def __init__(self, width, height, names=None):
        self.width = width
        self.height = height
        self.names = dict(names or {{"first": [width, height, {n}]}})

    def area_{n}(self, scale):
        if scale > {n}:
            return self.width * self.height * max(scale, len(self.names["first"]), 1)
        return [self.width + column for column in range(scale)]


def total_{n}(shapes, scale):
    found = {{shape.width: [shape.height, shape.area_{n}(scale + 1)] for shape in shapes}}
    for shape in shapes:
        if shape.width in found:
            found[shape.width + len(found)] = [shape.height, scale]
    return found
'''


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus of Python, a tokenizer trained on it, a tiny checkpoint that carries it."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "corpus").mkdir()
    for n in range(60):
        (folder / "corpus" / f"module_{n:02d}.py").write_text(CODE.format(n=n))
    checkpoint = folder / "checkpoint"
    write_tiny(checkpoint, {**TINY["llama"], "vocab_size": 300, "max_position_embeddings": 256}, dtype=torch.float32)
    bpe.save(bpe.train((one.text for one in read([str(folder / "corpus")])), 300), checkpoint)
    return folder


@pytest.fixture(scope="module")
def tasks(place):
    write_tasks([str(place / "corpus")], place / "tasks", 12, 0.3)
    return place / "tasks"


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- suites ---------------------------------------------------------------------------------------------------------


def test_the_papers_eight_and_their_average():
    suite = presets()["paper8"]
    assert len(suite.tasks) == 8
    assert len(suite.averages["mean_accuracy"]) == 7
    rows = {row["name"]: row for row in suite.reference.rows}
    assert (rows["scratch"]["mean_accuracy"], rows["scratch"]["wikitext"]) == (0.5012, 17.98)
    assert {task.task for task in presets()["paper-7b"].tasks} > {task.task for task in suite.tasks}
    assert {task.task: task.shots for task in presets()["paper-7b"].tasks if task.shots != 0} == {"mmlu": 5}
    assert all(task.shots == 0 for task in suite.tasks)
    table = results.reference_table(suite)
    assert table[0] == ["reference", "mean_accuracy", "wikitext"]
    assert table[1][1:] == ["52.80", "16.73"]


@pytest.mark.parametrize("preset", ["paper8", "paper-7b"])
def test_presets_name_tasks_and_metrics_that_the_harness_has(preset):
    from pathlib import Path

    import lm_eval

    found = "\n".join(
        path.read_text() for path in (Path(lm_eval.__file__).parent / "tasks").glob("[a-z]*/**/*.yaml") if path.stat().st_size < 9000
    )
    for choice in presets()[preset].tasks:
        assert f"task: {choice.task}\n" in found or f"group: {choice.task}\n" in found
        assert f"metric: {choice.metric}" in found


def test_a_suite_is_a_preset_names_or_a_file(tmp_path):
    assert read_suite("sciq, code").tasks[0].task == "sciq"
    assert "mean_accuracy" in read_suite("sciq,code").averages
    (tmp_path / "mine.yaml").write_text("tasks: [sciq, {task: own.yaml, metric: acc}]\naverages: {both: [sciq, own]}\n")
    suite = read_suite(str(tmp_path / "mine.yaml"))
    assert [task.name for task in suite.tasks] == ["sciq", "own"]
    assert suite.tasks[1].task == str(tmp_path / "own.yaml")
    (tmp_path / "mine.yaml").write_text("tasks: [sciq]\naverages: {both: [sciq, piqua]}\n")
    with pytest.raises(OutgrowError, match="averages.both names 'piqua', which is not among the tasks"):
        read_suite(str(tmp_path / "mine.yaml"))
    with pytest.raises(OutgrowError, match="--tasks takes paper8"):
        read_suite("sciq,")
    with pytest.raises(OutgrowError, match="there is no file"):
        read_suite("nowhere.yaml")


# --- questions ------------------------------------------------------------------------------------------------------


def test_questions_are_what_they_say(place, tasks):
    texts = {one.name: one.text for one in read([str(place / "corpus")])}
    for task in ("code_identifier", "code_bracket", "code_indent"):
        found = records(tasks / f"{task}.jsonl")
        assert found
        for record in found:
            text, right = texts[record["document"]], record["choices"][record["answer"]]
            assert text[: record["offset"]].endswith(record["context"])
            assert text[record["offset"] :].startswith(right)
            assert len(set(record["choices"])) == len(record["choices"])
            assert is_held_out(Document("", text), 0.3)
            if task == "code_identifier":
                assert all(name in record["context"] for name in record["choices"])
    kinds = [record["kind"] for record in records(tasks / "code_bracket.jsonl")]
    assert len({kinds.count(kind) for kind in kinds}) == 1
    assert len(set(kinds[:3])) == len(set(kinds))  # in turn, so that a limit keeps the balance


def test_the_same_text_gives_the_same_files(place, tasks, tmp_path):
    write_tasks([str(place / "corpus")], tmp_path / "again", 12, 0.3)
    for path in tasks.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert files_hash(read_task(tasks / "code_bracket.yaml")[1]) == files_hash(read_task(tmp_path / "again" / "code_bracket.yaml")[1])
    (tmp_path / "again" / "code_bracket.jsonl").write_text("{}\n")
    assert files_hash(read_task(tasks / "code_bracket.yaml")[1]) != files_hash(read_task(tmp_path / "again" / "code_bracket.yaml")[1])


def test_tokens_stand_where_they_say_and_other_text_has_none():
    text = "def f(x):\r\n    return [x,\r\n            'é' + \"(\"]\n# (\nif x:\n\ty = 1\n"
    for token in python_tokens(text):
        if token.kind in (tokenize.NAME, tokenize.OP):
            assert text.startswith(token.text, token.offset)
    assert python_tokens("It isn't Python: (\n") == []
    only_text = make_questions([Document("prose", "It isn't Python: (\n")], 5)
    assert [len(only_text[task]) for task in ("code_identifier", "code_bracket", "code_indent", "code_text")] == [0, 0, 0, 1]


# --- the harness ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(place, tasks):
    """Results of the tiny checkpoint on all tasks."""
    suite = read_suite(str(tasks))
    return results.evaluate(place / "checkpoint", suite, harness.load_tasks(suite, None))


def log_likelihood(model, tokenizer, context, continuation, longest=256):
    """Of the continuation's tokens, on as many tokens before them as the model takes at once."""
    whole, before = (tokenizer(text)["input_ids"] for text in (context + continuation, context))
    target = whole[len(before) :]
    row = whole[-(longest + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([row[:-1]])).logits[0, -len(target) :].log_softmax(-1)
    return sum(float(logits[place, token]) for place, token in enumerate(target))


@pytest.mark.parametrize("task", ["code_identifier", "code_bracket", "code_indent"])
def test_accuracy_is_that_of_hand_computed_log_likelihoods(place, tasks, asked, task):
    model = AutoModelForCausalLM.from_pretrained(place / "checkpoint", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "checkpoint")
    right = []
    for record in records(tasks / f"{task}.jsonl"):
        scores = [log_likelihood(model, tokenizer, record["context"], choice) for choice in record["choices"]]
        right.append(float(np.argmax(scores) == record["answer"]))
    assert asked[task]["samples"] == len(right)
    assert asked[task]["value"] == pytest.approx(np.mean(right))
    assert asked[task]["stderr"] == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)


def test_averages_and_their_errors(asked):
    parts = [asked[task] for task in ("code_identifier", "code_bracket", "code_indent")]
    assert asked["mean_accuracy"]["value"] == pytest.approx(np.mean([part["value"] for part in parts]))
    assert asked["mean_accuracy"]["stderr"] == pytest.approx(sum(part["stderr"] ** 2 for part in parts) ** 0.5 / 3)


def test_results_are_kept_beside_the_weights_and_found_again(place, tasks, asked, tmp_path, monkeypatch):
    suite = read_suite(str(tasks))
    loaded = harness.load_tasks(suite, None)
    kept = {path.name: path.read_bytes() for path in (place / "checkpoint" / "evaluation").iterdir()}
    assert len(kept) == 4
    with monkeypatch.context() as patch:
        patch.setattr(harness, "run_task", None)
        assert results.evaluate(place / "checkpoint", suite, loaded) == asked
    # A file that was written for one metric says what it has when it is asked for another.
    odd = suite.model_copy(update={"tasks": tuple(one.model_copy(update={"metric": "acc_norm"}) for one in suite.tasks[:1])})
    with pytest.raises(OutgrowError, match="has no metric 'acc_norm'; it has"):
        results.evaluate(place / "checkpoint", odd, [dataclasses.replace(loaded[0], choice=odd.tasks[0])])
    shutil.copytree(place / "checkpoint", tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *arguments: False)
        patch.setattr(harness, "run_task", None)
        with pytest.raises(OutgrowError, match="evaluation' cannot be written to, and results are kept there"):
            results.evaluate(tmp_path / "other", suite, [dataclasses.replace(loaded[0], data="another")])
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    assert weights_hash(tmp_path / "other") != weights_hash(place / "checkpoint")
    assert results.evaluate(tmp_path / "other", suite, loaded)["code_text"]["value"] != asked["code_text"]["value"]
    assert len(list((tmp_path / "other" / "evaluation").iterdir())) == 8
    assert json.loads(next((tmp_path / "other" / "evaluation").glob("code_text-*")).read_text())["settings"]["data"]


def test_grown_checkpoints_carry_their_tokenizer_and_are_asked_as_they_are(place, tasks, tmp_path):
    checkpoint = open_checkpoint(place / "checkpoint")
    for operator, knobs in (("stack", {"factor": 2}), ("random-depth", {"factor": 2})):
        grow_directory(checkpoint, tmp_path / operator, make_plan(operator, checkpoint.arch, checkpoint.config, knobs))
        assert AutoTokenizer.from_pretrained(tmp_path / operator)("def f")["input_ids"]
        suite = read_suite(str(tasks / "code_bracket.yaml"))
        assert results.evaluate(tmp_path / operator, suite, harness.load_tasks(suite, None), limit=3)["code_bracket"]["samples"] == 3


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "qwen3"])
def test_any_family_of_transformers_is_asked(place, tasks, family, tmp_path):
    write_tiny(tmp_path / family, {**TINY[family], "vocab_size": 300}, dtype=torch.float32)
    with pytest.raises(OutgrowError, match="has no tokenizer; give the directory"):
        open_model(tmp_path / family)
    suite = read_suite(str(tasks / "code_bracket.yaml"))
    found = results.evaluate(tmp_path / family, suite, harness.load_tasks(suite, None), 2, tokenizer=str(place / "checkpoint"))
    assert 0 <= found["code_bracket"]["value"] <= 1


@pytest.mark.parametrize(("own", "asked", "used"), [(None, None, 0), (3, None, 3), (3, 0, 0), (3, 1, 1)])
def test_a_number_of_shots_is_what_is_shown_and_none_is_the_tasks_own(place, tasks, tmp_path, own, asked, used):
    shutil.copytree(tasks, tmp_path / "tasks")
    path = tmp_path / "tasks" / "code_bracket.yaml"
    path.write_text(path.read_text() + ("" if own is None else f"num_fewshot: {own}\n"))
    suite = read_suite(str(path))
    suite = suite.model_copy(update={"tasks": tuple(one.model_copy(update={"shots": asked}) for one in suite.tasks)})
    (loaded,) = harness.load_tasks(suite, None)
    assert harness.run_task(loaded, open_model(place / "checkpoint"), 2, 8)["shots"] == used
    (task,) = loaded.tasks["tasks"].values()
    examples = [len(one.arguments[0]) > len(one.doc["context"]) for one in task.instances]
    assert all(examples) if used else not any(examples)


@pytest.fixture
def begun(place, tmp_path):
    """A checkpoint with a tokenizer such as Llama 2's, whose template puts <s> before a text, where </s> is what ends one."""
    texts = [one.text for one in read([str(place / "corpus")])]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False))
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    shutil.copytree(place / "checkpoint", tmp_path / "begun", ignore=shutil.ignore_patterns("evaluation"))
    words.save(str(tmp_path / "begun" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "begun" / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "begun"


@pytest.mark.parametrize(("trained", "prefix"), [(True, "</s>"), (False, "<s>")])
def test_a_text_stands_behind_what_it_stood_behind_in_training(begun, tasks, tmp_path, trained, prefix):
    if trained:
        (begun / "outgrow.json").write_text(json.dumps({"tokens": 640, "run": "tiny"}))
    opened = open_model(begun)
    seen = []
    opened.model.register_forward_pre_hook(lambda model, given, named: seen.append(named.get("input_ids", *given[:1])), with_kwargs=True)
    for task in ("code_bracket", "code_text"):
        (loaded,) = harness.load_tasks(read_suite(str(tasks / f"{task}.yaml")), None)
        assert harness.run_task(loaded, opened, 2, 8)["prefix"] == prefix
    corpus_loss(opened, [str(tasks / "code_text.jsonl")], None, documents=1)
    for prompt in ("def f", ""):
        sample(opened, prompt, 1)
    begins = {int(row[0]) for batch in seen for row in batch}
    assert (begins >= {1} and 0 not in begins) if trained else (begins >= {0} and 1 not in begins)


def test_results_from_before_training_are_not_taken_for_those_after(begun, tasks):
    suite = read_suite(str(tasks / "code_text.yaml"))
    loaded = harness.load_tasks(suite, None)
    before = results.evaluate(begun, suite, loaded, 2)["code_text"]
    (begun / "outgrow.json").write_text(json.dumps({"tokens": 640, "run": "tiny"}))
    after = results.evaluate(begun, suite, loaded, 2)["code_text"]
    assert (before["prefix"], after["prefix"]) == ("<s>", "</s>")
    assert before["value"] != after["value"]


def test_asking_draws_no_random_numbers(place, tasks):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    suite = read_suite(str(tasks / "code_bracket.yaml"))
    (loaded,) = harness.load_tasks(suite, None)
    harness.run_task(loaded, open_model(place / "checkpoint"), 2, 8)
    assert torch.equal(torch.rand(1), expected)


def test_code_in_a_task_file_is_refused_unasked(tasks, tmp_path):
    shutil.copytree(tasks, tmp_path / "tasks")
    path = tmp_path / "tasks" / "code_bracket.yaml"
    path.write_text(path.read_text() + "process_docs: !function evil.run\n")
    (tmp_path / "tasks" / "outer.yaml").write_text("include: code_bracket.yaml\ntask: outer\n")
    for name in ("code_bracket", "outer"):
        with pytest.raises(OutgrowError, match=r"code_bracket.yaml' runs Python of its own .* --trust-code"):
            harness.load_tasks(read_suite(str(tmp_path / "tasks" / f"{name}.yaml")), None)


def test_a_group_as_a_file_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "group.yaml"
    path.write_text("group: both\ntask: [one, two]\n")
    with pytest.raises(OutgrowError, match=r"group.yaml' is a group, .* in a suite"):
        harness.load_tasks(read_suite(str(path)), None)


def test_a_result_belongs_to_the_code_beside_its_task(tasks, tmp_path):
    shutil.copytree(tasks, tmp_path / "tasks")
    path, code = tmp_path / "tasks" / "code_bracket.yaml", tmp_path / "tasks" / "own.py"
    suite = read_suite(str(path))
    path.write_text(path.read_text() + "process_docs: !function own.first\n")
    hashes = []
    for count in (5, 5, 7):
        code.write_text(f"def first(documents):\n    return documents.select(range({count}))\n")
        hashes.append(harness.load_tasks(suite, None, trust_code=True)[0].data)
    assert hashes[0] == hashes[1] != hashes[2]
    code.unlink()
    with pytest.raises(OutgrowError, match="code_bracket.yaml' cannot be loaded: .*own"):
        harness.load_tasks(suite, None, trust_code=True)


@pytest.mark.parametrize(
    "line", ["class: evil.Task", "unsafe_code: true", "metric_list: [{metric: ./evil}]", "metric_list: [{metric: acc, hf_evaluate: true}]"]
)
def test_other_ways_to_code_in_a_task_file_are_refused_unasked(tasks, tmp_path, line):
    (tmp_path / "plain.yaml").write_text(f"task: plain\n{line}\n")
    for text in ("include: 'plain.yaml'", "include: [plain.yaml]"):
        (tmp_path / "outer.yaml").write_text(f"{text}\ntask: outer\n")
        with pytest.raises(OutgrowError, match=r"plain.yaml' runs Python of its own .* --trust-code"):
            harness.load_tasks(read_suite(str(tmp_path / "outer.yaml")), None)


def test_a_template_reaches_no_python(tasks, tmp_path):
    """The harness renders a task's text with templates that can reach everything; ours cannot."""
    shutil.copytree(tasks, tmp_path / "tasks")
    path = tmp_path / "tasks" / "code_bracket.yaml"
    reach = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "reached") + "') }}"
    path.write_text(path.read_text().replace("doc_to_text: context", f'doc_to_text: "{reach}"'))
    with pytest.raises(OutgrowError, match="cannot be loaded: .*is unsafe"):
        harness.load_tasks(read_suite(str(path)), None)
    assert not (tmp_path / "reached").exists()


def test_what_a_task_file_includes_is_read_from_beside_it(place, tasks, tmp_path):
    shutil.copytree(tasks, tmp_path / "tasks" / "inner")
    outer = tmp_path / "tasks" / "outer.yaml"
    outer.write_text("include: inner/code_bracket.yaml\ntask: outer\n")
    suite = read_suite(str(outer))
    (loaded,) = harness.load_tasks(suite, None)
    (plain,) = harness.load_tasks(read_suite(str(tasks / "code_bracket.yaml")), None)
    opened = open_model(place / "checkpoint")
    assert harness.run_task(loaded, opened, 3, 8)["all"] == harness.run_task(plain, opened, 3, 8)["all"]
    data = tmp_path / "tasks" / "inner" / "code_bracket.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    assert harness.load_tasks(suite, None)[0].data != loaded.data
    (tmp_path / "tasks" / "inner" / "code_bracket.yaml").write_text("include: ../outer.yaml\n")
    with pytest.raises(OutgrowError, match="includes itself"):
        harness.load_tasks(suite, None)


def test_pickled_weights_and_foreign_tokenizers_are_refused(place, tmp_path):
    shutil.copytree(place / "checkpoint", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(OutgrowError, match="transformers cannot open|there is no 'model.safetensors'"):
        open_model(tmp_path / "pickled")
    write_tiny(tmp_path / "small", TINY["llama"], dtype=torch.float32)
    with pytest.raises(OutgrowError, match="the tokenizer has 300 entries and the model .* 53"):
        open_model(tmp_path / "small", tokenizer=str(place / "checkpoint"))


# --- loss and samples -----------------------------------------------------------------------------------------------


def test_loss_is_that_of_transformers_forward_pass_document_by_document(place):
    opened = open_model(place / "checkpoint", context=40)
    rows = corpus_loss(opened, [str(place / "corpus")], 0.3, batch_size=3)
    (row,) = rows.values()
    nats, tokens, size = [], [], []
    for document in read([str(place / "corpus")]):
        if not is_held_out(document, 0.3):
            continue
        ids = [opened.prefix, *opened.tokenizer(document.text)["input_ids"]]
        total = 0.0
        for start in range(1, len(ids), 40):
            end = min(start + 40, len(ids))
            piece = torch.tensor([ids[max(0, end - 41) : end]])
            with torch.no_grad():
                scores = F.cross_entropy(opened.model(piece[:, :-1]).logits[0], piece[0, 1:], reduction="none")
            total += float(scores[start - end :].sum())
        nats.append(total)
        tokens.append(len(ids) - 1)
        size.append(len(document.text.encode()))
    nats, tokens, size = map(np.array, (nats, tokens, size))
    assert (row["documents"], row["tokens"], row["bytes"]) == (len(nats), tokens.sum(), size.sum())
    assert row["loss"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(nats.sum() / size.sum() / math.log(2), rel=1e-5)
    assert row["loss_stderr"] == pytest.approx(harness.ratio_error(nats, tokens), rel=1e-3)
    assert row["bits_per_byte_stderr"] == pytest.approx(harness.ratio_error(nats, size) / math.log(2), rel=1e-3)


def test_loss_and_harness_agree_on_bits_per_byte(place, tasks, asked, tmp_path):
    lines = [json.dumps({"text": record["text"]}) for record in records(tasks / "code_text.jsonl")]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    (row,) = corpus_loss(open_model(place / "checkpoint"), [str(tmp_path / "text.jsonl")], None).values()
    assert row["bits_per_byte"] == pytest.approx(asked["code_text"]["value"], rel=1e-5)
    assert row["bits_per_byte_stderr"] == pytest.approx(asked["code_text"]["stderr"], rel=1e-3)


def test_text_that_looks_like_a_control_token_is_text(begun, tasks, tmp_path):
    """As training packs it; to the harness too, where outgrow trained the model."""
    (begun / "outgrow.json").write_text(json.dumps({"tokens": 640, "run": "tiny"}))
    shutil.copy(tasks / "code_text.yaml", tmp_path)
    text = tmp_path / "code_text.jsonl"
    text.write_text(json.dumps({"text": "one</s>two<s>"}) + "\n")
    opened = open_model(begun)
    (row,) = corpus_loss(opened, [str(text)], None).values()
    assert row["tokens"] == sum(len(opened.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in ("one<", "/s>two<", "s>"))
    (loaded,) = harness.load_tasks(read_suite(str(tmp_path / "code_text.yaml")), None)
    assert harness.run_task(loaded, opened, None, 8)["all"]["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-5)
    (begun / "outgrow.json").unlink()
    (foreign,) = corpus_loss(open_model(begun), [str(text)], None).values()
    assert foreign["tokens"] == row["tokens"]


def test_loss_by_source_and_file(place, tmp_path):
    (tmp_path / "one.txt").write_text("x = 1\n" * 30)
    opened = open_model(place / "checkpoint")
    rows = corpus_loss(opened, [str(place / "corpus"), str(tmp_path)], None, documents=3)
    assert list(rows) == [str(place / "corpus"), str(tmp_path), "all"]
    assert rows["all"]["documents"] == 4
    assert rows[str(tmp_path)]["loss_stderr"] is None
    assert list(corpus_loss(opened, [str(place / "corpus")], None, documents=2, by_file=True)) == [
        f"{place / 'corpus'}: module_00.py", f"{place / 'corpus'}: module_01.py", "all",
    ]  # fmt: skip
    with pytest.raises(OutgrowError, match="no document of .* is held out"):
        corpus_loss(opened, [str(tmp_path)], 1e-9)


def test_samples_repeat_by_seed_and_greedy_is_the_likeliest(place):
    opened = open_model(place / "checkpoint")
    first = sample(opened, "def f", 12, 1.0, 20, seed=1, count=2)
    assert first == sample(opened, "def f", 12, 1.0, 20, seed=1, count=2)
    assert first[0] != first[1]
    assert all(text.startswith("def f") for text in first)
    assert sample(opened, "def f", 12, 1.0, 1, seed=1) == sample(opened, "def f", 12, 0, seed=2)
    assert isinstance(sample(opened, "", 3)[0], str)
    with pytest.raises(OutgrowError, match=r"are over the 256 that the model takes at once; ask for 25\d --tokens"):
        sample(opened, "def", 256)


# --- in training ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(place, tmp_path):
    text = (
        TINY_RUN.replace("max_position_embeddings: 16", "max_position_embeddings: 64")
        .replace("context: 16", "context: 64")
        .replace("validation_share: 0.1", "validation_share: 0.3")
    )
    config = load(RunConfig, write(tmp_path / "run.yaml", text, corpus=place / "corpus", tokens=640))
    return config.model_copy(update={"evaluate": EvaluateConfig(tasks="code_bracket,code_text", every=256, limit=4), "precision": "fp32"})


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("given", [{}, {"eos_token_id": 5, "pad_token_id": 7}])
def test_a_trained_checkpoint_says_the_tokens_of_its_tokenizer_and_those_that_were_given(run, tmp_path, family, given):
    model = {**TINY[family], "vocab_size": 300, **given}
    trained = run.model_copy(update={"model": model, "evaluate": None, "tokens": 128})
    execute(trained, tmp_path / "runs", Observer())
    (checkpoint,) = read_result(trained, tmp_path / "runs").directory.glob("checkpoints/*128")
    expected = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, **given}
    config = json.loads((checkpoint / "config.json").read_text())
    assert {name: config.get(name) for name in expected} == expected
    assert AutoModelForCausalLM.from_pretrained(checkpoint).generation_config.eos_token_id == expected["eos_token_id"]


def rows(result):
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in result.rows]


def test_a_run_evaluates_where_it_was_asked_to_and_its_identity_and_weights_stay(run, tmp_path):
    plain = run.model_copy(update={"evaluate": None})
    assert run.identity() == plain.identity()
    execute(run, tmp_path / "asked", Observer())
    execute(plain, tmp_path / "plain", Observer())
    asked, unasked = read_result(run, tmp_path / "asked"), read_result(plain, tmp_path / "plain")
    assert [row["tokens"] for row in asked.evaluations] == [0, 256, 512, 640]
    assert {"eval/code_bracket/acc", "eval/code_bracket/acc_stderr", "eval/code_text/bits_per_byte"} <= set(asked.evaluations[0])
    assert [row for row in rows(asked) if "loss" in row] == [row for row in rows(unasked) if "loss" in row]
    weights = [next(one.directory.glob("checkpoints/*640/model.safetensors")).read_bytes() for one in (asked, unasked)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("steps", [3, 4, 8])
def test_a_resumed_run_neither_repeats_nor_loses_evaluations(run, tmp_path, steps):
    execute(run, tmp_path / "whole", Observer())
    with pytest.raises(Interrupted):
        execute(run, tmp_path / "parts", Observer(stop_after=steps))
    execute(run, tmp_path / "parts", Observer())
    assert rows(read_result(run, tmp_path / "parts")) == rows(read_result(run, tmp_path / "whole"))


def test_what_was_evaluated_is_found_behind_any_number_of_roll_backs(run, tmp_path):
    from outgrow.data.packed import prepare
    from outgrow.lab.runs import place
    from outgrow.training.loop import _evaluate, train
    from outgrow.training.record import METRICS

    execute(run, tmp_path, Observer())
    directory = place(run, tmp_path)
    with (directory / METRICS).open("a") as file:
        file.writelines(json.dumps({"tokens": 640, "flops": 1.0, "rolled_back": "x"}) + "\n" for _ in range(5))
    trained = train(run, directory, prepare(run.data, tmp_path / "data"), None, Observer())
    trained.directory.joinpath(METRICS).read_text()
    _evaluate(trained, Observer(), lambda checkpoint: pytest.fail("evaluated twice"))


def test_a_run_killed_while_it_evaluates_evaluates_again(run, tmp_path, monkeypatch):
    from outgrow.lab import execute as lab_execute

    execute(run, tmp_path / "whole", Observer())
    real = evaluator(run, tmp_path / "killed")

    def killed(directory):
        if int(directory.name) == 512:
            raise KeyboardInterrupt
        return real(directory)

    with monkeypatch.context() as patch:
        patch.setattr(lab_execute, "evaluator", lambda run, root: killed)
        with pytest.raises(KeyboardInterrupt):
            execute(run, tmp_path / "killed", Observer())
    execute(run, tmp_path / "killed", Observer())
    assert rows(read_result(run, tmp_path / "killed")) == rows(read_result(run, tmp_path / "whole"))


def test_tasks_that_cannot_be_had_are_told_before_training(run, tmp_path):
    wrong = run.model_copy(update={"evaluate": EvaluateConfig(tasks="nowhere.yaml")})
    with pytest.raises(OutgrowError, match="there is no file"):
        execute(wrong, tmp_path, Observer())
    assert not list(tmp_path.glob("tiny-*"))
    packed = run.model_copy(update={"data": run.data.model_copy(update={"sources": ({"path": "x"},)})})
    with pytest.raises(OutgrowError, match="data.sources holds tokens alone"):
        evaluator(packed, tmp_path)


def test_a_comparison_reads_speed_up_at_equal_accuracy_and_reports_it(place, tmp_path):
    text = TINY_COMPARISON.replace("max_position_embeddings: 16", "max_position_embeddings: 64").replace("context: 16", "context: 64")
    text = text.replace("validation_share: 0.1", "validation_share: 0.3") + "precision: fp32\n"
    text += "evaluate: {{tasks: 'code_indent,code_text', every: 640, limit: 6}}\n"
    recipe = load(Comparison, write(tmp_path / "comparison.yaml", text, corpus=place / "corpus"))
    for one in in_order(recipe.runs((0,))):
        execute(one, tmp_path / "runs", Observer())
    outcome = read_outcome(recipe, (0,), tmp_path / "runs")
    assert outcome.evaluated() == ["eval/code_indent/acc", "eval/code_text/bits_per_byte"]
    instants = outcome.instants(0)
    assert [row["tokens"] for row in instants.values()] == [640, 640, 1920, 2560, 1920, 2560]
    (found,) = outcome.task_speed_ups("constant", "eval/code_text/bits_per_byte")
    curves = [outcome.on_task("constant", arm, 0, "eval/code_text/bits_per_byte") for arm in ("scratch", "grown")]
    assert found is None or found.loss == max(min(value for _, value in curve) for curve in curves)
    write_report(outcome, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for part in ("<h2>Tasks</h2>", "grown, before a step", "code_indent/acc", "speed-up at equal"):
        assert part in page
    without = dataclasses.replace(
        outcome,
        results={
            key: dataclasses.replace(one, rows=[row for row in one.rows if row not in one.evaluations])
            for key, one in outcome.results.items()
        },
    )
    write_report(without, tmp_path / "without.html")
    assert "<h2>Tasks</h2>" not in (tmp_path / "without.html").read_text()


def test_equal_accuracy_is_read_at_the_highest_that_both_reach():
    scratch, grown = [(1e12, 0.3), (2e12, 0.4), (4e12, 0.5)], [(1e12, 0.35), (2e12, 0.45)]
    found = equal_accuracy(scratch, grown)
    assert found.loss == 0.45
    assert found.grown_flops == pytest.approx(2e12)
    assert found.scratch_flops == pytest.approx(2e12 * 2**0.5)
    assert equal_accuracy([(1e12, 0.5)], [(1e12, 0.4), (2e12, 0.45)]) is None
    # Both at chance from the beginning: nothing was reached, and nobody was faster.
    assert equal_accuracy([(1e12, 1 / 3), (2e12, 1 / 3)], [(5e11, 1 / 3), (2e12, 1 / 3)]) is None
    assert equal_accuracy([(1e12, 0.3), (2e12, 0.4)], [(5e11, 0.4), (2e12, 0.38)]) is None


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_commands_end_to_end(place, tmp_path):
    corpus, checkpoint = place / "corpus", tmp_path / "checkpoint"
    shutil.copytree(place / "checkpoint", checkpoint, ignore=shutil.ignore_patterns("evaluation"))
    made = inside("data", "tasks", corpus, "--output", tmp_path / "tasks", "--count", 6, "--validation-share", 0.3)
    assert "code_bracket" in made
    done = outgrow("eval", checkpoint, place / "checkpoint", "--tasks", tmp_path / "tasks", "--limit", 3)
    assert done.returncode == 0, done.stderr
    assert "mean_accuracy" in done.stdout
    assert "bits_per_byte" in done.stdout
    named = ("--tasks", "code_bracket", "--corpus", corpus, "--validation-share", 0.3, "--runs", tmp_path, "--limit", 3, "--json")
    assert json.loads(inside("eval", checkpoint, *named))[str(checkpoint)]["code_bracket"]["samples"] == 3
    two = ("--corpus", corpus, "--documents", 2, "--all")
    assert json.loads(inside("loss", checkpoint, *two, "--json"))[str(corpus)]["documents"] == 2
    assert "bits per byte" in inside("loss", checkpoint, *two)
    texts = inside("sample", checkpoint, "--prompt", "def ", "--tokens", 5, "--count", 2, "--top-k", 5)
    assert texts.count("def ") == 2


def test_what_cannot_be_evaluated_is_one_sentence(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint = place / "checkpoint"
    command = [sys.executable, "-m", "outgrow", "eval", str(checkpoint), "--tasks", "sciq"]  # one that reads the variable where it imports
    refused(
        subprocess.run(command, capture_output=True, text=True, check=False),
        "the data set 'allenai/sciq' of the task 'sciq' is not on this machine.* HF_DATASETS_OFFLINE=1",
    )
    for arguments, message in (
        (("eval", checkpoint, "--tasks", "code", "--validation-share", 2), "--validation-share takes a share"),
        (("eval", tmp_path, "--tasks", place / "nowhere.yaml"), "there is no file"),
        (("eval", checkpoint, "--tasks", place / "tasks", "--corpus", "python"), "--corpus has no effect"),
        (("loss", tmp_path), "there is no checkpoint in"),
        (("sample", checkpoint, "--tokens", 900), "over the 256"),
        (("sample", checkpoint, "--temperature", 0, "--count", 2), "--count has no effect"),
        (("loss", checkpoint, "--all", "--validation-share", 0.04), "--validation-share has no effect with --all"),
        (("diagnose", checkpoint, "--documents", 0, "--corpus", "python"), "--corpus has no effect with --documents 0"),
        (("loss", checkpoint, "--device", "abacus"), "--device takes cpu"),
        (("loss", checkpoint, "--device", "xpu"), "--device xpu is asked for and torch finds none"),
        (("loss", checkpoint, "--context", 999), "--context 999 is more than the 256"),
    ):
        with pytest.raises(OutgrowError, match=message):
            inside(*arguments)


def inside(*arguments):
    """The command line in this process; gives what it prints."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_missing_harness_is_one_sentence(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(OutgrowError, match=r"pip install 'outgrow\[eval\]'"):
        harness.load_tasks(read_suite("code"), None)


def test_tasks_made_of_a_corpus_are_found_again(place, tmp_path):
    first = made_tasks(tmp_path, [str(place / "corpus")], 6, 0.3)
    stamp = (first / "suite.yaml").stat().st_mtime_ns
    assert made_tasks(tmp_path, [str(place / "corpus")], 6, 0.3) == first
    assert (first / "suite.yaml").stat().st_mtime_ns == stamp


def test_names_of_checkpoints_here_and_elsewhere_are_told_apart(tmp_path, monkeypatch):
    from outgrow.cli.show import short_names

    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert short_names(["."]) == ["one"]
    assert all(short_names([".", "../other"]))


def test_what_falls_is_told_by_the_metric_and_not_by_a_tasks_name():
    from outgrow.lab.evaluating import falls

    assert not falls("eval/character")
    assert falls("eval/wmt/ter")
    assert falls("eval/average/mean_word_perplexity")


def test_averages_are_of_one_kind_of_metric():
    suite = Suite(tasks=("a", "b"), averages={"both": ("a", "b")})
    found = {name: {"metric": "word_perplexity", "value": value, "stderr": 1.0} for name, value in (("a", 20.0), ("b", 10.0))}
    average = results.averages(suite, found)["both"]
    assert (average["metric"], average["value"]) == ("mean_word_perplexity", 15.0)
    assert results.averages(suite, {**found, "b": {**found["b"], "metric": "acc"}}) == {}


def test_f_strings_ask_nothing_in_any_python():
    texts = [token.text for token in python_tokens('a = f"{b(c)}" + d\n')]
    assert "d" in texts
    assert "b" not in texts


def test_a_checkpoints_own_generation_settings_do_not_stand_in(place):
    opened = open_model(place / "checkpoint")
    plain = sample(opened, "def ", 8, 0.0)
    opened.model.generation_config = GenerationConfig(repetition_penalty=50.0, top_p=0.01)
    assert sample(opened, "def ", 8, 0.0) == plain
