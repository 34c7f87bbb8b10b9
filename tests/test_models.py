from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from outgrow.errors import OutgrowError
from outgrow.lab.tiny import TINY
from outgrow.models import loss as losses
from outgrow.models.build import empty, initialised, materialise, resolved
from outgrow.models.decoder import Decoder
from outgrow.models.forward import ModelForward, forward_of
from outgrow.models.loss import next_token_loss

from .conftest import ODD

VARIANTS = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": 6},
    {"model_type": "mistral", "sliding_window": None},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
]  # fmt: skip


@pytest.mark.parametrize("edits", VARIANTS)
def test_the_decoder_computes_transformers_logits(make_model, tokens, edits):
    model = make_model(**edits)
    with torch.no_grad():
        torch.testing.assert_close(Decoder(model, torch.float32).logits(tokens), model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("edits", VARIANTS[:4])
def test_loss_and_gradients_are_autograds(make_model, tokens, edits, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 7)  # several chunks, the last one short
    model = make_model(dtype=torch.float64, **edits)
    decoder = Decoder(model, torch.float64)
    labels = tokens[:, 1:]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: value.grad.clone() for name, value in model.named_parameters()}

    ours = next_token_loss(decoder.hidden_states(tokens[:, :-1]), decoder.head, labels)
    plain = F.cross_entropy(decoder.logits(tokens[:, :-1]).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    expected, found = gradients(plain), gradients(ours)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def test_bf16_training_loss_is_that_of_transformers_under_autocast(make_model, tokens):
    model = make_model()
    decoder = Decoder(model, torch.bfloat16)
    with torch.no_grad():
        ours = next_token_loss(decoder.hidden_states(tokens[:, :-1]), decoder.head, tokens[:, 1:])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1]).logits
        theirs = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    assert ours.item() == pytest.approx(theirs.item(), rel=0.01)


@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_mask_of_the_whole_square_is_made_where_it_is_read(make_model, tokens, monkeypatch, dtype, masked):
    made, full = [], torch.full
    monkeypatch.setattr(torch, "full", lambda *arguments, **named: made.append(arguments[0]) or full(*arguments, **named))
    with torch.no_grad():
        Decoder(make_model(), dtype).hidden_states(tokens)
    assert made == [tuple(tokens.shape[1:]) * 2] * masked


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "olmo2", "gpt2", "opt", "phi3"])
def test_other_families_have_the_loss_of_transformers_without_whole_logits(family, tokens, monkeypatch):
    """In fp32, through the modules and over other parameters; heads of their own and tied ones."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 7)
    largest = []
    shape = F.linear
    for tied in (False, True):
        config = {**TINY[family], "tie_word_embeddings": tied, "pad_token_id": None}
        plain, ours = initialised(config, 0).eval(), initialised(config, 0).eval()
        logits = plain(tokens[:, :-1]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        forward = ModelForward(ours, torch.float32)
        for one in (forward, forward.over(dict(ours.named_parameters()))):
            torch.testing.assert_close(one.loss(tokens[:, :-1], tokens[:, 1:]), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(one.logits(tokens[:, :-1]), logits, rtol=1e-4, atol=1e-5)
        forward.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        expected.backward()
        for (name, value), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(other.grad, value.grad, rtol=1e-3, atol=1e-6, msg=name)
        if family != "gemma2":  # which caps its logits, all of them
            monkeypatch.setattr(F, "linear", lambda x, w, b=None: largest.append(w.shape[0]) or shape(x, w, b))
            forward.loss(tokens[:, :-1], tokens[:, 1:])
            monkeypatch.setattr(F, "linear", shape)
    assert config["vocab_size"] not in largest


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_built_without_drawing_weights(family, tied):
    """Only the buffers hold numbers, those of a model that transformers built; parameters that are tied stay one."""
    config = resolved({**TINY[family], "tie_word_embeddings": tied})
    model = empty(config, buffers=True)
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    assert all(value.is_meta for value in model.parameters())
    assert {name: value.shape for name, value in model.named_parameters()} == {name: v.shape for name, v in whole.named_parameters()}
    materialise(model, torch.device("cpu"))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]
    torch.testing.assert_close(dict(model.named_buffers()), dict(whole.named_buffers()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "edits",
    [
        {"hidden_act": "gelu"},
        {"model_type": "mistral", "sliding_window": 5},  # as Mistral-7B-v0.1, but shorter
        {"attention_dropout": 0.1},  # left out, as everywhere
        {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}},
    ],
)
def test_what_the_decoder_does_not_compute_transformers_does(make_model, tokens, edits):
    model, plain = make_model(**edits), make_model(**edits).eval()
    logits = plain(tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    forward = forward_of(model.train(), torch.float32)
    torch.testing.assert_close(forward.logits(tokens[:, :-1]), logits, rtol=1e-4, atol=1e-4)
    loss = forward.loss(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for (name, value), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, value.grad, rtol=1e-3, atol=1e-5, msg=name)
    usual = Decoder(make_model(), torch.float32).logits(tokens[:, :-1])
    assert edits.keys() == {"attention_dropout"} or (usual - logits).abs().max() > 1e-3  # what is computed makes a difference


def test_weights_are_drawn_from_seed_and_name_at_their_scale():
    config = resolved({**ODD, "hidden_size": 192, "intermediate_size": 512, "attention_bias": True, "initializer_range": 0.02})
    one, again, other = (dict(initialised(config, seed).named_parameters()) for seed in (0, 0, 1))
    shallow = dict(initialised(config | {"num_hidden_layers": 1}, 0).named_parameters())
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(one[name], again[name])
    assert torch.equal(one[name], shallow[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one[name.replace("gate", "up")])
    assert one[name].std().item() == pytest.approx(0.02, rel=0.02)
    assert one["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert one["model.layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(0.02 * 6**-0.5, rel=0.02)
    assert (one["model.norm.weight"] == 1).all()
    assert (one["model.layers.0.self_attn.q_proj.bias"] == 0).all()


def test_what_transformers_refuses_is_one_sentence():
    with pytest.raises(OutgrowError, match="transformers refuses the model") as error:
        resolved({**ODD, "num_attention_heads": 10, "num_key_value_heads": 2})
    assert "\n" not in str(error.value)


def test_layers_that_a_config_drops_at_random_are_kept(tokens):
    model = initialised({**TINY["opt"], "layerdrop": 0.5}, 0).train()
    forward = forward_of(model, torch.float32)
    losses = {forward.loss(tokens[:, :-1] % 53, tokens[:, 1:] % 53).item() for _ in range(5)}
    assert len(losses) == 1


@pytest.mark.parametrize("through", [True, False])
def test_matrices_are_not_kept_twice_where_modules_are_called(make_model, tokens, through):
    """FSDP gathers a block's matrices anew for the backward pass; copies of them would stay."""
    model = make_model()
    decoder = forward_of(model, torch.float32)
    decoder = decoder.through(model) if through else decoder
    expected = float(make_model()(tokens, labels=tokens).loss.detach())
    own, kept = {value.data_ptr() for value in model.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        loss = decoder.loss(tokens[:, :-1], tokens[:, 1:])
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-4)
    widths = {
        ODD["intermediate_size"],
        2 * ODD["intermediate_size"],
        10 * ODD["num_attention_heads"],
        10 * (ODD["num_attention_heads"] + 4),
    }
    copies = [value for value in kept if value.dim() == 2 and {*value.shape} & widths and ODD["hidden_size"] in value.shape]
    assert all(value.data_ptr() in own for value in copies) == through
