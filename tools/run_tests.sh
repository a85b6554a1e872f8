#!/usr/bin/env bash
# Sets up what is missing, then runs the test suite: bash tools/run_tests.sh [options of the set-up] [pytest arguments]
set -euo pipefail

# shellcheck source=tools/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_main "$@"
cd "$SETUP_ROOT"
exec python -m pytest ${SETUP_REST[@]+"${SETUP_REST[@]}"}
