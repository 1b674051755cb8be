"""The parity benchmark, at toy size: it measures rounding where there is nothing else, and sees what is wrong."""

import re
import sys
from pathlib import Path

import torch

from magi_attention.testing.rank_pool import RankPool

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import parity_models as models
import parity_transformers as parity


def numbers(tables: str, title: str) -> list[float]:
    section = tables.split(f"## {title}")[1].split("## ")[0]
    return [float(x) for x in re.findall(r"\d+e[+-]\d+", section)]


def test_tables(rank_pool: RankPool) -> None:
    options = ["--families", "gpt-oss", "--precisions", "float64", "float32", "--processes", "1", "2", "--steps", "2"]
    tables = parity.measure(rank_pool, parity.parse_arguments(options))
    for title in ("Logits", "Gradient", "Loss"):
        ours_64, theirs_32, ours_32 = (numbers(tables, title)[n] for n in (slice(2), slice(2, 3), slice(3, 5)))
        assert max(ours_64) < 1e-13
        assert 1e-8 < max(ours_32) < 10 * max(theirs_32)
    changes = tables.splitlines()[-1].split(" | ")
    assert changes[2] == "0, bit by bit" and float(changes[3]) < 1e-5


def test_an_error_is_seen() -> None:
    truth = parity.train_alone("Llama", "float64", "plain", 1)
    other = parity.train_alone("Mistral", "float64", "plain", 1)  # the same weights, but for the window
    assert min(other.errors(truth)) > 1e-3
    assert truth.errors(truth) == (0, 0, 0)


def test_documents_are_the_same_packed_and_padded() -> None:
    tokens = models.documents(3)
    batch = models.padded(tokens)
    assert torch.equal(batch["input_ids"][batch["attention_mask"].bool()], models.packed(tokens)["input_ids"][0])
    assert sorted(len(x) for x in tokens) == sorted(models.LENGTHS)
