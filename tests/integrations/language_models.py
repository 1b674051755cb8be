"""Small models of random weights, batches for them, and one training step alone or on ranks."""

import unittest.mock
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers.masking_utils import eager_mask

from magi_attention.integrations.transformers import dispatch_batch, undispatch_output

VOCABULARY = 61
IGNORE = -100
LENGTHS = (5, 23, 1, 14)
CU_SEQLENS = [0, 5, 28, 29, 43]

SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"]
LLAMA4 = dict(intermediate_size_mlp=40, moe_layers=[], no_rope_layers=[1, 0], attention_chunk_size=6)

CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", dict(sliding_window=6)),
    "gemma2": ("Gemma2Config", dict(sliding_window=6, layer_types=ALTERNATING, attn_logit_softcapping=0.5)),
    "gemma3": ("Gemma3TextConfig", dict(sliding_window=6, layer_types=ALTERNATING)),
    "gpt-oss": (
        "GptOssConfig", dict(sliding_window=6, layer_types=ALTERNATING, num_local_experts=3, num_experts_per_tok=2)
    ),
    "deepseek v3": (  # values have another head_dim than queries and keys
        "DeepseekV3Config",
        dict(
            q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10,
            num_key_value_heads=4, first_k_dense_replace=2,
        ),
    ),
    "llama4": ("Llama4TextConfig", LLAMA4 | dict(attn_temperature_tuning=False)),
    "llama4 tuned": ("Llama4TextConfig", LLAMA4 | dict(floor_scale=4)),
}  # fmt: skip

DENSE = {"gemma2", "gpt-oss"}  # what sdpa has no way to do, and eager does with a softmax in float32


def dense_attention(
    module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **kwargs
) -> tuple[Tensor, None]:  # fmt: skip
    """The plain formula in the precision of its inputs, under the mask that transformers makes."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(attention_mask < 0, -torch.inf)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num()[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), None


transformers.AttentionInterface.register("dense", dense_attention)
transformers.AttentionMaskInterface.register("dense", eager_mask)


def make_model(name: str, attention: str) -> transformers.PreTrainedModel:
    """The same weights at every call, in float64."""
    kind, options = CONFIGS[name]
    config = getattr(transformers, kind)(**SMALL | options)
    config._experts_implementation = "eager"  # the others have no float64
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model.train()


@dataclass
class Batch:
    """A batch, the same as one process without documents would have to be told it, and which tokens are real."""

    given: dict[str, Tensor]
    options: dict[str, list[int]] = field(default_factory=dict)
    alone: dict[str, Tensor] = field(default_factory=dict)
    keep: Tensor | None = None

    @property
    def reference(self) -> dict[str, Tensor]:
        return self.given | self.alone

    def real_rows(self, x: Tensor) -> Tensor:
        """``(batch, seqlen, ...)`` to ``(tokens, ...)``."""
        return x.flatten(0, 1) if self.keep is None else x[self.keep]


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def packed(by: str, seed: int = 0) -> Batch:
    """Four documents in one row, told apart by ``position_ids`` or by ``cu_seqlens``."""
    tokens = random_tokens(1, CU_SEQLENS[-1], seed=seed)
    labels = tokens.clone()
    labels[0, CU_SEQLENS[:-1]] = IGNORE  # as DataCollatorWithFlattening has it
    positions = {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    inputs = {"input_ids": tokens, "labels": labels}
    if by == "position_ids":
        return Batch(inputs | positions)
    return Batch(inputs, {"cu_seqlens": CU_SEQLENS}, positions)


def padded(side: str) -> Batch:
    """Three rows of different lengths."""
    seqlen, lengths = 19, torch.tensor([[19], [4], [11]])
    column = torch.arange(seqlen).expand(3, -1)
    keep = column < lengths if side == "right" else column >= seqlen - lengths
    tokens = random_tokens(3, seqlen).masked_fill(~keep, 0)
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    labels = tokens.masked_fill(positions == 0, IGNORE).masked_fill(~keep, IGNORE)
    inputs = {"input_ids": tokens, "labels": labels, "attention_mask": keep.long()}
    return Batch(inputs, {}, {"position_ids": positions}, keep)


def rows() -> Batch:
    """Two full rows."""
    tokens = random_tokens(2, 17)
    return Batch({"input_ids": tokens, "labels": tokens})


BATCHES = {
    "position_ids": lambda: packed("position_ids"),
    "cu_seqlens": lambda: packed("cu_seqlens"),
    "right padding": lambda: padded("right"),
    "left padding": lambda: padded("left"),
    "rows": rows,
}


@dataclass
class Step:
    """What a step of training gives: the logits of the real tokens, the loss, and the gradients."""

    logits: Tensor
    loss: Tensor
    grads: dict[str, Tensor]

    @classmethod
    def take(cls, model: torch.nn.Module, logits: Tensor, loss: Tensor) -> "Step":
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return cls(logits.detach(), loss.detach().clone(), grads)


# Models compute norms and losses in float32 whatever their weights are. In float64 right differs from nearly right.
in_float64 = unittest.mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


@in_float64
def step_alone(name: str, batch: Batch) -> Step:
    """One process, without this package."""
    model = make_model(name, "dense" if name in DENSE else "sdpa")
    output = model(**batch.reference, use_cache=False)
    return Step.take(model, batch.real_rows(output.logits), output.loss)


@in_float64
def documents_alone(name: str, batch: Batch) -> Tensor:
    """Logits of each document of a pack when the model sees nothing else."""
    model = make_model(name, "dense" if name in DENSE else "sdpa")
    documents = batch.given["input_ids"][0].split(LENGTHS)
    return torch.cat([model(tokens[None], use_cache=False).logits[0] for tokens in documents]).detach()


@in_float64
def step_on_rank(rank: int, group: dist.ProcessGroup, name: str, batch: Batch, checkpoint: bool = False) -> Step:
    """The same with context parallelism; loss and gradients are the means over the ranks."""
    model = make_model(name, "magi_attention")
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    local = dispatch_batch(batch.given, model.config, 4, group, **batch.options)
    output = model(**local)
    step = Step.take(model, undispatch_output(output.logits.detach(), local)[0], output.loss)
    average([step.loss, *step.grads.values()], group)
    return step


def average(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    for x in tensors:
        dist.all_reduce(x, group=group)
        x /= group.size()


@in_float64
def step_of_two_batches(rank: int, group: dist.ProcessGroup, name: str) -> Step:
    """Two batches of different numbers of labels, each on two ranks; DistributedDataParallel over all four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    batch = two_batches()[mesh.get_local_rank("dp")]
    model = make_model(name, "magi_attention")
    local = dispatch_batch(batch.given, model.config, 4, cp_mesh=mesh["cp"], loss_group=group)
    parallel = DistributedDataParallel(model, process_group=group)  # averages gradients as long as it is there
    output = parallel(**local)
    step = Step.take(model, undispatch_output(output.logits.detach(), local)[0], output.loss)
    average([step.loss], group)
    return step


def two_batches() -> list[Batch]:
    return [packed("position_ids"), rows()]


@in_float64
def step_of_two_batches_alone(name: str) -> Step:
    """The mean over the labels of both."""
    model = make_model(name, "sdpa")
    batches = two_batches()
    items = sum(int((batch.given["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    outputs = [model(**batch.reference, use_cache=False, num_items_in_batch=items) for batch in batches]
    logits = [batch.real_rows(output.logits) for batch, output in zip(batches, outputs, strict=True)]
    return Step.take(model, torch.cat(logits), outputs[0].loss + outputs[1].loss)


def logits_on_rank(rank: int, group: dist.ProcessGroup, name: str, batches: list[Batch]) -> list[Tensor]:
    model = make_model(name, "magi_attention")
    local = [dispatch_batch(batch.given, model.config, 4, group, **batch.options) for batch in batches]
    with torch.no_grad():
        return [undispatch_output(model(**x).logits, x)[0] for x in local]


def logits_under_autocast(rank: int, group: dist.ProcessGroup, name: str, batch: Batch) -> Tensor:
    """Float32 weights, bfloat16 arithmetic, and a backward pass to see that it runs."""
    model = make_model(name, "magi_attention").float()
    local = dispatch_batch(batch.given, model.config, 4, group, **batch.options)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**local)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    return undispatch_output(output.logits.detach(), local)[0]


def logits_under_autocast_alone(name: str, batch: Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return make_model(name, "sdpa").float()(**batch.reference, use_cache=False).logits[0].detach()


@in_float64
def input_gradient_on_rank(rank: int, group: dist.ProcessGroup, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the embeddings that take the place of ``input_ids``."""
    model = make_model(name, "magi_attention")
    embeddings = model.get_input_embeddings()(batch.given["input_ids"]).detach().requires_grad_()
    given = {name: x for name, x in batch.given.items() if name != "input_ids"}
    local = dispatch_batch(given | {"inputs_embeds": embeddings}, model.config, 4, group, **batch.options)
    output = model(**local)
    (output.loss / group.size()).backward()
    return undispatch_output(output.logits.detach(), local)[0], embeddings.grad
