# shellcheck shell=bash
# mmcv-full: a ready wheel where there is one, else compiled once and kept; sourced by tools/setup_env.sh.

setup_mmcv_works() {
  "$SETUP_PYTHON" -c 'import sys, torch, mmcv, mmcv._ext; sys.exit("mmcv-full==" + mmcv.__version__ != sys.argv[1])' \
    "$(setup_pin mmcv-full)" 2>/dev/null
}

setup_install_mmcv() {
  local pin cache wheel
  pin=$(setup_pin mmcv-full)
  if setup_mmcv_works; then return 0; fi
  if "$SETUP_PYTHON" -m pip show -q mmcv 2>/dev/null; then
    setup_die "the package mmcv is installed; it and mmcv-full cannot be in one environment" \
      "remedy: $SETUP_PYTHON -m pip uninstall mmcv, or leave out --active"
  fi
  if setup_run "looking for a ready wheel of $pin" mmcv-wheel \
    setup_pip --no-deps --force-reinstall --only-binary mmcv-full "$pin"; then
    if setup_mmcv_works; then return 0; fi
    setup_say "that wheel was made for another PyTorch and cannot be loaded; compiling $pin instead"
  fi
  cache=$(setup_mmcv_cache)
  mkdir -p "$cache"
  compgen -G "$cache/mmcv_full-*.whl" >/dev/null || setup_build_mmcv "$pin" "$cache"
  wheel=$(compgen -G "$cache/mmcv_full-*.whl" | head -n 1)
  setup_run "installing $pin" mmcv-install setup_pip --no-index --no-deps --force-reinstall "$wheel" \
    || setup_failed "$pin could not be installed" mmcv-install
  setup_mmcv_works || { rm -f "$wheel"; setup_die "$pin was compiled but cannot be imported" \
    "remedy: run again; $SETUP_PYTHON -c 'import torch, mmcv._ext' shows the cause"; }
}

# Own cache: pip's would hand out a wheel that was compiled against another PyTorch.
setup_mmcv_cache() {
  local base=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
  "$SETUP_PYTHON" - "${base:-$SETUP_STATE}" <<'TEXT'
import importlib.metadata, platform, sys
print(f"{sys.argv[1]}/stcocc/mmcv-full-py{sys.version_info[0]}.{sys.version_info[1]}"
      f"-torch{importlib.metadata.version('torch')}-{platform.machine()}")
TEXT
}

setup_jobs() {  # a compiler process takes up to 2 GB
  local cores memory
  cores=$(nproc 2>/dev/null || echo 2)
  memory=$(awk '/MemAvailable/ { print int($2 / 2000000) }' /proc/meminfo 2>/dev/null || echo "$cores")
  ((memory >= 1)) || memory=1
  echo $((cores < memory ? cores : memory))
}

# Objects stay in the source folder, so that an interrupted build goes on where it was.
setup_build_mmcv() {  # pin, folder for the wheel
  local source=$SETUP_STATE/mmcv-full/${2##*/} jobs=${MAX_JOBS:-$(setup_jobs)} total
  if [[ ! -f $source/setup.py ]]; then
    rm -rf "$source" "$source.part"
    mkdir -p "$source.part"
    setup_run "downloading the source of $1" mmcv-download setup_download_mmcv "$1" "$source.part" \
      || setup_failed "the source of $1 could not be had" mmcv-download
    mv "$source.part" "$source"
  fi
  total=$(find "$source"/mmcv/ops/csrc/pytorch "$source"/mmcv/ops/csrc/pytorch/cpu -maxdepth 1 -name '*.cpp' | wc -l)
  setup_run "compiling $1, once: $total files, about $((20 / jobs > 1 ? 20 / jobs : 1)) minutes with $jobs processes (MAX_JOBS)" \
    mmcv-build setup_compile_mmcv "$source" "$jobs" || setup_failed "$1 could not be compiled" mmcv-build
  mv "$source"/dist/mmcv_full-*.whl "$2/"
  rm -rf "$source"
}

setup_download_mmcv() {  # pin, folder
  local links=() folder
  for folder in ${SETUP_LINKS[@]+"${SETUP_LINKS[@]}"}; do links+=(--find-links "$folder"); done
  "$SETUP_PYTHON" -m pip --disable-pip-version-check --no-input download --progress-bar off --no-deps --no-build-isolation \
    --no-binary mmcv-full ${links[@]+"${links[@]}"} -d "$2" "$1" && tar -xzf "$2"/mmcv*full-*.tar.gz -C "$2" --strip-components 1
}

# Its CUDA operators are not used here, so neither a GPU nor a CUDA toolkit plays a part.
setup_compile_mmcv() {  # source folder, jobs
  cd "$1" && PATH=$(dirname "$SETUP_PYTHON"):$PATH MAX_JOBS=$2 CUDA_VISIBLE_DEVICES='' FORCE_CUDA=0 FORCE_MLU=0 FORCE_NPU=0 \
    MMCV_WITH_OPS=1 MMCV_WITH_TRT=0 MMCV_WITH_ORT=0 "$SETUP_PYTHON" setup.py bdist_wheel
}
