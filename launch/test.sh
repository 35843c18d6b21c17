#!/usr/bin/env bash
# Lint, format and tests, from a fresh checkout:
#   bash launch/test.sh [--slow] [pytest arguments]
# --slow also runs the tests that take minutes, the network or a package index.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
esac
slow=no
if [ "${1:-}" = --slow ]; then
  slow=yes
  shift
fi

# Prints the option that makes pip take torch's CPU build: on Linux PyPI's wheel of the same version
# brings gigabytes of CUDA libraries. The index is tried first, because pip would come back to an
# unreachable one again and again, for every package.
torch_index() {
  local index=https://download.pytorch.org/whl/cpu
  local open='import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=10)'
  [ "$(uname -s)" = Linux ] || return 0
  if "$python" -I -c "$open" "$index/torch/" 2>/dev/null; then
    printf '%s' "--extra-index-url=$index"
  else
    say "$index cannot be reached: torch comes from your package index," \
      'perhaps with CUDA libraries'
  fi
}

if ! is_installed requirements-test.txt; then
  make_venv
  index=$(torch_index)
  make_environment requirements-test.txt ${index:+"$index"}
fi
cd "$ROOT"

say 'ruff'
"$python" -m ruff check .
"$python" -m ruff format --check .

say 'pytest'
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# A process for each core, each test file in one of them: most of the time goes into compiling.
parallel=(-n auto --maxprocesses 8 --dist loadfile)
if [ $slow = yes ]; then
  "$python" -m pytest "${parallel[@]}" "$@"
else
  "$python" -m pytest "${parallel[@]}" -m 'not slow' "$@"
fi
say "all passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
