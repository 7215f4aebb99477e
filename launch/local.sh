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
# Whether it is one process of several, by what `start_distributed` of jaxalign/sharding.py goes by.
is_joined() {
  [[ ${COORDINATOR_ADDRESS:-} || ${TPU_WORKER_HOSTNAMES:-} == *,* || ${MEGASCALE_COORDINATOR_ADDRESS+set} ]] ||
    { [[ ${SLURM_STEP_NODELIST+set} ]] && ((${SLURM_NTASKS:-1} > 1)); } || ((${OMPI_COMM_WORLD_SIZE:-1} > 1))
}

is_joined || exec "$PY" -m jaxalign.main "$@"
# JAX aborts (134) a process that hears no more of another, and launchers start a run again at 75. SIGTERM may come to
# this shell alone; bash would hide SIGINT and the input from what it does not wait for.
pid='' told=''
trap 'told=TERM; [[ ! $pid ]] || kill -TERM "$pid" 2>/dev/null || :' TERM
trap 'told=INT' INT
(
  trap - INT
  exec "$PY" -m jaxalign.main "$@"
) <&0 &
pid=$!
[[ $told != TERM ]] || kill -TERM "$pid" 2>/dev/null || :
told=1
while [[ $told ]]; do
  told='' code=0
  wait "$pid" 2>/dev/null || code=$? # without what bash says of a process that was ended
done
if ((code == 134)); then
  echo 'jaxalign: JAX ended this process, most likely as another one of the job is gone; resume all' >&2
  code=75
fi
exit "$code"
