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
# shellcheck source=tools/launch/processes.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch/processes.sh"
check_gpus "$gpus"
launch "$gpus" test.py "$config" "$checkpoint" --launcher pytorch "$@"
