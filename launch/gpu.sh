#!/usr/bin/env bash
# Runs on one machine with NVIDIA GPUs: makes a virtual environment with '.[cuda13]' or '.[cuda12]', whichever the driver
# supports, then runs python -m jax_rlhf on all GPUs with the arguments given here. It restarts the run after exit code 75
# (saved because of preemption), after a crash (128 and up) and after an error that you did not cause (70), but at most
# three times in a row without a new checkpoint. It does not restart after 1 and 2.
#
#   bash launch/gpu.sh --config=configs/llama3_8b.py --workdir=runs/llama3-8b
#   bash launch/gpu.sh --max-restarts=3 --config=…   # maximum number of restarts; 10 if not given
#   bash launch/gpu.sh --install-only                # only makes the environment; needs no GPU
#   bash launch/gpu.sh --cuda=12 …                   # selects JAX's wheels for CUDA 12 or 13
#   PYTHON=python3.12 bash launch/gpu.sh …           # uses another interpreter
#
# SIGTERM, Ctrl-C and the loss of the terminal are forwarded to the program, which saves. It is not restarted after these.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

install() {
  local wanted
  if [ -z "$cuda" ]; then
    cuda=$(cuda_of_driver)
    case $cuda in
      0)
        echo "error: the NVIDIA driver is too old: JAX needs 525 or newer for CUDA 12, 580 for CUDA 13" >&2
        exit 1
        ;;
      '')
        echo "no driver to ask here: taking CUDA 12 (driver 525 or newer); --cuda=13 if all machines have 580 or newer" >&2
        cuda=12
        ;;
    esac
  fi
  make_environment "cuda$cuda"
  wanted=$(cat requirements.txt "requirements-cuda$cuda.txt" pyproject.toml | cksum)
  if [ "$wanted" != "$(cat "$environment/installed" 2>/dev/null)" ]; then # already installed: no network is needed
    pip_install -e ".[cuda$cuda]"
    echo "$wanted" >"$environment/installed"
  fi
}

pass_on() {
  stopping=$1
  [ -z "$program" ] || kill -s "$stopping" "$program" 2>/dev/null || true
}

# Runs the program once; sets $code.
run() {
  set -m # in its own process group: signals arrive once, from pass_on, and SIGINT is not ignored
  "$environment/bin/python" -m jax_rlhf "$@" &
  program=$!
  set +m
  [ -z "$stopping" ] || pass_on "$stopping" # a signal arrived just before
  while :; do
    code=0
    wait "$program" || code=$?
    kill -0 "$program" 2>/dev/null || break # else a trap interrupted the wait, and the program is still saving
  done
  program=''
}

max_restarts=10 install_only='' cuda='' stopping='' program='' restarts=0 stuck=0
while [ $# -gt 0 ]; do
  case $1 in
    --max-restarts=*) max_restarts=${1#*=} ;;
    --install-only) install_only=1 ;;
    --cuda=*) cuda=${1#*=} ;;
    -h | --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/gpu.sh
      exit
      ;;
    *) break ;;
  esac
  shift
done
case $max_restarts in '' | *[!0-9]*) echo "error: --max-restarts=$max_restarts is not a number" >&2 && exit 2 ;; esac
case $cuda in '' | 12 | 13) ;; *) echo "error: --cuda=$cuda; JAX has wheels for 12 and 13" >&2 && exit 2 ;; esac

if [ -n "$install_only" ]; then
  install
  exit
fi
if ! nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
  echo "error: there is no NVIDIA GPU here, or no driver: nvidia-smi --list-gpus lists none" >&2
  exit 1
fi
install
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # without it JAX continues on the CPU if CUDA is not available
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92} # JAX's default is 0.75; the plan assumes this
keep_compiled "$@"
trap 'pass_on INT' INT
trap 'pass_on TERM' HUP TERM

JAX_RLHF_PROGRESS_FILE=$(mktemp)
export JAX_RLHF_PROGRESS_FILE
trap 'rm -f "$JAX_RLHF_PROGRESS_FILE"' EXIT

before=
while :; do
  run "$@"
  starts_again "$code" && [ -z "$stopping" ] && [ "$restarts" -lt "$max_restarts" ] || exit "$code"
  progress=$(cat "$JAX_RLHF_PROGRESS_FILE")
  if is_further "$progress" "$before"; then stuck=0 before=$progress; else stuck=$((stuck + 1)); fi
  if enough_starts "$stuck"; then
    echo "gpu: started $stuck times without getting further than ${before:-the start}; not again" >&2
    exit "$code"
  fi
  restarts=$((restarts + 1))
  echo "[$(date +%H:%M:%S)] gpu: restart $restarts of at most $max_restarts" >&2
done
