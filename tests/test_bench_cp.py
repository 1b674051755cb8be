"""The benchmark of distributed attention, on CPU processes: its contenders, its checks, its tables, and what it does
about contenders that fail."""

import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from magi_attention.config import AttnOverlapMode, DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import relocate
from magi_attention.testing.rank_pool import RankPool

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import attention_cases  # noqa: E402
import bench_cp as bench  # noqa: E402
import cp_case  # noqa: E402
import cp_collectives as collectives  # noqa: E402
import cp_contenders as contenders  # noqa: E402
import cp_inputs as inputs  # noqa: E402
import cp_kernels as kernels  # noqa: E402
import cp_launch as launch  # noqa: E402
import cp_ranks as ranks  # noqa: E402
import cp_results as results  # noqa: E402
import cp_run  # noqa: E402
import cp_setting  # noqa: E402
import cp_timing as timing  # noqa: E402
import plot_cp  # noqa: E402
from attention_cases import make_case  # noqa: E402
from gpu_rivals import NotSupported  # noqa: E402

CPU = torch.device("cpu")
SMOKE = ["--device", "cpu", "--gpus", "2", "--preset", "smoke"]


def test_smoke_run_and_plot(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every contender that runs on CPUs agrees with one process, is timed, and is in the tables and the plot."""
    masks = ["--masks", "pack magi", "prefix tree", "--variants", "default", "degree=2,min_chunk_size=16"]
    rivals = ["--rivals", *bench.ALL_CPU_RIVALS, "torch ring all-gather"]
    bench.main([*SMOKE, *masks, *rivals, "--bandwidth", "--out", str(tmp_path)])
    assert "pack magi 256 8:4, one GPU: first call " in capfd.readouterr().out
    report = results.Report.load(tmp_path / "results.json")
    assert report.ours == ["magi", "magi degree=2,min_chunk_size=16"]
    assert sorted(result.mask for result in report.results) == ["pack magi", "prefix tree"]
    for result in report.results:
        assert set(result.outcomes) == {cp_case.ONE_GPU, *report.contenders}
        for name, outcome in result.outcomes.items():
            assert outcome.supported == (name != "torch ring all-gather"), outcome
            if outcome.supported:
                assert not outcome.failure, (name, outcome.failure)
                assert set(outcome.errors) == set(inputs.TENSORS) and max(outcome.errors.values()) < 1e-5
                assert name == cp_case.ONE_GPU or (result.has_time(name) and outcome.rounds >= 2)
        plan, staged = (result.plans[name] for name in report.ours)
        assert len(plan.recv_rows) == 2 and 1 <= plan.imbalance < 1.1 and (plan.stages, staged.stages) == (1, 2)
    assert [transfer.bytes_per_peer for transfer in report.transfers] == [1 << 14, 1 << 16, 1 << 18]
    plot_cp.main([str(tmp_path / "results.json"), "--output", str(tmp_path / "plot.png")])
    tables = capfd.readouterr().out
    assert "| pack magi | 256 | 2 | 8:4 |" in tables and "nan" not in tables
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def raises(task: contenders.Task) -> contenders.Contender:
    raise RuntimeError("\nno such kernel\nand a long trace")


def dies(task: contenders.Task) -> contenders.Contender:
    if task.rank == 1:
        os._exit(7)
    return contenders.magi(task)


def wrong(task: contenders.Task) -> contenders.Contender:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return contenders.magi(task).attend(q, k, v) * (1 + 1e-4 * (task.rank == 0))

    return contenders.Contender(attend, contenders.magi(task).rows)


def fails_later(task: contenders.Task) -> contenders.Contender:
    good, calls = contenders.magi(task), []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) > 2:
            raise MemoryError("full")
        return good.attend(q, k, v)

    return contenders.Contender(attend, good.rows)


FAULTY = {"raises": raises, "dies": dies, "wrong": wrong, "fails later": fails_later, "good": contenders.magi}


def work_with_faulty_rivals(rank: int, size: int, init_method: str, job: launch.Job) -> None:
    contenders.RIVALS.update(FAULTY)
    cp_run.work(rank, size, init_method, job)


def test_a_contender_that_fails_or_kills_a_process_stops_no_other(tmp_path: Path) -> None:
    args = bench.parse_arguments([*SMOKE, "--masks", "causal", "--out", str(tmp_path), "--timeout", "30"])
    args.rivals = list(FAULTY)
    job = launch.Job(args, launch.Progress(tmp_path / "progress.json"), deadline=time.time() + 100)
    launch.launch(work_with_faulty_rivals, 2, job, stall_s=60)
    (result,) = results.Report.load(tmp_path / "results.json").results
    failures = {name: outcome.failure for name, outcome in result.outcomes.items() if outcome.failure}
    assert set(failures) == {"raises", "dies", "wrong", "fails later"}
    assert failures["raises"] == "RuntimeError: no such kernel"
    assert failures["dies"].startswith("ended the processes: exit codes ") and "7" in failures["dies"]
    assert failures["wrong"].startswith("wrong: error of out ")
    assert failures["fails later"] == "MemoryError: full"
    assert all(result.has_time(name) for name in ("magi", "alone", "good"))


def ranks_of_pool(rank: int, group: dist.ProcessGroup) -> ranks.Ranks:
    return ranks.Ranks(rank, dist.get_world_size(group), CPU, group, group)


def attempt_on_rank(rank: int, group: dist.ProcessGroup) -> list[str]:
    """What becomes of steps that raise on no rank, on all, on all as not supported, and on one."""

    def step(failing: tuple[int, ...], kind: type[Exception]) -> int:
        if rank in failing:
            raise kind(f"rank {rank}")
        return rank

    outcomes = []
    for failing, kind in (((), ValueError), ((0, 1), ValueError), ((0, 1), NotSupported), ((1,), ValueError)):
        try:
            outcomes.append(str(ranks_of_pool(rank, group).attempt(partial(step, failing, kind))))
        except ranks.Failed as failed:
            outcomes.append(f"failed, {failed.supported}: {failed}")
        except ranks.Derailed as derailed:
            outcomes.append(f"derailed {derailed}")
    return outcomes


def test_ranks_agree_on_what_failed(rank_pool: RankPool) -> None:
    for rank, outcomes in enumerate(rank_pool.run(attempt_on_rank, 2)):
        assert outcomes == [
            str(rank),
            "failed, True: ValueError: rank 0",
            "failed, False: NotSupported: rank 0",
            "derailed on rank 1 of 2 only: ValueError: rank 1",
        ]


def move_on_rank(rank: int, group: dist.ProcessGroup) -> list[Tensor]:
    """Rows and gradients of both collectives, for inputs and gradients that are the rank's number and counts."""
    size = dist.get_world_size(group)
    moved = []
    for collective, rows in ((collectives.GatherRows, 3), (collectives.ExchangeBlocks, size)):
        x = (10.0 * rank + torch.arange(rows * 2.0).reshape(rows, 2)).requires_grad_()
        out = collective.apply(x, group)
        out.backward(100.0 * rank + torch.arange(out.numel()).reshape(out.shape))
        moved += [out.detach(), x.grad]
    return moved


def test_collectives_and_their_gradients(rank_pool: RankPool) -> None:
    size = 3
    by_rank = rank_pool.run(move_on_rank, size)
    sent = torch.stack([10.0 * rank + torch.arange(6.0).reshape(3, 2) for rank in range(size)])
    summed = torch.stack([100.0 * rank + torch.arange(18.0).reshape(9, 2) for rank in range(size)]).sum(dim=0)
    grads = torch.stack([100.0 * rank + torch.arange(6.0).reshape(3, 2) for rank in range(size)])
    for rank, (gathered, grad_gathered, exchanged, grad_exchanged) in enumerate(by_rank):
        torch.testing.assert_close(gathered, sent.flatten(0, 1))
        torch.testing.assert_close(grad_gathered, summed[3 * rank : 3 * rank + 3])
        torch.testing.assert_close(exchanged, sent[:, rank])
        torch.testing.assert_close(grad_exchanged, grads[:, rank])


def errors_on_rank(rank: int, group: dist.ProcessGroup) -> dict[str, float]:
    """Of results that are shared out otherwise than expected, partial in dk, wrong by 0.5 in one element of dv."""
    whole = torch.arange(1.0, 49.0).reshape(8, 3, 2)
    mine, theirs = (torch.arange(8)[start::step] for start, step in ((rank, 2), (4 * rank, 1)))
    theirs = theirs[:4]
    part = torch.arange(8)  # every rank has a half of every gradient of dk
    tensors = {"out": whole[mine], "dq": 2 * whole[mine], "dk": whole / 2, "dv": whole / 2}
    tensors["dv"] = tensors["dv"].clone()
    tensors["dv"][5, 2, 1] += 0.25
    expected = {name: (2 if name == "dq" else 1) * whole[theirs] for name in inputs.TENSORS}
    return inputs.relative_errors(
        inputs.Results(tensors, mine, part), inputs.Results(expected, theirs, theirs), 8, group
    )


def test_errors_are_over_all_ranks(rank_pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = torch.arange(1.0, 49.0).norm().item()
    for errors in rank_pool.run(errors_on_rank, 2):
        assert errors == pytest.approx({"out": 0, "dq": 0, "dk": 0, "dv": 0.5 / norm}, rel=1e-4)


def test_inputs_are_the_same_however_they_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_BLOCK", 10)
    made = inputs.Inputs(4, 2, 3, torch.float32, CPU)
    whole = made.rows("q", torch.arange(40))
    rows = torch.tensor([0, 3, 9, 10, 25, 39])
    assert torch.equal(made.rows("q", rows), whole[rows])
    assert torch.equal(made.rows("q", rows, heads_first=True), whole[rows].transpose(0, 1))
    assert made.rows("k", rows).shape == (6, 2, 3)
    assert not torch.equal(made.rows("k", rows), made.rows("v", rows))
    assert whole.std() == pytest.approx(1, abs=0.1) and whole.unique().numel() > 450


def test_alone_is_all_work_of_the_rank() -> None:
    """Over all ranks the masks of ``alone`` have the cells of the whole mask, and no key that is not needed."""
    for name in bench.TABLE_MASKS:
        case = make_case(name, 512)
        cells = 0
        for rank in range(4):
            with mock.patch.multiple(dist, get_rank=lambda group, r=rank: r, get_world_size=lambda group: 4):
                task = contenders.Task(case, 4, 2, 8, None, CPU, contenders.Variant("magi", chunk_size=32))
                part = contenders.plan_of(task).rank(rank)
                with mock.patch.object(contenders.gpu_rivals, "magi") as magi:
                    contender = contenders.alone(task)
            mask = magi.call_args.args[0].mask
            cells += mask.area
            assert mask.area == part.area and len(contender.rows) == 128
            assert len(contender.key_rows) == 128 + part.num_recv_rows
            dense = case.mask.to_dense()[contender.rows.numpy()][:, contender.key_rows.numpy()]
            assert (mask.to_dense() == dense).all()
        assert cells == case.mask.area


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", bench.TABLE_MASKS)
@pytest.mark.parametrize("zigzag", [False, True])
def test_flex_attention_of_a_rank_is_the_mask(name: str, zigzag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block lists and mask of rows that are a part of the sequence, in one piece or two."""
    for module in (attention_cases, kernels):
        monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(attention_cases, "WINDOW", 75)
    monkeypatch.setattr(attention_cases, "CAUSAL_BLOCK", 50)
    monkeypatch.setattr(kernels.gpu_rivals, "compiled_flex_attention", lambda: flex_attention)
    case = make_case(name, 252)
    for rank in range(3):
        with mock.patch.multiple(dist, get_rank=lambda group, r=rank: r, get_world_size=lambda group: 3):
            own = contenders.shard(contenders.Task(case, 4, 2, 16, None, CPU, contenders.Variant("magi")), zigzag)
        bands = relocate(case.mask.bands, own, np.array([[0, 252]]))
        mask = AttnMask.from_bands(bands, 84, 252)
        q, k, v = (torch.randn(rows, heads, 16) for rows, heads in ((84, 4), (252, 2), (252, 2)))
        torch.testing.assert_close(kernels.flex(mask, CPU)(q, k, v), kernels.dense(mask, CPU)(q, k, v))


def test_how_many_rounds() -> None:
    assert not timing.is_enough(7, 0.5, late=False) and timing.is_enough(8, 0.5, late=False)
    assert not timing.is_enough(2, 2.0, late=False) and timing.is_enough(3, 2.0, late=False)
    assert timing.is_enough(2, 3.0, late=False) and timing.is_enough(2, 0.1, late=True)
    assert not timing.is_enough(1, 60.0, late=True)


def test_options() -> None:
    text = "mode=dynamic,order=zigzag,grad_wire_dtype=input,chunk_size=32,sm_margin=8"
    args = bench.parse_arguments([*SMOKE, "--gpus", "4", "--variants", "default", text])
    assert args.tokens == [512] and args.heads == [(8, 4)] and args.masks == bench.TABLE_MASKS
    plain, other = args.variants
    assert plain == contenders.Variant("magi", chunk_size=16)
    config = DistAttnConfig(DispatchConfig(order="zigzag"), OverlapConfig(AttnOverlapMode.DYNAMIC), "input")
    assert other == contenders.Variant(f"magi {text}", config, chunk_size=32, sm_margin=8)
    task = contenders.Task(make_case("causal", 512), 6, 3, 64, None, CPU, other)
    model = task.config.overlap_config.cost_model
    assert (model.heads_q, model.heads_kv, model.head_dim) == (6, 3, 64)
    assert contenders.Task(task.case, 6, 3, 64, None, CPU, plain).config == DistAttnConfig()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--heads", "8:3"], "takes pairs"),
        (["--variants", "degree=-1"], "degree must be at least 0"),
        (["--variants", "speed=11"], "unknown choice speed"),
        (["--tokens", "100"], "not a multiple of 2 x GPUs x chunk size, 64"),
        (["--tokens", "128", "--tokens-per-gpu", "64"], "exclude each other"),
        (["--gpus", "0"], "at least 1"),
    ],
)
def test_mistakes_are_named(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments([*SMOKE, *options])
    assert complaint in capsys.readouterr().err


def test_links() -> None:
    header, legend = "\tGPU0\tGPU1\tCPU Affinity", "  NV#  = Connection traversing a bonded set of # NVLinks"
    assert cp_setting.links_in(f"{header}\nGPU0\t X \tNV18\t0-31\nGPU1\tNV18\t X \t0-31\n{legend}") == "NVLink (NV18)"
    assert cp_setting.links_in(f"{header}\nGPU0\t X \tSYS\t0-31\nGPU1\tSYS\t X \t0-31\n{legend}") == "no NVLink"


def test_who_ended_processes_twice_is_left_out_of_all_cases(tmp_path: Path) -> None:
    job = launch.Job(None, launch.Progress(tmp_path / "progress.json"), 0, {("causal", "a"): "died"})
    assert job.reason_to_leave_out("causal", "a") == "died"
    assert not job.reason_to_leave_out("full", "a") and not job.reason_to_leave_out("causal", "b")
    job = replace(job, ended=job.ended | {("full", "a"): "hung"})
    assert job.reason_to_leave_out("window", "a") == "died" and job.reason_to_leave_out("full", "a") == "hung"


def test_tables(tmp_path: Path) -> None:
    def outcome(forward_ms: float, backward_ms: float) -> results.Outcome:
        return results.Outcome(forward_ms, backward_ms, 0.1, 0.2, 7, 1.5, {"out": 0.001})

    outcomes = {
        "magi": outcome(2.0, 8.0),
        "alone": outcome(1.0, 4.0),
        "torch ring all-gather": results.Outcome(failure="NotSupported: full and causal only", supported=False),
        "Ulysses cuDNN": outcome(4.0, 4.0),
        "Ulysses FlexAttention": results.Outcome(failure="RuntimeError: no"),
    }
    plans = {"magi": results.PlanCost([512, 256], 1024, 1.01, 1, 2.5)}
    result = results.Result("causal", 2048, 2, 64, 8, 128, 2 * 10**12, outcomes, plans)
    report = results.Report(
        {"devices": "none"}, ["magi"], list(outcomes)[2:], [result], [results.Transfer(1 << 20, 0.5, 2.1)]
    )
    report.save(tmp_path)
    loaded = results.Report.load(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["tokens"] == 2048
    assert results.as_markdown(loaded) == results.as_markdown(report) == (tmp_path / "results.md").read_text()
    assert results.speed_lines(loaded)[-1] == (
        "| causal | 2k | 2 | 64:8 | 500 / 312 | 1000 / 625 |  | 250 / 625 | failed "
        "| 0.50 / 0.50 | 250 / 625 | 2.00 / 0.50 |"
    )
    assert results.communication_lines(loaded)[-1] == (
        "| causal | 2k | 2 | 64:8 | magi | 512 / 384 | 0.50 | 1.010 | 1 | 2.5 "
        "| 2.00 / 8.00 | 1.00 / 4.00 | 0.10 / 0.20 |"
    )
    assert results.transfer_lines(loaded)[-1] == "| 1 MiB | 0.500 | 2.1 |"
    assert results.failure_lines(loaded) == ["* Ulysses FlexAttention, causal 2k 64:8: RuntimeError: no"]


def test_processes_that_never_start_working_end_the_run(tmp_path: Path) -> None:
    job = launch.Job(None, launch.Progress(tmp_path / "progress.json"), deadline=0)
    with pytest.raises(SystemExit, match="does not help"):
        launch.launch(exits_at_once, 1, job, stall_s=60)


def exits_at_once(rank: int, size: int, init_method: str, job: launch.Job) -> None:
    os._exit(1)
