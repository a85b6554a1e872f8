#!/usr/bin/env bash
# From a bare machine to a prediction: sets up what is missing, then runs the model and draws what it sees.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash tools/quickstart.sh [options]

Runs STCOcc on a self-drawn six-camera frame and writes a picture; needs no data set and no GPU.

  --infos FILE        run on the frames of this info file instead
  --checkpoint FILE   trained weights; without them the weights are random and so is the prediction
  --out DIR           where pictures go (default: outputs/quickstart)
  any other option of tools/infer.py, and those of the set-up step (bash tools/setup_env.sh --help)
TEXT
}

for argument in "$@"; do
  case $argument in -h | --help) usage; exit 0 ;; esac
done

# shellcheck source=tools/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_main "$@"
exec python "$SETUP_ROOT/tools/infer.py" "$SETUP_ROOT/config/stcocc/stcocc-r50-16f-openocc-12e.py" \
  --out "$SETUP_ROOT/outputs/quickstart" ${SETUP_REST[@]+"${SETUP_REST[@]}"}
