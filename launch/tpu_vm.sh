#!/usr/bin/env bash
# Manages a TPU VM of any size: creates or reuses it, copies the code, starts the same command on all its workers, shows the
# log of worker 0, restarts after preemption, deletes it. See docs/launch.md.
#
#   bash launch/tpu_vm.sh run --name=rlhf --zone=us-east5-a --type=v5p-16 -- --config=configs/llama3_8b.py --workdir=DIR
#   bash launch/tpu_vm.sh run --dry-run …     # prints every command and executes none; needs no gcloud
#   bash launch/tpu_vm.sh down --name=rlhf --zone=us-east5-a
#
# Commands:
#   up      creates the VM, or waits until the VM of this name is ready; a preempted VM is deleted and created again
#   sync    copies the code: the files that git tracks, as they are on disk
#   run     up, sync, install, and python -m jax_rlhf with the arguments after --; shows the log and exits with the job's
#           exit code. It restarts the job after exit code 75 (saved because of preemption), a crash (128 and up), an error
#           that you did not cause (70), or if the VM is gone, but at most three times in a row without a new checkpoint.
#           It does not restart after 1 or 2. The job survives a lost connection and Ctrl-C: run the same command again to
#           follow it
#   logs    shows the log from the job's start to its end
#   stop    asks the job to save and end (SIGTERM), and keeps the VM
#   down    deletes the VM, and the queued resource that it came from
#
# Options:
#   --name=NAME           the VM's name; required, as is --zone
#   --zone=ZONE
#   --project=PROJECT     if it is not gcloud's default
#   --type=TYPE           the accelerator type, such as v5p-16, v6e-8, v5litepod-16; required to create a VM
#   --version=VERSION     the runtime version; the usual one for the type if not given
#   --spot                a spot VM: cheaper, and preempted when others need it
#   --queued              creates a queued resource, which waits in a queue until there is a VM
#   --create-flag=FLAG    one more flag for gcloud's create, such as --network=NAME; may be repeated
#   --connect-flag=FLAG   one more flag for gcloud's ssh and scp, such as --internal-ip; may be repeated
#   --env-file=FILE       lines NAME=VALUE for the job's environment, such as HF_TOKEN=…; copied to ~/.jax_rlhf/env.
#                         Others must not be able to read it: chmod 600 FILE
#   --setup=COMMAND       run on all workers after the copy, each time a job starts; for example to mount shared storage
#   --python=PYTHON       the workers' interpreter; if not given, 3.11 or newer is searched for, or installed with uv
#   --max-restarts=N      maximum number of restarts of a job; 10 if not given
#   --dry-run             prints the commands, quoted for a shell, instead of executing them
# TPU_VM_POLL=30 is the number of seconds between two checks of a VM, TPU_VM_FOLLOW=300 that of one connection that reads the
# log.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

name='' zone='' type='' version='' spot='' queued='' env_file='' setup='' python='' max_restarts=10 dry_run=''
# These arrays are never empty when used: some versions of bash treat an empty one as unset. gcloud tries ten times to
# connect. With ssh's default timeouts it would notice only after twenty minutes that a VM is gone.
where=() create_flags=(--quiet)
connect=(--ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=30) copy=(--worker=all --scp-flag=-oConnectTimeout=20)
poll=${TPU_VM_POLL:-30} follow_seconds=${TPU_VM_FOLLOW:-300}

exec 3>&1 4>&2 # this script's own output, while the output of its commands is read
say() { [ -n "$dry_run" ] || echo "[$(date +%H:%M:%S)] tpu_vm: $*" >&4; }

die() {
  echo "error: $*" >&2
  exit 1
}

wrong_usage() {
  echo "error: $*; see bash launch/tpu_vm.sh --help" >&2
  exit 2
}

# Quotes words so that a shell reads them back unchanged.
quote() {
  local LC_ALL=C word line='' mark="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/"$mark"}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Executes a command, or prints it.
call() {
  if [ -n "$dry_run" ]; then quote "$@" >&3; else "$@"; fi
}

tpus() {
  local noun=$1 verb=$2
  shift 2
  call gcloud compute tpus "$noun" "$verb" "$name" "${where[@]}" "$@"
}

# Runs a command line on worker $1, a number or "all".
remote() { tpus tpu-vm ssh "${connect[@]}" "--worker=$1" "--command=$2" </dev/null; }

# The command lines that call tpu_worker.sh on a worker. ask is for queries: if the code was never copied, there is no job.
worker() { echo "cd ~/jax_rlhf && exec bash launch/tpu_worker.sh $(quote "$@")"; }
ask() { echo "[ -d jax_rlhf ] || { echo '@job state=none' >&2; exit 0; }; $(worker "$@")"; }

# shellcheck source=launch/tpu_resource.sh
source "$root/launch/tpu_resource.sh"

# ---- the code

# Makes $scratch/jax_rlhf.tar.gz of the tracked files and a list of them. The next copy uses the list to remove old files.
pack() {
  local file untracked
  cd "$root"
  for file; do
    case $file in
      --config=/*) ;; # a path on the workers' disks
      --config=*)
        file=${file#--config=}
        git ls-files --error-unmatch -- "${file%%:*}" >/dev/null 2>&1 ||
          die "${file%%:*} would not be copied, since git does not track it in $root: git add ${file%%:*}"
        ;;
    esac
  done
  untracked=$(git ls-files --others --exclude-standard)
  [ -z "$untracked" ] || say "not copied, since git does not track them: ${untracked//$'\n'/, }"
  if [ -n "$dry_run" ]; then
    echo "git ls-files -z >$scratch/.copied" >&3
  else
    git ls-files -z | while IFS= read -r -d '' file; do
      [ ! -e "$file" ] && [ ! -L "$file" ] || printf '%s\0' "$file" # not those deleted from disk
    done >"$scratch/.copied"
  fi
  call tar -czf "$scratch/jax_rlhf.tar.gz" --null -T "$scratch/.copied" -C "$scratch" .copied
  cd "$OLDPWD"
}

upload() {
  call gcloud compute tpus tpu-vm scp "$1" "$name:$2" "${where[@]}" "${copy[@]}" </dev/null
}

# Copies the code to all workers, and then runs the commands in the arguments there.
copy_code() {
  local unpack='mkdir -p jax_rlhf && cd jax_rlhf && { [ ! -f .copied ] || xargs -0 rm -f -- <.copied; }' command
  unpack+=' && tar -xzf ../jax_rlhf.tar.gz'
  for command; do
    unpack+=" && $command"
  done
  upload "$scratch/jax_rlhf.tar.gz" jax_rlhf.tar.gz && remote all "$unpack"
}

# Prepares the workers for the job.
prepare() {
  say "copying the code and installing, on all workers"
  if [ -n "$env_file" ]; then
    # Into a folder that others cannot enter, because scp creates files that others can read, and may overwrite an older one.
    # (ssh's stdin would work for one worker, but gcloud does not copy it to several.)
    remote all "mkdir -p -m 700 .jax_rlhf && chmod 700 .jax_rlhf && rm -f .jax_rlhf/env jax_rlhf.env" || return
    upload "$env_file" .jax_rlhf/env || return
    set -- "chmod 600 ~/.jax_rlhf/env"
  fi
  [ -z "$setup" ] || set -- "$@" "(cd && { $setup"$'\n'"})" # the newline ends a comment in $setup
  copy_code "$@" "$(worker install ${python:+"$python"})"
}

# ---- the job

field() { sed -n "s/^@job \(.* \)\{0,1\}$1=\([^ ]*\).*/\2/p" <<<"$2"; }

# Follows the log of worker 0. Sets $line to the last report, $job_state to ended, lost, none, or gone (with the VM).
follow() {
  local offset=start failures=0
  while :; do
    if remote 0 "$(ask follow "$offset" "$follow_seconds")" 2>"$scratch/follow" && line=$(last_report follow); then
      failures=0
      job_state=$(field state "$line")
      [ "$job_state" = running ] || return 0
      offset=$(field offset "$line")
      continue
    fi
    job_state=ended
    [ -z "$dry_run" ] || return 0
    failures=$((failures + 1))
    case $(outlook) in
      ready* | '') ;; # the connection failed, or this machine's network
      *)
        job_state=gone
        return 0
        ;;
    esac
    [ "$failures" -lt 20 ] || die "worker 0 cannot be reached; a job on it continues. $(tail -n 3 "$scratch/follow")"
    say "the connection to worker 0 is lost; trying again"
    sleep "$poll"
  done
}

last_report() { grep '^@job ' "$scratch/$1" | tail -n 1; }

# After the end on worker 0: asks all workers for their exit codes. Sets $outcome to restart or to an exit code, $progress to
# the last checkpoint of the run.
ask_exit_codes() {
  local report code chosen=0 culprit='' again='' stopped=''
  progress=''
  remote all "$(ask settle 300)" 2>"$scratch/settle" || true
  outcome=0
  [ -z "$dry_run" ] || return 0
  if grep -q '^@job .*state=running' "$scratch/settle"; then
    say "a worker is still running minutes after worker 0 ended: stopping it"
    remote all "$(ask stop 30)" 2>/dev/null || true
  fi
  while read -r report; do
    code=$(field code "$report")
    [ "$(field stopped "$report")" != 1 ] || stopped=1
    case $(field progress "$report") in '' | -) ;; *) progress=$(field progress "$report" | tr - ' ') ;; esac
    case $(field state "$report"):$code in
      lost:* | none:* | ended:75) again=1 ;;
      running:* | ended:0) ;;
      # A program's own exit code is more informative than the signals (128 and up) that end processes which lost it.
      # Errors that only the user can fix (1 and 2) come first.
      *) if [ "$(weight "$code")" -gt "$(weight "$chosen")" ]; then chosen=$code culprit=$report; fi ;;
    esac
  done < <(grep '^@job ' "$scratch/settle" || echo '@job state=lost')
  outcome=$chosen
  if starts_again "$chosen"; then again=1; elif [ "$chosen" = 1 ] || [ "$chosen" = 2 ]; then again=''; fi
  if [ -z "$again" ]; then
    show_end "$culprit"
  elif [ -n "$stopped" ]; then
    outcome=75
  else
    outcome=restart
  fi
}

# How informative an exit code is, compared with others.
weight() { case $1 in 0) echo 0 ;; 1 | 2) echo 3 ;; *) if [ "$1" -ge 128 ]; then echo 1; else echo 2; fi ;; esac; }

# Shows the end of the log of a failed worker, unless it is worker 0, whose log was shown already.
show_end() {
  local host
  host=$(field worker "$1")
  case $host in
    '' | *-w-0) ;;
    *-w-*)
      say "the end of the log of $host:"
      remote "${host##*-w-}" "$(worker tail 40)" >&2 || true
      ;;
  esac
}

# Whether the same job is already running on the VM. A VM that was just created has none.
attach() {
  local report sum
  [ -z "$created" ] && [ -z "$dry_run" ] || return 1
  remote all "$(ask settle 0)" 2>"$scratch/attach" || die "$name cannot be reached: $(tail -n 5 "$scratch/attach")"
  report=$(grep '^@job .*state=running' "$scratch/attach" | tail -n 1) || return 1
  sum=$(printf '%s\0' "$@" | cksum | tr ' ' -)
  [ "$(field command "$report")" = "$sum" ] || die "$name is running another command; 'logs' shows it, 'stop' ends it"
  if grep '^@job ' "$scratch/attach" | grep -qv " id=$(field id "$report") "; then
    say "it was started on some workers only: restarting"
    return 1
  fi
  say "it is running already; this is its log"
}

# Starts the job on all workers, with an id that identifies repeated starts. Fails if the VM is gone.
launch() {
  local id=$1
  shift
  if prepare && remote all "$(worker start "$id" "$@")"; then
    say "started python -m jax_rlhf $(quote "$@")"
    return
  fi
  case $(outlook) in ready* | '') die "$name could not be made ready for the job; see the messages above" ;; esac
  return 1
}

run() {
  local restarts=0 stuck=0 before='' started
  [ $# -gt 0 ] || wrong_usage "the arguments of the job come after --, such as -- --config=configs/sft.py --workdir=DIR"
  started=$(date +%s)-$$
  pack "$@"
  while :; do
    outcome=restart
    up
    if { [ "$restarts" = 0 ] && attach "$@"; } || launch "$started-$restarts" "$@"; then
      follow
      case $job_state in
        ended | lost)
          ask_exit_codes
          if is_further "$progress" "$before"; then stuck=0 before=$progress; else stuck=$((stuck + 1)); fi
          ;;
      esac
    fi
    [ "$outcome" = restart ] || break
    if enough_starts "$stuck"; then
      say "started $stuck times without getting further than ${before:-the start}; not again"
      outcome=70
      break
    fi
    if [ "$restarts" -ge "$max_restarts" ]; then
      say "the job is not finished, but --max-restarts=$max_restarts is used up; the same command resumes it"
      outcome=75
      break
    fi
    restarts=$((restarts + 1))
    say "restart $restarts of at most $max_restarts"
  done
  say "ended with exit code $outcome. The VM keeps running, and costs money: bash launch/tpu_vm.sh down --name=$name --zone=$zone"
  exit "$outcome"
}

logs() {
  follow
  [ -z "$dry_run" ] || return 0
  [ "$job_state" = ended ] || die "there is no exit code: the job on $name is $job_state"
  exit "$(field code "$line")"
}

interrupted() {
  say "no longer watching. $name and its job keep running: launch/tpu_vm.sh logs, stop or down --name=$name --zone=$zone"
  exit "$1"
}

# The file contains secrets: others on this machine must not be able to read it, and git must not track it.
check_env_file() {
  [ -f "$env_file" ] || die "--env-file=$env_file: no such file"
  # ls prints the same on all systems; options of find and stat differ.
  case $(ls -dlL -- "$env_file") in
    -???------*) ;;
    *) die "--env-file=$env_file can be read or written by others: chmod 600 $(quote "$env_file")" ;;
  esac
  if git -C "$(dirname -- "$env_file")" ls-files --error-unmatch -- "$(basename -- "$env_file")" >/dev/null 2>&1; then
    die "--env-file=$env_file is tracked by git, which keeps its history: run git rm --cached, and replace the tokens"
  fi
}

# Sets the variables above from the options. Arguments after -- are stored in $arguments.
read_options() {
  local option
  while [ $# -gt 0 ]; do
    option=$1
    shift
    case $option in
      --name=*) name=${option#*=} ;;
      --zone=*) zone=${option#*=} && where+=("$option") ;;
      --project=*) where+=("$option") ;;
      --type=*) type=${option#*=} ;;
      --version=*) version=${option#*=} ;;
      --spot) spot=1 && create_flags+=(--spot) ;;
      --queued) queued=1 ;;
      --create-flag=*) create_flags+=("${option#*=}") ;;
      --connect-flag=*) connect+=("${option#*=}") && copy+=("${option#*=}") ;;
      --env-file=*) env_file=${option#*=} ;;
      --setup=*) setup=${option#*=} ;;
      --python=*) python=${option#*=} ;;
      --max-restarts=*) max_restarts=${option#*=} ;;
      --dry-run) dry_run=1 ;;
      --) break ;;
      *) wrong_usage "'$option' is not an option; arguments of python -m jax_rlhf come after --" ;;
    esac
  done
  arguments=("$@" --) # with the -- it is never empty
  [ -n "$name" ] || wrong_usage "--name=NAME is missing"
  [ -n "$zone" ] || wrong_usage "--zone=ZONE is missing"
  case $max_restarts in '' | *[!0-9]*) wrong_usage "--max-restarts=$max_restarts is not a number" ;; esac
  [ -z "$env_file" ] || check_env_file
  [ -n "$dry_run" ] || command -v gcloud >/dev/null || die "gcloud is not installed; --dry-run shows the commands"
}

main() {
  local command=${1:-}
  case $command in
    up | sync | run | logs | stop | down) shift ;;
    -h | --help | help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    *) wrong_usage "'$command' is not a command" ;;
  esac
  read_options "$@"
  set -- "${arguments[@]}"
  set -- "${@:1:$#-1}"
  [ "$command" = run ] || [ $# = 0 ] || wrong_usage "only run takes arguments after --"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM
  case $command in
    up | run | logs) "$command" "$@" ;;
    sync)
      pack # not pack && …, because bash does not stop at an error inside the left side of &&
      copy_code
      ;;
    stop) remote all "$(ask stop 600)" ;;
    down) delete ;;
  esac
}

main "$@"
