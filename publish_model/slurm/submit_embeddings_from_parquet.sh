#!/usr/bin/env bash
# Embeds packaged images with the published model on SLURM; fetches the model first.
#   publish_model/slurm/submit_embeddings_from_parquet.sh --account A --input PARQUET --output OUTPUT \
#     --model-id ID --batch-size 32 [--array-size N] [--dry-run]
# Every option: --help. All that it decides is decided in slurm/control/submit.py.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
# shellcheck source=slurm/control/common.sh
source "$root/slurm/control/common.sh"
load_modules
find_python "$@"
exec "$PYTHON" "$root/slurm/control/submit.py" embeddings "$@"
