# shellcheck shell=bash
# What a machine must have before anything is installed; sourced by tools/setup_env.sh.

# Prints "3.11 venv headers", with "no-" before what is missing; nothing when the command is no Python.
setup_probe() {
  "$1" -c '
import os, sys, sysconfig
try:
    import ensurepip, venv
    makes = "venv"
except ImportError:
    makes = "no-venv"
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
print("%d.%d" % sys.version_info[:2], makes, "headers" if os.path.exists(header) else "no-headers")
' 2>/dev/null || true
}

setup_fits() { [[ $1 =~ ^3\.1[012]\  ]]; }

# Sets SETUP_PYTHON and SETUP_PROBE: PYTHON if given, else the first complete Python on PATH, else any that fits.
setup_find_python() {
  local name found=() incomplete=
  for name in ${PYTHON:-python3 python3.12 python3.11 python3.10 python}; do
    SETUP_PROBE=$(setup_probe "$name")
    [[ -z $SETUP_PROBE ]] || found+=("$name is ${SETUP_PROBE%% *}")
    setup_fits "$SETUP_PROBE" || continue
    SETUP_PYTHON=$name
    [[ $SETUP_PROBE == *no-* ]] || return 0
    incomplete=${incomplete:-$name}
  done
  if [[ -n $incomplete ]]; then
    SETUP_PYTHON=$incomplete
    SETUP_PROBE=$(setup_probe "$incomplete")
    return 0
  fi
  SETUP_PYTHON=
  local listed="${found[*]-}"
  if [[ -n ${PYTHON:-} ]]; then
    setup_problem "PYTHON=$PYTHON is not a Python 3.10, 3.11 or 3.12${listed:+ ($listed)}" \
      "name one that is, such as PYTHON=python3.12, or leave PYTHON away"
  else
    setup_problem "no Python 3.10, 3.11 or 3.12 on PATH${listed:+ ($listed)}" \
      "install one (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev) or set PYTHON=/path/to/python3.12"
  fi
}

setup_check_python() {
  local version
  if [[ $SETUP_ACTIVE == 1 ]]; then
    SETUP_PYTHON=$(command -v python || command -v python3 || true)
    SETUP_PROBE=
    [[ -z $SETUP_PYTHON ]] || SETUP_PROBE=$(setup_probe "$SETUP_PYTHON")
    setup_fits "$SETUP_PROBE" || setup_problem "--active: the active Python ${SETUP_PYTHON:-(none)} is not 3.10, 3.11 or 3.12" \
      "activate an environment with one of these, or leave out --active"
  elif setup_venv_works; then
    SETUP_PYTHON=$SETUP_VENV/bin/python
    SETUP_PROBE=$(setup_probe "$SETUP_PYTHON")
    setup_fits "$SETUP_PROBE" || setup_problem "$SETUP_VENV holds Python ${SETUP_PROBE%% *}; 3.10, 3.11 and 3.12 are accepted" \
      "remove that folder and run again"
    if [[ -n ${PYTHON:-} ]]; then
      version=$(setup_probe "$PYTHON")
      [[ ${version%% *} == "${SETUP_PROBE%% *}" ]] || setup_problem \
        "$SETUP_VENV holds Python ${SETUP_PROBE%% *}, but PYTHON=$PYTHON is ${version%% *}" "remove that folder or leave PYTHON away"
    fi
  else
    setup_find_python
  fi
  version=${SETUP_PROBE%% *}
  [[ $SETUP_ACTIVE == 1 || $SETUP_PROBE != *no-venv* ]] || setup_problem \
    "$SETUP_PYTHON (Python $version) cannot make environments: its module venv or ensurepip is missing" \
    "install it (Debian, Ubuntu: apt-get install python$version-venv)"
  [[ $SETUP_PROBE != *no-headers* ]] || setup_problem \
    "the headers of $SETUP_PYTHON (Python.h of Python $version) are missing; the operators need them to compile" \
    "install them (Debian, Ubuntu: apt-get install python$version-dev; Fedora: dnf install python$version-devel)"
}

setup_check_compiler() {
  local name
  for name in "${CXX:-}" c++ g++ clang++; do
    if [[ -n $name ]] && command -v "${name%% *}" >/dev/null; then
      export CXX=$name
      setup_compiler_works || setup_problem "the C++ compiler $CXX cannot make a C++17 library with OpenMP" \
        "install g++ 9 or newer and set CXX=g++ (clang++ also needs libomp-dev)"
      return 0
    fi
  done
  setup_problem "no C++ compiler (g++) on PATH; the operators are compiled here" \
    "install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or set CXX"
}

setup_compiler_works() {  # the flags of setup.py
  local product=${TMPDIR:-/tmp}/stcocc-check-$$.so flags=(-std=c++17 -shared -fPIC) code=0
  [[ $OSTYPE != linux* ]] || flags+=(-fopenmp)
  # CXX may hold flags of its own
  # shellcheck disable=SC2086
  printf '#include <vector>\nint f() { if (std::vector<int> v; v.empty()) return 1; return 0; }\n' \
    | $CXX "${flags[@]}" -x c++ - -o "$product" 2>/dev/null || code=1
  rm -f "$product"
  return $code
}

setup_check_space() {
  local need=8 temporary=4 free where=$SETUP_ROOT
  [[ $SETUP_ACTIVE != 1 ]] || where=$("$SETUP_PYTHON" -c 'import sys; print(sys.prefix)' 2>/dev/null || echo "$where")
  if "$SETUP_PYTHON" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    need=2 temporary=1
  elif [[ -n $SETUP_TORCH_INDEX ]]; then
    need=4 temporary=2
  fi
  need=${STCOCC_MIN_FREE_GB:-$need}
  free=$(df -Pk "$where" | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
  ((free >= need)) || setup_problem "only $free GB free in $where; the packages and their download take about $need GB" \
    "free some space, or set STCOCC_MIN_FREE_GB to a smaller number if you know better"
  ((temporary <= need)) || temporary=$need
  where=${TMPDIR:-/tmp}
  free=$(df -Pk "$where" 2>/dev/null | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
  ((${free:-0} >= temporary)) || setup_problem "only ${free:-0} GB free in $where, where pip unpacks; about $temporary GB are needed" \
    "set TMPDIR to a folder on a larger disk"
}

setup_checks() {
  SETUP_PROBLEMS=()
  local tool folder
  for tool in awk df find grep sed tail tar; do
    command -v $tool >/dev/null || setup_problem "the program $tool is missing" "install it with your system's package manager"
  done
  setup_check_python
  setup_check_compiler
  [[ -z $SETUP_PYTHON ]] || setup_check_space
  for folder in ${SETUP_LINKS[@]+"${SETUP_LINKS[@]}"}; do
    [[ $folder == *://* || -e $folder ]] || setup_problem "the folder of packages $folder does not exist" \
      "check --find-links and STCOCC_WHEELS"
  done
  ((${#SETUP_PROBLEMS[@]} == 0)) || setup_refuse
}
