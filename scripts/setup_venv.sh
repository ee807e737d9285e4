# Sourced by quickstart, test and tpu/worker.
# shellcheck shell=bash

# setup_venv ROOT [EXTRA]: makes ROOT/.venv and installs the package of ROOT there,
# editable, with an extra of setup.cfg. Fast when nothing has changed since; a set-up
# that was interrupted is begun again. Sets venv_python.
setup_venv() {
  local root=$1 extra=${2:-} venv=$1/.venv base pid
  local unfinished=$venv/.unfinished stamp=$venv/.installed${extra:+-$extra}
  venv_python=$venv/bin/python
  if [[ $stamp -nt $root/setup.cfg && $stamp -nt $root/pyproject.toml ]] &&
    [[ ! -e $unfinished ]] && "$venv_python" -c "" 2>/dev/null; then
    return
  fi
  SECONDS=0
  if [[ -e $unfinished ]]; then
    pid=$(<"$unfinished")
    if [[ -n $pid ]] && kill -0 "$pid" 2>/dev/null; then
      fail "process $pid is setting up $venv already (if not, remove that folder)"
    fi
    echo "An earlier set-up of $venv did not finish: beginning again"
    rm -rf "$venv"
  fi
  if [[ ! -e $venv ]]; then
    find_python
    echo "Making .venv with $("$base" --version) ..."
    mkdir "$venv"
    echo $$ >"$unfinished"
    "$base" -m venv "$venv" || fail "$base can't make a virtual environment"
  fi
  "$venv_python" -m pip --version >/dev/null 2>&1 ||
    fail "$venv_python does not work or lacks pip: remove $venv and run this again"
  echo "Installing gpt2_jax and what it needs into .venv (a minute or so) ..."
  # Modules are compiled when first imported, not all 10,000 of them now.
  "$venv_python" -m pip install -qq --disable-pip-version-check --no-compile \
    -e "$root${extra:+[$extra]}" || fail "pip could not install gpt2_jax, see above"
  env -u PYTHONDONTWRITEBYTECODE "$venv_python" -c \
    "import gpt2_jax.training.train, matplotlib.figure, sentencepiece, tensorboardX" ||
    fail "what was installed can't be imported, see above"
  touch "$venv/.installed" "$stamp"
  rm -f "$unfinished"
  echo "Set up in $SECONDS s"
}

# Sets base: $PYTHON, or the first python3 on PATH that is new enough and has venv.
find_python() {
  local check='import sys; sys.exit(sys.version_info < (3, 11))' without_venv='' found
  local -a candidates=("${PYTHON:-python3}")
  [[ -n ${PYTHON:-} ]] || candidates+=(python3.{14..11})
  for base in "${candidates[@]}"; do
    "$base" -c "$check" >/dev/null 2>&1 || continue
    "$base" -c "import ensurepip, venv" >/dev/null 2>&1 && return
    without_venv=${without_venv:-$base}
  done
  if [[ -n $without_venv ]]; then
    fail "$without_venv lacks venv or pip (Debian and Ubuntu: apt install python3-venv)"
  fi
  found=$("${candidates[0]}" --version 2>/dev/null) || found="missing or broken"
  fail "Python 3.11 or newer is needed, ${candidates[0]} is $found (PYTHON=... names one)"
}

fail() {
  echo "error: $1" >&2
  exit 2
}
