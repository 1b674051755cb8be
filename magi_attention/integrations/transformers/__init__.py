"""Context parallelism for the decoders of Hugging Face transformers: ``attn_implementation="magi_attention"``.

Importing this module registers the attention. :func:`dispatch_batch` turns a batch into this rank's part of it, which
goes into the model as it is.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from magi_attention.integrations.transformers.attention import attention_forward, describe_mask
from magi_attention.integrations.transformers.batch import dispatch_batch, undispatch_output
from magi_attention.integrations.transformers.layer_masks import LayerMask, layer_masks

__all__ = ["LayerMask", "dispatch_batch", "layer_masks", "undispatch_output"]

# Plans and collectives are no part of a graph: what torch.compile makes of a layer ends before and goes on behind them.
AttentionInterface.register("magi_attention", torch.compiler.disable(attention_forward))
AttentionMaskInterface.register("magi_attention", describe_mask)
