#!/usr/bin/env bash
# What the dated results are made of, on the GPUs of this machine:
#
#     benchmarks/measure.sh tests results     # the tests that need GPUs
#     benchmarks/measure.sh one results       # one GPU; several are used side by side
#     benchmarks/measure.sh all results       # attention over all GPUs
#
# Each takes up to ten minutes, kernels being compiled at first, and writes to a folder of the second one. It needs pytest,
# pytest-xdist and hypothesis for the tests, and compares with flash-attn-4 where that can be imported.
set -euo pipefail
cd "$(dirname "$0")/.."
part=$1 out=$(realpath -m "$2")
mkdir -p "$out"
export PYTHONPATH=.:${PYTHONPATH:-} CUBLAS_WORKSPACE_CONFIG=:4096:8
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')

on() { # GPU, seconds, name of the log, command: in the background, on one GPU, the last if there is no such
    local gpu=$(($1 < gpus ? $1 : gpus - 1))
    CUDA_VISIBLE_DEVICES=$gpu timeout "$2" "${@:4}" >"$out/$3.log" 2>&1 &
}

case $part in
tests)
    on 0 300 engines python3 -m pytest -q -n 12 tests/gpu/test_engines.py tests/gpu/test_comm_rows.py
    wait
    timeout 280 python3 -m pytest -q tests/gpu/test_four_gpus.py tests/gpu/test_distributed.py >"$out/nccl.log" 2>&1 || true
    on 0 200 memcheck compute-sanitizer --tool memcheck python3 tests/gpu/sanitize.py
    on 1 200 racecheck compute-sanitizer --tool racecheck python3 tests/gpu/sanitize.py
    ;;
one)
    flex=(python3 benchmarks/bench_flex_attn.py --budget 540)
    on 0 590 table "${flex[@]}" --preset table --out "$out/table"
    on 1 590 wide "${flex[@]}" --head-dims 256 192 64 --heads 16:4 --seqlens 8192 --engines hopper triton --out "$out/dims" \
        --masks full causal "varlen causal" "sliding window"
    on 2 590 heads "${flex[@]}" --heads 64:8 16:16 --seqlens 8192 131072 --masks full causal "varlen causal" --out "$out/heads"
    on 3 590 scale python3 benchmarks/emulate_scale.py --masks "varlen causal" causal --cp-sizes 8 64 16 32 --packs 2 --ranks 2 \
        --budget 400 --out "$out/scale"
    wait
    on 0 100 host python3 benchmarks/bench_host_time.py --repetitions 3 --output "$out/host_time.md"
    ;;
all)
    cp=(python3 benchmarks/bench_cp.py --gpus "$gpus")
    timeout 260 "${cp[@]}" --preset scaling --bandwidth --variants default intra_node=heads --budget 240 \
        --out "$out/scaling" >"$out/scaling.log" 2>&1 || true
    timeout 160 "${cp[@]}" --preset table --heads 48:8 --tokens 65536 524288 --budget 140 --out "$out/table" >"$out/cp.log" 2>&1 || true
    timeout 150 "${cp[@]}" --masks causal "pack magi" "sliding window" --tokens 65536 --rivals --budget 130 --out "$out/variants" \
        --variants default degree=0 mode=dynamic grad_wire_dtype=input >"$out/variants.log" 2>&1 || true
    ;;
esac
wait
tail -n 12 "$out"/*.log
