"""What a run reads: part of its identity."""

from __future__ import annotations

from pydantic import Field

from outgrow.config import Settings


class DataConfig(Settings):
    """A corpus, how it is tokenized, and how much is held out."""

    corpus: str = Field("python", description="'python' (the standard library), or a text file or folder")
    vocab: int = Field(1024, ge=257, description="size of the byte-level BPE vocabulary trained on the training documents")
    validation_share: float = Field(0.04, gt=0, lt=1, description="share of documents held out")
    validation_tokens: int = Field(131_072, ge=1, description="held-out tokens measured at each validation, at most")
    context: int = Field(256, ge=2, description="tokens per sequence")
    epochs: float = Field(1.0, gt=0, description="how often the training tokens may be read; above 1 they repeat")
