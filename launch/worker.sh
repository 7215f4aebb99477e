#!/usr/bin/env bash
# What launch/tpu_vm.sh calls on each worker: bash jaxalign/launch/worker.sh RUN ATTEMPT [flags of jaxalign]
# gcloud repeats a command whose connection broke. So the run does not depend on the connection, and the command of an
# attempt that has begun shows what becomes of it. ~/jaxalign/launch.log has its standard error, launch.out its output.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# Images of TPUs come with Python 3.10. Where none can be had, launch/local.sh says what it needs.
get_python() {
  local uv=$HOME/.local/bin/uv found
  if [[ ! -x $PY ]] && ! (find_python) >/dev/null 2>&1; then
    echo 'jaxalign: getting Python 3.12' >&2
    if python3 -m pip install --quiet --user uv && "$uv" python install --quiet 3.12 &&
      found=$("$uv" python find 3.12); then
      export PYTHON=$found
    fi
  fi
}

run=$1 attempt=$2
shift 2
state=$ROOT/.launch
mkdir -p "$state"
touch "$ROOT/launch.log" "$ROOT/launch.out"
before=$(cat "$state/run" 2>/dev/null) || before=

# Only the shell that watches the run holds the lock, however it ends.
exec 9>"$state/lock"
if [[ $before == "$run $attempt" ]]; then
  lines=(--lines=10)
  if flock --nonblock 9 && [[ ! -e $state/code ]]; then
    echo 'jaxalign: this machine was started again during the run' >&2
    exit 75
  fi
else
  flock --nonblock 9 || die 'another run is going on here: launch/tpu_vm.sh NAME ZONE --stop ends it'
  if [[ $before != "$run "* ]]; then
    : >"$ROOT/launch.log"
    : >"$ROOT/launch.out"
  fi
  wc -c <"$ROOT/launch.log" >"$state/log_from"
  wc -c <"$ROOT/launch.out" >"$state/out_from"
  lines=(--bytes="+$(($(cat "$state/log_from") + 1))")
  rm -f "$state/code" "$state/stopped"
  echo "$run $attempt" >"$state/run"
  (
    trap '' HUP
    code=0
    get_python 9>&-
    if [[ -e $state/stopped ]]; then
      echo 'jaxalign: stopped before the run began' >&2
    else
      bash "$ROOT/launch/local.sh" "$@" 9>&- || code=$?
    fi
    echo "$code" >"$state/code"
  ) </dev/null >>"$ROOT/launch.out" 2>>"$ROOT/launch.log" &
  echo $! >"$state/pid"
fi
exec 9>&-

pid=$(cat "$state/pid")
tail "${lines[@]}" --follow --sleep-interval=0.1 --pid="$pid" "$ROOT/launch.log" >&2 &
tail --bytes="+$(($(cat "$state/out_from") + 1))" --follow --sleep-interval=0.1 --pid="$pid" "$ROOT/launch.out"
wait
code=$(cat "$state/code" 2>/dev/null) || die 'the run was killed'
# A run asks to be started again after any SIGTERM.
[[ ! -e $state/stopped ]] || code=143
exit "$code"
