# Sourced by tpu_vm.sh. Manages the VM, or the queued resource that creates it: up waits until it is ready, delete deletes it.
# shellcheck shell=bash disable=SC2154,SC2034 # its variables are set and read in tpu_vm.sh

# Prints the state of the VM (tpu-vm) or of the request for it (queued-resources); NOT_FOUND if there is none.
state_of() {
  local format='value(state)' output
  [ "$1" = tpu-vm ] || format='value(state.state)'
  if output=$(tpus "$1" describe "--format=$format" 2>"$scratch/describe"); then
    echo "${output:-STATE_UNSPECIFIED}"
  elif grep -q NOT_FOUND "$scratch/describe"; then
    echo NOT_FOUND
  else
    cat "$scratch/describe" >&2
    return 1
  fi
}

# Prints the next action for the VM (ready, create, replace, start, wait or give-up), and the state that is the reason.
outlook() {
  local state
  if [ -n "$queued" ]; then
    state=$(state_of queued-resources) || return
    case $state in
      ACTIVE) ;; # the VM's own state decides
      NOT_FOUND) state=$(state_of tpu-vm) || return ;;
      SUSPENDED) echo "replace $state" && return ;;
      FAILED) echo "give-up $state" && return ;;
      *) echo "wait $state" && return ;;
    esac
    if [ "$state" = ACTIVE ]; then
      state=$(state_of tpu-vm) || return
      [ "$state" != NOT_FOUND ] || state=TERMINATED # the VM is gone, and the request does not know it yet
    fi
  else
    state=$(state_of tpu-vm) || return
  fi
  case $state in
    READY) echo "ready $state" ;;
    NOT_FOUND) echo "create $state" ;;
    PREEMPTED | TERMINATED) echo "replace $state" ;;
    STOPPED) echo "start $state" ;;
    HIDDEN | UNKNOWN) echo "give-up $state" ;;
    *) echo "wait $state" ;; # CREATING, STARTING, RESTARTING, REPAIRING, DELETING, …
  esac
}

runtime_version() {
  case $type in
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) wrong_usage "the runtime version of --type=$type is not known; pass --version=VERSION" ;;
  esac
}

create() {
  [ -n "$type" ] || wrong_usage "$name does not exist; --type=TYPE is needed to create it"
  [ -n "$version" ] || version=$(runtime_version) || exit
  say "creating ${queued:+a queued resource for }$name: $type, $version${spot:+, spot}"
  if [ -n "$queued" ]; then
    tpus queued-resources create "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" "${create_flags[@]}"
  else
    tpus tpu-vm create "--accelerator-type=$type" "--version=$version" "${create_flags[@]}"
  fi
}

# Deletes the queued resource with its VM, or only the VM; arguments are passed to gcloud.
delete() {
  local state found=''
  state=$(state_of queued-resources) || return
  if [ "$state" != NOT_FOUND ]; then
    found=1
    tpus queued-resources delete --force "$@" || return
  fi
  state=$(state_of tpu-vm) || return
  if [ "$state" != NOT_FOUND ]; then
    found=1
    tpus tpu-vm delete "$@" || return
  fi
  [ -n "$found" ] || say "there is no $name in $zone"
}

# Returns when the VM is ready. Sets $created if it had to be created.
up() {
  local action state seen='' changes=0
  created=''
  if [ -n "$dry_run" ]; then
    outlook >/dev/null
    create
    return
  fi
  while :; do
    read -r action state <<<"$(outlook || echo "unknown -")"
    [ "$state" = "$seen" ] || say "$name: $state"
    seen=$state
    case $action in
      ready) return ;;
      wait) sleep "$poll" && continue ;;
      create)
        created=1
        create || created_by_others || die "gcloud did not create $name; if there is no capacity, --queued waits for it"
        ;;
      replace) delete --quiet || say "gcloud could not delete it; checking again" ;; # it may be gone already
      start) tpus tpu-vm start ;;
      give-up) die "$name is $state (gcloud's describe shows why); launch/tpu_vm.sh down --name=$name --zone=$zone deletes it" ;;
      *) die "gcloud does not report the state of $name" ;;
    esac
    changes=$((changes + 1))
    [ "$changes" -lt 6 ] || die "$name is still $state after several attempts"
  done
}

created_by_others() {
  local action
  action=$(outlook | cut -d ' ' -f 1) && [ "$action" != create ]
}
