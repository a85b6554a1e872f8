#!/usr/bin/env bash
# From a bare machine to a trained model: sets up what is missing, makes a small synthetic data set, trains a tiny model
# on it, scores it before and after, and draws what it sees beside what is there.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash tools/quickstart.sh [options]

Trains a tiny STCOcc on a small synthetic data set, scores it and writes pictures; needs no download of data and no GPU.
With two CPU cores it takes less than 15 minutes after the set-up. Steps whose result is there are skipped.

  --iterations N      length of the training (default: 1800; 300 for a short look)
  --out DIR           where everything goes (default: outputs/quickstart)
  --infos FILE        train nothing: predict the frames of this info file, with the full-size model. Any other option of
                      tools/infer.py goes with it, such as --checkpoint FILE; without that the weights are random
  those of the set-up step: bash tools/setup_env.sh --help

The data set is kept in data/synthetic-quickstart and used again by the next run.
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

tools=$SETUP_ROOT/tools
out=$SETUP_ROOT/outputs/quickstart
for argument in "$@"; do
  if [[ $argument == --infos || $argument == --infos=* ]]; then
    exec python "$tools/infer.py" "$SETUP_ROOT/config/stcocc/stcocc-r50-16f-openocc-12e.py" --out "$out" "$@"
  fi
done

iterations=1800
while (($#)); do
  case $1 in
    --iterations | --out)
      (($# > 1)) || { echo "error: $1 needs a value" >&2; exit 1; }
      if [[ $1 == --out ]]; then out=$2; else iterations=$2; fi
      shift 2 ;;
    --iterations=*) iterations=${1#*=}; shift ;;
    --out=*) out=${1#*=}; shift ;;
    *) echo "error: unknown option: $1 (--help lists them)" >&2; exit 1 ;;
  esac
done
[[ $iterations =~ ^[1-9][0-9]{0,6}$ ]] || { echo "error: --iterations: expected a number from 1, got $iterations" >&2; exit 1; }

config=$SETUP_ROOT/config/stcocc/stcocc-tiny-synthetic.py
data=$SETUP_ROOT/data/synthetic-quickstart
train=$data/stcocc-nuscenes_infos_train.pkl
val=$data/stcocc-nuscenes_infos_val.pkl
run=$out/$iterations-iterations
checkpoint=$run/training/iter_$iterations.pth
options=("data.train.ann_file=$train" "data.val.ann_file=$val" "data.test.ann_file=$val")

# Everything here is small: more threads would wait for each other most of the time.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# step RESULT TEXT COMMAND...: runs the command unless its result is there
step() {
  local result=$1 text=$2
  shift 2
  if [[ -e $result ]]; then
    setup_say "already there: $text ($result)"
    return
  fi
  setup_say "$text"
  "$@"
}

# 2. data: the info file is written last
step "$val" "making a synthetic data set in $data: 6 scenes to train on, 2 to look at" \
  python "$tools/create_synthetic.py" --scenes 8 --frames 6 --image-size 400x225 --out "$data"

# 3. what a model has to beat: the labels that are most frequent, and itself before the training
step "$out/majority.json" "scoring the most frequent class of each voxel" \
  python "$tools/baselines.py" "$config" --out "$out/majority.json" --cfg-options "${options[@]}"
step "$out/untrained.json" "scoring the untrained model" \
  python "$tools/baselines.py" "$config" --predictor untrained --out "$out/untrained.json" --cfg-options "${options[@]}"

# 4. training; one that was interrupted goes on
step "$checkpoint" "training for $iterations iterations" \
  python "$tools/train.py" "$config" --work-dir "$run/training" --auto-resume --cfg-options "${options[@]}" \
  "runner.max_iters=$iterations" "lr_config.step=[$((iterations * 4 / 5))]"

# 5. scores (written last) and predictions of the trained model
step "$run/trained/results.json" "scoring the trained model" \
  python "$tools/test.py" "$config" "$checkpoint" --work-dir "$run/trained" --out "$run/predictions" \
  --cfg-options "${options[@]}"

# 6. pictures: the prediction beside the ground truth, and the curve of the training
draw() {  # the folder gets its name when all pictures are there
  python "$tools/visualize.py" --infos "$val" --index 2 --count 4 --pred "$run/predictions" --out "$run/pictures.part"
  mv "$run/pictures.part" "$run/pictures"
}
step "$run/pictures" "drawing frames of a scene that the model has not seen" draw
step "$run/curve.png" "drawing the curve of the training" \
  python "$tools/plot_log.py" "$run/training" --out "$run/curve.png"

python "$tools/results_table.py" --names majority untrained trained -- "$out/majority.json" "$out/untrained.json" \
  "$run/trained/results.json" > "$run/table.md"
cat "$run/table.md"
setup_say "done, on synthetic data: these are no nuScenes scores. In $run:
  pictures/   camera images, prediction and ground truth
  curve.png   loss over the training
  table.md    the scores above; more in trained/results.json
  training/   checkpoints and logs"
