#!/usr/bin/env bash
# Runs jaxalign on this machine: bash launch/local.sh --algo=dpo
# Makes .venv and installs the package where that has not been done, then passes all arguments on.
# With --dry_run before them it prints the commands and runs none.
# PYTHON names the Python to make .venv with; JAX_PLATFORMS, if set, is left alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

dry_run=''
if [[ ${1:-} == --dry_run ]]; then
  dry_run=1
  shift
fi
extra=''
case $(accelerator) in
  nvidia) extra=cuda ;;
  tpu) extra=tpu ;;
  none) export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} ;;
esac
# What paths in buckets need.
[[ $* != *gs://* ]] || extra+=${extra:+,}gcs
prepare "$extra"
[[ ! $dry_run ]] || {
  call env ${JAX_PLATFORMS:+JAX_PLATFORMS="$JAX_PLATFORMS"} "$PY" -m jaxalign.main "$@"
  exit
}
exec "$PY" -m jaxalign.main "$@"
