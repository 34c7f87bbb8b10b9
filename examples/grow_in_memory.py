"""Grows a `transformers` model in memory, in the middle of a training script of one's own, optimizer state included.

python examples/grow_in_memory.py
"""

from __future__ import annotations

import torch
import transformers

import outgrow

BASE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 97,
}  # fmt: skip


def make(config: dict) -> transformers.PreTrainedModel:
    """A model of a config, with random weights."""
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config), dtype=torch.float32)


def train(model: transformers.PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Learns to count modulo the vocabulary, as good a task as any."""
    loss = torch.zeros(())
    for _ in range(steps):
        tokens = (torch.randint(0, 97, (16, 1)) + torch.arange(24)) % 97
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def grown(model: transformers.PreTrainedModel, optimizer: torch.optim.Optimizer, operator: str) -> tuple:
    """The grown model, and an AdamW that goes on where the old one was."""
    growth = outgrow.plan(model.config.to_dict(), operator)
    target = make(growth.target_config)
    target.load_state_dict(outgrow.grow_state(growth, model.state_dict()))
    after = torch.optim.AdamW(target.parameters(), lr=optimizer.param_groups[0]["lr"])
    old = dict(model.named_parameters())
    step = next(iter(optimizer.state.values()))["step"]
    first = outgrow.grow_moments(growth, {name: optimizer.state[p]["exp_avg"] for name, p in old.items()})
    second = outgrow.grow_moments(growth, {name: optimizer.state[p]["exp_avg_sq"] for name, p in old.items()}, squares=True)
    for name, parameter in target.named_parameters():
        after.state[parameter] = {"step": step.clone(), "exp_avg": first[name], "exp_avg_sq": second[name]}
    return target, after


def main() -> None:
    """Trains a base, grows it, trains on."""
    torch.manual_seed(0)
    model = make({"model_type": "llama", **BASE})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    print(f"base:  loss {train(model, optimizer, 60):.3f} after 60 steps")
    tokens = torch.arange(24)[None]
    before = model(input_ids=tokens).logits
    model, optimizer = grown(model, optimizer, "zero-depth(factor=2), direct-width(hidden=96, ffn=192, kv=3)")
    change = (model(input_ids=tokens).logits - before).abs().max()
    print(f"grown: logits differ by at most {change:.1e}, {model.num_parameters():,} parameters")
    print(f"grown: loss {train(model, optimizer, 60):.3f} after 60 more")


if __name__ == "__main__":
    main()
