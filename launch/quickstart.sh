#!/usr/bin/env bash
# Set everything up and run the quickstart; arguments go on to halos_jax.main:
#
#   bash launch/quickstart.sh --config.workdir=DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment "$(choose_extra)"
exec "$VENV_PYTHON" -m halos_jax.main --config="$HALOS_JAX_ROOT/configs/quickstart.py" "$@"
