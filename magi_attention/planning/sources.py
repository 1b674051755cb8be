"""Sources: where queries and keys come from, and whether their rows may change places."""

from dataclasses import dataclass, fields, replace

from magi_attention.config import DispatchConfig
from magi_attention.mask.integers import as_flag


@dataclass(frozen=True)
class Sources:
    """Whether queries and keys are made from the same tokens, and whether their rows may be given to any rank.

    Attributes:
        is_same_source: True for self-attention: the rank that has a token's query has its key and value, too. False
            for cross-attention: keys and values are rows of another tensor, and dispatched on their own.
        is_q_permutable: Whether any rank may have any chunk of queries. If not, rank r has the r-th of ``cp_size`` runs
            of neighbours, as with ``DispatchConfig(order="contiguous")``.
        is_k_permutable: The same of keys. Queries and keys of the same source go together, so both must be permutable
            there.
    """

    is_same_source: bool = True
    is_q_permutable: bool = True
    is_k_permutable: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, as_flag(getattr(self, field.name), field.name))

    def dispatch_config(self, config: DispatchConfig) -> DispatchConfig:
        """How the chunks of queries are given to ranks: as ``config`` says, but in order where they must keep theirs.

        Raises:
            ValueError: If ``config`` asks for another order.
        """
        if self.is_q_permutable and (self.is_k_permutable or not self.is_same_source):
            return config
        if config not in (
            DispatchConfig(uneven=config.uneven),
            DispatchConfig(order="contiguous", uneven=config.uneven),
        ):
            name = "is_k_permutable" if self.is_q_permutable else "is_q_permutable"
            raise ValueError(f"{name}=False needs the default DispatchConfig or order='contiguous', not {config!r}")
        return replace(config, order="contiguous")


SELF_ATTENTION = Sources()
