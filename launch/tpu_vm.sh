#!/usr/bin/env bash
# Cloud TPU VMs, of one worker or many, by gcloud:
#   bash launch/tpu_vm.sh create NAME
#   bash launch/tpu_vm.sh sync NAME                   HEAD of this checkout, to all workers
#   bash launch/tpu_vm.sh run NAME train --config=configs/glue.py:task=rte --workdir=/mnt/runs/rte ...
#   bash launch/tpu_vm.sh logs NAME                   follows the first worker's; it writes for all
#   bash launch/tpu_vm.sh stop NAME                   SIGTERM: all stop together, after a checkpoint
#   bash launch/tpu_vm.sh delete NAME
# With --dry-run before the first word, the commands are printed and not run.
#
# Needs gcloud, logged in, and TPU_ZONE, TPU_TYPE and TPU_RUNTIME (see launch/env.example). TPU_ENV
# names a file of settings for the workers, which becomes their launch/env. `run` starts the command
# on every worker and returns. With several workers --workdir, the data and the caches must be on a
# disk that all of them mount (Filestore, or a bucket by gcsfuse). A spot VM that was taken away is
# gone: delete, create, sync and run again continues from the last checkpoint.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/remote.sh
source "$(dirname "${BASH_SOURCE[0]}")/remote.sh"

action=${1:-} name=${2:-}
[ -n "$name" ] || fail 'expected create, sync, run, logs, stop or delete, and the name of a TPU VM'
shift 2
[ "$action" = run ] || no_more "$@"
need TPU_ZONE 'the zone of the TPU VM'
place=(--zone="$TPU_ZONE" ${TPU_PROJECT:+--project="$TPU_PROJECT"})

tpu() {
  execute gcloud compute tpus tpu-vm "$@" "${place[@]}"
}

# on WORKER COMMAND: WORKER is a number or all.
on() {
  tpu ssh "$name" --worker="$1" --command="$2"
}

sync() {
  local bundle=adapters_jax.bundle folder
  tell_uncommitted
  folder=$(temporary_folder)
  # A bundle, so that the workers have the commit's name for their summaries.
  execute mkdir -p "$folder"
  execute git -C "$ROOT" bundle create --quiet "$folder/$bundle" HEAD
  tpu scp "$folder/$bundle" "$name:$bundle" --worker=all
  on all "git init -q adapters_jax && cd adapters_jax && git fetch -q ../$bundle HEAD && git checkout -qf FETCH_HEAD"
  execute rm -r "$folder"
  [ -z "${TPU_ENV:-}" ] || tpu scp "$TPU_ENV" "$name:adapters_jax/launch/env" --worker=all
}

run() {
  check_command "$@"
  on all "cd adapters_jax || exit
if kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null; then echo 'a command runs here already' >&2; exit 1; fi
ADAPTERS_JAX_EXTRA=tpu nohup bash launch/run.sh $(quoted "$@") >>run.log 2>&1 </dev/null &
echo \$! >run.pid"
}

case $action in
  create)
    need TPU_TYPE 'its type, such as v5litepod-16'
    need TPU_RUNTIME 'the version of its software, such as v2-alpha-tpuv5-lite'
    tpu create "$name" --accelerator-type="$TPU_TYPE" --version="$TPU_RUNTIME" \
      ${TPU_SPOT:+--spot}
    ;;
  sync) sync ;;
  run) run "$@" ;;
  logs) on 0 'tail -n 100 -F adapters_jax/run.log' ;;
  # The process that run.sh has become; its own handler does the rest.
  stop) on all "kill -TERM \"\$(cat adapters_jax/run.pid)\"" ;;
  delete) tpu delete "$name" --quiet ;;
  *) fail "expected create, sync, run, logs, stop or delete, got '$action'" ;;
esac
