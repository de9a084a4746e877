#!/usr/bin/env bash
# Runs on a worker of a TPU VM: the commands that launch/tpu_vm.sh calls over ssh. It is copied there with the code. Do not
# call it yourself.
#
#   bash launch/tpu_worker.sh install [PYTHON]        # the virtual environment, with '.[tpu]'
#   bash launch/tpu_worker.sh start ID ARGUMENT…      # python -m jax_rlhf ARGUMENT…, which survives the connection
#   bash launch/tpu_worker.sh follow OFFSET SECONDS   # the log from this byte on ("start": from the job's start)
#   bash launch/tpu_worker.sh settle SECONDS          # waits at most this long for the job's end
#   bash launch/tpu_worker.sh stop SECONDS            # SIGTERM; SIGKILL if the job is still running after that
#   bash launch/tpu_worker.sh tail LINES              # the end of the log
#
# follow, settle and stop end with a line on stderr:
#   @job worker=HOST state=STATE code=CODE id=ID command=SUM stopped=0 progress=PHASE-STEP offset=BYTE
# STATE is none (never started), running, ended (with that exit code), or lost (no process, no exit code: a reboot).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

job=$HOME/jax_rlhf_job # folder with id, command, process, offset, log, exit_code, stopped, progress
boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null || true)

install() {
  local wanted
  if [ $# -gt 0 ]; then PYTHON=$1; else choose_python; fi
  make_environment tpu
  ln -sfn "$(basename "$environment")" .venv/tpu # so that start does not need the version
  wanted=$(cat requirements.txt requirements-tpu.txt pyproject.toml | cksum)
  [ "$wanted" = "$(cat "$environment/installed" 2>/dev/null)" ] && return
  pip_install -e '.[tpu]'
  echo "$wanted" >"$environment/installed"
}

# Many TPU VM images have Python 3.10, or a distribution's Python without ensurepip, which cannot create environments.
choose_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      PYTHON=$candidate
      return
    fi
  done
  echo "no Python 3.11 or newer with ensurepip was found: uv installs 3.12 (--python=PYTHON selects another)" >&2
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv # only into ~/.local
  python3 -m uv python install 3.12
  PYTHON=$(python3 -m uv python find --managed-python 3.12)
}

start() {
  local id=$1
  shift
  mkdir -p "$job"
  exec 9>"$job/lock"
  flock 9 # gcloud repeats a command after a broken connection, while the first one may still be running
  if [ "$id" = "$(cat "$job/id" 2>/dev/null)" ]; then
    return
  fi
  stop 60 2>/dev/null
  rm -f "$job/exit_code" "$job/stopped" "$job/progress"
  touch "$job/log"
  wc -c <"$job/log" >"$job/offset"
  printf '%s\0' "$@" | cksum | tr ' ' - >"$job/command"
  echo "$id" >"$job/id"
  setsid nohup bash launch/tpu_worker.sh job "$@" >>"$job/log" 2>&1 </dev/null 9>&- &
  echo "$! $boot" >"$job/process"
}

job() {
  # The program handles a signal to the whole group (stop, shutdown). This shell stays alive to write the exit code, in one
  # step, so that a reader never sees a partial file.
  trap : HUP INT TERM
  trap 'echo $? >"$job/exit_code.new" && mv "$job/exit_code.new" "$job/exit_code"' EXIT
  if [ -f "$HOME/.jax_rlhf/env" ]; then
    set -a
    # shellcheck source=/dev/null
    source "$HOME/.jax_rlhf/env"
    set +a
  fi
  export PYTHONUNBUFFERED=1
  export JAX_RLHF_PROGRESS_FILE=$job/progress # the phase and step of its last checkpoint
  keep_compiled "$@"
  export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} # without it JAX continues on the CPU if the TPU is not available
  .venv/tpu/bin/python -m jax_rlhf "$@"
}

# Sets $state, $code and $process.
look() {
  local booted=
  code=- process=
  [ ! -f "$job/process" ] || read -r process booted <"$job/process" || true
  if [ -f "$job/exit_code" ]; then
    state=ended code=$(cat "$job/exit_code")
  elif [ ! -f "$job/id" ]; then
    state=none
  elif [ -n "$process" ] && [ "$booted" = "$boot" ] && kill -0 "$process" 2>/dev/null; then
    state=running
  elif [ -f "$job/exit_code" ]; then # it ended between the first check and the last
    state=ended code=$(cat "$job/exit_code")
  else
    state=lost
  fi
}

report() {
  local stopped=0 id=- sum=- far=-
  [ ! -s "$job/progress" ] || far=$(tr ' ' - <"$job/progress")
  [ ! -f "$job/stopped" ] || stopped=1
  [ ! -f "$job/id" ] || id=$(cat "$job/id") sum=$(cat "$job/command")
  echo "@job worker=$(hostname) state=$state code=$code id=$id command=$sum stopped=$stopped progress=$far offset=${1:-0}" >&2
}

follow() {
  local offset=$1 end=$((SECONDS + $2)) size
  [ "$offset" != start ] || offset=$(cat "$job/offset" 2>/dev/null || echo 0)
  while :; do
    look # before the size, so that the size includes everything written before the end
    size=$(wc -c 2>/dev/null <"$job/log" || echo 0)
    if [ "$size" -gt "$offset" ]; then
      head -c $((size - offset)) < <(tail -c +$((offset + 1)) "$job/log")
      offset=$size
    fi
    [ "$state" = running ] && [ "$SECONDS" -lt "$end" ] || break
    sleep 0.1
  done
  report "$offset"
}

settle() {
  local end=$((SECONDS + $1))
  look
  while [ "$state" = running ] && [ "$SECONDS" -lt "$end" ]; do
    sleep 0.1
    look
  done
  report
}

stop() {
  local end=$((SECONDS + $1))
  look
  if [ "$state" = running ]; then
    touch "$job/stopped"
    pkill -TERM -P "$process" || true # the program, not the shell that writes its exit code
    while [ "$state" = running ] && [ "$SECONDS" -lt "$end" ]; do
      sleep 0.1
      look
    done
    if [ "$state" = running ]; then
      kill -KILL -- "-$process" 2>/dev/null || true
      echo 137 >"$job/exit_code"
      look
    fi
  fi
  report
}

case ${1:-} in
  install | start | job | follow | settle | stop) "$@" ;;
  tail) tail -n "$2" "$job/log" ;;
  *)
    echo "$0: unknown command '${1:-}'; call launch/tpu_vm.sh instead" >&2
    exit 2
    ;;
esac
