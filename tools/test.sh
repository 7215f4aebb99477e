#!/usr/bin/env bash
# Lints, checks types and runs the tests: bash tools/test.sh [arguments of pytest]
# Makes .venv and installs the test extra where that has not been done. A process per core, up to four, runs the tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"

stage() {
  echo "== $1" >&2
  "$PY" -m "$@" || die "tools/test.sh: $1 failed"
}

prepare test,tools
cd "$ROOT"
stage ruff check --quiet
stage pyink --check --quiet --pyink-indentation=2 --pyink-use-majority-quotes --line-length=120 setup.py jaxalign tests tools
stage mypy --no-error-summary
echo '== pytest' >&2
JAX_PLATFORMS=cpu exec "$PY" -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal "$@"
