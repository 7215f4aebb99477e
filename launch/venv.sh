# Sourced by launch/local.sh and tools/test.sh: `prepare EXTRA` makes .venv beside setup.py, with the package in it.
# Sets ROOT (the checkout) and PY (the Python of .venv).

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
PY=$ROOT/.venv/bin/python

# Runs a command, or with `dry_run` prints it.
call() {
  if [[ ${dry_run:-} ]]; then
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
  else
    "$@"
  fi
}

die() {
  echo "jaxalign: $*" >&2
  exit 1
}

# Prints nvidia, tpu or none.
accelerator() {
  if nvidia-smi -L >/dev/null 2>&1; then
    echo nvidia
  # Older TPUs, then newer ones: other cards use vfio too, so Google's vendor id must be on the bus.
  elif compgen -G '/dev/accel[0-9]*' >/dev/null; then
    echo tpu
  elif compgen -G '/dev/vfio/[0-9]*' >/dev/null && grep -qsx 0x1ae0 /sys/bus/pci/devices/*/vendor; then
    echo tpu
  else
    echo none
  fi
}

# Prints a Python that the package runs on: $PYTHON, or else the first of several names.
find_python() {
  local names=(python3 python3.13 python3.12 python3.11) name found
  [[ -n ${PYTHON:-} ]] && names=("$PYTHON")
  for name in "${names[@]}"; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
      echo "$name"
      return
    fi
  done
  found=$("${names[0]}" --version 2>&1) || found='not there'
  die "Python 3.11, 3.12 or 3.13 is needed, and ${names[0]} is ${found}; install one, or name it: PYTHON=/path/to/python3.11"
}

prepare() {
  local extra=$1 python stamp made shown=2
  [[ ! ${dry_run:-} ]] || shown=1
  # What an install depends on: a changed setup.py, another Python or a checkout that was moved is installed anew.
  stamp="$(cksum <"$ROOT/setup.py") $("$PY" --version 2>/dev/null || echo 'no Python') $ROOT"
  for made in "$ROOT/.venv/.jaxalign-${extra:-}"*; do
    [[ $(cat "$made" 2>/dev/null) == "$stamp" ]] && return
  done
  if ! "$PY" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || exit 1
    [[ ${dry_run:-} ]] || echo "jaxalign: making $ROOT/.venv with $("$python" --version)" >&2
    call "$python" -m venv "$ROOT/.venv" >&"$shown" ||
      die "$python cannot make $ROOT/.venv (Debian and Ubuntu want: sudo apt-get install python3-venv)"
    [[ ${dry_run:-} ]] || stamp="$(cksum <"$ROOT/setup.py") $("$PY" --version) $ROOT"
  fi
  [[ ${dry_run:-} ]] || echo "jaxalign: installing into $ROOT/.venv (minutes, the first time)" >&2
  call "$PY" -m pip install --quiet --disable-pip-version-check --use-pep517 --editable "$ROOT${extra:+[$extra]}" \
    >&"$shown" || die 'pip could not install the package; see its message above'
  [[ ${dry_run:-} ]] || echo "$stamp" >"$ROOT/.venv/.jaxalign-${extra:-core}"
}
