"""Trainer over data- and context-parallel ranks makes the same steps as over one process."""

import os
import unittest.mock
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from magi_attention.integrations.transformers.trainer import ContextParallelTrainer
from magi_attention.testing.rank_pool import RankPool

from .language_models import in_float64, make_model, random_tokens

LENGTHS = (9, 23, 4, 31, 17, 12, 8, 27)


def arguments(folder: str, **options: Any) -> transformers.TrainingArguments:
    defaults = dict(
        output_dir=folder, use_cpu=True, max_steps=3, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0.0, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        gradient_accumulation_steps=2, dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.TrainingArguments(**defaults | options)


def documents() -> list[dict[str, list[int]]]:
    return [{"input_ids": random_tokens(n, seed=n).tolist()} for n in LENGTHS * 3]


def weights_after(trainer: transformers.Trainer) -> dict[str, Tensor]:
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@in_float64
def train_alone(folder: str, batch_size: int) -> dict[str, Tensor]:
    model = make_model("llama", "sdpa")
    model.config.use_cache = False  # with a cache, documents would see each other
    trainer = transformers.Trainer(
        model,
        arguments(folder, per_device_train_batch_size=batch_size),
        train_dataset=documents(),
        data_collator=transformers.DataCollatorWithFlattening(),
    )
    return weights_after(trainer)


@in_float64
def train_on_rank(rank: int, group: dist.ProcessGroup, folder: str, cp_size: int) -> dict[str, Tensor]:
    """Four processes, of which ``cp_size`` share a batch of two documents."""
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    mesh = init_device_mesh("cpu", (4 // cp_size, cp_size), mesh_dim_names=("dp", "cp"))
    with unittest.mock.patch.dict(os.environ, environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}):
        trainer = ContextParallelTrainer(
            make_model("llama", "magi_attention"),
            arguments(folder, per_device_train_batch_size=2),
            train_dataset=documents(),
            data_collator=transformers.DataCollatorWithFlattening(),
            cp_mesh=mesh["cp"],
            chunk_size=4,
        )
        assert trainer.args.world_size == 4
        return weights_after(trainer)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_training_equals_one_process(rank_pool: RankPool, tmp_path, cp_size: int) -> None:
    expected = train_alone(str(tmp_path), batch_size=2 * 4 // cp_size)
    before = dict(make_model("llama", "sdpa").named_parameters())
    for ours in rank_pool.run(train_on_rank, 4, str(tmp_path), cp_size):
        for name, weight in ours.items():
            assert (weight - before[name]).abs().max() > 1e-6
            torch.testing.assert_close(weight, expected[name], rtol=1e-10, atol=1e-10)


def test_what_is_refused(local_group: dist.ProcessGroup, tmp_path) -> None:
    with pytest.raises(ValueError, match="average_tokens_across_devices must be True"):
        ContextParallelTrainer(
            make_model("llama", "magi_attention"),
            arguments(str(tmp_path), average_tokens_across_devices=False),
            cp_group=local_group,
        )
    trainer = ContextParallelTrainer(
        make_model("llama", "magi_attention"), arguments(str(tmp_path)), cp_group=local_group
    )
    for use in (trainer.evaluate, trainer.predict):
        with pytest.raises(NotImplementedError, match="trains only"):
            use()
