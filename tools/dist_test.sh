#!/usr/bin/env bash
# Evaluate on several GPUs of one machine or of several, or with several processes on CPUs.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]

Starts GPUS processes on this machine, each with a GPU of its own; on a machine without GPU they share its processors.
The result does not depend on their number.

environment:
  NNODES       machines (1); run this script on each of them
  NODE_RANK    number of this machine, 0 to NNODES - 1 (0)
  MASTER_ADDR  address of machine 0 (127.0.0.1)
  PORT         port of machine 0; default: a free one, 29500 with several machines
  PYTHON       interpreter (python)
TEXT
}

case ${1:-} in -h | --help) usage; exit 0 ;; esac
if [ $# -lt 3 ]; then usage >&2; exit 2; fi
config=$1 checkpoint=$2 gpus=$3
shift 3
if ! [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
  echo "error: GPUS must be a positive whole number, got '$gpus'" >&2
  exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
nodes=${NNODES:-1}
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    export OMP_NUM_THREADS=1
  else
    threads=$(($(nproc) / gpus))
    export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
  fi
fi

if [ "$nodes" = 1 ] && [ -z "${PORT:-}" ]; then
  meet=(--nnodes=1 --rdzv-backend=c10d --rdzv-endpoint=localhost:0)
else
  meet=(--nnodes="$nodes" --node-rank="${NODE_RANK:-0}" --master-addr="${MASTER_ADDR:-127.0.0.1}"
        --master-port="${PORT:-29500}")
fi
exec "${PYTHON:-python}" -m mmdet3d.utils.launch "${meet[@]}" --nproc-per-node="$gpus" \
  "$root/tools/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
