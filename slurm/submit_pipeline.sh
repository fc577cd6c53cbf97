#!/usr/bin/env bash
# Submits the whole pipeline, or what is left of it:
#   slurm/submit_pipeline.sh --account A [--config C] [--from-stage N] [--to-stage N] [--array-size N] [--dry-run]
# Every option: --help. All that it decides is decided in submit.py.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
# shellcheck source=slurm/control/common.sh
source "$root/slurm/control/common.sh"
load_modules
find_python "$@"
exec "$PYTHON" "$root/slurm/control/submit.py" pipeline "$@"
