"""The masks that the layers of a model have, before it is known what they lie over."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from magi_attention.mask import AttnMask, builders


class LayerMask(NamedTuple):
    """A kind of causal mask: over everything, in a sliding window, or in chunks.

    Attributes:
        kind: ``"full_attention"``, ``"sliding_attention"`` or ``"chunked_attention"``, as in configs' ``layer_types``.
        size: Keys that a window spans, the own one included, or tokens in a chunk; 0 for full attention.
    """

    kind: str
    size: int = 0

    def over(self, cu_seqlens: Sequence[int]) -> AttnMask:
        """This mask in each of some packed documents; windows and chunks begin anew in each."""
        match self.kind:
            case "sliding_attention":
                return builders.sliding_window(cu_seqlens, (self.size - 1, 0))
            case "chunked_attention":
                return builders.block_causal(cu_seqlens, self.size, window=0, causal=True)
            case _:
                return builders.varlen(cu_seqlens, causal=True)


FULL = LayerMask("full_attention")


def layer_masks(config: Any) -> Counter[LayerMask]:
    """How many layers of a model have which mask.

    Args:
        config: The model's config.

    Raises:
        ValueError: If the model has layers other than full, sliding-window and chunked attention.
    """
    config = config.get_text_config()
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    known = {
        "full_attention": FULL,
        "sliding_attention": LayerMask("sliding_attention", window or 0),
        "chunked_attention": LayerMask("chunked_attention", chunk or 0),
    }
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # then all layers are of one kind, told by what the config has a size for
        kind = "sliding_attention" if window is not None else "full_attention" if chunk is None else "chunked_attention"
        kinds = [kind] * config.num_hidden_layers
    for layer, kind in enumerate(kinds):
        if kind not in known:
            raise ValueError(
                f"config.layer_types[{layer}] is {kind!r}, but context parallelism is here for {', '.join(known)} only"
            )
    return Counter(known[kind] for kind in kinds)


def requested_mask(config: Any, local_size: int | None) -> LayerMask:
    """The mask that a model asks transformers for: of everything, or of ``local_size`` in the config's sense."""
    if local_size is None:
        return FULL
    chunked = local_size == getattr(config, "attention_chunk_size", None)
    return LayerMask("chunked_attention" if chunked else "sliding_attention", local_size)
