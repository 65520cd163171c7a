#!/usr/bin/env bash
# Check and measure training and generation on one large GPU in under nine minutes.
#   bench/h200.sh                        on an H200 (or any GPU with 80 GB); writes docs/results/h200.json
#   nanogpt=../nanoGPT bench/h200.sh     also measures nanoGPT, from that folder
#   bench/h200.sh toy FILE.json          the same commands on a CPU, in a minute
# Everything is compiled and in bfloat16. The training step of a 124 M and of a 1.1 B model is compared with
# the fastest matrix product and with nanoGPT. Greedy decoding at batch sizes 1 and 32, eager and as a CUDA
# graph, is compared with the rate at which the weights can be read. The loss head is measured in time and
# memory. Each benchmark checks its results against the peers before it times anything.
set -euo pipefail
cd "$(dirname "$0")/.."

size=${1:-h200}
out=${2:-docs/results/h200.json}
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
peer=()
if [ -n "${nanogpt:-}" ]; then peer=(--nanogpt="$nanogpt"); fi

failed=0
# bench SECONDS NAME SUBJECT --key=value ...: run a benchmark with a time limit. NAME is its key in the JSON.
bench() {
    local seconds=$1 name=$2
    shift 2
    echo "== $name: python -m bench $*" >&2
    timeout "$seconds" python -m bench "$@" --json="$parts/$name.json" || failed=1  # continue with the others
}

if [ "$size" = toy ]; then
    timing=(--rounds=1 --seconds=0.01 --device=cpu)
    tiny=(--n_layer=1 --n_head=2 --n_embd=32 --vocab_size=300)
    batch=(--block_size=16 --batch_size=2 --arms="float32$")
    bench 60 train_124m train "${timing[@]}" "${tiny[@]}" "${batch[@]}" "${peer[@]}"
    bench 60 train_1.1b train "${timing[@]}" "${tiny[@]}" "${batch[@]}" --n_kv_head=1
    bench 60 decode_124m generate "${timing[@]}" "${tiny[@]}" --max_new_tokens=8
    bench 60 loss loss "${timing[@]}" --n=64 --d=32 --v=500
else
    timing=(--rounds=3 --seconds=1 --device=cuda)
    if python -c "import pytest" 2> /dev/null; then
        timeout 70 python -m pytest -q tests/test_gpu.py || failed=1
    fi
    bench 100 train_124m train "${timing[@]}" --size=124m --batch_size=32 "${peer[@]}" \
        --arms="(nanoGPT|our Llama), bfloat16, compiled"
    bench 90 train_1.1b train "${timing[@]}" --size=1.1b --arms="our Llama, bfloat16, compiled"
    gpt2=(--n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50257 --block_size=1024 --max_new_tokens=128)
    large=(--n_layer=22 --n_head=32 --n_embd=2048 --vocab_size=32000 --max_new_tokens=64)
    bench 90 decode_124m generate "${timing[@]}" "${gpt2[@]}" "${peer[@]}"
    bench 70 decode_124m_batch_32 generate "${timing[@]}" "${gpt2[@]}" --batch_size=32
    bench 90 decode_1.1b generate "${timing[@]}" "${large[@]}"
    bench 20 loss loss "${timing[@]}" --n=16384 --d=768 --v=50257
fi

python - "$parts" "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

parts = {path.stem: json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"))}
Path(sys.argv[2]).write_text(json.dumps({"command": "bench/h200.sh", **parts}, indent=2) + "\n")
print(f"{sys.argv[2]}: {', '.join(parts)}")
PYTHON
exit $failed
