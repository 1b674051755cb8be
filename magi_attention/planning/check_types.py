"""What planning is given: values of another type are refused by name, before anything is made of them."""

from magi_attention.config import DistAttnConfig
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.planning.shared_plan import SharedPlan
from magi_attention.planning.sources import Sources


def check_mask(mask: object) -> None:
    """Refuse what is no mask.

    Raises:
        TypeError: If ``mask`` is no AttnMask.
    """
    if not isinstance(mask, AttnMask):
        raise TypeError(f"mask must be an AttnMask, as the builders make, not {mask!r}")


def check_config(config: object, name: str) -> None:
    """Refuse what is no whole configuration, such as a part of one.

    Raises:
        TypeError: If ``config`` is no DistAttnConfig; the message calls it ``name``.
    """
    if not isinstance(config, DistAttnConfig):
        raise TypeError(f"{name} must be a DistAttnConfig, not {config!r}")


def check_sources(sources: object) -> None:
    """Refuse what does not say where queries and keys come from.

    Raises:
        TypeError: If ``sources`` are no Sources.
    """
    if not isinstance(sources, Sources):
        raise TypeError(f"sources must be Sources, such as Sources(is_same_source=False), not {sources!r}")


def check_plan(plan: object) -> None:
    """Refuse what is no plan.

    Raises:
        TypeError: If ``plan`` is neither a plan of all ranks nor one rank's part.
    """
    if not isinstance(plan, SharedPlan):
        raise TypeError(f"plan must be what plan_attention returns, or one rank's part of it, not {plan!r}")
