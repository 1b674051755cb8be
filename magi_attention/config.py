"""Configuration: frozen values, checked when they are built."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, get_args


@dataclass(frozen=True)
class LocalityDispatchAlg:
    """Equal unmasked area on every rank first, then as few rows moved as can be found. The default.

    Attributes:
        tolerance: How far the most loaded rank may lie above the mean area, as a fraction. Where the chunks are too
            coarse for it, the balance of :class:`MinHeapDispatchAlg` is the bound.
    """

    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), a fraction of the mean area, not {self.tolerance!r}")


@dataclass(frozen=True)
class MinHeapDispatchAlg:
    """Chunks in order of falling area, each to the least loaded rank that has room. Blind to the rows it moves."""


DispatchAlg = LocalityDispatchAlg | MinHeapDispatchAlg
DispatchOrder = Literal["balanced", "contiguous", "zigzag"]


@dataclass(frozen=True)
class DispatchConfig:
    """How chunks are given to ranks. Each rank gets the same number, and keeps them in ascending order.

    Attributes:
        alg: The rule of the ``"balanced"`` order; the others leave nothing to decide, so there it stays the default.
        order: Which chunks a rank may have.

            * ``"balanced"``: any, as ``alg`` chooses them.
            * ``"contiguous"``: rank r has the r-th of ``cp_size`` equal runs of the sequence. For models with other
              layers that need neighbouring tokens, such as convolutions and state-space models. The areas are what
              the mask makes them: under plain causal attention the last rank has almost twice the mean.
            * ``"zigzag"``: the sequence is cut into ``2 * cp_size`` runs, and rank r has run r and run
              ``2 * cp_size - 1 - r``: two runs of neighbours, and balance under plain causal attention. With an odd
              number of chunks a rank, its two runs differ by one chunk.
    """

    alg: DispatchAlg = field(default_factory=LocalityDispatchAlg)
    order: DispatchOrder = "balanced"

    def __post_init__(self) -> None:
        _check_type("alg", self.alg, (LocalityDispatchAlg, MinHeapDispatchAlg))
        if self.order not in get_args(DispatchOrder):
            orders = ", ".join(map(repr, get_args(DispatchOrder)))
            raise ValueError(f"order must be one of {orders}, not {self.order!r}")
        if self.order != "balanced" and self.alg != LocalityDispatchAlg():
            raise ValueError(f"alg must be left out with order {self.order!r}, which leaves it nothing to decide")


class AttnOverlapMode(Enum):
    """How the number of overlap stages is found."""

    STATIC = "static"


@dataclass(frozen=True)
class UniformOverlapAlg:
    """Stages of equal numbers of remote rows."""


@dataclass(frozen=True)
class OverlapConfig:
    """How communication is split into stages and hidden behind computation.

    Attributes:
        mode: ``STATIC``: as many stages as ``degree`` says.
        degree: Number of stages that the remote rows are split into. While a stage is computed the next one travels.
            0 means no overlap: one stage, waited for before anything is computed.
        min_chunk_size: Fewest rows in a stage; a rank that receives less than ``degree * min_chunk_size`` rows fills
            fewer stages.
        alg: How rows are split into stages.
    """

    mode: AttnOverlapMode = AttnOverlapMode.STATIC
    degree: int = 1
    min_chunk_size: int = 512
    alg: UniformOverlapAlg = field(default_factory=UniformOverlapAlg)

    def __post_init__(self) -> None:
        _check_type("mode", self.mode, (AttnOverlapMode,))
        _check_type("alg", self.alg, (UniformOverlapAlg,))
        _check_integer("degree", self.degree, at_least=0)
        _check_integer("min_chunk_size", self.min_chunk_size, at_least=1)


@dataclass(frozen=True)
class DistAttnConfig:
    """Everything about distributed attention that is a choice and not part of the mask."""

    dispatch_config: DispatchConfig = field(default_factory=DispatchConfig)
    overlap_config: OverlapConfig = field(default_factory=OverlapConfig)

    def __post_init__(self) -> None:
        _check_type("dispatch_config", self.dispatch_config, (DispatchConfig,))
        _check_type("overlap_config", self.overlap_config, (OverlapConfig,))


def _check_type(name: str, value: object, types: tuple[type, ...]) -> None:
    if not isinstance(value, types):
        wanted = " or ".join(t.__name__ for t in types)
        raise TypeError(f"{name} must be a {wanted}, not {value!r}")


def _check_integer(name: str, value: object, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, not {value}")
