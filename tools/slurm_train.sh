#!/usr/bin/env bash
# Train on a Slurm cluster.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of tools/train.py]

environment:
  GPUS           processes, each with a GPU of its own (8)
  GPUS_PER_NODE  of them on one machine (8, or GPUS if that is less)
  CPUS_PER_TASK  processors of each process (5)
  SRUN_ARGS      further options of srun, such as "--time=24:00:00 --signal=TERM@120" (saves before the time is up)
  MASTER_PORT    port of the first machine; default: one that follows from the number of the job
  PYTHON         interpreter (python)

With --auto-resume a job that was ended and queued again goes on where it was.
TEXT
}

case ${1:-} in -h | --help) usage; exit 0 ;; esac
if [ $# -lt 3 ]; then usage >&2; exit 2; fi
partition=$1 job=$2 config=$3
shift 3

# shellcheck source=tools/launch/slurm.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch/slurm.sh"
launch_on_slurm "$partition" "$job" train.py "$config" --seed 0 --launcher slurm "$@"
