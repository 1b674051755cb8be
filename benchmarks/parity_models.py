"""Small models of transformers of every family that is supported, documents for them, and precisions to compute in."""

import contextlib
import unittest.mock
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import eager_mask

VOCABULARY, IGNORE = 64, -100
LENGTHS = (60, 5, 83, 1, 44)

SIZE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"] * 2


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        config: Name of the config's class.
        options: What it is made of besides ``SIZE``.
        attention: What transformers has for it: sdpa, or eager where sdpa lacks soft caps or sinks.
        masks: In words.
    """

    config: str
    options: dict[str, Any]
    attention: str
    masks: str


FAMILIES = {
    "Llama": Family("LlamaConfig", {}, "sdpa", "full"),
    "Mistral": Family("MistralConfig", dict(sliding_window=16), "sdpa", "window of 16"),
    "Gemma 2": Family(
        "Gemma2Config", dict(sliding_window=16, layer_types=ALTERNATING, attn_logit_softcapping=5.0),
        "eager", "window of 16 and full in turn, soft cap 5",
    ),
    "Gemma 3": Family(
        "Gemma3TextConfig", dict(sliding_window=16, layer_types=ALTERNATING), "sdpa", "window of 16 and full in turn"
    ),
    "gpt-oss": Family(
        "GptOssConfig",
        dict(sliding_window=16, layer_types=ALTERNATING, num_local_experts=4, num_experts_per_tok=2),
        "eager", "window of 16 and full in turn, sinks; 4 experts",
    ),
    "Llama 4": Family(
        "Llama4TextConfig",
        dict(
            intermediate_size_mlp=64, num_local_experts=4, attention_chunk_size=24, no_rope_layers=[1, 1, 1, 0],
            floor_scale=16,
        ),
        "sdpa", "chunks of 24, each fourth layer full with its temperature tuned; 4 experts",
    ),
}  # fmt: skip
PRECISIONS = ("float64", "float32", "bfloat16")


def documents(step: int) -> list[Tensor]:
    """Of the same lengths at every step in another order; each counts up from a number of its own in its own stride."""
    generator = torch.Generator().manual_seed(step)
    order = torch.randperm(len(LENGTHS), generator=generator).tolist()
    starts, strides = (torch.randint(1, VOCABULARY, (len(LENGTHS),), generator=generator).tolist() for _ in range(2))
    return [(starts[n] + torch.arange(LENGTHS[n]) * (1 + strides[n] % 3)) % VOCABULARY for n in order]


def packed(tokens: Sequence[Tensor]) -> dict[str, Tensor]:
    """All in one row, told apart by ``position_ids``."""
    input_ids = torch.cat(list(tokens))[None]
    position_ids = torch.cat([torch.arange(len(x)) for x in tokens])[None]
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": input_ids}


def padded(tokens: Sequence[Tensor]) -> dict[str, Tensor]:
    """One a row, padded to the right."""
    keep = pad_sequence([torch.ones(len(x), dtype=torch.long) for x in tokens], batch_first=True)
    input_ids = pad_sequence(list(tokens), batch_first=True)
    return {"input_ids": input_ids, "attention_mask": keep, "labels": input_ids.masked_fill(keep == 0, IGNORE)}


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float,
    softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The formula in the precision of its inputs, under the mask that transformers makes: eager rounds to float32."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(attention_mask < 0, -torch.inf)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num()[..., : key.shape[2]]  # a row of padding attends nothing
    return (weights @ value).transpose(1, 2), None


transformers.AttentionInterface.register("plain", plain_attention)
transformers.AttentionMaskInterface.register("plain", eager_mask)


def make_model(family: str, attention: str, precision: str) -> transformers.PreTrainedModel:
    """The same weights at every call."""
    config = getattr(transformers, FAMILIES[family].config)(**SIZE | FAMILIES[family].options)
    config._experts_implementation = "eager"  # the others have no float64
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.train().to(torch.float64 if precision == "float64" else torch.float32)


@contextlib.contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Inside, models compute in a precision; bfloat16 is that of autocast, with float32 weights."""
    if precision == "bfloat16":
        with torch.autocast("cpu", torch.bfloat16):
            yield
    elif precision == "float64":  # RoPE and the loss are in float32 whatever the weights are, by calling float()
        with unittest.mock.patch.object(Tensor, "float", Tensor.double):
            yield
    else:
        yield
