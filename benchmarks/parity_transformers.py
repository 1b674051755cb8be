"""How nearly models of transformers give the same under context parallelism as in one process without it.

    PYTHONPATH=. python benchmarks/parity_transformers.py --output benchmarks/results/parity_transformers.md

Small models of random weights are trained on packed documents on 1, 2 and 4 gloo processes, and on the same documents,
padded and one a row, in one process with transformers' own attention. Both are held to that one process in float64.
It also says what other documents notice when one is changed. Runs on the CPU.
"""

import argparse
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from parity_models import FAMILIES, LENGTHS, PRECISIONS, computing_in, documents, make_model, packed, padded
from rich.progress import track
from torch import Tensor

from magi_attention.integrations.transformers import dispatch_batch, undispatch_output
from magi_attention.testing.rank_pool import RankPool

CHUNK_SIZE = 8

REPORT = """\
# Models of transformers under context parallelism, {today}

{versions}.
Models of random weights with 4 layers, 4 query and 2 key/value heads, head_dim 8; documents of {lengths} tokens, in
another order and with other tokens at each step, chunks of {chunk_size} rows. By `benchmarks/parity_transformers.py`.

Everything is held to one process without context parallelism in float64, which gets the documents padded, one a row.
*Transformers itself* is that process in float32, or in bfloat16 by autocast, with transformers' own attention, so it
shows what rounding does on its own; in models with experts, it sends some tokens to others. *On n* is this package on n
processes, which get the documents packed in one row. In float64, norms are still computed in float32, as transformers
has them, and leave nothing of differences that are small enough: hence 50 steps without any.

## Logits of the first step

The largest error, relative to the largest value.

{logits}

## Gradient of the first step

Of all parameters. The largest error, relative to the largest value.

{gradient}

## Loss over {steps} steps of AdamW

The largest error in any step, in nats a token; and the first and the last loss.

{loss}

## Packed documents do not see each other

The largest change of the *other* documents' logits, relative to the largest value, in float32 on {most} processes: when
the tokens of the first and longest document are reversed, and when all documents change places, which puts rows in
other tiles and on other ranks. Last, the former in transformers itself, in one process, for documents packed by
`position_ids`.

{apart}
"""


@dataclass
class Run:
    """The first step's logits of all tokens, documents in order, and its gradient; the loss of each step."""

    logits: Tensor
    gradient: Tensor
    losses: list[float]

    def errors(self, truth: "Run") -> tuple[float, float, float]:
        """Of logits and gradient, relative to the largest value, and of the loss in any step, in nats."""
        gaps = (abs(a - b) for a, b in zip(self.losses, truth.losses, strict=True))
        return error(self.logits, truth.logits), error(self.gradient, truth.gradient), max(gaps)


def error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).abs().max() / truth.abs().max())


def train(
    model: transformers.PreTrainedModel,
    precision: str,
    batches: Iterable[dict[str, Any]],
    all_logits: Callable[[Tensor, dict[str, Any]], Tensor],
    average: Callable[[Tensor], None],
) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run = Run(torch.empty(0), torch.empty(0), [])
    for batch in batches:
        with computing_in(precision):
            output = model(**batch)
        output.loss.backward()
        gradient = [p.grad for p in model.parameters() if p.grad is not None]
        loss = output.loss.detach().clone()
        for x in (loss, *gradient):
            average(x)
        if not run.losses:
            run.logits = all_logits(output.logits.detach(), batch)
            run.gradient = torch.cat([x.flatten() for x in gradient]).clone()
        run.losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return run


def train_alone(family: str, precision: str, attention: str, steps: int) -> Run:
    """In one process, without this package."""
    return train(
        make_model(family, attention, precision),
        precision,
        (padded(documents(step)) | {"use_cache": False} for step in range(steps)),
        lambda logits, batch: logits[batch["attention_mask"].bool()],
        lambda x: None,
    )


def train_on_rank(rank: int, group: dist.ProcessGroup, family: str, precision: str, steps: int) -> Run:
    """With context parallelism."""
    model = make_model(family, "magi_attention", precision)

    def average(x: Tensor) -> None:
        dist.all_reduce(x, group=group)
        x /= group.size()

    return train(
        model,
        precision,
        (dispatch_batch(packed(documents(step)), model.config, CHUNK_SIZE, group) for step in range(steps)),
        lambda logits, batch: undispatch_output(logits, batch)[0],
        average,
    )


@torch.no_grad()
def logits_on_rank(rank: int, group: dist.ProcessGroup, family: str, packs: list[list[Tensor]]) -> list[Tensor]:
    model = make_model(family, "magi_attention", "float32")
    batches = [dispatch_batch(packed(tokens), model.config, CHUNK_SIZE, group) for tokens in packs]
    return [undispatch_output(model(**batch).logits, batch)[0] for batch in batches]


@torch.no_grad()
def logits_of_transformers(family: str, packs: list[list[Tensor]]) -> list[Tensor]:
    model = make_model(family, FAMILIES[family].attention, "float32")
    return [model(**packed(tokens), use_cache=False).logits[0] for tokens in packs]


def isolation(pool: RankPool, family: str, num_processes: int) -> list[str]:
    """The largest change of other documents' logits: first document changed, all reversed; first in transformers."""
    tokens = sorted(documents(0), key=len, reverse=True)
    changed = [tokens[0].flip(0), *tokens[1:]]
    others = slice(len(tokens[0]), None)
    before, after, backwards = pool.run(logits_on_rank, num_processes, family, [tokens, changed, tokens[::-1]])[0]
    in_order = torch.cat(backwards.split([len(x) for x in reversed(tokens)])[::-1])
    theirs_before, theirs_after = logits_of_transformers(family, [tokens, changed])
    assert not torch.equal(before, after)
    pairs = ((after[others], before[others]), (in_order, before), (theirs_after[others], theirs_before[others]))
    return ["0, bit by bit" if torch.equal(a, b) else f"{error(a, b.double()):.0e}" for a, b in pairs]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def measure(pool: RankPool, args: argparse.Namespace) -> str:
    """Run everything; the report as Markdown."""
    errors: list[list[list[str]]] = [[], [], []]  # rows of a table each: logits, gradient, loss
    apart = []
    for family in track(args.families, "models"):
        truth = train_alone(family, "float64", "plain", args.steps)
        for precision in args.precisions:
            runs = [] if precision == "float64" else [
                train_alone(family, precision, FAMILIES[family].attention, args.steps)
            ]  # fmt: skip
            itself = [] if runs else ["the measure"]
            runs += [pool.run(train_on_rank, n, family, precision, args.steps)[0] for n in args.processes]
            for rows, values in zip(errors, zip(*(run.errors(truth) for run in runs), strict=True), strict=True):
                rows.append([family, precision, *itself, *(f"{x:.0e}" for x in values)])
            errors[2][-1].append(f"{truth.losses[0]:.2f}, {truth.losses[-1]:.2f}")
        apart.append([family, FAMILIES[family].masks, *isolation(pool, family, max(args.processes))])

    header = ["model", "precision", "transformers itself", *(f"on {n}" for n in args.processes)]
    changes = ["tokens changed", "places changed", "tokens changed, in transformers itself"]
    return REPORT.format(
        today=date.today(),
        versions=f"{platform.machine()}, gloo on the CPU, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
        lengths=", ".join(map(str, LENGTHS)),
        chunk_size=CHUNK_SIZE,
        steps=args.steps,
        most=max(args.processes),
        logits=table(header, errors[0]),
        gradient=table(header, errors[1]),
        loss=table([*header, "loss"], errors[2]),
        apart=table(["model", "masks of its layers", *changes], apart),
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", type=Path, help="write the tables as Markdown")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    with RankPool(max(args.processes), timeout_seconds=120) as pool:
        report = measure(pool, args)
    print(report)
    if args.output:
        args.output.write_text(report)


if __name__ == "__main__":
    main()
