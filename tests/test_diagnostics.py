"""Diagnostics: numbers that are known beforehand, on grown and trained checkpoints of several families."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outgrow import grow
from outgrow.checkpoint.lineage import read_lineage
from outgrow.errors import OutgrowError
from outgrow.evaluation.diagnostics import Diagnosis, cosine, diagnose, effective_rank
from outgrow.lab.diagnosing import figures, rows, sentences, write_diagnosis
from outgrow.lab.recovery import recovery
from outgrow.lab.tiny import TINY, write_tiny

from .processes import outgrow


def save_tiny(family: str, directory: Path, **edits: int) -> Path:
    write_tiny(directory, {**TINY[family], **edits}, dtype=torch.float32)
    return directory


def test_effective_rank_counts_directions():
    assert effective_rank(torch.eye(7)) == pytest.approx(1)
    assert effective_rank(torch.ones(5, 9)) == pytest.approx(1 / 5)
    assert effective_rank(torch.zeros(3, 4)) == 0
    two = torch.zeros(4, 6)
    two[0, 0] = two[1, 1] = 3.0
    assert effective_rank(two) == pytest.approx(2 / 4)


def test_cosine_of_nothing_is_not_a_number():
    assert cosine(torch.ones(3), 2 * torch.ones(3)) == pytest.approx(1)
    assert math.isnan(cosine(torch.ones(3), torch.zeros(3)))


@pytest.mark.parametrize("family", sorted(TINY))
def test_copies_are_alike_until_one_of_them_moves(family, tmp_path):
    source = save_tiny(family, tmp_path / "source")
    grow(source, tmp_path / "grown", "stack(factor=2)")
    base, found = diagnose(source), diagnose(tmp_path / "grown")
    count = len(next(iter(base.rms.values())))
    assert list(found.sources) == list(range(count)) * 2
    assert all(math.isnan(one) for one in found.likeness[:count])
    assert found.likeness[count:] == pytest.approx([1.0] * count)
    assert found.seams == [count]
    for key, layers in base.rms.items():
        assert found.rms[key] == pytest.approx(layers * 2)
        assert found.rank[key] == pytest.approx(base.rank[key] * 2, abs=1e-6)
    weights = load_file(tmp_path / "grown" / "model.safetensors")
    last = next(name for name in reversed(list(weights)) if f".{2 * count - 1}." in name and weights[name].ndim > 1)
    weights[last] = -weights[last]
    save_file(weights, tmp_path / "grown" / "model.safetensors")
    moved = diagnose(tmp_path / "grown", ranks=False)
    assert moved.likeness[-1] < 0.99
    assert moved.likeness[count:-1] == found.likeness[count:-1]
    assert moved.rank == {}


def test_copied_neurons_are_alike_until_one_of_them_moves(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    ffn = config["intermediate_size"]
    grow(source, tmp_path / "grown", f"direct-width(ffn={2 * ffn})")
    found = diagnose(tmp_path / "grown")
    assert set(found.neurons) == {"ffn"}
    assert found.neurons["ffn"] == pytest.approx([1.0] * config["num_hidden_layers"])
    weights = load_file(tmp_path / "grown" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][ffn:] *= -1
    save_file(weights, tmp_path / "grown" / "model.safetensors")
    moved = diagnose(tmp_path / "grown").neurons["ffn"]
    assert moved[0] == pytest.approx(1 / 3)  # of gate, up and down: 1, -1 and 1
    assert moved[1:] == pytest.approx([1.0] * (len(moved) - 1))


def test_copied_experts_are_read_in_all_their_matrices(tmp_path):
    source = save_tiny("mixtral", tmp_path / "source")
    grow(source, tmp_path / "grown", "more-experts")
    found = diagnose(tmp_path / "grown").neurons["expert"]
    assert found == pytest.approx([1.0] * len(found))
    weights = load_file(tmp_path / "grown" / "model.safetensors")
    for expert in range(4, 8):
        weights[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"] *= -1
    save_file(weights, tmp_path / "grown" / "model.safetensors")
    moved = diagnose(tmp_path / "grown").neurons["expert"]
    assert moved[0] == pytest.approx(1 / 2)  # of the router, w1, w2 and w3: 1, 1, -1 and 1
    assert moved[1:] == pytest.approx(found[1:])


def test_a_copy_behind_a_new_layer_is_a_seam():
    assert Diagnosis(0, [0, 1, -1, -1, 0, 1], {}, {}, [], {}, []).seams == [2, 3, 4]


def test_copies_are_known_through_several_growths(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    count = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    grow(source, tmp_path / "grown", "stack(factor=2), interpolate(factor=2)")
    twice = [layer for layer in [*range(count), *range(count)] for _ in range(2)]
    assert read_lineage(tmp_path / "grown").copies == {"layer": twice}


def test_what_a_layer_adds_is_the_loss_without_it(tmp_path, corpus):
    from outgrow.data.config import DataConfig
    from outgrow.data.packed import prepare
    from outgrow.evaluation.loss import mean_loss
    from outgrow.evaluation.model import open_model
    from outgrow.evaluation.skipped import first_held_out, skipped_losses

    settings = DataConfig(corpus=str(corpus), vocab=300, context=16, validation_share=0.3, validation_tokens=256)  # type: ignore[call-arg]
    packed = prepare(settings, tmp_path / "data")
    source = save_tiny("llama", tmp_path / "source", vocab_size=300)
    grow(source, tmp_path / "grown", "zero-depth(factor=2)")
    opened = open_model(tmp_path / "grown", tokenizer=str(packed.tokenizer_files[0].parent))
    documents = first_held_out([str(corpus)], 4, 0.3)
    whole, found = skipped_losses(opened, documents)
    assert whole == mean_loss(opened, documents)
    sources = diagnose(tmp_path / "grown").sources
    identity = [layer for layer in range(len(found)) if sources[layer] in sources[:layer] or sources[layer] < 0]
    assert identity
    assert all(abs(found[layer]) < 1e-6 for layer in identity)  # they compute nothing yet
    kept = [layer for layer in range(len(found)) if layer not in identity]
    assert any(abs(found[layer]) > 1e-5 for layer in kept)
    with pytest.raises(OutgrowError, match="is held out"):
        first_held_out([str(corpus)], 4, 1e-12)


@pytest.mark.parametrize(
    ("points", "spike", "tokens"),
    [
        ([(100, 3.0), (200, 2.9)], 0.0, 0),  # exact growth that only gets better
        ([(100, 5.0), (200, 3.5), (300, 2.9), (400, 2.8)], 2.0, 200),
        ([(100, 3.0), (200, 4.0), (300, 2.9)], 1.0, 200),  # the new rate's rise, later made good
        ([(100, 5.0), (200, 4.0)], 2.0, None),
    ],
)
def test_a_spike_is_made_good_after_its_peak(points, spike, tokens):
    found = recovery(3.0, points)
    assert found.spike == pytest.approx(spike)
    assert found.tokens == tokens


def test_the_command_prints_writes_a_page_and_figures(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    grow(source, tmp_path / "grown", "stack(factor=2)")
    run = ("diagnose", tmp_path / "grown", "--documents", 0)
    page, picture = tmp_path / "page.html", tmp_path / "figures.svg"
    done = outgrow(*run, "--output", page, "--figure", picture)
    assert done.returncode == 0, done.stderr
    assert "likeness to first copy" in done.stdout
    assert "at the seams" in done.stdout
    assert "likeness of copied layers" in page.read_text()
    assert "<svg" in picture.read_text()
    printed = json.loads(outgrow(*run, "--json").stdout)
    assert printed[str(tmp_path / "grown")]["likeness"][0] is None
    wrong = outgrow(*run[:-2], "--figure", "x.gif")
    assert wrong.returncode
    assert "Traceback" not in wrong.stderr


def test_weights_that_are_no_numbers_are_named(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, source / "model.safetensors")
    with pytest.raises(OutgrowError, match=r"'model.layers.1.mlp.up_proj.weight' of .* holds what is no number"):
        diagnose(source)


def test_checkpoints_of_one_run_show_how_copies_part(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    grow(source, tmp_path / "grown", "stack(factor=2)")
    later = tmp_path / "later"
    later.mkdir()
    for path in (tmp_path / "grown").iterdir():
        (later / path.name).write_bytes(path.read_bytes())
    receipt = json.loads((later / "outgrow.json").read_text())
    (later / "outgrow.json").write_text(json.dumps({**receipt, "tokens": 1000}))
    weights = {name: value + 0.01 * torch.randn(value.shape) for name, value in load_file(later / "model.safetensors").items()}
    save_file(weights, later / "model.safetensors")
    found = {"at growth": diagnose(tmp_path / "grown"), "later": diagnose(later)}
    part = next(figure for figure in figures(found) if figure.title == "copies part as they train")
    assert list(part.series[0].x) == [0, 1000]
    assert part.series[0].y[0] == pytest.approx(1)
    assert part.series[0].y[1] < 0.999
    write_diagnosis(found, tmp_path / "page.html", None)
    assert list(sentences(found))
    assert rows(found["later"])[0][:2] == ["layer", "copy of"]
