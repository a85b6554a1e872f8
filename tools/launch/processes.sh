# Sourced by dist_train.sh and dist_test.sh.

# check_gpus GPUS: ends the script unless it is a positive whole number.
check_gpus() {
  if ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: GPUS must be a positive whole number, got '$1'" >&2
    exit 2
  fi
}

# launch GPUS SCRIPT [arguments]: becomes torchrun with GPUS processes on this machine.
launch() {
  local gpus=$1 nodes=${NNODES:-1} threads root meet
  shift
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
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
  exec "${PYTHON:-python}" -m mmdet3d.utils.launch "${meet[@]}" --nproc-per-node="$gpus" "$root/tools/$1" "${@:2}"
}
