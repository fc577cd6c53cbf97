"""Embed a few photographs with the published model: one picture, one vector.

    python publish_model/embed_images.py a.jpg b.jpg --model-id published
    python publish_model/embed_images.py *.jpg --npy embeddings.npy

Prints a JSON object a line, {"image": ..., "embedding": [...]}, or writes the vectors (N, 256) float32 in the order of
the pictures to a .npy. They have length 1, so a dot product is a cosine. In a notebook:

    from publish_model.embed_images import embed_images
    embeddings = embed_images(["a.jpg", "b.jpg"], "published")

For more than some thousand pictures take stage 8, which can be resumed.
"""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.files.writing import writing_to
from pipeline.ids import decode_name
from pipeline.log import logging_to
from publish_model.model_folder.published_model import find_model
from publish_model.new_data.embed_options import DEFAULT_MODEL_ID
from publish_model.new_data.photographs import embed_photographs


def embed_images(
    paths: Iterable[Path | str], model_id: str = DEFAULT_MODEL_ID, *, device: str = "auto", dtype: str = "auto"
) -> NDArray[np.float32]:
    """Return the embeddings of image files, (N, D) float32 of length 1, in their order.

    `model_id` is a published model's folder or hub id, fetched if need be. Raises InputError where the model cannot be
    had or a file cannot be read as an image.
    """
    model = find_model(model_id, download=True)
    return embed_photographs([Path(path) for path in paths], model.prepare(), dtype, device)


def main(argv: Sequence[str] | None = None) -> None:
    """Embed from a command line."""
    parser = cli.make_parser(__doc__ or "", config=False)
    add = parser.add_argument
    add("images", type=Path, nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP files")
    add(
        "--model-id", default=os.environ.get("MODEL_ID") or DEFAULT_MODEL_ID, metavar="ID",
        help=f"published model: hub id or folder (default: $MODEL_ID, else {DEFAULT_MODEL_ID})",
    )  # fmt: skip
    add("--npy", type=Path, metavar="PATH", help="write the vectors there, and print nothing but the path")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where the model runs (auto)")
    add(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="what the model computes in (auto: bfloat16 on CUDA, float32 on CPU)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    with logging_to(None):
        embeddings = embed_images(arguments.images, arguments.model_id, device=arguments.device, dtype=arguments.dtype)
        if arguments.npy is None:
            for path, embedding in zip(arguments.images, embeddings, strict=True):
                print(json.dumps({"image": decode_name(str(path)), "embedding": embedding.tolist()}))
            return
        with writing_to(arguments.npy) as temporary, open(temporary, "wb") as file:
            np.save(file, embeddings)
        print(arguments.npy)


if __name__ == "__main__":
    cli.run_guarded(main)
