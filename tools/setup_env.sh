#!/usr/bin/env bash
# The one set-up step of STCOcc: environment, packages, operators. Safe to run any time and any number of times.
# tools/quickstart.sh and tools/run_tests.sh source it; on its own it only sets up.

setup_usage() {
  cat <<'TEXT'
usage: bash tools/setup_env.sh [options]

  --active            use the Python environment that is active now instead of making .venv (or STCOCC_ACTIVE=1)
  --find-links DIR    take packages, such as a ready wheel of mmcv-full, from DIR first (or STCOCC_WHEELS=DIR)
  --torch-index URL   get torch and torchvision from this package index, for example one with the small
                      CPU builds (or STCOCC_TORCH_INDEX=URL)
  --rebuild           compile the operators again even when nothing changed
  --check             only look whether everything needed is there; installs nothing
  -h, --help          this text

  PYTHON=python3.12   the Python to make .venv with (3.10, 3.11 or 3.12)
  MAX_JOBS=2          parallel compiler processes
  STCOCC_MIN_FREE_GB  free disk space to ask for, in GB (default: what the packages take)
pip's own variables and configuration (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX, ...) are respected.
TEXT
}

SETUP_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SETUP_STATE=$SETUP_ROOT/build/setup
SETUP_VENV=$SETUP_ROOT/.venv
SETUP_PYTHON=      # the Python that sets up: of the environment once there is one
SETUP_PREFIX=      # the environment's folder
SETUP_REST=()      # arguments that are not options of the set-up

# shellcheck source=tools/setup/messages.sh
source "$SETUP_ROOT/tools/setup/messages.sh"
# shellcheck source=tools/setup/checks.sh
source "$SETUP_ROOT/tools/setup/checks.sh"
# shellcheck source=tools/setup/mmcv.sh
source "$SETUP_ROOT/tools/setup/mmcv.sh"

# ------------------------------------------------------------------------------------------------- environment

setup_venv_works() { [[ -x $SETUP_VENV/bin/python ]] && "$SETUP_VENV/bin/python" -c 'import pip' 2>/dev/null; }

setup_make_venv() {
  [[ $SETUP_ACTIVE != 1 ]] || return 0
  if ! setup_venv_works; then
    if [[ -e $SETUP_VENV ]]; then
      setup_say "$SETUP_VENV is incomplete or its Python is gone; making it anew"
      rm -rf "$SETUP_VENV"
    fi
    setup_run "making the environment .venv with $SETUP_PYTHON (Python ${SETUP_PROBE%% *})" venv \
      "$SETUP_PYTHON" -m venv "$SETUP_VENV" || setup_failed "the environment could not be made" venv
  fi
  SETUP_PYTHON=$SETUP_VENV/bin/python
}

setup_pin() { sed -n "s/^\($1==[^ ;]*\).*/\1/p" "$SETUP_ROOT/requirements.txt"; }

setup_pip() {  # arguments of pip install
  local links=() folder
  for folder in ${SETUP_LINKS[@]+"${SETUP_LINKS[@]}"}; do links+=(--find-links "$folder"); done
  "$SETUP_PYTHON" -m pip --disable-pip-version-check --no-input install --progress-bar off ${links[@]+"${links[@]}"} "$@"
}

# torch from an index of its own. The choice is remembered: a later run without the option keeps it.
setup_install_torch() {
  local file=$SETUP_PREFIX/.stcocc-torch-index before=
  [[ ! -f $file ]] || before=$(<"$file")
  if [[ -n $SETUP_TORCH_INDEX && $SETUP_TORCH_INDEX != "$before" ]]; then
    "$SETUP_PYTHON" -m pip uninstall -q -y torch torchvision >/dev/null 2>&1 || true
    printf '%s\n' "$SETUP_TORCH_INDEX" >"$file"
  fi
  SETUP_TORCH_INDEX=${SETUP_TORCH_INDEX:-$before}
  [[ -n $SETUP_TORCH_INDEX ]] || return 0
  setup_run "installing $(setup_pin torch) from $SETUP_TORCH_INDEX" torch \
    setup_pip --index-url "$SETUP_TORCH_INDEX" --no-deps "$(setup_pin torch)" "$(setup_pin torchvision)" \
    || setup_failed "PyTorch could not be installed from $SETUP_TORCH_INDEX" torch
}

setup_install_packages() {
  local others=$SETUP_STATE/requirements-without-mmcv.txt size=
  "$SETUP_PYTHON" "$SETUP_ROOT/tools/setup/state.py" repair >&2
  setup_install_torch
  "$SETUP_PYTHON" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null || size=", a download of about 3 GB"
  grep -v '^mmcv-full' "$SETUP_ROOT/requirements.txt" >"$others"
  setup_run "installing the packages of requirements.txt$size" packages \
    setup_pip -r "$others" -r "$SETUP_ROOT/requirements-dev.txt" || setup_failed "packages could not be installed" packages
  setup_install_mmcv
  setup_run "trying the packages" import "$SETUP_PYTHON" -c \
    'import cv2, einops, matplotlib, mmcv, mmcv._ext, mmdet, mmseg, numpy, nuscenes, PIL, torch, torchvision, tqdm' \
    || setup_failed "an installed package cannot be imported" import
  # tools and notebooks find mmdet3d from any folder, without PYTHONPATH
  echo "$SETUP_ROOT" >"$("$SETUP_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/stcocc.pth"
  "$SETUP_PYTHON" "$SETUP_ROOT/tools/setup/state.py" packages-done
}

# ---------------------------------------------------------------------------------------------------- operators

setup_build_operators() {
  local code=0 jobs=${MAX_JOBS:-$(setup_jobs)}
  setup_run "compiling the operators ($1)" operators \
    env PATH="$(dirname "$SETUP_PYTHON"):$PATH" MAX_JOBS="$jobs" "$SETUP_PYTHON" "$SETUP_ROOT/tools/setup/state.py" build-operators \
    || code=$?
  if ((code == 3)); then
    setup_say "WARNING: the CUDA toolkit could not compile the operators; they run on the GPU as plain PyTorch, which is slower."
    setup_say "         The cause is in $SETUP_STATE/operators.log; see docs/install.md (GPU), then run with --rebuild."
  elif ((code)); then
    setup_failed "the operators could not be compiled" operators
  fi
}

# ---------------------------------------------------------------------------------------------------------- main

setup_options() {
  SETUP_REST=() SETUP_ACTIVE=${STCOCC_ACTIVE:-0} SETUP_TORCH_INDEX=${STCOCC_TORCH_INDEX:-} SETUP_LINKS=() SETUP_ONLY_CHECK=0 SETUP_REBUILD=0
  [[ -z ${STCOCC_WHEELS:-} ]] || SETUP_LINKS+=("$STCOCC_WHEELS")
  while (($#)); do
    case $1 in
      --active) SETUP_ACTIVE=1 ;;
      --check) SETUP_ONLY_CHECK=1 ;;
      --rebuild) SETUP_REBUILD=1 ;;
      --find-links | --torch-index)
        (($# > 1)) || setup_die "$1 needs a value" "see: bash tools/setup_env.sh --help"
        if [[ $1 == --find-links ]]; then SETUP_LINKS+=("$2"); else SETUP_TORCH_INDEX=$2; fi
        shift ;;
      --) shift; SETUP_REST+=("$@"); break ;;
      *) SETUP_REST+=("$1") ;;
    esac
    shift
  done
}

# Sets SETUP_PACKAGES and SETUP_OPERATORS to "ready" or what is to be done.
setup_status() {
  SETUP_PACKAGES="not installed yet" SETUP_OPERATORS="not compiled yet"
  if [[ $SETUP_ACTIVE == 1 ]]; then
    SETUP_PYTHON=$(command -v python || command -v python3 || true)
  else
    SETUP_PYTHON=$SETUP_VENV/bin/python
  fi
  [[ -x $SETUP_PYTHON ]] || return 0
  { read -r SETUP_PACKAGES && read -r SETUP_OPERATORS; } \
    < <("$SETUP_PYTHON" "$SETUP_ROOT/tools/setup/state.py" status 2>/dev/null) || return 0
  if [[ -n $SETUP_TORCH_INDEX ]]; then
    SETUP_PREFIX=$("$SETUP_PYTHON" -c 'import sys; print(sys.prefix)')
    [[ $(cat "$SETUP_PREFIX/.stcocc-torch-index" 2>/dev/null) == "$SETUP_TORCH_INDEX" ]] || SETUP_PACKAGES="another index for PyTorch"
  fi
  ((SETUP_REBUILD == 0)) || SETUP_OPERATORS="asked for"
}

setup_is_ready() { [[ $SETUP_PACKAGES == ready && $SETUP_OPERATORS == ready ]]; }

setup_lock() {
  mkdir -p "$SETUP_STATE"
  command -v flock >/dev/null || return 0
  exec 9>"$SETUP_STATE/lock"
  if ! flock -n 9; then
    setup_say "another set-up of this checkout is running; waiting for it"
    flock 9
  fi
}

setup_work() {
  trap setup_interrupted INT TERM HUP
  trap 'setup_ended $?' EXIT
  setup_lock
  setup_status  # another process may have done it while this one waited
  if ! setup_is_ready; then
    setup_checks
    setup_make_venv
    SETUP_PREFIX=$("$SETUP_PYTHON" -c 'import sys; print(sys.prefix)')
    [[ $SETUP_PACKAGES == ready ]] || setup_install_packages
    [[ $SETUP_OPERATORS == ready ]] || setup_build_operators "$SETUP_OPERATORS"
    setup_say "ready: $SETUP_PREFIX"
  fi
  exec 9>&-
  trap - INT TERM HUP EXIT
}

# Puts the environment first on PATH for the rest of the calling script.
setup_activate() {
  [[ $SETUP_ACTIVE == 1 ]] || export VIRTUAL_ENV=$SETUP_VENV PATH=$SETUP_VENV/bin:$PATH
  export PYTHONPATH=$SETUP_ROOT${PYTHONPATH:+:$PYTHONPATH}
}

# Sets up if need be and puts the environment first on PATH; SETUP_REST keeps the arguments that are not its own.
setup_main() {
  set -euo pipefail
  setup_options "$@"
  if ((SETUP_ONLY_CHECK)); then
    setup_checks
    setup_say "everything needed is here ($SETUP_PYTHON, Python ${SETUP_PROBE%% *}, $CXX)"
    exit 0
  fi
  setup_status
  setup_is_ready || setup_work
  setup_activate
}

setup_alone() {
  set -euo pipefail
  local argument
  for argument in "$@"; do
    case $argument in -h | --help) setup_usage; exit 0 ;; esac
  done
  setup_options "$@"
  ((${#SETUP_REST[@]} == 0)) || setup_die "unknown option: ${SETUP_REST[0]}" "see: bash tools/setup_env.sh --help"
  setup_main "$@"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || setup_alone "$@"
