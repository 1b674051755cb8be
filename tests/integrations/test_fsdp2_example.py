"""FSDP2 with context parallelism makes the steps of one process, and goes on from a checkpoint as if never stopped."""

import functools
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from magi_attention.testing.rank_pool import RankPool
from tests.torchrun import torchrun

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))

import fsdp2_llama as example  # noqa: E402

SMALL = ["--seqlen", "201", "--chunk-size", "8", "--dtype", "float32", "--lr", "0.01"]


@functools.cache
def losses_alone(dp_size: int, steps: int) -> list[float]:
    """The same model and batches in one process, with transformers' own attention and one backward pass a step."""
    args = example.parse_arguments(SMALL)
    torch.manual_seed(0)
    model = example.LlamaForCausalLM._from_config(example.SIZES["tiny"], attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    losses = []
    for step in range(steps):
        batches = [example.make_batch(args, step, dp_rank) for dp_rank in range(dp_size)]
        for batch in batches:
            batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, -100)
        items = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        loss = sum(model(**batch, use_cache=False, num_items_in_batch=items).loss for batch in batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_on_rank(rank: int, group: dist.ProcessGroup, arguments: list[str]) -> list[float]:
    return example.train(example.parse_arguments(SMALL + arguments), torch.device("cpu"))


def run(num_processes: int, *arguments: str) -> list[float]:
    """The losses that the program prints."""
    printed = torchrun(EXAMPLES / "fsdp2_llama.py", *SMALL, *arguments, num_processes=num_processes)
    assert len(re.findall(r"[\d,]+ tokens/s, peak memory [\d.]+ GiB$", printed, re.MULTILINE)) >= 1
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_losses_equal_one_process(rank_pool: RankPool, cp_size: int) -> None:
    expected = losses_alone(4 // cp_size, 3)
    assert expected[2] < expected[0] - 0.1
    for losses in rank_pool.run(train_on_rank, 4, ["--steps", "3", "--cp", str(cp_size)]):
        assert losses == pytest.approx(expected, rel=1e-6)


def test_two_processes_and_compiled_blocks() -> None:
    losses = run(2, "--steps", "3", "--compile", "eager")
    assert losses == pytest.approx(losses_alone(1, 3), rel=1e-6)


def test_recomputing_changes_nothing(rank_pool: RankPool) -> None:
    runs = [
        rank_pool.run(train_on_rank, 4, ["--steps", "2", "--recompute", what])[0] for what in ("none", "mlp", "block")
    ]
    assert runs[0] == runs[1] == runs[2]


def test_going_on_from_a_checkpoint(rank_pool: RankPool, tmp_path: Path) -> None:
    """Bit by bit on as many ranks; on others, which hold other shards, to rounding."""
    whole = rank_pool.run(train_on_rank, 4, ["--steps", "4", "--cp", "2"])[0]
    before = rank_pool.run(train_on_rank, 4, ["--steps", "2", "--cp", "2", "--save", str(tmp_path)])[0]
    rest = ["--steps", "4", "--resume", str(tmp_path / "step_2")]
    after = rank_pool.run(train_on_rank, 4, [*rest, "--cp", "2"])[0]
    assert before + after == whole
    assert run(2, *rest, "--cp", "1") == pytest.approx(whole[2:], rel=1e-6)


def test_mixed_precision(rank_pool: RankPool) -> None:
    """bfloat16 rounds the first loss a little; rounding the number of labels, 1401 a rank, would be 7e-4 of it."""
    arguments = ["--steps", "1", "--cp", "2", "--seqlen", "2803", "--documents", "1"]
    exact, rounded = (rank_pool.run(train_on_rank, 4, [*arguments, "--dtype", x])[0] for x in ("float32", "bfloat16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-4)


@pytest.mark.usefixtures("local_group")
def test_cp_must_divide_the_processes() -> None:
    with pytest.raises(ValueError, match="--cp must divide the number of processes, 1, not be 3"):
        example.train(example.parse_arguments(["--cp", "3"]), torch.device("cpu"))
