"""Grows a model in the middle of a `transformers` Trainer run: train the base, grow its checkpoint on disk, train on from it.

pip install accelerate
python examples/grow_in_trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers

import outgrow

BASE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97,
}  # fmt: skip


class Counting(torch.utils.data.Dataset):
    """Sequences that count modulo the vocabulary."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + torch.arange(24)) % 97
        return {"input_ids": tokens, "labels": tokens}


def train(model: transformers.PreTrainedModel, directory: Path, steps: int) -> float:
    """Trains with the Trainer, saves the model, and returns its loss."""
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3, lr_scheduler_type="constant",
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Counting())
    loss = trainer.train().training_loss
    trainer.save_model(str(directory))
    return loss


def main() -> None:
    """Trains a base, grows it on disk, trains on."""
    with tempfile.TemporaryDirectory() as folder:
        base, grown = Path(folder) / "base", Path(folder) / "grown"
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**BASE), dtype=torch.float32)
        print(f"base:  mean loss {train(model, base, 60):.3f} over 60 steps")
        outgrow.grow(base, grown, "stack", {"factor": 2})
        model = transformers.AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
        print(f"grown: mean loss {train(model, Path(folder) / 'target', 60):.3f} over 60 more, {model.config.num_hidden_layers} layers")


if __name__ == "__main__":
    main()
