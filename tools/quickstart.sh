#!/usr/bin/env bash
# From a bare machine to predictions: sets up what is missing, makes a small synthetic data set, runs the model on it and
# draws what was seen beside what is there.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash tools/quickstart.sh [options]

Runs STCOcc on a small synthetic data set and writes pictures; needs no download of data and no GPU.

  --infos FILE        run on the frames of this info file instead
  --checkpoint FILE   trained weights; without them the weights are random and so is the prediction
  --out DIR           where pictures go (default: outputs/quickstart)
  any other option of tools/infer.py, and those of the set-up step (bash tools/setup_env.sh --help)

The data set is kept in data/synthetic-small and used again by the next run.
TEXT
}

for argument in "$@"; do
  case $argument in -h | --help) usage; exit 0 ;; esac
done

# 1. environment, packages, operators
# shellcheck source=tools/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_main "$@"
set -- ${SETUP_REST[@]+"${SETUP_REST[@]}"}

config=$SETUP_ROOT/config/stcocc/stcocc-r50-16f-openocc-12e.py
data=$SETUP_ROOT/data/synthetic-small
infos=$data/stcocc-nuscenes_infos_val.pkl
out=$SETUP_ROOT/outputs/quickstart
own_infos=
for ((i = 1; i <= $#; i++)); do
  next=$((i + 1))
  case ${!i} in
    --infos) own_infos=${!next-} ;;
    --infos=*) own_infos=${!i#*=} ;;
    --out) out=${!next-} ;;
    --out=*) out=${!i#*=} ;;
  esac
done

if [[ -n $own_infos ]]; then
  exec python "$SETUP_ROOT/tools/infer.py" "$config" --out "$out" "$@"
fi

# 2. data
if [[ ! -f $infos ]]; then
  setup_say "making a small synthetic data set in $data"
  python "$SETUP_ROOT/tools/create_synthetic.py" --small --out "$data"
fi

# 3. predictions for the validation frames
python "$SETUP_ROOT/tools/infer.py" "$config" --infos "$infos" --out "$out" "$@"

# 4. pictures of the first frame: what is there, and the prediction beside it
python "$SETUP_ROOT/tools/visualize.py" --infos "$infos" --index 0 --pred "$out" --voxels --out "$out/truth"
