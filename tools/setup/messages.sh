# shellcheck shell=bash
# Messages, progress and errors of the set-up step; sourced by tools/setup_env.sh.

SETUP_CHILD=       # process group of the running step
SETUP_PROBLEMS=()  # what the checks found
SETUP_SILENT=1     # 0 once the cause of an error was told

setup_say() { printf '[setup] %s\n' "$*" >&2; }

setup_die() {  # message, remedy lines
  printf '\n[setup] ERROR: %s\n' "$1" >&2
  shift
  if (($#)); then printf '        %s\n' "$@" >&2; fi
  SETUP_SILENT=0
  exit 1
}

setup_problem() {  # message, remedy
  SETUP_PROBLEMS+=("$1"$'\n'"        remedy: $2")
}

setup_refuse() {  # all problems at once
  printf '\n[setup] ERROR: this machine is not ready; nothing was changed:\n' >&2
  printf '      - %s\n' "${SETUP_PROBLEMS[@]}" >&2
  SETUP_SILENT=0
  exit 1
}

# No error goes unexplained: the trap of a set-up that ends before it is done.
setup_ended() {  # exit status
  if (($1 && SETUP_SILENT)); then
    printf '\n[setup] ERROR: stopped with status %d; run again, or look at the newest log in %s\n' "$1" "$SETUP_STATE" >&2
  fi
}

setup_interrupted() {
  trap - INT TERM HUP EXIT
  [[ -z $SETUP_CHILD ]] || kill -TERM -- "-$SETUP_CHILD" 2>/dev/null || true
  printf '\n[setup] interrupted; run the same command again to go on\n' >&2
  exit 130
}

setup_clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# What a running step is doing now: the last telling line of its log, of pip or of ninja.
setup_status_line() {  # log
  grep -E '^ *(Downloading|Collecting|Installing|Building|Preparing|Using cached|\[[0-9]+/[0-9]+\])' "$1" | tail -n 1 | sed \
    -e 's/^ *//' -e 's/^Installing collected packages:.*/unpacking packages/' \
    -e 's|^\[\([0-9]*\)/\([0-9]*\)\].*|\1 of \2 files compiled|' | cut -c1-60 || true
}

# Runs a command with its output in a log and shows that it is alive; returns its exit status.
setup_run() {  # title, log name, command...
  local title=$1 log=$SETUP_STATE/$2.log start=$SECONDS next=30 polls=0 passed code=0
  shift 2
  mkdir -p "$SETUP_STATE"
  setup_say "$title"
  set -m  # a process group of its own, so that an interrupt reaches compilers started by it
  "$@" >"$log" 2>&1 </dev/null &
  SETUP_CHILD=$!
  set +m
  while kill -0 "$SETUP_CHILD" 2>/dev/null; do
    sleep "0.$((polls++ < 10 ? 1 : 5))"
    passed=$((SECONDS - start))
    if [[ -t 2 ]]; then
      printf '\r\033[K[setup]   %s  %s' "$(setup_clock $passed)" "$(setup_status_line "$log")" >&2
    elif ((passed >= next)); then
      setup_say "  $(setup_clock $passed)  $(setup_status_line "$log")"
      next=$((passed + 60))
    fi
  done
  wait "$SETUP_CHILD" || code=$?
  SETUP_CHILD=
  if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
  return $code
}

setup_explain() {  # log: a remedy for what commonly goes wrong
  local log=$1
  if grep -qiE 'No space left on device|Disk quota exceeded' "$log"; then
    echo "the disk is full: free some space (TMPDIR=/folder/on/a/larger/disk moves pip's temporary files) and run again"
  elif grep -qE 'CERTIFICATE_VERIFY_FAILED' "$log"; then
    echo "the package index has a certificate that is not trusted here: set PIP_CERT to your organisation's file"
  elif grep -qiE 'name resolution|NewConnectionError|ConnectTimeout|ReadTimeout|Connection (refused|reset)|ProxyError|Max retries|unreachable' "$log"; then
    echo "the package index cannot be reached: check the network, PIP_INDEX_URL and PIP_PROXY; offline, see docs/install.md"
  elif grep -q 'externally-managed-environment' "$log"; then
    echo "this Python belongs to the system: leave out --active, or activate an environment of your own first"
  elif grep -qE 'Killed signal|fatal error: Killed|cc1plus.*(Killed|out of memory)' "$log"; then
    echo "the compiler ran out of memory: run again with MAX_JOBS=1 (what is compiled already is kept)"
  elif grep -q 'Python.h: No such file' "$log"; then
    echo "Python's headers are missing: install the package with them (Debian, Ubuntu: python3-dev)"
  elif grep -qE 'No matching distribution|Could not find a version' "$log"; then
    echo "the package index has no such release for this Python: check PIP_INDEX_URL, PIP_NO_INDEX and --find-links"
  else
    echo "the whole log tells more; run again once the cause is gone, finished parts are kept"
  fi
}

setup_failed() {  # what failed, log name
  local log=$SETUP_STATE/$2.log
  printf '\n[setup] last lines of %s:\n' "$log" >&2
  tail -n 15 "$log" | cut -c1-300 | sed 's/^/    /' >&2
  setup_die "$1" "log: $log" "remedy: $(setup_explain "$log")"
}
