"""What studies found, as tables and sentences: worked out from their files alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from outgrow.errors import OutgrowError
from outgrow.lab.findings import PROTOCOLS, Finding, findings, rank_correlation, spread
from outgrow.lab.records import Record, Records
from outgrow.lab.recovery import recovery
from outgrow.lab.speedup import OverSeeds
from outgrow.lab.study import Scale, Study, Trial, open_study


@dataclass(frozen=True)
class Studied:
    """A study at a scale with what its records say."""

    study: Study
    scale: Scale
    scale_name: str
    seeds: int
    records: Records
    rows: tuple[Finding, ...]

    @property
    def file(self) -> str:
        return f"{self.study.name}-{self.scale_name}"

    @property
    def runs(self) -> list[Record]:
        """Every record of the study, parents before children."""
        return list({record.identity: record for row in self.rows for record in row.records}.values())

    def row(self, name: str) -> Finding:
        return next(row for row in self.rows if row.name == name)

    @property
    def best(self) -> Finding | None:
        """The arm of the largest annealed speed-up that is read at a loss."""
        read = [(figure.speed_up, row) for row in self.rows if (figure := row.speed_ups["annealed"]) and not figure.beyond]
        return max(read, key=lambda one: one[0])[1] if read else None


def results_file(folder: Path, scale: str) -> Path:
    """Where the records of a scale lie; studies share the runs that they have in common."""
    return folder / "results" / f"{Path(scale).stem}.jsonl"


def named(names: Sequence[str], folder: Path) -> list[str]:
    """Studies by name; `all` stands for every one of the folder."""
    if list(names) != ["all"]:
        return list(names)
    found = sorted(path.stem for path in folder.glob("*.yaml"))
    if not found:
        raise OutgrowError(f"'{folder}' holds no study; run this in a clone, or give a --folder that does")
    return found


def read_studies(names: Sequence[str], scale: str, seeds: int, folder: Path, against: str | None = None) -> list[Studied]:
    """Reads studies, their scale and their records; `all` are those that compare anything yet.

    Every arm is compared with `against`, or with the arm that the study names for it.
    """
    records = Records(results_file(folder, scale))
    found = list[Studied]()
    for name in named(names, folder):
        study, size = open_study(name, scale, folder)
        study = study.compared_with(against) if against else study
        rows = tuple(findings(study, size, seeds, records))
        compares = any(any(row.speed_ups.values()) for row in rows if row.name != study.against(row.name))
        if compares:
            found.append(Studied(study, size, Path(scale).stem, seeds, records, rows))
        elif list(names) != ["all"]:
            raise OutgrowError(f"'{records.path}' has nothing to compare for '{name}'; 'outgrow study {name} --scale {scale}' trains it")
    if not found:
        raise OutgrowError(f"no study in '{folder}' has results at the scale '{scale}'; run 'outgrow study NAME --scale {scale}' first")
    return found


def main_table(studied: Studied) -> list[dict[str, Any]]:
    """An arm a row, as text."""
    return [
        {
            "arm": row.name, "says": row.arm.says, "seeds": len(row.trials), "rate": f"{row.sweep.best:g}" if row.sweep.best else "-",
            "edge": row.sweep.at_edge, "loss": _loss(row), "flops": f"{row.end.flops:.3g}" if row.end else "-",
            **{protocol: quoted(row.speed_ups[protocol]) for protocol in PROTOCOLS},
            "bootstrap": _between(figure.bootstrap) if (figure := row.speed_ups["annealed"]) else "",
            "against": studied.study.against(row.name),
            "paper": "" if row.arm.paper is None else f"{row.arm.paper:+.1%}",
            "tokens_per_parameter": f"{row.end.tokens / row.target.non_embedding:.1f}" if row.end and row.target else "-",
            "head": f"{row.target.head_share:.0%}" if row.target else "-", "diverged": row.diverged,
        }
        for row in studied.rows
    ]  # fmt: skip


def budget_table(studied: Studied) -> list[dict[str, str]]:
    """An arm and a budget a row: annealed losses, gaps at equal tokens, speed-ups at equal loss of the curves so far."""
    return [
        {
            "arm": row.name, "tokens": f"{one.tokens:,}", "flops": f"{one.flops:.3g}", "loss": f"{mean(one.losses):.4f}",
            "ratio": f"{one.tokens / row.target.non_embedding:.0f}" if row.target else "-",
            "gap": f"{one.gap[0]:+.4f}{_plain(one.gap[1])}" if one.gap else "", "speed_up": quoted(one.speed_up),
        }
        for row in studied.rows
        for one in row.budgets
    ]  # fmt: skip


def sweep_table(studied: Studied) -> tuple[list[float], list[tuple[str, list[str], int | None]]]:
    """Rates, and for every arm its annealed losses at them, the mean over seeds in brackets where one tells too little, and the best."""
    rates = sorted({rate for row in studied.rows for rate in row.sweep.losses})
    rows = list[tuple[str, list[str], int | None]]()
    for row in studied.rows:
        cells = [_swept(row.sweep.losses.get(rate)) + _over_all(row.sweep.means.get(rate)) for rate in rates]
        rows.append((row.name, cells, rates.index(row.sweep.best) if row.sweep.best else None))
    return rates, rows


def recovery_table(studied: Studied) -> list[tuple[str, ...]]:
    """(arm, loss before growth, after it, spike, tokens until it was made good) over seeds, of the last growth of the longest trunk.

    A trunk ends where its branch's rate begins to fall: what the decay makes good is not made good here.
    """
    rows: list[tuple[str, ...]] = []
    for row in studied.rows:
        found = [recovery(*known) for one in row.trials if (known := last_growth(one, studied.records))]
        if found:
            lengths = [one.tokens for one in found if one.tokens is not None]
            back = f"{mean(lengths):,.0f}" if len(lengths) == len(found) else f"not in {len(found) - len(lengths)} of {len(found)} seeds"
            losses = (mean(one.before for one in found), mean(one.after for one in found), mean(one.spike for one in found))
            rows.append((row.name, *(f"{loss:.3f}" for loss in losses), back))
    return rows


def last_growth(one: Trial, records: Records) -> tuple[float, list[tuple[int, float]]] | None:
    """(held-out loss of what was grown, (tokens, loss) of the grown run) of a trial's longest trunk; None where nothing grows."""
    run = one.trunks[max(one.trunks)]
    if run.start is None or run.start.run is None or not run.start.operator:
        return None
    grown = records[run.identity()]
    before = [loss for tokens, _, loss, _ in records[run.start.run.identity()].points if tokens <= grown.points[0][0]]
    return before[-1], [(int(tokens), loss) for tokens, _, loss, _ in grown.points]


def sentences(studied: Studied) -> Iterator[str]:
    """What was found, in words."""
    best = studied.best
    if best and best.end and (figure := best.speed_ups["annealed"]):
        against = studied.study.against(best.name)
        verb = "gains most over what it is compared with" if figure.speed_up > 0 else "comes closest"
        if figure.student:
            sure = f"95% interval {_between(figure.student)} over {len(figure.values)} seeds"
        else:
            sure = f"{len(figure.values)} seed{'s' if len(figure.values) > 1 else ''}, no interval"
        yield (
            f"Annealed, '{best.name}' {verb}: {figure.speed_up:+.1%} over '{against}' at an equal held-out loss of "
            f"{figure.loss:.3f}, every FLOP counted ({sure})."
        )
    for protocol in PROTOCOLS:
        if (found := rank_correlation(studied.rows, protocol)) is not None:
            yield f"Rank correlation with the paper's figures, {protocol}: {found[0]:+.2f} over {found[1]} arms."
    yield from (f"Diverged: {name} ({why})." for name, why in dict(pair for row in studied.rows for pair in row.diverged).items())
    left = [row.name for row in studied.rows if len(row.trials) + len(row.lost) < studied.seeds]
    if left:
        yield f"Not finished: {', '.join(left)}."


def quoted(figure: OverSeeds | None) -> str:
    """A speed-up with its interval, or on which side of it the truth lies."""
    if figure is None:
        return ""
    if figure.beyond:
        return f"{figure.beyond} {figure.speed_up:+.1%}"
    return f"{figure.speed_up:+.1%}" + (f" ({_between(figure.student)})" if figure.student else "")


def _between(between: tuple[float, float] | None) -> str:
    return f"{100 * between[0]:+.1f} to {between[1]:+.1%}" if between else ""


def _plain(between: tuple[float, float] | None) -> str:
    return f" ({between[0]:+.4f} to {between[1]:+.4f})" if between else ""


def _loss(row: Finding) -> str:
    if row.end is None:
        return "-"
    known = spread(row.end.losses)
    return f"{mean(row.end.losses):.4f}" + ("" if math.isnan(known) else f" ± {known:.4f}")


def _over_all(mean_loss: float | None) -> str:
    return "" if mean_loss is None else f" ({_swept(mean_loss)})"


def _swept(loss: float | None) -> str:
    return "" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.4f}"
