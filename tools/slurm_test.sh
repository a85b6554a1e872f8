#!/usr/bin/env bash
# Evaluate on a Slurm cluster.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]

environment:
  GPUS           processes, each with a GPU of its own (8)
  GPUS_PER_NODE  of them on one machine (8, or GPUS if that is less)
  CPUS_PER_TASK  processors of each process (5)
  SRUN_ARGS      further options of srun, such as "--time=02:00:00"
  MASTER_PORT    port of the first machine; default: one that follows from the number of the job
  PYTHON         interpreter (python)
TEXT
}

case ${1:-} in -h | --help) usage; exit 0 ;; esac
if [ $# -lt 4 ]; then usage >&2; exit 2; fi
partition=$1 job=$2 config=$3 checkpoint=$4
shift 4

# shellcheck source=tools/launch/slurm.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch/slurm.sh"
launch_on_slurm "$partition" "$job" test.py "$config" "$checkpoint" --launcher slurm "$@"
