#!/usr/bin/env bash
# What the dated results are made of, on the GPUs of this machine:
#
#     benchmarks/measure.sh tests results     # the tests that need GPUs
#     benchmarks/measure.sh one results       # one GPU; several are used side by side
#     benchmarks/measure.sh all results       # attention over all GPUs, and over pairs of them
#
# Each takes up to ten minutes on four GPUs, and writes to a folder of the second one. It needs pytest, pytest-xdist and
# hypothesis for the tests, and compares with flash-attn-4 where that can be imported.
set -euo pipefail
cd "$(dirname "$0")/.."
part=$1 out=$(realpath -m "$2")
mkdir -p "$out"
export PYTHONPATH=.:${PYTHONPATH:-} CUBLAS_WORKSPACE_CONFIG=:4096:8
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')

on() { # GPUs, seconds, name of the log, command: in the background, and where there are fewer GPUs one after the other
    local devices=$1
    [[ ${devices//*,/} -lt $gpus ]] || devices=$(seq -s, 0 "$(tr -dc , <<<"$devices" | wc -c)")
    CUDA_VISIBLE_DEVICES=$devices flock "$out/lock of $devices" timeout "$2" "${@:4}" >"$out/$3.log" 2>&1 &
}

case $part in
tests)
    on 0 280 engines python3 -m pytest -q -n 12 tests/gpu/test_engines.py tests/gpu/test_comm_rows.py
    on 1 280 memcheck compute-sanitizer --tool memcheck python3 tests/gpu/sanitize.py
    on 2 280 racecheck compute-sanitizer --tool racecheck python3 tests/gpu/sanitize.py
    timeout 280 python3 -m pytest -q tests/gpu/test_four_ranks.py tests/gpu/test_distributed.py >"$out/nccl.log" 2>&1 || true
    ;;
one)
    flex=(python3 benchmarks/bench_flex_attn.py)
    plain=(full causal "varlen full" "varlen causal" "sliding window" "block causal" "prefix tree")
    packs=("pack magi" "pack pile" "pack prolong64k" "pack prolong512k")
    packs+=("published varlen full" "published varlen causal" "published block causal")
    on 0 200 plain_8k "${flex[@]}" --budget 180 --seqlens 8192 --masks "${plain[@]}" --out "$out/plain_8k"
    on 1 200 packs_8k "${flex[@]}" --budget 180 --seqlens 8192 --masks "${packs[@]}" --out "$out/packs_8k"
    on 2 200 plain_32k "${flex[@]}" --budget 180 --seqlens 32768 --masks "${plain[@]}" --out "$out/plain_32k"
    on 3 200 packs_32k "${flex[@]}" --budget 180 --seqlens 32768 --masks "${packs[@]}" --out "$out/packs_32k"
    wait
    some=(full causal "varlen causal" "sliding window")
    on 0 170 dims "${flex[@]}" --budget 150 --head-dims 256 192 64 --heads 16:4 --seqlens 8192 --engines hopper triton \
        --masks "${some[@]}" --out "$out/dims"
    on 1 170 heads "${flex[@]}" --budget 150 --heads 64:8 16:16 --seqlens 8192 --masks "${some[@]}" --deterministic \
        --out "$out/heads"
    on 2 170 long "${flex[@]}" --budget 150 --seqlens 131072 --masks "pack magi" "sliding window" causal full --out "$out/long"
    on 3 90 latent "${flex[@]}" --budget 70 --head-dims 192:128 --heads 16:16 --seqlens 8192 --masks full causal "varlen causal" \
        --out "$out/latent"
    on 3 170 scale python3 benchmarks/emulate_scale.py --masks causal "varlen causal" --cp-sizes 8 64 16 32 --packs 2 --ranks 2 \
        --budget 150 --out "$out/scale"
    wait
    on 0 60 host python3 benchmarks/bench_host_time.py --repetitions 3 --output "$out/host_time.md"
    ;;
all)
    cp=(python3 benchmarks/bench_cp.py)
    timeout 260 "${cp[@]}" --preset scaling --bandwidth --variants default intra_node=heads --budget 220 \
        --out "$out/scaling" >"$out/scaling.log" 2>&1 || true
    on 0,1 280 pairs "${cp[@]}" --gpus 2 --masks full causal "pack magi" --tokens 65536 --heads 48:8 64:8 --budget 250 \
        --out "$out/pairs"
    on 2,3 120 variants "${cp[@]}" --gpus 2 --masks causal "pack magi" "sliding window" --tokens 65536 --rivals --budget 100 \
        --variants default degree=0 mode=dynamic grad_wire_dtype=input --out "$out/variants"
    on 2,3 170 long "${cp[@]}" --gpus 2 --masks "pack magi" "sliding window" --tokens 524288 --budget 150 --out "$out/long"
    ;;
esac
wait
tail -n 12 "$out"/*.log
