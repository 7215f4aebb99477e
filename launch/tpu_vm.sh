#!/usr/bin/env bash
# Runs jaxalign on all workers of a Cloud TPU VM: bash launch/tpu_vm.sh NAME ZONE --algo=dpo --workdir=/mnt/shared/dpo
# Copies this checkout to ~/jaxalign there, and passes the arguments after the zone to launch/local.sh on each worker.
# Checkpoints are written by all workers together: --workdir must be on a disk that all of them mount.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

(($# > 2)) && [[ $1 != -* && $2 != -* ]] || die 'usage: bash launch/tpu_vm.sh NAME ZONE --algo=ALGO [--flag=value ...]'
name=$1 zone=$2
shift 2
command -v gcloud >/dev/null || die 'gcloud is not installed; see https://cloud.google.com/sdk/docs/install'

packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
tar -czf "$packed/jaxalign.tgz" -C "$ROOT" --exclude=__pycache__ setup.py README.md LICENSE jaxalign gin_configs launch
gcloud compute tpus tpu-vm scp "$packed/jaxalign.tgz" "$name:jaxalign.tgz" --zone="$zone" --worker=all >&2 ||
  die "could not copy the checkout to $name in $zone; see the message of gcloud above"
# JAX asks the machine's metadata for the other workers.
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
mkdir -p jaxalign && tar -xzf jaxalign.tgz -C jaxalign &&
COORDINATOR_ADDRESS=auto bash jaxalign/launch/local.sh $(printf '%q ' "$@")"
