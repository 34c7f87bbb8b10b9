"""Text that a checkpoint writes."""

from __future__ import annotations

import torch
from transformers import GenerationConfig

from outgrow.errors import OutgrowError
from outgrow.evaluation.model import Opened


def sample(
    opened: Opened, prompt: str, tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0, count: int = 1
) -> list[str]:
    """Prompts with what the model makes of them.

    Args:
        opened: the model.
        prompt: the beginning; nothing lets the model begin.
        tokens: of each continuation, at most; a text that ends, ends.
        temperature: divides the logits; 0 takes the likeliest token each time, and then all texts are the same.
        top_k: draw from so many of the likeliest tokens; from all if not given.
        seed: the same seed writes the same texts on the same machine.
        count: of texts.

    Raises:
        OutgrowError: prompt and continuation are longer than the model takes at once.
    """
    inputs = opened.tokenizer(prompt, add_special_tokens=not opened.trained)["input_ids"] or [opened.prefix]
    if len(inputs) + tokens > opened.context:
        room = opened.context - len(inputs)
        way_out = f"ask for {room:,} --tokens at most, or shorten the prompt" if room > 0 else "shorten the prompt"
        raise OutgrowError(
            f"the prompt's {len(inputs):,} tokens and {tokens:,} more are over the {opened.context:,} that the model takes at once; "
            + way_out
        )
    end = opened.prefix if opened.trained else opened.tokenizer.eos_token_id
    drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0} if temperature else {"do_sample": False}
    settings = GenerationConfig(max_new_tokens=tokens, eos_token_id=end, pad_token_id=opened.prefix if end is None else end, **drawn)
    rows_BT = torch.tensor([inputs] * count, device=opened.device)
    opened.model.generation_config = GenerationConfig()  # or what the checkpoint says would stand in for whatever is not given
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        written_BT = opened.model.generate(rows_BT, attention_mask=torch.ones_like(rows_BT), generation_config=settings)
    new = (row[len(inputs) :].tolist() for row in written_BT)
    return [prompt + opened.tokenizer.decode(_until(row, end), skip_special_tokens=True) for row in new]


def _until(row: list[int], end: int | None) -> list[int]:
    return row[: row.index(end)] if end in row else row
