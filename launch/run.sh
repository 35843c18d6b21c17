#!/usr/bin/env bash
# A command of adapters_jax; the same line on a laptop, a machine with GPUs and a TPU VM:
#   bash launch/run.sh COMMAND [options]     COMMAND: train, evaluate, sweep, predict, convert,
#                                            compile, preprocess or experiments.NAME
#   bash launch/run.sh --prepare             only makes the environment
# For example
#   bash launch/run.sh train --config=configs/glue.py:task=rte --config.data.dir=GLUE \
#       --workdir=runs/rte
# Paths are relative to the checkout. The first run makes the virtual environment and installs what
# JAX needs for the accelerator that is here; it says what it found. Settings: launch/env.example.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Prints a value of this machine's metadata, which all of Google's clouds serve.
metadata() {
  curl --silent --fail --max-time 2 --header 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
}

# Prints the workers of the TPU slice that this machine is one of, separated by commas.
tpu_workers() {
  if [ -n "${TPU_WORKER_HOSTNAMES:-}" ]; then
    echo "$TPU_WORKER_HOSTNAMES"
  elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ] || [ "${ADAPTERS_JAX_EXTRA:-}" = tpu ]; then
    metadata worker-network-endpoints
  fi
}

# Prints the driver's version once for each NVIDIA GPU.
gpu_drivers() {
  nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null
}

# Sets $extra (cuda13, cuda12, tpu or none) and $workers (machines of the TPU slice), and says why.
find_accelerator() {
  local found
  extra=${ADAPTERS_JAX_EXTRA:-auto} workers=1
  case $extra in
    auto | cuda13 | cuda12 | tpu | none) ;;
    *) fail "ADAPTERS_JAX_EXTRA=$extra: expected auto, cuda13, cuda12, tpu or none" ;;
  esac
  if [ "${JAX_PLATFORMS:-}" = cpu ]; then
    extra=none
    say 'JAX_PLATFORMS=cpu: on the CPU'
  elif [[ $extra = auto || $extra = tpu ]] && found=$(tpu_workers) && [ -n "$found" ]; then
    extra=tpu workers=$(($(tr -cd , <<<"$found" | wc -c) + 1))
    say "found a TPU machine, one of $workers in its slice: JAX with tpu"
  elif [ "$extra" != auto ]; then
    say "ADAPTERS_JAX_EXTRA=$extra, as given, on this machine alone"
  elif found=$(gpu_drivers) && [ -n "$found" ]; then
    # CUDA 13 needs a driver of 580 or newer, CUDA 12 one of 525.
    [ "${found%%.*}" -ge 580 ] && extra=cuda13 || extra=cuda12
    say "found $(($(wc -l <<<"$found"))) NVIDIA GPU(s), driver ${found%%$'\n'*}: JAX with $extra"
  else
    extra=none
    say 'found neither a TPU nor an NVIDIA GPU: JAX as it is'
  fi
}

# Whether the environment has the requirements and JAX's part for the accelerator.
is_ready() {
  is_installed requirements.txt &&
    { [ "$extra" = none ] || [ -e "$VENV/installed-jax-$extra" ]; }
}

prepare() {
  local version
  make_environment requirements.txt
  [ "$extra" = none ] && return
  version=$(sed -n 's/^jax==//p' "$ROOT/requirements.txt")
  say "installing jax[$extra]==$version"
  PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    "$python" -I -m pip install --quiet --no-input "jax[$extra]==$version" ||
    fail "pip could not install jax[$extra]==$version (its message is above);" \
      'ADAPTERS_JAX_EXTRA=none goes on without it'
  touch "$VENV/installed-jax-$extra"
}

command=${1:-}
case $command in
  train | evaluate | sweep | predict | convert | compile | preprocess) module=adapters_jax.$command ;;
  experiments.[a-z]*) module=$command ;;
  --prepare) module= ;;
  -h | --help)
    usage
    exit
    ;;
  *)
    fail 'expected train, evaluate, sweep, predict, convert, compile, preprocess,' \
      "experiments.NAME, --prepare or --help, got '$command'"
    ;;
esac
shift
find_accelerator
if ! is_ready; then
  # One process of a machine, or of many that share the file system, installs; the others wait.
  mkdir -p "$(dirname "$VENV")"
  (
    ! command -v flock >/dev/null || flock 9
    is_ready || prepare
  ) 9>"$VENV.lock"
fi
if [ "$command" = --prepare ]; then
  say "ready: $python"
  exit
fi

case "$command $*" in
  *--distributed*) ;;
  train* | evaluate* | sweep*)
    if [ "$workers" -gt 1 ] && [ -z "${ADAPTERS_JAX_DISTRIBUTED:-}" ]; then
      say "$workers machines work together: --distributed=auto"
      set -- "$@" --distributed=auto
    fi
    ;;
esac
cd "$ROOT"
exec "$python" -m "$module" "$@"
