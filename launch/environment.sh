# Sourced by the scripts beside it: a virtual environment with the package in it.
#
#   HALOS_JAX_VENV    folder of the environment (default: .venv in the checkout)
#   HALOS_JAX_EXTRA   the platform: cpu, tpu, cuda12 or cuda13
#   HALOS_JAX_PYTHON  the Python to make the environment with (default: the first >= 3.11 found)

HALOS_JAX_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
HALOS_JAX_VENV="${HALOS_JAX_VENV:-$HALOS_JAX_ROOT/.venv}"
[[ "$HALOS_JAX_VENV" == /* ]] || HALOS_JAX_VENV="$PWD/$HALOS_JAX_VENV"
VENV_PYTHON="$HALOS_JAX_VENV/bin/python"

fail() {
  echo "error: $*" >&2
  exit 1
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

PYTHON_NAMES=(python3.12 python3.13 python3.11 python3.14 python3 python)

find_python() {
  local name
  if [[ -n "${HALOS_JAX_PYTHON:-}" ]]; then
    is_new_enough "$HALOS_JAX_PYTHON" && echo "$HALOS_JAX_PYTHON"
    return
  fi
  for name in "${PYTHON_NAMES[@]}"; do
    if is_new_enough "$name"; then
      echo "$name"
      return
    fi
  done
  return 1
}

make_environment() {
  local python
  if [[ ! -x "$VENV_PYTHON" ]]; then
    if python="$(find_python)"; then
      echo "Making the environment $HALOS_JAX_VENV with $("$python" --version)" >&2
    elif [[ -z "${HALOS_JAX_PYTHON:-}" ]] && command -v uv >/dev/null; then
      python=3.12 # uv fetches it
      echo "Making the environment $HALOS_JAX_VENV with a Python $python that uv fetches" >&2
    else
      fail "no Python >= 3.11 found; looked at: ${HALOS_JAX_PYTHON:-${PYTHON_NAMES[*]}};" \
        "install one, or name it: HALOS_JAX_PYTHON=/path/to/python"
    fi
    if command -v uv >/dev/null; then
      uv venv --quiet --python "$python" "$HALOS_JAX_VENV" || fail "uv could not make $HALOS_JAX_VENV"
    elif ! "$python" -m venv "$HALOS_JAX_VENV"; then
      rm -rf "$HALOS_JAX_VENV"
      fail "could not make $HALOS_JAX_VENV; on Debian and Ubuntu: apt install python3-venv"
    fi
  fi
  is_new_enough "$VENV_PYTHON" ||
    fail "$HALOS_JAX_VENV has $("$VENV_PYTHON" --version 2>&1), but Python >= 3.11 is needed;" \
      "remove the folder, or name another one with HALOS_JAX_VENV"
}

install_packages() {
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$VENV_PYTHON" "$@"
    return
  fi
  "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || "$VENV_PYTHON" -m ensurepip >/dev/null
  # Python compiles a module where it is first imported, which most never are - unless it may not.
  local options=(--quiet --disable-pip-version-check)
  [[ -n "${PYTHONDONTWRITEBYTECODE:-}" ]] || options+=(--no-compile)
  "$VENV_PYTHON" -m pip install "${options[@]}" "$@"
}

# Install the checkout with the given extras (comma-separated), unless that was done with the
# same pyproject.toml before.
prepare_environment() {
  local extras="$1" stamp wanted
  stamp="$HALOS_JAX_VENV/installed-${extras//,/-}"
  wanted="$HALOS_JAX_ROOT $(cksum <"$HALOS_JAX_ROOT/pyproject.toml")"
  make_environment
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    echo "Installing halos_jax[$extras]; the first time takes a few minutes" >&2
    install_packages --editable "$HALOS_JAX_ROOT[$extras]" ||
      fail "could not install halos_jax[$extras]; the message above says why"
    echo "$wanted" >"$stamp"
  fi
}

# The platform's extra: as asked for, else by the NVIDIA driver (CUDA 13 needs 580), else cpu.
choose_extra() {
  local driver
  if [[ -n "${HALOS_JAX_EXTRA:-}" ]]; then
    echo "$HALOS_JAX_EXTRA"
  elif driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null)"; then
    driver="${driver%%.*}"
    if [[ "$driver" =~ ^[0-9]+$ ]] && ((driver < 580)); then echo cuda12; else echo cuda13; fi
  else
    echo cpu
  fi
}
