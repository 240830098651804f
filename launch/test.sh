#!/usr/bin/env bash
# Set everything up and run the tests, two at a time; arguments go on to pytest:
#
#   bash launch/test.sh tests/config/test_settings.py -k freeze
#
# HALOS_JAX_PARITY=1 installs torch as well (several GB), which some tests compare with; they are
# skipped without it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

extras="${HALOS_JAX_EXTRA:-cpu},test"
if [[ "${HALOS_JAX_PARITY:-0}" == 1 ]]; then
  extras+=",parity"
fi
prepare_environment "$extras"

workers=(-n 2)
for argument in "$@"; do
  case "$argument" in
    -n* | --numprocesses* | --pdb) workers=() ;;
  esac
done
cd "$HALOS_JAX_ROOT"
exec "$VENV_PYTHON" -m pytest ${workers[@]+"${workers[@]}"} "$@"
