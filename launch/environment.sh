# Sourced by the other scripts. make_environment NAME makes .venv/NAME-VERSION and sets $environment. pip_install installs
# into it.

# Only sets $environment.
name_environment() {
  local python=${PYTHON:-python3} version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$0: $python is Python $version; 3.11 or newer is needed (PYTHON=python3.12 bash $0)" >&2
    exit 1
  fi
  environment=.venv/$1-$version
}

make_environment() {
  name_environment "$1"
  [ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
}

# Whether a run that ended with this code is started again: saved (75), an error that the user did not cause (70), or
# killed. Not after 1 and 2, which only the user can fix.
starts_again() {
  case $1 in
    70 | 75) ;;
    *) [ "$1" -ge 128 ] ;;
  esac
}

# Whether a run has a later checkpoint than before. Both arguments are "PHASE STEP", or empty. A damaged checkpoint that was
# written again is not later.
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

# Whether this number of starts in a row without a later checkpoint is the limit. The program writes phase and step of its
# last checkpoint to JAX_RLHF_PROGRESS_FILE.
enough_starts() { [ "$1" -ge 3 ]; }

# If pip was interrupted, the environment can contain incomplete packages, on which pip fails from then on. So it is cleared.
# The lock is for scripts that start at the same time: an installation in progress looks interrupted to the others.
pip_install() {
  exec 9>"$environment.lock"
  ! command -v flock >/dev/null || flock 9 # macOS has none
  [ ! -e "$environment/incomplete" ] || "${PYTHON:-python3}" -m venv --clear "$environment"
  touch "$environment/incomplete"
  "$environment/bin/python" -m pip install --quiet "$@"
  rm "$environment/incomplete"
  exec 9>&-
}

# Prints the CUDA version of the JAX wheels that run here: 13 needs driver 580 and GPUs of compute capability 7.5, 12 needs
# driver 525 (JAX's installation page). Prints 0 if the driver is older, and nothing if there is no driver.
cuda_of_driver() {
  { nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null || true; } | LC_ALL=C awk -F ', *' '
    $1 !~ /^[0-9]+\./ { next }
    { cuda = $1 + 0 < 525 ? 0 : $1 + 0 < 580 || $2 + 0 < 7.5 ? 12 : 13 }
    least == "" || cuda < least { least = cuda }
    END { if (least != "") print least }'
}

# Makes JAX cache compiled programs under the workdir, which is read from these arguments of python -m jax_rlhf. Files on the
# machine are lost with the machine, and with several processes all must find the same programs. A variable that is already
# set, and --compile_cache, take precedence.
keep_compiled() {
  local workdir=''
  [ -z "${JAX_COMPILATION_CACHE_DIR+set}" ] || return 0
  while [ $# -gt 0 ]; do
    case $1 in
      -workdir=* | --workdir=*) workdir=${1#*=} ;;
      -workdir | --workdir) [ $# -lt 2 ] || { workdir=$2 && shift; } ;;
      -compile_cache | --compile_cache | -compile_cache=* | --compile_cache=*) return 0 ;;
    esac
    shift
  done
  [ -n "$workdir" ] || return 0
  # shellcheck disable=SC2088 # a ~ that the shell did not expand, as in --workdir=~/run
  case $workdir in '~/'*) workdir=$HOME/${workdir#'~/'} ;; esac
  export JAX_COMPILATION_CACHE_DIR=${workdir%/}/compile_cache
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0} # cache fast compilations too
  case $workdir in
    # XLA would write its own files to the same folder, and does not support buckets.
    *://*) export JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES=${JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES:-none} ;;
  esac
}
