#!/usr/bin/env bash
# Everything that CI checks: a virtual environment with all requirements, lint, format, tests.
#
#   bash launch/test.sh                        # the interpreter called python3
#   PYTHON=python3.12 bash launch/test.sh      # another one
#   bash launch/test.sh tests/models -k cache  # arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "launch/test.sh: $python is Python $version; 3.11 or newer is needed (PYTHON=python3.12 bash launch/test.sh)" >&2
  exit 1
fi

environment=.venv/test-$version
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet -r requirements.txt -r requirements-dev.txt
"$environment/bin/python" -m pip install --quiet --no-deps -r requirements-quickstart.txt

"$environment/bin/ruff" check .
"$environment/bin/ruff" format --check .
# Two processes, a file at a time: compiling, which takes most of the time, hardly uses a second core by itself.
exec "$environment/bin/python" -m pytest -n 2 --dist loadfile "$@"
