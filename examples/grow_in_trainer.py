"""Grows a model between two runs of a `transformers` Trainer: train the base, grow its checkpoint on disk, read on with the target.

The optimizer begins anew, as in arXiv 2405.15319; the second run reads what the first has not.

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


STEPS, BATCH = 60, 16


class Counting(torch.utils.data.Dataset):
    """Sequences that count modulo the vocabulary."""

    def __len__(self) -> int:
        return 2 * STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + torch.arange(24)) % 97
        return {"input_ids": tokens, "labels": tokens}


def train(model: transformers.PreTrainedModel, directory: Path, first: int) -> float:
    """Trains with the Trainer on the sequences from `first` on, saves the model, and returns its loss."""
    unread = torch.utils.data.Subset(Counting(), range(first, first + STEPS * BATCH))
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=3e-3, lr_scheduler_type="constant",
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=unread)
    loss = trainer.train().training_loss
    trainer.save_model(str(directory))
    return loss


def main() -> None:
    """Trains a base, grows it on disk, trains on."""
    with tempfile.TemporaryDirectory() as folder:
        base, grown = Path(folder) / "base", Path(folder) / "grown"
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**BASE), dtype=torch.float32)
        print(f"base:  mean loss {train(model, base, 0):.3f} over {STEPS} steps")
        outgrow.grow(base, grown, "stack", {"factor": 2})
        model = transformers.AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
        loss = train(model, Path(folder) / "target", STEPS * BATCH)
        print(f"grown: mean loss {loss:.3f} over {STEPS} more, {model.config.num_hidden_layers} layers")


if __name__ == "__main__":
    main()
