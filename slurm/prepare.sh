#!/usr/bin/env bash
# Prepares a cluster for jobs without internet; run it on a login node:
#   slurm/prepare.sh [--config CONFIG] [--model-id ID ...] [--no-install]
# Loads the configured modules first, makes the environment (.venv) with them, and fetches the configured backbone, or
# the models named, into $HF_HOME. A gated model needs HF_TOKEN in the environment, here and nowhere else.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
# shellcheck source=slurm/control/common.sh
source "$root/slurm/control/common.sh"
load_modules

options=()
install=1
for option in "$@"; do
    if [ "$option" = --no-install ]; then install=0; else options+=("$option"); fi
done
if [ "$install" = 1 ] && [[ " ${options[*]-} " != *" --help "* ]]; then
    make --no-print-directory -C "$root" install PYTHON="${PYTHON:-python3}"
fi
find_python "$@"
export HF_HUB_OFFLINE=0
exec "$PYTHON" "$root/slurm/control/submit.py" fetch ${options[@]+"${options[@]}"}
