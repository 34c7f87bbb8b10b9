"""What a run reads: part of its identity."""

from __future__ import annotations

from pydantic import Field, model_validator

from outgrow.config import Settings, later


class SourceConfig(Settings):
    """A directory that 'outgrow data prepare' wrote, and its weight in a mixture."""

    path: str = Field(min_length=1, description="the directory with its manifest.json")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="its share of the sequences, relative to the other sources")


VALIDATION_SHARE = 0.04  # of documents held out, in training and in evaluation alike


class DataConfig(Settings):
    """A corpus, how it is tokenized, and how much is held out; or directories that are prepared already."""

    corpus: str = Field("python", description="'python' (the standard library), 'site-packages', or a file or folder of text")
    vocab: int = Field(1024, ge=257, description="size of the byte-level BPE vocabulary trained on the training documents")
    validation_share: float = Field(VALIDATION_SHARE, gt=0, lt=1, description="share of documents held out")
    validation_tokens: int = Field(131_072, ge=1, description="held-out tokens measured at each validation, at most")
    context: int = Field(256, ge=2, description="tokens per sequence")
    epochs: float = Field(1.0, gt=0, description="how often the training tokens may be read; what is left out by rolling back comes on top")
    sources: tuple[SourceConfig, ...] = later((), "prepared directories to read in place of 'corpus', mixed by their weights")

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        prepared = ("corpus", "vocab", "validation_share")
        unused = [name for name in prepared if getattr(self, name) != type(self).model_fields[name].default]
        if self.sources and unused:
            raise ValueError(
                f"{' and '.join(f'data.{name}' for name in unused)} has no effect with data.sources, which are packed; remove it"
            )
        if self.validation_tokens < self.context:
            raise ValueError(
                f"data.validation_tokens ({self.validation_tokens:,}) is less than a sequence of data.context ({self.context:,}); raise it"
            )
        paths = [source.path for source in self.sources]
        if len(set(paths)) < len(paths):
            raise ValueError("data.sources names a directory twice; give it once, with the sum of the weights")
        return self
