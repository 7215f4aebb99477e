#!/usr/bin/env bash
# Runs jaxalign on all workers of a Cloud TPU VM: bash launch/tpu_vm.sh NAME ZONE --algo=dpo --workdir=/mnt/shared/dpo
# Copies this checkout to ~/jaxalign there, and passes the flags of jaxalign to launch/local.sh on each worker.
# Checkpoints are written by all workers together: --workdir must be in a bucket (gs://BUCKET/NAME), or on a disk that
# all of them mount.
#
# Options, before the flags of jaxalign (`--` ends them):
#   --create=TYPE      make the VM where there is none, or none that is left: v5litepod-16, v6e-8, v5p-32, v4-8, ...
#   --version=RUNTIME  the image of its workers; there is a default for each generation
#   --queued           wait in the queue for it
#   --spot             take a cheaper one, which may be taken away
#   --project=P        the project, where it is not gcloud's default
#   --restarts=N       how often to go on where the VM was taken away or has no room to be made again, the connection is
#                      lost, or the run asks for it by exit code 75 (3 with --create, or else 0)
#   --setup=COMMAND    run it on each worker first, to mount the disk of --workdir; it must do no harm when run again
#   --logs=DIR         fetch the logs of all workers to DIR/worker-*/ when the run has ended, however it did
#   --stop             in place of a run: SIGTERM to the one that is going on, which saves first
#   --delete           delete the VM and its place in the queue after the run, once nothing runs there any more, or
#                      at once where no run is asked for
#   --dry_run          print the commands and run none
# What the run writes to standard output is shown as it comes, and after a lost connection again from its beginning: the
# launch.out of --logs has it once.
# JAXALIGN_POLL_SECONDS is how long to wait before asking again for the state of a VM (30).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

USAGE='usage: bash launch/tpu_vm.sh NAME ZONE [--create=TYPE ...] --algo=ALGO [--flag=value ...], or --stop or --delete'
POLL=${JAXALIGN_POLL_SECONDS:-30}
# The run, or what sets it up. A shell with this text as its command must not match.
RUN_PATTERN='-m jaxalign[.]main|jaxalign/launch/local[.]sh'
# Whether anything runs on a worker: launch/worker.sh holds the lock from before the run to its end.
BUSY="busy() {
  [[ -e jaxalign/.launch/lock ]] && ! flock --nonblock jaxalign/.launch/lock true ||
    pgrep -f -- '$RUN_PATTERN' >/dev/null
}"
# While Python is installed there is nothing yet to tell: worker.sh then sees the file.
STOP="$BUSY
touch jaxalign/.launch/stopped 2>/dev/null
busy || { echo 'jaxalign: nothing runs here' >&2; exit 0; }
for i in {1..120}; do
  [[ \$told ]] || ! pkill -TERM -f -- '$RUN_PATTERN' || told=1
  busy || exit 0
  sleep 1
done
echo 'jaxalign: still saving after two minutes' >&2; exit 1"

(($# > 2)) && [[ $1 != -* && $2 != -* ]] || misuse "$USAGE"
login=$1 name=${1#*@} zone=$2
shift 2
read_options 'dry_run queued spot stop delete' 'create version project restarts setup logs' "$@"
set -- ${rest[@]+"${rest[@]}"}
if [[ $stop ]]; then
  (($# == 0)) || misuse '--stop ends a run: it takes no flags of jaxalign'
else
  [[ $# != 0 || $delete ]] || misuse "$USAGE"
fi
[[ ! $restarts ]] || is_count "$restarts" || misuse "--restarts=$restarts: it is a number, without a 0 before it"
restarts=${restarts:-${create:+3}}
restarts=${restarts:-0}
case $create in
  '') [[ ! $version$spot ]] || misuse '--version and --spot say how to make a VM: they need --create' ;;
  v5litepod-*) version=${version:-v2-alpha-tpuv5-lite} ;;
  v5p-*) version=${version:-v2-alpha-tpuv5} ;;
  v6e-*) version=${version:-v2-alpha-tpuv6e} ;;
  v[234]-*) version=${version:-tpu-ubuntu2204-base} ;;
  tpu7x*) misuse "--create=$create: there are no such VMs, only nodes of GKE: launch/gke/run.sh" ;;
  v5e-*) misuse "--create=$create: Google calls it v5litepod-${create#v5e-}" ;;
  *) [[ $version ]] || misuse "--create=$create: not a type that is known here; say --version=RUNTIME for it" ;;
esac
[[ ! $create || $# == 0 ]] || warn_of_workdir "$@"
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  die 'gcloud is not installed; see https://cloud.google.com/sdk/docs/install'

where=(--zone="$zone" ${project:+--project="$project"})
tpus() {
  call gcloud compute tpus "$@" "${where[@]}"
}

# Runs a command on all workers. A host that vanishes without a word counts as lost after two minutes.
on_workers() {
  call gcloud compute tpus tpu-vm ssh "$login" --worker=all --command="$1" "${where[@]}" \
    -- -o ServerAliveInterval=30 -o ServerAliveCountMax=4
}

# Runs a command. A signal to this shell alone is heard at once, and not when the command ends.
heeding() {
  local code=0
  "$@" <&0 &
  waited=$!
  wait "$waited" || code=$?
  waited=''
  return "$code"
}

# Sets `found` to a field of a tpu-vm or of queued-resources, or to ABSENT.
ask() {
  local tries=$((answered ? 5 : 1)) # An hour in the queue must not be lost to one message that was.
  if [[ $dry_run ]]; then
    tpus "$1" describe "$name" --format="value($2)"
    found=$assumed
    return
  fi
  until found=$(tpus "$1" describe "$name" --format="value($2)" 2>"$scratch/said"); do
    if grep -q 'NOT_FOUND\|was not found' "$scratch/said"; then
      found=ABSENT
      break
    elif ((--tries <= 0)); then
      cat "$scratch/said" >&2
      say "could not ask for the state of $name in $zone; see the message of gcloud above"
      return 1
    fi
    heeding sleep "$POLL"
  done
  answered=1
}

# Sets `found` to the state of the VM, or to that of its place in the queue until the VM is there.
find_state() {
  local place=''
  if [[ $queued ]]; then
    ask queued-resources state.state || return
    [[ $found == ACTIVE || $found == ABSENT ]] || return 0
    place=$found
  fi
  ask tpu-vm state || return
  [[ $place != ACTIVE || $found != ABSENT ]] || found=SUSPENDED
}

# Shows and keeps what is said. (In a pipeline gcloud would be no child of this process, with which it is ended.)
create() {
  local code=0
  tpus "$@" > >(tee "$scratch/said" >&2) 2>&1 || code=$?
  wait # for what is shown
  return "$code"
}

# Returns 1 where a VM that was used already finds no room to be made again.
make() {
  local kind=tpu-vm args=(--accelerator-type="$create")
  if [[ $queued ]]; then
    kind=queued-resources
    args+=(--runtime-version="$version" --node-id="$name")
  else
    args+=(--version="$version")
  fi
  args+=(${spot:+--spot})
  if [[ $dry_run ]]; then
    tpus "$kind" create "$name" "${args[@]}"
    assumed=READY
    return
  fi
  say "making $name: $create in $zone"
  local failed=''
  making=1
  heeding create "$kind" create "$name" "${args[@]}" || failed=1
  making=''
  [[ $failed ]] || return 0
  if grep -qi 'capacity\|stockout' "$scratch/said"; then
    ((restarted == 0)) || return 1
    die "$zone has no free $create now: --queued waits for one, or try another zone"
  elif grep -qi 'quota' "$scratch/said"; then
    die "the project has no quota for $create${spot:+ (spot)} in $zone: use the zone where it has, or ask for more" \
      'at https://console.cloud.google.com/iam-admin/quotas'
  fi
  die "could not make $name; see the message of gcloud above"
}

# A VM that came out of the queue goes with its place there.
remove() {
  local kind=tpu-vm force=''
  ask queued-resources state.state || exit
  if [[ $found != ABSENT && (! $dry_run || $queued) ]]; then
    kind=queued-resources force=--force
  fi
  [[ $dry_run ]] || say "deleting $name"
  tpus "$kind" delete "$name" --quiet ${force:+"$force"} >&"$shown" ||
    die "could not delete $name in $zone; see the message of gcloud above"
}

# Deletes the VM after a run, but not under one that may still go on.
release() {
  if ((code)); then
    find_state || found=READY
    case $found in
      ABSENT)
        if ! ask queued-resources state.state || [[ $found == ABSENT ]]; then
          [[ ! $making ]] ||
            say "$name was being made, and may still come: bash launch/tpu_vm.sh $login $zone --delete"
          return
        fi
        ;;
      READY | REPAIRING)
        on_workers "$BUSY; ! busy" || {
          say "$name stays: bash launch/tpu_vm.sh $login $zone --stop ends what may run there, --delete the VM itself"
          return 0
        }
        ;;
    esac
  fi
  remove
}

# Returns when the VM is ready, or 1 where there is no room to make it again.
ensure() {
  local awaited='' seen=''
  while :; do
    find_state || exit
    case $found in
      READY) return ;;
      ABSENT | FAILED | SUSPENDED | PREEMPTED | TERMINATED | STOPPED)
        # What was waited for and came to nothing would most likely do so again.
        if [[ $awaited && $found == FAILED ]]; then
          ask queued-resources state.failedData.error.message || exit
          die "$name FAILED in the queue${found:+: $found}; the same command asks for it again"
        elif [[ $awaited ]]; then
          die "$name is $found before it could be used; the same command asks for it again"
        fi
        if [[ ! $create && $found == ABSENT ]]; then
          die "there is no TPU VM $name in $zone: --create=ACCELERATOR_TYPE makes one, as --create=v5litepod-16"
        elif [[ ! $create ]]; then
          die "$name is $found: with --create=ACCELERATOR_TYPE it is deleted and made again"
        fi
        [[ $found == ABSENT ]] || remove
        make || return
        awaited=1
        ;;
      STOPPING | SUSPENDING | DELETING)
        say "$name is $found; waiting"
        heeding sleep "$POLL"
        ;;
      *)
        [[ $found == "$seen" ]] || say "$name is $found; waiting"
        seen=$found awaited=1
        heeding sleep "$POLL"
        ;;
    esac
  done
}

# Copies the checkout and runs it: what the first worker that failed returned, or 255 where it was lost.
execute() {
  call tar -czf "$scratch/jaxalign.tgz" -C "$ROOT" --exclude=__pycache__ \
    setup.py README.md LICENSE jaxalign gin_configs launch || return
  if ! heeding tpus tpu-vm scp "$scratch/jaxalign.tgz" "$login:jaxalign.tgz" --worker=all >&"$shown"; then
    say "could not copy the checkout to $name in $zone; see the message of gcloud above"
    return 255
  fi
  running=1
  # JAX asks the machine's metadata for the other workers. What an earlier checkout had, and this one has not, goes.
  heeding on_workers "$BUSY
busy || rm -rf jaxalign/jaxalign jaxalign/gin_configs jaxalign/launch
mkdir -p jaxalign && tar -xzf jaxalign.tgz -C jaxalign &&
${setup:+bash -c $(printf '%q' "$setup") >&2 &&
}COORDINATOR_ADDRESS=auto bash jaxalign/launch/worker.sh $run $attempt $(printf '%q ' "$@")"
}

fetch_log() {
  local folder=$logs/worker-$1 said
  call mkdir -p "$folder"
  # Shown as a whole: what several copies say at a time would mix within lines.
  said=$({
    tpus tpu-vm scp "$login:jaxalign/launch.log" "$login:jaxalign/launch.out" "$folder/" --worker="$1" </dev/null ||
      say "could not fetch the log of worker $1"
  } 2>&1)
  [[ ! $said ]] || cat <<<"$said" >&"$shown" # echo would write each line by itself
}

fetch_logs() {
  local worker copies=() # not the connection of a run that could not be stopped
  [[ $logs ]] || return 0
  ask tpu-vm 'networkEndpoints.len()' || return 0
  if [[ $dry_run ]]; then
    fetch_log 0
  elif [[ ! $found =~ ^[0-9]+$ ]]; then
    say "could not fetch the logs: $name is gone"
  else
    for ((worker = 0; worker < found; worker++)); do
      fetch_log "$worker" &
      copies+=($!)
      (((worker + 1) % 8 && worker + 1 < found)) || {
        wait "${copies[@]}" || :
        copies=()
      }
    done
  fi
}

# Where one worker fails, the others exit with 75: sets `code` to that of the one.
find_failure() {
  local codes one
  codes=$(on_workers 'cat jaxalign/.launch/code') || return 0
  for one in $codes; do
    [[ $one != [12] ]] || code=$one
  done
}

# Whether this is the shell itself: one that it has just begun for a command may still have its traps.
is_main() {
  [[ ${BASHPID:-$$} == "$$" ]]
}

interrupted() {
  trap - INT TERM
  is_main || exit "$1"
  code=$1
  local left=$waited
  if [[ $running ]]; then
    say "stopping the run on all workers of $name, which saves first"
    on_workers "$STOP" || say "could not stop it on all workers: bash launch/tpu_vm.sh $login $zone --stop"
    fetch_logs
  fi
  # A connection may not have ended with the run; and nothing must go on to make what is deleted here.
  [[ ! $left ]] || {
    pkill -TERM -P "$left" || kill -TERM "$left" || :
    wait "$left" || :
  } 2>/dev/null
  if [[ $delete ]]; then
    release
  elif [[ $create && ! $running ]]; then
    say "$name stays, or stays in the queue: bash launch/tpu_vm.sh $login $zone --delete"
  fi
  exit "$code"
}

answered='' running='' making='' waited='' found='' assumed=READY shown=2
if [[ $dry_run ]]; then
  scratch=/tmp/launch shown=1
  [[ ! $create ]] || assumed=ABSENT
else
  scratch=$(mktemp -d)
  trap '! is_main || rm -rf "$scratch"' EXIT
fi

code=0
if [[ $stop ]]; then
  on_workers "$STOP" || code=$?
  fetch_logs
elif (($#)); then
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM
  [[ ! $logs ]] || call mkdir -p "$logs"
  run=$(date +%s)-$$ attempt=0
  for ((restarted = 0; ; restarted++)); do
    pause=0 next='the same command goes on from the last checkpoint'
    if ensure; then
      code=0
      execute "$@" || code=$?
      ((code == 255)) || running=''
      ((code)) || break
      ((code != 75)) || find_failure
      find_state || break
      if [[ $found != READY ]]; then
        why="$name is $found" running=''
      elif ((code == 75)); then
        why='the run asked to be started again'
        attempt=$((attempt + 1)) # Another one: the exit code of this one is known.
      elif ((code == 255)); then
        # The same attempt is looked at again where it still runs.
        why="the connection to $name was lost" pause=1 next='where the run still goes on, --stop ends it'
      else
        break
      fi
    else
      why="$zone has no free $create now" pause=20 # for others to leave, ten minutes
    fi
    if ((restarted >= restarts)); then
      say "$why; $next"
      break
    fi
    say "$why: restart $((restarted + 1)) of $restarts"
    for ((; pause; pause--)); do heeding sleep "$POLL"; done
  done
  trap - INT TERM
  fetch_logs
fi
[[ ! $delete ]] || release
exit "$code"
