#!/usr/bin/env bash
# Runs jaxalign on TPUs of GKE:
#   bash launch/gke/run.sh --name=dpo --tpu_type=v5litepod-16 --image=IMAGE --algo=dpo --workdir=DIR
# Submits a JobSet, by xpk where that is installed and --cluster is given, or else by kubectl.
# launch/gke/Dockerfile makes IMAGE.
# Checkpoints are written by all hosts together: --workdir must be in a bucket (gs://BUCKET/NAME), or on a disk that all
# of them mount.
#
# Options, before the flags of jaxalign (`--` ends them):
#   --name=NAME         of the workload
#   --cluster=C         the cluster; without it, what kubectl is set to
#   --tpu_type=TYPE     v5litepod-16, v6e-8, v5p-32, v4-16, tpu7x-16, ...
#   --topology=AxBxC    of a slice; must be given for types that have several (v4, v5p, tpu7x); not with xpk
#   --slices=N          how many of them (1)
#   --image=IMAGE       what to run
#   --claim=CLAIM       a PersistentVolumeClaim to mount at /mnt/shared; xpk mounts what `xpk storage attach` names
#   --zone=Z --project=P    of the cluster, where they are not gcloud's defaults
#   --restarts=N        how often all hosts start again after one was lost (3)
#   --logs              print the logs of the pods that are there, and follow them until those end
#   --delete            stop and delete the workload
#   --dry_run           print the commands, and run none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"
source "$ROOT/launch/options.sh"

USAGE='usage: bash launch/gke/run.sh --name=NAME --tpu_type=TYPE --image=IMAGE [...] --algo=ALGO [--flag=value ...]'
read_options 'dry_run delete logs' 'name cluster tpu_type topology slices image claim zone project restarts' "$@"
set -- ${rest[@]+"${rest[@]}"}
: "${slices:=1}" "${restarts:=3}"

# Names of pods hold that of the workload and 23 more characters, and have at most 63.
check_name() {
  [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    misuse "$1=$2: lower-case letters, digits and - can be in it, at most 40, a letter first and no - last"
}

[[ $name ]] || misuse "$USAGE"
check_name --name "$name"
[[ ! $cluster ]] || check_name --cluster "$cluster"
[[ $slices =~ ^[1-9][0-9]*$ ]] || misuse "--slices=$slices: it is a number, at least 1"
is_count "$restarts" || misuse "--restarts=$restarts: it is a number, without a 0 before it"
[[ ! $topology || $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || misuse "--topology=$topology: write 4x4, or 2x2x4"
by_xpk=''
if [[ $cluster ]] && command -v xpk >/dev/null; then
  by_xpk=1
fi
if [[ $delete || $logs ]]; then
  (($# == 0)) || misuse '--logs and --delete are of a workload that is there: they take no flags of jaxalign'
  [[ ! $delete || ! $logs ]] || misuse 'one of --logs and --delete, please'
else
  [[ $# != 0 && $tpu_type && $image ]] || misuse "$USAGE"
  [[ $image =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || misuse "--image=$image: it is not the name of an image"

  [[ ! $claim ]] || check_name --claim "$claim"
  [[ ! $topology || ! $by_xpk ]] ||
    misuse "--topology=$topology: xpk goes by --tpu_type alone; leave it out, or leave --cluster out for kubectl"
  [[ ! $claim || ! $by_xpk ]] || misuse '--claim: xpk mounts what `xpk storage attach` names, and takes no claim'

  # Chips of a slice; those of v4, v5p and tpu7x are counted as two.
  number=${tpu_type##*-} flat=''
  [[ $tpu_type =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] || misuse "--tpu_type=$tpu_type: write v5litepod-16, v6e-8, v5p-32, ..."
  case $tpu_type in
    v5litepod-*) accelerator=tpu-v5-lite-podslice flat=1 ;;
    v6e-*) accelerator=tpu-v6e-slice flat=1 ;;
    v4-*) accelerator=tpu-v4-podslice ;;
    v5p-*) accelerator=tpu-v5p-slice ;;
    tpu7x-*) accelerator=tpu7x ;;
    *) misuse "--tpu_type=$tpu_type: the types are v4-N, v5litepod-N, v5p-N, v6e-N and tpu7x-N" ;;
  esac
  count=$((flat ? number : number / 2))
  if [[ ! $topology && $flat ]]; then
    case $count in
      1) topology=1x1 ;;
      4) topology=2x2 ;;
      8) topology=2x4 ;;
      16) topology=4x4 ;;
      32) topology=4x8 ;;
      64) topology=8x8 ;;
      128) topology=8x16 ;;
      256) topology=16x16 ;;
      *) misuse "--tpu_type=$tpu_type: there are 1, 4, 8, 16, 32, 64, 128 and 256 chips" ;;
    esac
  fi
  if [[ $topology ]]; then
    dims=${topology//[0-9]/}
    ((${#dims} == (flat ? 1 : 2))) ||
      misuse "--topology=$topology: that of --tpu_type=$tpu_type is $([[ $flat ]] && echo AxB || echo AxBxC)"
    ((count == ${topology//x/*})) ||
      misuse "--topology=$topology has $((${topology//x/*})) chips, and --tpu_type=$tpu_type has $count"
  else
    [[ $by_xpk ]] || misuse "--tpu_type=$tpu_type needs --topology=AxBxC of $count chips"
  fi
  # A host has four chips, or is alone with fewer.
  ((count < 4 || count % 4 == 0)) || misuse "--tpu_type=$tpu_type: $count chips are not of hosts with 4 each"
  chips=$((count < 4 ? count : 4))
  hosts=$((count / (chips ? chips : 1)))
  warn_of_workdir "$@"
fi

needs() {
  [[ $dry_run ]] || command -v "$1" >/dev/null || die "$1 is not installed; see $2"
}

set_cluster() {
  needs kubectl https://kubernetes.io/docs/tasks/tools
  if [[ $cluster ]]; then
    needs gcloud https://cloud.google.com/sdk/docs/install
    call gcloud container clusters get-credentials "$cluster" \
      ${zone:+--location="$zone"} ${project:+--project="$project"}
  fi
}

# A string of JSON, which YAML reads too. Kubernetes would put variables in place of $(NAME).
quoted() {
  local text=$1 dollar='$('
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  text=${text//"$dollar"/\$$dollar}
  printf '"%s"' "$text"
}

fill() {
  jobset=${jobset%%"{{$1}}"*}$2${jobset#*"{{$1}}"}
}

if [[ $logs ]]; then
  set_cluster
  call kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$name" --container=jaxalign --prefix --tail=-1 \
    --follow --max-log-requests=1024
elif [[ $delete && $by_xpk ]]; then
  call xpk workload delete --workload="$name" --cluster="$cluster" --force \
    ${zone:+--zone="$zone"} ${project:+--project="$project"}
elif [[ $delete ]]; then
  set_cluster
  call kubectl delete jobset "$name"
elif [[ $by_xpk ]]; then
  # With exec the SIGTERM that xpk passes on is that of Python. At 134 (JAX aborts) xpk restarts without being told.
  call xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$tpu_type" --num-slices="$slices" \
    --docker-image="$image" --docker-name=jaxalign --max-restarts="$restarts" --restart-on-exit-codes=1,75 \
    --termination-grace-period-seconds=300 --command="exec python -m jaxalign.main$(printf ' %q' "$@")" \
    ${zone:+--zone="$zone"} ${project:+--project="$project"}
else
  args=''
  for arg; do
    args+=${args:+, }$(quoted "$arg")
  done
  jobset=$(<"$ROOT/launch/gke/jobset.yaml")
  jobset=${jobset#*$'\n'}
  volumes='[]' mounts='[]'
  if [[ $claim ]]; then
    volumes="[{name: shared, persistentVolumeClaim: {claimName: $claim}}]"
    mounts='[{name: shared, mountPath: /mnt/shared}]'
  fi
  for mark in name restarts slices accelerator topology image chips volumes mounts; do
    fill "$mark" "${!mark}"
  done
  fill hosts "$hosts"
  fill hosts "$hosts"
  fill args "[$args]"
  set_cluster
  if [[ $dry_run ]]; then
    echo "kubectl apply --filename=- <<'END'"
    echo "$jobset"
    echo END
  else
    kubectl apply --filename=- <<<"$jobset"
  fi
fi
