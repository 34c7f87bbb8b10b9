"""What is kept of runs: one JSON line each, with settings, curve, machine; everything a report says is worked out from these lines."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from outgrow.arch import arch_for, flops_per_token, parameter_counts
from outgrow.config import hash_of
from outgrow.errors import OutgrowError
from outgrow.files import read_json
from outgrow.lab.ancestry import model_of, parent_of
from outgrow.lab.runs import ENVIRONMENT, Result
from outgrow.lab.speedup import Curve
from outgrow.training.config import RunConfig


@dataclass(frozen=True)
class Record:
    """A run that ended.

    Attributes:
        identity, name, parent: of the run; `parent` is the identity of the run it starts from.
        settings: what its identity is the hash of.
        environment: text, versions, machine, and the commit.
        params, non_embedding, head_share: of its model; the head's share of a token's FLOPs.
        tokens: its clock at the end.
        points: (tokens, FLOPs, held-out loss, bits per byte) at each validation, ancestors included in tokens and FLOPs.
        seconds, tokens_per_second: of its own steps.
        diverged: why it has no end; empty where it has.
    """

    identity: str
    name: str
    parent: str | None
    settings: dict[str, Any]
    environment: dict[str, Any]
    params: int
    non_embedding: int
    head_share: float
    tokens: int
    points: list[list[float]]
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    diverged: str = ""

    @property
    def final_loss(self) -> float:
        return self.points[-1][2]

    @property
    def flops(self) -> float:
        return self.points[-1][1]

    @property
    def own_flops(self) -> float:
        """FLOPs of its own steps; 0 where it has none."""
        return self.points[-1][1] - self.points[0][1] if self.points else 0.0

    @property
    def curve(self) -> Curve:
        """(FLOPs, held-out loss), once anything was spent."""
        return [(flops, loss) for _, flops, loss, _ in self.points if flops]


def record_of(result: Result, commit: str) -> Record:
    """The record of a finished run."""
    speeds = [row["tokens_per_second"] for row in result.steps]
    points = [[row["tokens"], row["flops"], round(row["validation_loss"], 6), round(row["bits_per_byte"], 6)] for row in result.validation]
    environment = {**read_json(result.directory / ENVIRONMENT), "commit": commit}
    seconds = sum(result.config.batch_tokens / speed for speed in speeds)
    return _record(result.config, environment, points=points, seconds=round(seconds, 1), tokens_per_second=round(median(speeds)))


def diverged_record(run: RunConfig, environment: Mapping[str, Any], why: str) -> Record:
    """The record of a run that has no end."""
    return _record(run, dict(environment), points=[], diverged=why)


def _record(run: RunConfig, environment: dict[str, Any], **found: Any) -> Record:
    config = model_of(run)
    arch = arch_for(config)
    counts = parameter_counts(arch, config)
    share = round(6 * counts.head / flops_per_token(arch, config, run.data.context), 4)
    return Record(
        run.identity(), run.name, parent_of(run), json.loads(json.dumps(run.identifying())), environment, counts.total,
        counts.non_embedding, share, run.tokens, **found,
    )  # fmt: skip


class Records(dict[str, Record]):
    """Identity -> record, kept in a file of JSON lines that grows as runs end: all runs of a scale, whichever studies they belong to."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; a last line that is cut short is left out, any other broken line is an error."""
        super().__init__()
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # another process is writing it, or was killed: `add`, which locks the file, tells
        for number, line in enumerate(lines, 1):
            try:
                record = Record(**json.loads(line))
                told = record.environment.get("corpus_hash", "")
            except (ValueError, TypeError, AttributeError) as error:
                raise OutgrowError(f"{path}:{number} is no record of a run: {error}; restore the file") from None
            if hash_of(record.settings) != record.identity:
                raise OutgrowError(
                    f"{path}:{number}: the settings of '{record.name}' are not those of its identity {record.identity}; restore the file"
                )
            self.require_text(told, f"{path}:{number}: '{record.name}' was trained on")
            self[record.identity] = record
        self._whole = sum(map(len, lines))

    def seconds(self, flops: float) -> float | None:
        """What so many FLOPs take one job, at the median speed of the records; None where they have none."""
        speeds = [record.own_flops / record.seconds for record in self.values() if record.seconds and record.own_flops]
        return flops / median(speeds) if speeds else None

    def add(self, record: Record) -> None:
        """Keeps a record, on disk at once, and takes over what another study at the same scale has added meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._whole)
            for line in file.read().splitlines(keepends=True):
                if not line.endswith(b"\n"):  # cut short by a kill
                    file.truncate(self._whole)
                    break
                other = Record(**json.loads(line))
                self[other.identity] = other
                self._whole += len(line)
            if record.identity not in self:
                self[record.identity] = record
                self._whole += file.write((json.dumps(asdict(record)) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())

    def require_text(self, corpus_hash: str, who: str) -> None:
        """Refuses to compare runs on different texts: 'python' is another corpus on another machine."""
        for record in self.values():
            if record.environment.get("corpus_hash", "") != corpus_hash:
                raise OutgrowError(f"{who} another text than '{record.name}' of '{self.path}'; give it back, or use another --folder")
            return

    def of(self, runs: Iterable[RunConfig]) -> list[Record]:
        """Those of some runs that are there."""
        return [self[run.identity()] for run in runs if run.identity() in self]
