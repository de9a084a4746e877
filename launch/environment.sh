# Sourced by the other scripts: make_environment NAME makes .venv/NAME-VERSION and sets $environment.

make_environment() {
  local python=${PYTHON:-python3} version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$0: $python is Python $version; 3.11 or newer is needed (PYTHON=python3.12 bash $0)" >&2
    exit 1
  fi
  environment=.venv/$1-$version
  [ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
}
