"""From a batch as transformers takes it to this rank's part of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.api import compute_pad_size, dispatch, undispatch
from magi_attention.config import DistAttnConfig
from magi_attention.integrations.transformers.layer_masks import LayerMask, layer_masks
from magi_attention.mask.integers import as_cu_seqlens
from magi_attention.runtime.groups import CpGroup, position_device, resolve_group
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.make_key import make_key, make_key_after_dispatch

IGNORE = -100  # label of tokens without a loss, in all of transformers
TENSORS = ("input_ids", "inputs_embeds", "position_ids", "attention_mask", "labels")

Keys = dict[LayerMask, DistAttnRuntimeKey]


def dispatch_batch(
    batch: Mapping[str, Any],
    config: Any,
    chunk_size: int = 512,
    cp_group: dist.ProcessGroup | None = None,
    cp_mesh: DeviceMesh | None = None,
    *,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    loss_group: dist.ProcessGroup | None = None,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),
) -> dict[str, Any]:
    """Pack a batch into one sequence and take this rank's rows of it, ready for ``model(**local_batch)``.

    Every rank of the group calls it with the same batch. Padding is dropped. Documents are, in this order of
    precedence: what ``cu_seqlens`` says; the tokens of each row that ``attention_mask`` keeps; runs of consecutive
    ``position_ids``; the rows of the batch. No document sees another, and none predicts the first token of the next.
    One key is made for each mask that the model's layers have. All have one dispatch, balanced for the mask that costs
    the model most.

    Args:
        batch: ``input_ids`` of shape ``(batch, seqlen)`` or ``inputs_embeds`` of ``(batch, seqlen, hidden_size)``, and
            optionally ``position_ids``, ``attention_mask`` and ``labels`` of ``(batch, seqlen)``. Labels are not
            shifted, -100 for none. Nothing else may be in it.
        config: The model's config, ``model.config``.
        chunk_size: Rows in a chunk, the unit that is given to ranks.
        cp_group: The context-parallel process group. Give either this or ``cp_mesh``.
        cp_mesh: The context-parallel device mesh; all its ranks take part.
        cu_seqlens: Where the documents begin in the rows of the batch laid one behind the other, and the total.
        loss_group: All ranks over which gradients are averaged, ``dp x cp``; None when these are the ranks of
            ``cp_group``. It must contain whole context-parallel groups.
        dist_attn_config: How to balance the ranks and to split communication into stages.

    Returns:
        Arguments of the model: ``input_ids`` or ``inputs_embeds``, and ``position_ids``, positions in the document, of
        this rank's rows, batch size 1; ``magi_keys``, the key of each mask, and ``magi_positions``, which the model
        passes on to its attention; ``use_cache``, False. With labels also ``labels``, each row's next token (-100 for
        padding), the same as ``shift_labels``, which is how transformers is told that they are shifted, and
        ``num_items_in_batch``, such that the *mean* over the ranks of ``loss_group`` of the model's loss is the mean
        over all labels of all these ranks. Then the mean of the ranks' gradients, which is what DDP and FSDP take, is
        the gradient of that loss.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit together, the batch has other entries or no token, ``attention_mask`` is other
            than 0 and 1 or keeps a row as one document whose ``position_ids`` begin anew, the model's attention is
            another implementation, or it has layers that cannot be context-parallel.
    """
    check_implementation(config)
    group = resolve_group(cp_group, cp_mesh)
    packed = Packed.pack(batch, cu_seqlens)
    keys = make_keys(packed.cu_seqlens, config, chunk_size, group, dist_attn_config)
    key = next(iter(keys.values()))
    local: dict[str, Any] = {name: dispatch(rows, key)[None] for name, rows in packed.rows.items()}
    local |= {"magi_keys": keys, "magi_positions": local["position_ids"], "use_cache": False}
    if packed.next_labels is not None:
        labels = dispatch(packed.next_labels - IGNORE, key)[None] + IGNORE  # padding is 0, so IGNORE afterwards
        count, ranks = (packed.next_labels != IGNORE).sum(), group.size()
        if loss_group is not None:  # each batch is counted by all ranks that share it
            count, ranks = count.to(position_device(loss_group)), ranks * loss_group.size()
            dist.all_reduce(count, group=loss_group)
        # No tensor, which FSDP's mixed precision would round like the other arguments. Without labels the loss is 0.
        items = max(count.item(), 1) / ranks
        local |= {"labels": labels, "shift_labels": labels, "num_items_in_batch": items}
    return local


def check_implementation(config: Any) -> None:
    """Refuse a model whose attention would take a rank's rows for a sequence of their own.

    Raises:
        TypeError: If ``config`` is none.
        ValueError: If so. A config that belongs to no model yet has no implementation, and passes.
    """
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"config must be that of a model, model.config, not a {type(config).__name__}")
    implementation = config.get_text_config()._attn_implementation
    if implementation not in (None, "magi_attention"):
        raise ValueError(
            f"the model has attn_implementation {implementation!r}, whose rows would attend those of their own rank "
            'only; make it with attn_implementation="magi_attention", or call '
            'model.set_attn_implementation("magi_attention")'
        )


def undispatch_output(x: torch.Tensor, local_batch: Mapping[str, Any]) -> torch.Tensor:
    """What a model returned for this rank's rows, such as ``logits``, for all rows of the packed sequence.

    Args:
        x: ``(1, local_seqlen, ...)``.
        local_batch: What :func:`dispatch_batch` returned.

    Returns:
        ``(1, total_seqlen, ...)`` on every rank: the batch's rows laid one behind the other, without padding. Its
        backward pass takes this rank's rows of a gradient that is equal on every rank.

    Raises:
        TypeError: If ``local_batch`` is not what ``dispatch_batch`` returned.
        ValueError: If ``x`` has not this rank's rows.
    """
    if not isinstance(local_batch, Mapping) or "magi_keys" not in local_batch:
        raise TypeError("local_batch must be what dispatch_batch returned, which has magi_keys in it")
    return undispatch(x[0], next(iter(local_batch["magi_keys"].values())))[None]


def make_keys(
    cu_seqlens: Sequence[int], config: Any, chunk_size: int, group: CpGroup, dist_attn_config: DistAttnConfig
) -> Keys:
    """One key for each mask of the model's layers, all of one dispatch; first the one that the dispatch is made for."""
    count = layer_masks(config)
    masks = {layer_mask: layer_mask.over(cu_seqlens) for layer_mask in count}
    costliest = max(masks, key=lambda layer_mask: count[layer_mask] * masks[layer_mask].area)
    pad_size = compute_pad_size(cu_seqlens[-1], group.size(), chunk_size)
    first = make_key(masks.pop(costliest), pad_size, chunk_size, group, dist_attn_config, None)
    others = {name: make_key_after_dispatch(mask, first, None, None) for name, mask in masks.items()}
    return {costliest: first, **others}


@dataclass(frozen=True)
class Packed:
    """A batch as one sequence of documents.

    Attributes:
        cu_seqlens: Where the documents begin, and the total.
        rows: The model's inputs, ``(total, ...)``.
        next_labels: The label of the token behind each one in its document, ``(total,)``, if there are labels.
    """

    cu_seqlens: list[int]
    rows: dict[str, torch.Tensor]
    next_labels: torch.Tensor | None

    @classmethod
    def pack(cls, batch: Mapping[str, Any], cu_seqlens: torch.Tensor | Sequence[int] | None) -> "Packed":
        """Lay the rows of a batch one behind the other, without padding."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch must be a mapping with input_ids or inputs_embeds, not a {type(batch).__name__}")
        given = {name: x for name, x in batch.items() if x is not None}
        content = _check_batch(given)
        keep, first = _documents(given, given[content], cu_seqlens)
        if not len(first):
            raise ValueError("the batch has no token")
        starts = first.nonzero()[:, 0]
        rows = {content: given[content][keep]}
        if "position_ids" in given:
            rows["position_ids"] = given["position_ids"][keep]
        else:
            rows["position_ids"] = torch.arange(len(first), device=first.device) - starts[first.cumsum(0) - 1]
        next_labels = None
        if "labels" in given:
            is_last = F.pad(first[1:], (0, 1), value=True)
            next_labels = F.pad(given["labels"][keep][1:], (0, 1), value=IGNORE).masked_fill(is_last, IGNORE)
        return cls([*starts.tolist(), len(first)], rows, next_labels)


def _check_batch(given: Mapping[str, Any]) -> str:
    """Refuse what is no batch; which of ``input_ids`` and ``inputs_embeds`` it has."""
    unknown = sorted(given.keys() - set(TENSORS))
    if unknown:
        raise ValueError(f"batch has {unknown}, but only {list(TENSORS)} can be dispatched")
    if ("input_ids" in given) == ("inputs_embeds" in given):
        raise ValueError("batch must have exactly one of input_ids and inputs_embeds")
    content = "input_ids" if "input_ids" in given else "inputs_embeds"
    for name, x in given.items():
        ndim = 3 if name == "inputs_embeds" else 2
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"batch[{name!r}] must be a torch.Tensor, not {type(x).__name__}")
        if x.ndim != ndim:
            shape = "(batch, seqlen, hidden_size)" if ndim == 3 else "(batch, seqlen)"
            raise ValueError(f"batch[{name!r}] has shape {tuple(x.shape)}, but must be {shape}")
        if x.shape[:2] != given[content].shape[:2]:
            begin = tuple(given[content].shape[:2])
            raise ValueError(f"batch[{name!r}] has shape {tuple(x.shape)}, but must begin as {content}, {begin}")
    return content


def _kept(attention_mask: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Which tokens a mask keeps, bool; each row is a document, and must not look like several."""
    keep = attention_mask == 1
    other = attention_mask[~keep & (attention_mask != 0)]
    if len(other):
        raise ValueError(
            f"batch['attention_mask'] must be 1 for tokens and 0 for padding, but there is {other[0].item()}; where it "
            "numbers the documents of a row, give cu_seqlens in its place"
        )
    if position_ids is not None and ((position_ids.diff(dim=1) < 0) & keep[:, 1:] & keep[:, :-1]).any():
        raise ValueError(
            "batch['position_ids'] go back inside a row that batch['attention_mask'] makes one document: leave out the "
            "attention_mask, or give cu_seqlens in its place"
        )
    return keep


def _documents(
    given: Mapping[str, torch.Tensor], content: torch.Tensor, cu_seqlens: torch.Tensor | Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are kept, ``(batch, seqlen)``, and which of these begin a document, ``(total,)``."""
    keep = torch.ones(content.shape[:2], dtype=torch.bool, device=content.device)
    if cu_seqlens is not None:
        if "attention_mask" in given:
            raise ValueError("cu_seqlens and attention_mask both say where documents are: give one of them")
        borders = torch.from_numpy(as_cu_seqlens(cu_seqlens, "cu_seqlens"))
        if borders[-1] != keep.numel():
            raise ValueError(f"cu_seqlens ends at {borders[-1]}, but the batch has {keep.numel()} tokens")
        first = torch.zeros(keep.numel() + 1, dtype=torch.bool)
        first[borders[:-1]] = True  # empty documents at the end begin behind the last token
        return keep, first[:-1].to(keep.device)
    if "attention_mask" in given:
        keep = _kept(given["attention_mask"], given.get("position_ids"))
    first = keep & (keep.cumsum(1) == 1)
    if "position_ids" in given and "attention_mask" not in given:
        first[:, 1:] |= given["position_ids"].diff(dim=1) != 1
    return keep, first[keep]
