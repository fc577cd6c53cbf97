#!/usr/bin/env bash
# Gather the wheels that gpu_acceptance.py needs beside torch, torchvision, transformers, pyarrow, numpy and Pillow.
#   benchmarks/prepare_bare.sh FOLDER [PYTHON_VERSION]       here, with a network; the version is the bare machine's (3.12)
#   pip install --no-index --no-deps --target=FOLDER/lib FOLDER/*.whl
#   PYTHONPATH=FOLDER/lib python benchmarks/gpu_acceptance.py --group decisive       there, without one
# Triton needs a C compiler and Python's headers there.
set -euo pipefail
folder=${1:?give a folder for the wheels}
python=${PYTHON:-python}
# pydantic, with those of its requirements that torch does not have, and threadpoolctl, in the versions installed here.
wanted=()
for name in pydantic pydantic-core annotated-types typing-inspection threadpoolctl; do
    wanted+=("$name==$("$python" -P -c "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))" "$name")")
done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation=cp --python-version="${2:-3.12}" \
    --platform=manylinux2014_x86_64 --platform=manylinux_2_28_x86_64 --dest="$folder" "${wanted[@]}"
ls "$folder"
