# shellcheck shell=bash
# The virtual environment of this checkout, and its settings. Sourced by the scripts beside it, which
# then call
#   make_environment REQUIREMENTS_FILE [pip options]
# or `usage`, which prints their head, and find the environment's interpreter in $python.
#
# $PYTHON chooses the interpreter that the environment is made from, $ADAPTERS_JAX_VENV its place
# (default: .venv in the checkout). The environment keeps the text of the requirements it has, so
# that nothing is installed again until they change.
#
# Settings come from launch/env where there is one (see launch/env.example), or from the file that
# $ADAPTERS_JAX_ENV names; what is in the environment already takes precedence.

ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '[adapters_jax] %s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

# Prints the head of the script that sources this.
usage() {
  sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$0"
}

settings=${ADAPTERS_JAX_ENV:-$ROOT/launch/env}
if [ -f "$settings" ]; then
  given=$(export -p)
  set -a
  # shellcheck disable=SC1090  # whatever file the user names
  source "$settings"
  set +a
  eval "$given"
elif [ -n "${ADAPTERS_JAX_ENV:-}" ]; then
  fail "ADAPTERS_JAX_ENV names $settings, which is no file: name one like launch/env.example"
fi

# A training step on a CPU takes and gives back a gigabyte: in pages of 2 MB that costs a tenth less
# time than in those of 4 kB. Where glibc is not the C library nobody reads this.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

VENV=${ADAPTERS_JAX_VENV:-$ROOT/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
python=$VENV/bin/python

# Prints the interpreter's version, and succeeds where it can make an environment. Only running it
# tells: version managers put commands on the PATH that do nothing but print an error, and Debian
# ships Python without ensurepip.
can_make_environments() {
  "$1" -I -c '
import sys
print("%d.%d.%d" % sys.version_info[:3])
if sys.version_info < (3, 11):
    sys.exit("too old")
import ensurepip, venv
' 2>/dev/null
}

# Prints the first usable interpreter; the versions named in requirements.txt come first.
find_python() {
  local candidate version found=
  if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
  else
    set -- python3.12 python3.11 python3.13 python3.14 python3 python
  fi
  for candidate in "$@"; do
    if version=$(can_make_environments "$candidate"); then
      command -v "$candidate"
      return
    fi
    found="$found, $candidate (${version:-does not run})"
  done
  fail "Python 3.11 or newer with its venv and ensurepip modules is needed; tried: ${found#, }." \
    'Install one (Debian, Ubuntu: apt install python3 python3-venv)' \
    'or name one: PYTHON=/path/to/python3.12'
}

# Makes the environment where there is none, and again where its Python or its pip does not run.
make_venv() {
  "$python" -I -m pip --version >/dev/null 2>&1 && return
  if [ -n "$(ls -A "$VENV" 2>/dev/null)" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
    fail "$VENV exists and is not a virtual environment:" \
      'remove it, or name another place in ADAPTERS_JAX_VENV'
  fi
  local base
  base=$(find_python)
  say "making the virtual environment $VENV with $base"
  "$base" -I -m venv --clear "$VENV"
}

# Prints the name of a requirements file and of those that it includes.
requirements_files() {
  local included
  echo "$1"
  sed -n 's/^-r *//p' "$ROOT/$1" | while read -r included; do
    requirements_files "$included"
  done
}

requirements_text() {
  requirements_files "$1" | while read -r name; do
    cat "$ROOT/$name"
  done
}

# Takes away the metadata of packages that an interrupted installation left incomplete (pip writes
# INSTALLER after the last file): pip would count them as installed.
forget_incomplete_packages() {
  local metadata
  for metadata in "$VENV"/lib/python3*/site-packages/*.dist-info; do
    if [ -d "$metadata" ] && [ ! -e "$metadata/INSTALLER" ]; then
      rm -rf "$metadata"
    fi
  done
}

# Whether the environment runs and has what FILE, as it reads now, names.
is_installed() {
  requirements_text "$1" | cmp -s - "$VENV/installed-$1" && "$python" -I -c '' 2>/dev/null
}

# make_environment FILE [pip options]: afterwards $python has what FILE (in the checkout) names.
make_environment() {
  local requirements=$1 name
  shift
  is_installed "$requirements" && return
  make_venv
  say "installing $requirements (a few hundred MB the first time; needs a package index)"
  rm -f "$VENV"/installed-*
  forget_incomplete_packages
  PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    "$python" -I -m pip install --quiet --no-input -r "$ROOT/$requirements" "$@" ||
    fail "pip could not install $requirements (its message is above);" \
      'run this again once that is mended: it takes up from here'
  for name in $(requirements_files "$requirements"); do
    requirements_text "$name" >"$VENV/installed-$name"
  done
}
