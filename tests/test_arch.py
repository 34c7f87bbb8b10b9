from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from outgrow.arch import LLAMA, arch_for, flops_per_token, parameter_counts, parse, step_flops
from outgrow.checkpoint.grow import grow_directory
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.errors import OutgrowError
from outgrow.growth.operators import make_plan
from outgrow.lab.tiny import TINY, write_tiny
from outgrow.models.build import resolved

from .conftest import ODD

# Another odd size of each family, with other choices of what its config leaves open.
OTHER = {
    "llama": {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": None,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"hidden_size": 42, "num_hidden_layers": 1, "tie_word_embeddings": False},
    "qwen2": {"hidden_size": 30, "head_dim": None, "tie_word_embeddings": False},
    "qwen3": {"hidden_size": 42, "attention_bias": True, "tie_word_embeddings": False},
    "qwen3_moe": {"hidden_size": 42, "num_experts": 3, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "gemma2": {"hidden_size": 42, "num_hidden_layers": 3, "num_key_value_heads": 3},
    "olmo2": {"hidden_size": 30, "head_dim": None, "num_key_value_heads": 6, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 33, "n_head": 3, "n_inner": None, "n_layer": 1},
    "gpt_neox": {"hidden_size": 33, "num_attention_heads": 3, "intermediate_size": 50, "attention_bias": False},
    "opt": {
        "hidden_size": 33,
        "word_embed_proj_dim": 33,
        "num_attention_heads": 3,
        "ffn_dim": 50,
        "enable_bias": False,
        "tie_word_embeddings": False,
    },
    "phi3": {"hidden_size": 30, "head_dim": None, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "mixtral": {"hidden_size": 42, "num_local_experts": 3, "num_hidden_layers": 2},
}
SHAPES = [*TINY.values(), *({k: v for k, v in {**TINY[family], **edits}.items() if v is not None} for family, edits in OTHER.items())]
# The paper's targets (arXiv 2405.15319): layers, hidden, ffn, heads, key-value heads.
PAPER = {
    "410M": (24, 1024, 2816, 16, 16),
    "1.1B": (24, 2048, 5632, 32, 32),
    "3B": (32, 2560, 7040, 20, 4),
    "7B": (32, 4096, 11008, 32, 8),
}


def _paper(name, layers=None):
    depth, hidden, ffn, heads, kv = PAPER[name]
    return {
        "model_type": "llama", "num_hidden_layers": layers or depth, "hidden_size": hidden, "intermediate_size": ffn,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": 32_000,
    }  # fmt: skip


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: f"{config['model_type']}-{config.get('hidden_size') or config['n_embd']}")
def test_names_shapes_and_counts_are_those_that_transformers_writes(config, tmp_path):
    write_tiny(tmp_path, config, dtype=torch.float32)
    whole = json.loads((tmp_path / "config.json").read_text())
    on_disk = {name: tuple(value.shape) for name, value in load_file(tmp_path / "model.safetensors").items()}
    arch = arch_for(whole)
    assert arch.shapes(whole) == on_disk
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**whole))
    counts = parameter_counts(arch, whole)
    assert counts.total == model.num_parameters()
    tables = ("embed", "lm_head", "wte", "wpe")
    assert counts.embedding == sum(math.prod(shape) for name, shape in on_disk.items() if any(word in name for word in tables))
    assert open_checkpoint(tmp_path).arch is arch


def test_a_mixture_counts_the_experts_that_a_token_is_sent_to():
    config = TINY["qwen3_moe"]
    arch = arch_for(config)
    dense = parameter_counts(arch, {**config, "num_experts": 2}).matmul
    assert parameter_counts(arch, config).matmul == dense + config["num_hidden_layers"] * 2 * config["hidden_size"]  # the router's rows


def test_names_of_a_file_saved_without_its_head_are_made_whole(tmp_path):
    """The hub's gpt2 is such a file; it also carries the causal mask as a buffer."""
    source = tmp_path / "source"
    write_tiny(source, TINY["gpt2"])
    whole = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in whole.items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1)}, source / "model.safetensors")
    found = open_checkpoint(source)
    assert set(found.tensors) == set(whole)
    grow_directory(source, tmp_path / "grown", make_plan("stack", found.arch, found.config))
    grown = load_file(tmp_path / "grown" / "model.safetensors")
    assert torch.equal(grown["transformer.h.5.mlp.c_fc.weight"], whole["transformer.h.1.mlp.c_fc.weight"])


@pytest.mark.parametrize(
    ("family", "edits", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "'do_layer_norm_before' = False is not described for opt; only True is"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"'mlp_only_layers' = \[0\] is not described for qwen3_moe"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' = True is not described"),
    ],
)
def test_variants_that_no_table_describes_are_refused(family, edits, message):
    config = {**TINY[family], **edits}
    with pytest.raises(OutgrowError, match=message):
        arch_for(config).shapes(config)


@pytest.mark.parametrize("name", PAPER)
def test_flops_are_six_per_multiplying_parameter_and_attention(name):
    layers, hidden, ffn, heads, kv = PAPER[name]
    attention = hidden * hidden * 2 + 2 * hidden * (hidden // heads) * kv
    by_hand = 6 * (layers * (attention + 3 * hidden * ffn) + 32_000 * hidden) + 12 * layers * hidden * 2048
    assert flops_per_token(LLAMA, _paper(name), 2048) == by_hand


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_under_muon_multiplies_to_orthogonalise(family):
    """The products that torch.optim.Muon does to one update of every matrix inside a block, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    config = TINY[family]
    arch = arch_for(config)
    weights = {
        tensor.name: torch.nn.Parameter(torch.ones(arch.shape(tensor.spec, arch.sizes(config))))
        for tensor in arch.tensors(config) if tensor.is_inner_matrix
    }  # fmt: skip
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    with FlopCounterMode(display=False) as counted:
        torch.optim.Muon(weights.values()).step()
    of_tokens = 8 * flops_per_token(arch, config, 16)
    assert step_flops(arch, config, 16, 8, "muon") == of_tokens + counted.get_total_flops()
    assert step_flops(arch, config, 16, 8, "adamw") == of_tokens


def test_the_papers_sizes():
    assert parameter_counts(LLAMA, _paper("1.1B", layers=6)).total == pytest.approx(0.44e9, rel=0.01)
    assert parameter_counts(LLAMA, _paper("1.1B")).total == pytest.approx(1.36e9, rel=0.01)


def test_a_tied_head_is_counted_once_as_a_parameter_and_still_multiplies():
    untied, tied = ({**ODD, "tie_word_embeddings": flag} for flag in (False, True))
    one, two = parameter_counts(LLAMA, tied), parameter_counts(LLAMA, untied)
    assert two.total - one.total == ODD["vocab_size"] * ODD["hidden_size"]
    assert one.matmul == two.matmul
    assert one.head == two.head
    assert one.non_embedding == two.non_embedding


def test_a_base_of_a_quarter_of_the_layers_costs_more_than_a_quarter():
    """FACTS of the literature: 0.26 of the 7B target per token, because the head does not shrink."""
    share = flops_per_token(LLAMA, _paper("7B", layers=8), 2048) / flops_per_token(LLAMA, _paper("7B"), 2048)
    assert share == pytest.approx(0.26, abs=0.01)


# config.json of models on the hub, as far as sizes go, and the parameter counts that their pages state.
_QWEN = {"rms_norm_eps": 1e-6, "vocab_size": 151936, "max_window_layers": 28}
PUBLISHED = {
    "Qwen2.5-0.5B": (494_032_768, {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
                                   "num_hidden_layers": 24, "num_key_value_heads": 2, "tie_word_embeddings": True, **_QWEN}),
    "Qwen3-0.6B": (596_049_920, {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "head_dim": 128,
                                 "num_hidden_layers": 28, "num_key_value_heads": 8, "tie_word_embeddings": True, **_QWEN}),
    "Qwen3-30B-A3B": (30_532_122_624, {"model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32,
                                       "head_dim": 128, "num_hidden_layers": 48, "num_key_value_heads": 4, "num_experts": 128,
                                       "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], **_QWEN}),
    "gemma-2-2b": (2_614_341_888, {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
                                   "head_dim": 256, "num_hidden_layers": 26, "num_key_value_heads": 4, "vocab_size": 256000}),
    "OLMo-2-1B": (1_484_916_736, {"model_type": "olmo2", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
                                  "num_hidden_layers": 16, "num_key_value_heads": 16, "vocab_size": 100352}),
    "pythia-70m": (70_426_624, {"model_type": "gpt_neox", "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
                                "num_hidden_layers": 6, "vocab_size": 50304}),
    "gpt2": (124_439_808, {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}),
    "opt-125m": (125_239_296, {"model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
                               "max_position_embeddings": 2048, "vocab_size": 50272, "word_embed_proj_dim": 768}),
    "Phi-3-mini": (3_821_079_552, {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
                                   "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32064}),
    "Llama-3-70B": (70_553_706_496, {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
                                     "num_hidden_layers": 80, "num_key_value_heads": 8, "vocab_size": 128256}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes_and_grow(name):
    total, config = PUBLISHED[name]
    arch = arch_for(config)
    assert parameter_counts(arch, config).total == total
    sizes = arch.sizes(config)
    wider = {"hidden": sizes["hidden"] * 3 // 2, **({} if "group" in sizes else {"kv": sizes["kv"] * 3 // 2})}
    for operator, knobs in (("stack", {"factor": 2}), ("zero-depth", {}), ("direct-width", wider), ("zero-width", wider)):
        grown = make_plan(operator, arch, config, knobs).target_config
        assert parameter_counts(arch, grown).total > total
        assert arch.sizes(grown)["head"] == sizes["head"]


def test_the_grammar_reads_roles_and_layout():
    spec = parse("hidden <- vocab | stored vocab hidden")
    assert [(axis.blocks, axis.role) for axis in spec.axes] == [((("vocab",),), "read"), ((("hidden",),), "write")]
    assert not spec.multiplies
    query = parse("(kv group head) <- hidden")
    assert query.axes[0].blocks == (("kv", "group", "head"),)
    fused = parse("(kv group head) + (kv head) + (kv head) <- hidden")
    assert fused.axes[0].blocks == (("kv", "group", "head"), ("kv", "head"), ("kv", "head"))
    assert LLAMA.shape(fused, {"kv": 2, "group": 3, "head": 10, "hidden": 24}) == (100, 24)
    assert LLAMA.shape(parse("(kv 3 head) <-"), {"kv": 2, "head": 10}) == (60,)
    assert query.multiplies
    assert query.decays
    bias = parse("ffn <- | if mlp_bias")
    assert (bias.decays, bias.multiplies, bias.condition) == (False, False, "mlp_bias")
    assert parse("gain hidden").is_gain
    assert parse("hidden <- ffn | ends branch").ends_branch
    gemma = parse("gain hidden | plus one | before tied head")
    assert gemma.plus_one
    assert gemma.before_tied_head
    assert parse("hidden <- vocab | times sqrt hidden").times_sqrt == "hidden"
    assert [axis.role for axis in parse("shift hidden").axes] == ["shift"]


@pytest.mark.parametrize("line", ["hidden ffn", "hidden <- ffn | sometimes", "hidden <- ffn | stored hidden kv"])
def test_a_malformed_line_is_shown(line):
    with pytest.raises(OutgrowError, match=r"architecture line"):
        parse(line)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"model_type": "bert"}, "unknown architecture 'bert'; known: llama, mistral, .* give it with --family-file"),
        ({"model_type": None}, "no 'model_type'"),
        ({"num_hidden_layers": -1}, "'num_hidden_layers' must be a whole number of at least 0, not -1"),
        ({"num_hidden_layers": "3"}, "not '3'"),
        ({"hidden_size": True}, "'hidden_size' must be a whole number"),
        ({"num_attention_heads": 7, "num_key_value_heads": 3}, r"'num_attention_heads' \(7\) is not a multiple of 'kv' \(3\)"),
        ({"intermediate_size": None}, "says nothing about the size of 'ffn'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(edits, message):
    config = {**ODD, **edits}
    with pytest.raises(OutgrowError, match=message):
        arch_for(config).shapes(config)


def test_unknown_model_keys_suggest_the_nearest():
    published = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}  # files of 2024
    assert resolved({**ODD, **published})["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    with pytest.raises(OutgrowError, match=r"unknown key 'model.hiden_size' for a 'llama' model; did you mean 'hidden_size'\?"):
        resolved({**ODD, "hiden_size": 24})
