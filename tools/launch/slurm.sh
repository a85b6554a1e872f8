# Sourced by slurm_train.sh and slurm_test.sh.

# launch_on_slurm PARTITION JOB_NAME SCRIPT [arguments]: becomes srun with GPUS processes.
launch_on_slurm() {
  local partition=$1 job=$2 script=$3 root gpus per_node srun_args
  shift 3
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  gpus=${GPUS:-8}
  per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
  read -r -a srun_args <<<"${SRUN_ARGS:-}"
  exec srun --partition="$partition" --job-name="$job" --gres="gpu:$per_node" --ntasks="$gpus" \
    --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    "${PYTHON:-python}" -u "$root/tools/$script" "$@"
}
