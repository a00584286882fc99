#!/bin/sh
# The rest of what a GPU can tell, after benchmarks/gpu.sh: every number of heads, length and batch, every divergence, what a cache keeps of a teacher; beside
# torch.compile, flex_attention, and Liger and flash-linear-attention where they are installed. At the end tokens a second of whole models, for which
# effconvert is to be installed. At most two hours; rows are written as they come.
#     OUT=DIR sh benchmarks/gpu-rest.sh                                # on a bare machine with torch and triton, in a clone
#     TRITON_INTERPRET=1 OUT=DIR sh benchmarks/gpu-rest.sh --tiny      # on a CPU, to see that it runs
set -u
OUT=${OUT:-.}
PYTHON=${PYTHON:-python}
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv,noheader
failed=0
for what in distill-step decode-attention chunked-attention experts generation; do
    timeout 1800 "$PYTHON" "benchmarks/$(echo $what | tr - _).py" --rest "$@" -o "$OUT/$what-rest-$(date +%F).csv" || { failed=1; echo "$what was not measured to its end"; }
done
exit $failed
