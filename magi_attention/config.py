"""Configuration: frozen values, checked when they are built."""

import math
import operator
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real
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
        _make_float(self, "tolerance")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), a fraction of the mean area, not {self.tolerance!r}")


@dataclass(frozen=True)
class MinHeapDispatchAlg:
    """Chunks in order of falling area, each to the least loaded rank that has room. Blind to the rows it moves."""


DispatchAlg = LocalityDispatchAlg | MinHeapDispatchAlg
DispatchOrder = Literal["balanced", "contiguous", "zigzag"]


@dataclass(frozen=True)
class DispatchConfig:
    """How chunks are given to ranks. Each rank gets the same number (see ``uneven``), in ascending order.

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
        uneven: Whether ranks may have different numbers of rows, by one chunk at most. Then any ``pad_size`` fits, also
            0, and the last chunk may be short. Other layers must not expect equal shapes on all ranks.
    """

    alg: DispatchAlg = field(default_factory=LocalityDispatchAlg)
    order: DispatchOrder = "balanced"
    uneven: bool = False

    def __post_init__(self) -> None:
        _check_type("alg", self.alg, (LocalityDispatchAlg, MinHeapDispatchAlg))
        if not isinstance(self.uneven, bool):
            raise TypeError(f"uneven must be True or False, not {self.uneven!r}")
        if self.order not in get_args(DispatchOrder):
            orders = ", ".join(map(repr, get_args(DispatchOrder)))
            raise ValueError(f"order must be one of {orders}, not {self.order!r}")
        if self.order != "balanced" and self.alg != LocalityDispatchAlg():
            raise ValueError(f"alg must be left out with order {self.order!r}, which leaves it nothing to decide")


@dataclass(frozen=True)
class CostModel:
    """What computing and transfers cost on one rank: what predicted times are made of.

    It also tells how many queries may wait for rows in a forward pass, where more than 50 GB/s are believed of ranks of
    one host only. GPUs of one host without NVLink between them need their own ``bandwidth``.

    The defaults were measured: the attention rates on an H100 with large masks, bf16, head_dim 128; the transfers
    between two GPUs of one host over NVLink, 198, 255 and 295 GB/s for 16, 64 and 256 MiB, which the latency and the
    bandwidth here give to 4 %. Between hosts a GPU has less: set ``bandwidth`` to what its network card carries.

    Attributes:
        heads_q: Heads of the queries.
        heads_kv: Heads of the keys and values; divides ``heads_q``.
        head_dim: Dimensions of a head of queries and keys.
        head_dim_v: Dimensions of a head of values; None for those of keys.
        element_bytes: Bytes of an element of q, k and v.
        forward_tflops: TFLOP/s of the forward kernel, of useful work:
            ``2 * area * heads_q * (head_dim + head_dim_v)`` FLOPs.
        backward_tflops: TFLOP/s of the backward kernel, whose useful work is
            ``2 * area * heads_q * (3 * head_dim + 2 * head_dim_v)`` FLOPs.
        bandwidth: Bytes a second that a rank sends, and receives at the same time, in an all-to-all.
        latency: Seconds that an all-to-all takes however little travels.
        hbm_bandwidth: Bytes a second that a GPU's memory carries; partial results are merged there.
        stage_overhead: Seconds that a stage costs a pass beside its work, for launches and partly filled tiles. An
            estimate.
        forward_weight: How much the time of a forward pass counts; 2 where activations are recomputed.
        backward_weight: How much the time of a backward pass counts; 0 for inference.
    """

    heads_q: int = 64
    heads_kv: int = 8
    head_dim: int = 128
    head_dim_v: int | None = None
    element_bytes: int = 2
    forward_tflops: float = 650.0
    backward_tflops: float = 520.0
    bandwidth: float = 300e9
    latency: float = 30e-6
    hbm_bandwidth: float = 2.7e12
    stage_overhead: float = 20e-6
    forward_weight: float = 1.0
    backward_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("heads_q", "heads_kv", "head_dim", "element_bytes"):
            _make_integer(self, name, at_least=1)
        if self.head_dim_v is not None:
            _make_integer(self, "head_dim_v", at_least=1)
        if self.heads_q % self.heads_kv:
            raise ValueError(f"heads_q must be a multiple of heads_kv, not {self.heads_q} with {self.heads_kv}")
        for name in ("forward_tflops", "backward_tflops", "bandwidth", "hbm_bandwidth"):
            _make_float(self, name)
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("latency", "stage_overhead", "forward_weight", "backward_weight"):
            _make_float(self, name)
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.forward_weight == self.backward_weight == 0:
            raise ValueError("forward_weight and backward_weight must not both be 0: nothing would count")

    @property
    def head_dims(self) -> tuple[int, int]:
        """Dimensions of a head of keys and of values."""
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v


class AttnOverlapMode(Enum):
    """How the number of overlap stages and their sizes are found.

    ``STATIC``: as many as :attr:`OverlapConfig.degree` says, of equal size. ``DYNAMIC``: those for which
    :attr:`OverlapConfig.cost_model` predicts the least time, anew for each plan.
    """

    STATIC = "static"
    DYNAMIC = "dynamic"


@dataclass(frozen=True)
class UniformOverlapAlg:
    """Stages of equal numbers of remote rows: the only way there is, which 1.0.x asks for by this name."""


@dataclass(frozen=True)
class OverlapConfig:
    """How communication is split into stages and hidden behind computation.

    Attributes:
        mode: Whether ``degree`` says how many stages there are (``STATIC``), or ``cost_model`` (``DYNAMIC``).
        degree: Number of stages that the remote rows are split into. While a stage is computed the next one travels.
            0 means no overlap: one stage, waited for before anything is computed. Left out with ``DYNAMIC``.
        min_chunk_size: Fewest rows in a stage. ``STATIC``: a rank that receives few rows fills fewer stages than
            others. ``DYNAMIC``: on the rank that receives most; stages have the same share of every rank's rows.
        alg: How ``STATIC`` splits rows into stages.
        max_degree: Most stages that ``DYNAMIC`` may choose, 1 to 8. Planning compares 577 ways to make up to 4 stages,
            and some three times as many with each one more.
        cost_model: What the time of a plan is predicted with; and, in both modes, how much own work is kept for the
            time in which the rows of the first stage travel in a forward pass.
    """

    mode: AttnOverlapMode = AttnOverlapMode.STATIC
    degree: int = 1
    min_chunk_size: int = 512
    alg: UniformOverlapAlg = field(default_factory=UniformOverlapAlg)
    max_degree: int = 4
    cost_model: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        _check_type("mode", self.mode, (AttnOverlapMode,))
        _check_type("alg", self.alg, (UniformOverlapAlg,))
        _check_type("cost_model", self.cost_model, (CostModel,))
        _make_integer(self, "degree", at_least=0)
        _make_integer(self, "min_chunk_size", at_least=1)
        _make_integer(self, "max_degree", at_least=1)
        if self.max_degree > 8:
            raise ValueError(f"max_degree must be at most 8, not {self.max_degree}")
        if self.mode is AttnOverlapMode.DYNAMIC and self.degree != 1:
            raise ValueError(
                f"degree must be left out with mode DYNAMIC, which chooses up to max_degree, not {self.degree}"
            )


GradWireDtype = Literal["float32", "input"]
IntraNode = Literal["sequence", "heads"]


@dataclass(frozen=True)
class DistAttnConfig:
    """Everything about distributed attention that is a choice and not part of the mask.

    Attributes:
        dispatch_config: How chunks are given to ranks.
        overlap_config: How communication is split into stages.
        grad_wire_dtype: The type in which partial dK and dV travel home to the rank that has the rows.

            * ``"float32"``: the type they were added up in (float64 for float64 inputs); nothing is rounded on the way.
            * ``"input"``: the type of k and v. Half the bytes for bf16 and fp16, and one more rounding of each part
              that travels. The owner adds the parts up in float32 in either case.
        intra_node: What the ranks of a node split while they attend.

            * ``"sequence"``: the sequence, as all ranks do.
            * ``"heads"``: the heads, so that only nodes split the sequence, and plans are over nodes: each chunk is
              given to one, and ``dispatch_config`` is about them. Needs a ``cp_mesh`` of two axes, nodes and the ranks
              in each, and heads that these can share. The heads of a ``cost_model`` are then those of one rank.
    """

    dispatch_config: DispatchConfig = field(default_factory=DispatchConfig)
    overlap_config: OverlapConfig = field(default_factory=OverlapConfig)
    grad_wire_dtype: GradWireDtype = "float32"
    intra_node: IntraNode = "sequence"

    def __post_init__(self) -> None:
        _check_type("dispatch_config", self.dispatch_config, (DispatchConfig,))
        _check_type("overlap_config", self.overlap_config, (OverlapConfig,))
        if self.grad_wire_dtype not in get_args(GradWireDtype):
            dtypes = ", ".join(map(repr, get_args(GradWireDtype)))
            raise ValueError(f"grad_wire_dtype must be one of {dtypes}, not {self.grad_wire_dtype!r}")
        if self.intra_node not in get_args(IntraNode):
            raise ValueError(f"intra_node must be 'sequence' or 'heads', not {self.intra_node!r}")


def _check_type(name: str, value: object, types: tuple[type, ...]) -> None:
    if not isinstance(value, types):
        wanted = " or ".join(t.__name__ for t in types)
        raise TypeError(f"{name} must be of type {wanted}, not {value!r}")


def _make_integer(config: object, name: str, at_least: int) -> None:
    """Equal configurations are spelled alike, which is how ranks compare them: with Python's numbers."""
    value = getattr(config, name)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, not {value}")
    object.__setattr__(config, name, operator.index(value))


def _make_float(config: object, name: str) -> None:
    """See :func:`_make_integer`."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    object.__setattr__(config, name, float(value))
