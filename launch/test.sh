#!/usr/bin/env bash
# Runs everything that CI checks: makes a virtual environment with all requirements, then checks lint, format and types,
# and runs the tests.
#
#   bash launch/test.sh                        # uses python3
#   PYTHON=python3.12 bash launch/test.sh      # uses another interpreter
#   bash launch/test.sh tests/models -k cache  # passes arguments to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/environment.sh
source launch/environment.sh

# transformers 4, which many people still use, must read the saved models too. It cannot be installed next to transformers 5.
# It is installed at the same time as the rest.
name_environment transformers4
export TRANSFORMERS4_PYTHON="$PWD/$environment/bin/python"
(
  make_environment transformers4
  pip_install 'transformers>=4.57,<5' 'jinja2>=3.1,<4' 'numpy>=2,<3'
) &
transformers4=$!

make_environment test
pip_install -r requirements.txt -r requirements-judge.txt -r requirements-dev.txt
pip_install --no-deps -r requirements-quickstart.txt

"$environment/bin/ruff" check .
"$environment/bin/ruff" format --check .
"$environment/bin/basedpyright" --pythonpath "$environment/bin/python"
wait "$transformers4"
# Two processes, one file at a time: compiling takes most of the time, and hardly uses a second core. The files keep the
# order of tests/conftest.py. Otherwise files with many tests would come first, and the longest tests, which are alone in
# their files, last.
exec "$environment/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
