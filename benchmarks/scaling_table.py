"""What emulate_scale.py predicts for a number of GPUs beside what bench_cp.py measured on as many.

    PYTHONPATH=. python benchmarks/bench_cp.py --gpus 4 --preset scaling --bandwidth --out measured \\
        --variants default intra_node=heads
    python benchmarks/scaling_table.py measured/results.json --links links.json
    PYTHONPATH=. python benchmarks/emulate_scale.py --cp-sizes 4 --tokens 8192 --packs 1 --ranks 4 --degrees 1 \\
        --masks full causal "varlen full" "varlen causal" "sliding window" "block causal" --links links.json --out 8k
    python benchmarks/scaling_table.py measured/results.json 8k/results.json 32k/results.json

The masks of ``--preset scaling`` are those that ``--packs 1`` emulates. An error is of the predicted speed, relative to
the measured one: above zero, the GPUs were slower than predicted.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import cp_results
import scale_results
from flex_attn_results import as_length

METHODS = {
    "magi": (scale_results.OURS, scale_results.FLAT),
    "magi intra_node=heads": (scale_results.HEADS_IN_NODES, scale_results.FLAT),
}
"""What a contender is called in the emulation: the method, and how its rows travel."""

Speeds = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A case as measured and as predicted, TFLOP/s a GPU forward and backward.

    Attributes:
        mask: Its name in the emulation.
        tokens: Tokens of a GPU.
        gpus: How many.
        contender: Its name where it was measured.
        measured: Measured.
        predicted: Predicted.
    """

    mask: str
    tokens: int
    gpus: int
    contender: str
    measured: Speeds
    predicted: Speeds

    @property
    def error(self) -> Speeds:
        """Of the prediction, relative."""
        forward, backward = (p / m - 1 for p, m in zip(self.predicted, self.measured, strict=True))
        return forward, backward


def lines(measured: cp_results.Report, emulated: list[scale_results.Report]) -> list[Line]:
    """The cases that both know, in the order in which they were measured."""
    predicted = {
        (m.mask, int(report.setting["tokens a GPU"]), m.cp_size, m.method, m.transport): (m.forward, m.backward)
        for report in emulated
        for m in report.modelled
    }
    found = []
    for result in sorted(measured.results, key=lambda result: result.tokens):
        mask, tokens = result.mask.removeprefix("published "), result.tokens // result.gpus
        for contender, method in METHODS.items():
            case = (mask, tokens, result.gpus, *method)
            if case in predicted and result.has_time(contender):
                found.append(Line(mask, tokens, result.gpus, contender, result.tflops(contender), predicted[case]))
    return found


def table(found: list[Line]) -> str:
    """As Markdown, with the median and the largest size of the errors of each contender below."""
    rows = [["mask", "tokens a GPU", "GPUs", "contender", "measured f / b", "predicted f / b", "error f / b, percent"]]
    for line in found:
        sizes = [as_length(line.tokens), str(line.gpus)]
        speeds = [f"{forward:.0f} / {backward:.0f}" for forward, backward in (line.measured, line.predicted)]
        rows.append([line.mask, *sizes, line.contender, *speeds, " / ".join(f"{100 * x:+.0f}" for x in line.error)])
    text = scale_results.table(rows)
    for contender in dict.fromkeys(line.contender for line in found):
        errors = [[abs(x) for x in line.error] for line in found if line.contender == contender]
        sizes = [f"{100 * statistics.median(way):.0f} and {100 * max(way):.0f}" for way in zip(*errors, strict=True)]
        text += f"\n{contender}: median and largest error {sizes[0]} % forward, {sizes[1]} % backward.\n"
    return text


def links(measured: cp_results.Report) -> list[tuple[int, float]]:
    """Bytes that a GPU sent and seconds that it took, as emulate_scale.py reads them."""
    gpus = measured.results[0].gpus
    return [(transfer.bytes_per_peer * (gpus - 1), transfer.ms / 1e3) for transfer in measured.transfers]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="results.json of bench_cp.py")
    parser.add_argument("emulated", type=Path, nargs="*", help="results.json of emulate_scale.py")
    parser.add_argument("--links", type=Path, help="write the measured all-to-alls here")
    args = parser.parse_args(argv)
    measured = cp_results.Report.load(args.measured)
    if args.links is not None:
        args.links.write_text(json.dumps(links(measured)) + "\n")
    if args.emulated:
        found = lines(measured, [scale_results.Report.load(path) for path in args.emulated])
        if not found:
            parser.error("no case was both measured and emulated")
        print(table(found))


if __name__ == "__main__":
    main()
