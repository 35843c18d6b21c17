#!/usr/bin/env bash
# TPU slices of a GKE cluster, by xpk (https://github.com/AI-Hypercomputer/xpk):
#   bash launch/gke_xpk.sh create NAME train --config=configs/glue.py:task=rte --workdir=/mnt/runs/rte ...
#   bash launch/gke_xpk.sh list
#   bash launch/gke_xpk.sh logs NAME                  follows the first worker's; it writes for all
#   bash launch/gke_xpk.sh delete NAME
# With --dry-run before the first word, the commands are printed and not run.
#
# Needs xpk, gcloud and kubectl, logged in, docker for the image, and XPK_CLUSTER, XPK_ZONE and
# XPK_TYPE (see launch/env.example). The image is $XPK_IMAGE with HEAD of this checkout in it.
# --workdir must be on a volume that all workers mount (xpk storage attach). A worker that is
# preempted, stopped or killed (xpk: status 42, 127 and more) restarts them all, and they continue
# from the last checkpoint; a mistake (2) or a defect (1) ends them.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/remote.sh
source "$(dirname "${BASH_SOURCE[0]}")/remote.sh"

action=${1:-} name=${2:-}
case $action in
  list) no_more "${@:2}" ;;
  create | logs | delete)
    [ -n "$name" ] || fail "expected the name of a workload after $action"
    [ "$action" = create ] || no_more "${@:3}"
    ;;
  *) fail "expected create, list, logs or delete, got '$action'" ;;
esac
need XPK_CLUSTER 'the name of the cluster'
need XPK_ZONE 'its zone'
project=(${XPK_PROJECT:+--project="$XPK_PROJECT"})

workload() {
  execute xpk workload "$@" --cluster="$XPK_CLUSTER" --zone="$XPK_ZONE" "${project[@]}"
}

create() {
  local folder
  shift 2
  check_command "$@"
  need XPK_TYPE 'the type of a slice, such as v5litepod-16'
  tell_uncommitted
  folder=$(temporary_folder)
  # A clone: neither an environment made for this machine nor runs get into the image.
  execute git clone --quiet "$ROOT" "$folder"
  workload create --workload="$name" --tpu-type="$XPK_TYPE" --num-slices="${XPK_SLICES:-1}" \
    --base-docker-image="${XPK_IMAGE:-python:3.12}" --script-dir="$folder" \
    --max-restarts="${XPK_RESTARTS:-10}" \
    --termination-grace-period-seconds=120 \
    ${XPK_ENV:+--env-file="$XPK_ENV"} \
    --command="exec env ADAPTERS_JAX_EXTRA=tpu ADAPTERS_JAX_DISTRIBUTED=auto bash launch/run.sh $(quoted "$@")"
  execute rm -rf "$folder"
}

logs() {
  execute gcloud container clusters get-credentials "$XPK_CLUSTER" --region="${XPK_ZONE%-*}" \
    "${project[@]}"
  execute kubectl logs --follow --container=jax-tpu \
    --selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

case $action in
  create) create "$@" ;;
  list) workload list ;;
  logs) logs ;;
  delete) workload delete --workload="$name" ;;
esac
