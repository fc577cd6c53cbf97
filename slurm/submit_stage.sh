#!/usr/bin/env bash
# Submits one stage, or what is left of it:
#   slurm/submit_stage.sh STAGE --account A [--config C] [--array-size N] [--dry-run] [-- OPTIONS]
# Every option: --help. All that it decides is decided in submit.py.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
# shellcheck source=slurm/control/common.sh
source "$root/slurm/control/common.sh"
load_modules
find_python "$@"
exec "$PYTHON" "$root/slurm/control/submit.py" stage "$@"
