"""What operators share: layer lists, and the lifts that a family's spaces admit."""

from __future__ import annotations

from collections.abc import Mapping

from outgrow.arch import Arch, Config
from outgrow.errors import OutgrowError
from outgrow.spaces import MEAN, AnyLift, Lift, copies, mean, pad, tiling

MOST_LAYERS = 10_000  # far beyond any model: a slip of the finger should not fill the memory


def as_they_are(arch: Arch, config: Config) -> tuple[int, ...]:
    """The layer list of a model that keeps its depth."""
    return tuple(range(arch.layers(config)))


def refuse_factor(arch: Arch, config: Config, factor: int) -> None:
    """Says where a growth factor makes no more layers, or too many."""
    if factor < 2:
        raise OutgrowError(f"the growth factor must be at least 2, not {factor}")
    count = arch.layers(config)
    if count * factor > MOST_LAYERS:
        raise OutgrowError(f"{count} x {factor:,} layers are more than {MOST_LAYERS:,}; lower the factor")


def repeated(arch: Arch, config: Config, factor: int) -> tuple[int, ...]:
    """All layers `factor` times over, 012 -> 012012."""
    refuse_factor(arch, config, factor)
    return as_they_are(arch, config) * factor


def evenly(arch: Arch, config: Config, layers: int) -> tuple[int, ...]:
    """A deeper layer list in which each layer stands once or more, in place: 012 -> 00112; whole periods where kinds take turns."""
    count, period = arch.layers(config), block_of(arch, config, 0)
    if not count <= layers <= MOST_LAYERS or not count or layers % period:
        multiple = f" and be a multiple of {period}" if period > 1 else ""
        raise OutgrowError(f"'layers' must lie between the source's {count} and {MOST_LAYERS:,}{multiple}, not {layers}")
    old, new = count // period, layers // period
    return tuple(unit * old // new * period + place for unit in range(new) for place in range(period))


def identity_blocks(layers: tuple[int, ...]) -> tuple[float, ...]:
    """[target layers] branch factors: one for the first copy of a layer, zero for later ones, which then add nothing."""
    return tuple(0.0 if layer < 0 or layer in layers[:place] else 1.0 for place, layer in enumerate(layers))


def wider(arch: Arch, config: Config, wanted: Mapping[str, int], deeper: bool = False) -> dict[str, tuple[int, int]]:
    """Space -> (old, new size), for the sizes asked for; zero asks for nothing, which is enough of a model that grows deeper."""
    sizes = arch.sizes(config)
    found: dict[str, tuple[int, int]] = {}
    for space, new in wanted.items():
        if not new:
            continue
        if space not in sizes:
            raise OutgrowError(f"'{space}' is not a space of {arch.family}; its spaces: {', '.join(arch.spaces)}")
        if new < sizes[space]:
            raise OutgrowError(f"cannot grow '{space}' of {arch.family} from {sizes[space]} to {new}: the new size is smaller")
        if new > sizes[space]:
            found[space] = sizes[space], new
    if not found and not deeper:
        given = ", ".join(f"{space} is {sizes[space]}" for space in wanted if space in sizes)
        raise OutgrowError(f"no space is asked to grow ({given}); give a larger size to one, such as {next(iter(wanted))}=...")
    return found


def exact_copies(arch: Arch, space: str, old: int, new: int) -> Lift:
    """The lift by copies that keeps the function under what reads the space."""
    admits = arch.spaces[space].admits
    if admits == "RMSNorm":
        return tiling(old, new)
    if admits == "LayerNorm" and new % old:
        return _gained(arch, mean(old, new))
    return copies(old, new)


def block_of(arch: Arch, config: Config, block: int) -> int:
    """How many layers to repeat together: as many as asked for, or one period where layers of several kinds take turns, or one."""
    period = arch.pattern(config)
    return block or (period if period < arch.layers(config) or period == arch.period else 1)


def room(arch: Arch, space: str, old: int, new: int) -> Lift:
    """The lift by new indices that hold nothing: zero, or the mean where LayerNorm reads the space."""
    admits = arch.spaces[space].admits
    if admits == "LayerNorm":
        return _gained(arch, mean(old, new))
    return _gained(arch, pad(old, new)) if admits == "RMSNorm" else pad(old, new)


def parting(noise: float) -> dict[str, dict[str, float]]:
    """The rewrite by which a share of noise lets copies part ways; none for no noise."""
    if not 0 <= noise <= 1:
        raise OutgrowError(f"'noise' is a share between 0 and 1, not {noise}")
    return {"projected noise": {"share": noise}} if noise else {}


def has_dual(lifts: Mapping[str, AnyLift]) -> bool:
    """Do gradients move by the dual lift? Not where LayerNorm reads means: its own mean then has other weights."""
    return not any(isinstance(lift, Lift) and (lift.source == MEAN).any() for lift in lifts.values())


def _gained(arch: Arch, lift: Lift) -> Lift:
    """The gain and eps take up the change of the norm, or the weights do where no eps may change."""
    return lift if arch.norm_eps else lift.without_gain()
