# Sourced by the other scripts: make_environment NAME makes .venv/NAME-VERSION and sets $environment; pip_install fills it.

make_environment() {
  name_environment "$1"
  [ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
}

name_environment() {
  local python=${PYTHON:-python3} version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$0: $python is Python $version; 3.11 or newer is needed (PYTHON=python3.12 bash $0)" >&2
    exit 1
  fi
  environment=.venv/$1-$version
}

# Whether a run that ended with this code is started again: saved (75), an error that is not the user's (70), or killed.
# Not after 1 and 2, which only the user can mend.
starts_again() {
  case $1 in
    70 | 75) ;;
    *) [ "$1" -ge 128 ] ;;
  esac
}

# Whether a run is further than it was, both as "PHASE STEP", or nothing: of a checkpoint that was damaged and made again it
# is not.
is_further() {
  local phases='sft reward ppo' new=$1 former=$2
  [ -n "$new" ] || return 1
  [ -n "$former" ] || return 0
  if [ "${new% *}" = "${former% *}" ]; then
    [ "${new#* }" -gt "${former#* }" ]
  else
    [[ $phases = *"${former% *}"*"${new% *}"* ]]
  fi
}

# Whether so many starts in a row that got no further are enough. The program writes phase and step of its last checkpoint
# to JAX_RLHF_PROGRESS_FILE.
enough_starts() { [ "$1" -ge 3 ]; }

# 13 where the driver is new enough, else 12: JAX's installation page asks for driver 580 or newer, or 525.
cuda_version() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
  driver=${driver%%.*}
  case $driver in
    '' | *[!0-9]*) echo 12 ;;
    *) if [ "$driver" -ge 580 ]; then echo 13; else echo 12; fi ;;
  esac
}

# Compiled programs are kept in the workdir: it outlives the machine, and all processes see it. Unless JAX is told another
# folder, or the program is.
keep_compiled() {
  local argument before='' workdir=''
  for argument; do
    case $argument in
      --compile_cache* | -compile_cache*) return ;;
      --workdir=* | -workdir=*) workdir=${argument#*=} ;;
      *) case $before in --workdir | -workdir) workdir=$argument ;; esac ;;
    esac
    before=$argument
  done
  [ -z "$workdir" ] || export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR-${workdir%/}/compiled}"
}

# An environment in which pip was interrupted can have halves of packages, on which it fails ever after: it is cleared.
# The lock is for scripts that start side by side: what one of them still installs looks interrupted to the others.
pip_install() {
  exec 9>"$environment.lock"
  ! command -v flock >/dev/null || flock 9 # macOS has none
  [ ! -e "$environment/incomplete" ] || "${PYTHON:-python3}" -m venv --clear "$environment"
  touch "$environment/incomplete"
  "$environment/bin/python" -m pip install --quiet "$@"
  rm "$environment/incomplete"
  exec 9>&-
}
