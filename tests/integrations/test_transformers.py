"""Models of transformers on several ranks give the logits, the loss and the gradients of one process."""

import functools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from magi_attention.integrations.transformers import LayerMask, dispatch_batch, layer_masks, undispatch_output
from magi_attention.testing.error_bound import assert_close_to_oracle
from magi_attention.testing.rank_pool import RankPool

from .language_models import (
    BATCHES,
    CONFIGS,
    CU_SEQLENS,
    SMALL,
    Batch,
    Step,
    documents_alone,
    input_gradient_on_rank,
    logits_on_rank,
    logits_under_autocast,
    logits_under_autocast_alone,
    make_model,
    packed,
    random_tokens,
    step_alone,
    step_of_two_batches,
    step_of_two_batches_alone,
    step_on_rank,
)

alone = functools.cache(lambda name, kind: step_alone(name, BATCHES[kind]()))


def check_steps_are_equal(ours: Step, expected: Step) -> None:
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-11, atol=0)
    assert ours.grads.keys() == expected.grads.keys()
    for name, grad in ours.grads.items():
        assert expected.grads[name].any()
        torch.testing.assert_close(
            grad, expected.grads[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", list(BATCHES))
def test_every_kind_of_batch(rank_pool: RankPool, kind: str, size: int) -> None:
    for ours in rank_pool.run(step_on_rank, size, "llama", BATCHES[kind]()):
        check_steps_are_equal(ours, alone("llama", kind))


# In transformers, packed documents are told apart neither by the masks of gpt-oss nor by the temperature of Llama 4's
# queries, and in 4.56 nor by Llama 4's chunks. These are held to what a document gets alone, below.
NOT_PACKED = ("gpt-oss", "llama4", "llama4 tuned")
MODELS = [
    (name, kind)
    for name in CONFIGS
    for kind in ("position_ids", "right padding")
    if name != "llama" and not (name in NOT_PACKED and kind == "position_ids")
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_models_of_several_masks(rank_pool: RankPool, name: str, kind: str, size: int) -> None:
    for ours in rank_pool.run(step_on_rank, size, name, BATCHES[kind]()):
        check_steps_are_equal(ours, alone(name, kind))


@pytest.mark.parametrize("name", ["llama", "gemma2", *NOT_PACKED])
def test_a_document_gets_what_it_gets_alone(rank_pool: RankPool, name: str) -> None:
    batch = packed("cu_seqlens")
    for ours in rank_pool.run(step_on_rank, 2, name, batch):
        torch.testing.assert_close(ours.logits, documents_alone(name, batch), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_documents_do_not_see_each_other(rank_pool: RankPool, name: str) -> None:
    """Other tokens in one document leave the others' logits as they are, bit by bit: all rows stay where they were."""
    batch, changed = packed("position_ids"), packed("position_ids")
    changed.given["input_ids"][0, 5:28] = random_tokens(23, seed=1)
    others = torch.ones(CU_SEQLENS[-1], dtype=torch.bool)
    others[5:28] = False
    for before, after in rank_pool.run(logits_on_rank, 4, name, [batch, changed]):
        assert torch.equal(before[others], after[others])
        assert (before[5:28] != after[5:28]).any(dim=1).all()


def test_the_order_of_documents_does_not_matter(rank_pool: RankPool) -> None:
    """Rows are placed otherwise then, so sums are taken in another order: equal to rounding."""
    batch = packed("cu_seqlens")
    tokens = batch.given["input_ids"][0].split([5, 23, 15])
    swapped = Batch(
        {"input_ids": torch.cat([tokens[1], tokens[0], tokens[2]])[None]}, {"cu_seqlens": [0, 23, 28, 29, 43]}
    )
    for before, after in rank_pool.run(logits_on_rank, 4, "gemma3", [batch, swapped]):
        in_order = torch.cat([after[23:28], after[:23], after[28:]])
        torch.testing.assert_close(in_order, before, rtol=1e-12, atol=1e-12)


def test_loss_over_data_and_context_parallel_ranks(rank_pool: RankPool) -> None:
    expected, steps = step_of_two_batches_alone("gemma3"), rank_pool.run(step_of_two_batches, 4, "gemma3")
    for ours, rows in zip(steps, (slice(0, 43), slice(0, 43), slice(43, None), slice(43, None)), strict=True):
        check_steps_are_equal(ours, Step(expected.logits[rows], expected.loss, expected.grads))


def test_gradient_checkpointing_changes_nothing(rank_pool: RankPool) -> None:
    plain, again = (rank_pool.run(step_on_rank, 2, "gemma3", packed("cu_seqlens"), on)[0] for on in (False, True))
    assert torch.equal(plain.loss, again.loss)
    assert all(torch.equal(grad, again.grads[name]) for name, grad in plain.grads.items())


def test_embeddings_as_input(rank_pool: RankPool) -> None:
    batch = packed("cu_seqlens")
    ((expected, grad),) = rank_pool.run(input_gradient_on_rank, 1, "llama", batch)
    torch.testing.assert_close(expected, alone("llama", "cu_seqlens").logits, rtol=1e-11, atol=1e-11)
    assert (
        grad.any(dim=2).sum() == CU_SEQLENS[-1] - len(CU_SEQLENS) + 1
    )  # the last token of a document predicts nothing
    for logits, ours in rank_pool.run(input_gradient_on_rank, 4, "llama", batch):
        torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(ours, grad, rtol=1e-11, atol=1e-11)


def test_autocast(rank_pool: RankPool) -> None:
    exact, plain = alone("llama", "position_ids").logits, logits_under_autocast_alone("llama", packed("position_ids"))
    assert plain.dtype == torch.bfloat16
    for ours in rank_pool.run(logits_under_autocast, 2, "llama", packed("position_ids")):
        assert_close_to_oracle(ours, exact, plain)


# --- Masks and keys -------------------------------------------------------------------------------------------------


def config_of(kind: str, **options: Any) -> Any:
    return getattr(transformers, kind)(**SMALL | options)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("LlamaConfig", {}, {("full_attention", 0): 2}),
        ("MistralConfig", dict(sliding_window=6), {("sliding_attention", 6): 2}),
        ("MistralConfig", dict(sliding_window=None), {("full_attention", 0): 2}),
        (
            "Gemma3TextConfig",
            dict(
                num_hidden_layers=12, sliding_window=4, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2
            ),
            {("sliding_attention", 4): 10, ("full_attention", 0): 2},
        ),
        (
            "Llama4TextConfig",
            dict(num_hidden_layers=4, attention_chunk_size=8, moe_layers=[]),
            {("chunked_attention", 8): 3, ("full_attention", 0): 1},
        ),
    ],
)
def test_masks_of_a_config(kind: str, options: dict, expected: dict) -> None:
    assert layer_masks(config_of(kind, **options)) == Counter(expected)


def test_layers_that_mix_tokens_otherwise_are_refused() -> None:
    config = config_of("LlamaConfig")
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"layer_types\[1\] is 'linear_attention'"):
        layer_masks(config)


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (LayerMask("full_attention"), lambda i, j: True),
        (LayerMask("sliding_attention", 3), lambda i, j: j > i - 3),
        (LayerMask("chunked_attention", 4), lambda i, j: i // 4 == j // 4),
    ],
)
def test_masks_begin_anew_in_each_document(mask: LayerMask, rule) -> None:
    document = torch.tensor([[j <= i and rule(i, j) for j in range(9)] for i in range(9)])
    dense = torch.from_numpy(mask.over([0, 7, 16]).to_dense())
    assert torch.equal(dense, torch.block_diag(document[:7, :7], document).bool())


def test_one_dispatch_balanced_for_what_costs_most(local_group: dist.ProcessGroup) -> None:
    """Five cheap layers to an expensive one: the window counts for more if the documents are short enough."""
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = config_of("Gemma3TextConfig", num_hidden_layers=6, sliding_window=4, layer_types=kinds)
    for lengths, costliest in (([100], "full_attention"), ([6] * 10, "sliding_attention")):
        tokens = torch.cat([torch.arange(n) for n in lengths])[None]
        local = dispatch_batch({"input_ids": tokens, "position_ids": tokens}, config, 4, local_group)
        (first, *others) = local["magi_keys"].items()
        assert first[0].kind == costliest and first[1].dispatch_of is None
        assert [key.dispatch_of for _, key in others] == [first[1].mask]


# --- What is refused ------------------------------------------------------------------------------------------------

IDS = torch.zeros(2, 6, dtype=torch.int64)
NUMBERED = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0]])
AGAIN = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]])


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({}, {}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "pixel_values": IDS}, {}, r"batch has \['pixel_values'\]"),
        ({"input_ids": IDS[0]}, {}, r"batch\['input_ids'\] has shape \(6,\), but must be \(batch, seqlen\)"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, {}, r"batch\['labels'\] has shape \(2, 5\)"),
        ({"input_ids": IDS, "attention_mask": IDS[:, None, None]}, {}, r"attention_mask'\] has shape \(2, 1, 1, 6\)"),
        ({"input_ids": IDS, "attention_mask": IDS}, {}, "the batch has no token"),
        ({"input_ids": IDS, "attention_mask": IDS + 1}, {"cu_seqlens": [0, 12]}, "give one of them"),
        ({"input_ids": IDS, "attention_mask": NUMBERED}, {}, r"1 for tokens and 0 for padding, but there is 2"),
        ({"input_ids": IDS, "attention_mask": IDS.float() - torch.inf}, {}, "0 for padding, but there is -inf"),
        ({"input_ids": IDS, "attention_mask": IDS + 1, "position_ids": AGAIN}, {}, "position_ids'] go back inside"),
        ({"input_ids": IDS}, {"cu_seqlens": [0, 6]}, "cu_seqlens ends at 6, but the batch has 12 tokens"),
        ({"input_ids": IDS}, {"cp_group": None}, "exactly one of cp_group and cp_mesh"),
    ],
)
def test_batches_that_are_refused(local_group: dist.ProcessGroup, batch: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dispatch_batch(batch, config_of("LlamaConfig"), 4, **{"cp_group": local_group} | options)


def test_arguments_in_each_others_places(local_group: dist.ProcessGroup) -> None:
    model, batch = make_model("llama", "magi_attention"), {"input_ids": IDS}
    with pytest.raises(TypeError, match=r"config must be that of a model, model\.config, not a LlamaForCausalLM"):
        dispatch_batch(batch, model, 4, local_group)
    with pytest.raises(TypeError, match="batch must be a mapping with input_ids or inputs_embeds, not a Tensor"):
        dispatch_batch(IDS, model.config, 4, local_group)
    local = dispatch_batch(batch, model.config, 4, local_group)
    logits = model(**local).logits
    for wrong in ((local, logits), (logits, batch)):
        with pytest.raises(TypeError, match="local_batch must be what dispatch_batch returned"):
            undispatch_output(*wrong)


def test_a_model_with_another_attention_is_refused(local_group: dist.ProcessGroup) -> None:
    """Its ranks would attend their own rows only, and the loss would look like one."""
    model = make_model("llama", "sdpa")
    with pytest.raises(
        ValueError, match=r'"magi_attention", or call model.set_attn_implementation\("magi_attention"\)'
    ):
        dispatch_batch({"input_ids": IDS}, model.config, 4, local_group)
    model.set_attn_implementation("magi_attention")
    model(**dispatch_batch({"input_ids": IDS}, model.config, 4, local_group))


def test_a_batch_without_labels_to_learn_has_no_loss(local_group: dist.ProcessGroup) -> None:
    model = make_model("llama", "magi_attention")
    labels = torch.full_like(IDS, -100)
    assert model(**dispatch_batch({"input_ids": IDS, "labels": labels}, model.config, 4, local_group)).loss == 0


def test_uses_that_are_refused(local_group: dist.ProcessGroup) -> None:
    model = make_model("gemma2", "magi_attention")
    with pytest.raises(ValueError, match="call the model with what dispatch_batch returns"):
        model(input_ids=IDS)
    local = dispatch_batch({"input_ids": IDS}, model.config, 4, local_group)
    with pytest.raises(ValueError, match="give it to dispatch_batch"):
        model(**local | {"attention_mask": torch.ones(1, 12)})
    with pytest.raises(TypeError, match="attention_mask must be left to magi_attention, not Tensor"):
        model(**local | {"attention_mask": torch.ones(1, 1, 12, 12)})
    with pytest.raises(ValueError, match="one packed sequence"):
        model(**local | {"input_ids": IDS, "position_ids": torch.arange(6)[None]})
    other = dispatch_batch({"input_ids": IDS}, config_of("LlamaConfig"), 4, local_group)
    with pytest.raises(
        ValueError, match=r"asks for LayerMask\(kind='sliding_attention', size=6\), but its config told"
    ):
        model(**other)
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"set config\.attention_dropout to 0, not 0\.1"):
        model(**local)
