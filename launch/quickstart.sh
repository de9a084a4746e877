#!/usr/bin/env bash
# Runs the whole pipeline in minutes: makes a virtual environment, installs the requirements and packages with a small real
# model and real data, then runs SFT, reward model and PPO (configs/quickstart.py lists the expected results).
#
#   bash launch/quickstart.sh                        # writes into runs/quickstart
#   bash launch/quickstart.sh --config.seed=1 --workdir=runs/quickstart-1
#   PYTHON=python3.12 bash launch/quickstart.sh      # uses another interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

make_environment quickstart
pip_install -r requirements.txt -r requirements-judge.txt
pip_install --no-deps -r requirements-quickstart.txt

exec "$environment/bin/python" -m jax_rlhf --config=configs/quickstart.py --workdir=runs/quickstart "$@"
