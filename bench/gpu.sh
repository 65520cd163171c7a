#!/usr/bin/env bash
# Measure one large GPU, part by part: bench/gpu.sh PART [--minutes=2.5] [--out=DIR] (bench/gpu.py says more).
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 -m bench.gpu "$@"
