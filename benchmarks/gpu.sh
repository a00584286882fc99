#!/bin/sh
# What a GPU can tell in six minutes: first whether the kernels are right on it, then what a decoding step's attention, linear attention and the loss of
# distillation cost. On a bare machine with torch and triton, in a clone: OUT=DIR sh benchmarks/gpu.sh
set -u
OUT=${OUT:-.}
nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv,noheader
timeout 130 python benchmarks/kernels_on_gpu.py || echo "the kernels are NOT right on this card, or were not all tried"
timeout 75 python benchmarks/decode_attention.py -o "$OUT/decode-attention-$(date +%F).csv"
timeout 65 python benchmarks/chunked_attention.py -o "$OUT/chunked-attention-$(date +%F).csv"
timeout 85 python benchmarks/distill_step.py -o "$OUT/distill-step-$(date +%F).csv"
