#!/usr/bin/env bash
# Everything that CI checks: a virtual environment with all requirements, lint, format, tests.
#
#   bash launch/test.sh                        # the interpreter called python3
#   PYTHON=python3.12 bash launch/test.sh      # another one
#   bash launch/test.sh tests/models -k cache  # arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/environment.sh
source launch/environment.sh

# What is saved is also read by the transformers that most people still have, which cannot be installed beside ours.
make_environment transformers4
pip_install 'transformers>=4.57,<5' 'jinja2>=3.1,<4' 'numpy>=2,<3'
export TRANSFORMERS4_PYTHON="$PWD/$environment/bin/python"

make_environment test
pip_install -r requirements.txt -r requirements-judge.txt -r requirements-dev.txt
pip_install --no-deps -r requirements-quickstart.txt

"$environment/bin/ruff" check .
"$environment/bin/ruff" format --check .
# Two processes, a file at a time: compiling, which takes most of the time, hardly uses a second core by itself. In the
# order of tests/conftest.py, and not those of many tests first: the longest tests are alone in theirs, and would all
# come last.
exec "$environment/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
