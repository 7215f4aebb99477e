#!/usr/bin/env bash
# Runs jaxalign on GPUs of a Slurm cluster: bash launch/slurm.sh --nodes=2 --gpus=8 --algo=dpo --workdir=/shared/dpo
# Submits a job that runs one process a node, and prints its id. The checkout must be on a disk that all nodes mount,
# and --workdir too, or in a bucket (gs://). The job is told to save two minutes before its time is up, and goes back to
# the queue where the run asks for it (exit code 75). What else sbatch should know, say in its variables
# (SBATCH_CONSTRAINT, ...).
#
# Options, before the flags of jaxalign (`--` ends them):
#   --nodes=N --gpus=G     nodes, and GPUs of each (1 and 1)
#   --cpus_per_gpu=N       cores for each GPU, beside other jobs; without it the job has whole nodes, with all of their
#                          cores and memory
#   --time=HH:MM:SS --partition=P --account=A    as those of sbatch
#   --restarts=N           how often it goes back to the queue (30)
#   --job_name=J           its name (jaxalign)
#   --log_dir=DIR          where NAME-ID.log goes, on that disk too (runs/slurm)
#   --dry_run              print what would be submitted
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

USAGE='usage: bash launch/slurm.sh [--nodes=N] [--gpus=G] [--time=HH:MM:SS ...] --algo=ALGO [--flag=value ...]'
read_options dry_run 'nodes gpus cpus_per_gpu time partition account restarts job_name log_dir' "$@"
set -- ${rest[@]+"${rest[@]}"}
: "${nodes:=1}" "${gpus:=1}" "${restarts:=30}" "${job_name:=jaxalign}" "${log_dir:=runs/slurm}"
(($#)) || misuse "$USAGE"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || misuse "--nodes=$nodes: it is a number, at least 1"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || misuse "--gpus=$gpus: it is a number, at least 1"
[[ ! $cpus_per_gpu || $cpus_per_gpu =~ ^[1-9][0-9]*$ ]] ||
  misuse "--cpus_per_gpu=$cpus_per_gpu: it is a number, at least 1"
is_count "$restarts" || misuse "--restarts=$restarts: it is a number, without a 0 before it"
[[ ! $time || $time =~ ^([0-9]+-)?[0-9]+(:[0-9][0-9]){0,2}$ ]] ||
  misuse "--time=$time: write HH:MM:SS, or DAYS-HH:MM:SS"
[[ $job_name =~ ^[A-Za-z0-9._-]+$ ]] || misuse "--job_name=$job_name: letters, digits, ., _ and - can be in it"

# JAX starts from what srun tells its tasks, but would give each but one GPU.
local=$(printf '%q' "$ROOT/launch/local.sh")
devices=0
for ((device = 1; device < gpus; device++)); do
  devices+=,$device
done
script=$(
  cat <<END
#!/usr/bin/env bash
# The environment is made by one node for all of them.
srun --nodes=1 --ntasks=1 bash $local --list $(printf '%q ' "$@")>/dev/null || exit
export JAX_LOCAL_DEVICE_IDS=$devices
code=0
# After one task has ended the others have five minutes, also where the cluster would end them at once: they may wait
# for it for ever. The exit code of srun is the highest, and where one task fails the others exit with 75. A task is not
# bound to a core: it has all that the job has on its node.
srun --ntasks-per-node=1 --wait=300 --kill-on-bad-exit=0 --cpu-bind=none \\
  bash -c 'trap : TERM; bash "\$0" "\$@"; code=\$?
    exit "\$((code == 1 || code == 2 ? code + 100 : code))"' $local $(printf '%q ' "$@")|| code=\$?
code=\$((code == 101 || code == 102 ? code - 100 : code))
if ((code == 75 && \${SLURM_RESTART_COUNT:-0} >= $restarts)); then
  echo 'jaxalign: --restarts=$restarts are used up; the same command goes on from the last checkpoint' >&2
elif ((code == 75)); then
  scontrol requeue "\$SLURM_JOB_ID" && echo 'jaxalign: the job goes back to the queue' >&2
fi
exit "\$code"
END
)
share=(--exclusive --mem=0)
[[ ! $cpus_per_gpu ]] || share=(--cpus-per-gpu="$cpus_per_gpu")
command=(sbatch --parsable --job-name="$job_name" --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus"
  "${share[@]}" --requeue --signal=TERM@120 --output="$log_dir/%x-%j.log" --open-mode=append
  ${time:+--time="$time"} ${partition:+--partition="$partition"} ${account:+--account="$account"})
if [[ $dry_run ]]; then
  echo "$(printf '%q ' "${command[@]}")<<'END'"
  echo "$script"
  echo END
  exit
fi
command -v sbatch >/dev/null || die 'sbatch is not installed: run this on a login node of the cluster'
mkdir -p "$log_dir"
id=$("${command[@]}" <<<"$script") || {
  code=$?
  say 'sbatch refused the job; see its message above'
  exit "$code"
}
echo "${id%%;*}"
