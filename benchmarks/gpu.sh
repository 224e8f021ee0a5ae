#!/usr/bin/env bash
# Everything that waits for a GPU, in at most nine minutes on one card: tests/test_gpu.py, early exit on known shapes
# by the tokens of a step, and trials per minute of one worker and of twelve. The numbers go to one JSON file.
#
#   benchmarks/gpu.sh [--output FILE]                 with the dependencies of dact installed
#   benchmarks/gpu.sh --wheels DIR [--output FILE]    with those that are missing from wheels, on a machine without network
#   benchmarks/gpu.sh --fetch DIR                     fetch these wheels, for Python 3.12 on Linux, x86-64
#   benchmarks/gpu.sh --dry [--output FILE]           on the CPU, with the smallest sizes: whether it works
#
# The wheels may take 64 MiB. They are meant for an image that has torch, lightning, transformers, scipy and their like.
set -euo pipefail

LIMIT_MIB=64
SECONDS_IN_ALL=540
MISSING=(optuna optuna-integration sqlalchemy greenlet colorlog alembic mako 'datasets>=5,<6' multiprocess dill
  'jsonargparse>=4.49,<5' typeshed-client docstring-parser)
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
wheels='' fetch='' arguments=()
while (($#)); do
  case $1 in
    --wheels) wheels=$(cd "$2" && pwd); shift 2 ;;
    --fetch) fetch=$2; shift 2 ;;
    --output) mkdir -p "$(dirname "$2")"; arguments+=(--output "$(cd "$(dirname "$2")" && pwd)/$(basename "$2")"); shift 2 ;;
    --dry) arguments+=(--dry); shift ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done

if [[ -n $fetch ]]; then
  platforms=()
  for name in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${name}_x86_64")
  done
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -d "$fetch" "${MISSING[@]}"
  wheels=$fetch
fi
if [[ -n $wheels ]]; then
  size=$(du -sm "$wheels" | cut -f1)
  if ((size > LIMIT_MIB)); then
    echo "gpu.sh: $wheels holds $size MiB, and at most $LIMIT_MIB are allowed" >&2
    exit 1
  fi
fi
[[ -z $fetch ]] || exit 0

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [[ -n $wheels ]]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
fi
cd "$root"
PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 \
  "$python" benchmarks/gpu.py --seconds "$SECONDS_IN_ALL" "${arguments[@]}"
