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
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.errors import InputError, Rejection
from pipeline.files.outputs import check_outside_datasets, check_replaceable
from pipeline.ids import decode_name
from pipeline.inference.images import log_turned
from pipeline.inference.model_files import DEFAULT_MODEL_ID
from pipeline.log import logging_to
from pipeline.workspace import writing_to
from publish_model.model_folder.published_model import PublishedModel, find_model
from publish_model.new_data.embed_options import add_device_option, add_model_option
from publish_model.new_data.image_sources import read_file

# Decoded at a time; larger inputs are stage 8's.
BLOCK_IMAGES = 32
# How a file of float32 rows begins: one of labels or of other numbers is the user's.
NPY_MARK = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': ("


def embed_images(
    paths: Iterable[Path | str],
    model_id: str = DEFAULT_MODEL_ID,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> NDArray[np.float32]:
    """Return the embeddings of image files, (N, D) float32 of length 1, in their order.

    `model_id` is a published model's folder or hub id, fetched if need be. Raises InputError where the model cannot be
    had or a file cannot be read as an image.
    """
    model = find_model(
        model_id, download=True, device=device, batch_size=BLOCK_IMAGES, trust_remote_code=trust_remote_code
    )
    return embed_photographs([Path(path) for path in paths], model, "auto")


def embed_photographs(paths: Sequence[Path], model: PublishedModel, dtype: str) -> NDArray[np.float32]:
    """Return the embeddings of image files, (N, D) float32, in their order.

    Raises InputError where one of them cannot be read as an image.
    """
    for path in paths:  # found before a large model is loaded
        if not path.is_file():
            raise InputError(f"{path}: not a file: give JPEG, PNG or WebP images")
    from pipeline.inference.backbone import check_embeddings

    embedder = model.load(dtype)
    blocks = []
    for start in range(0, len(paths), BLOCK_IMAGES):
        decoded = []
        for path in paths[start : start + BLOCK_IMAGES]:
            try:
                decoded.append(embedder.decode(read_file(path)))
            except Rejection as rejection:
                raise InputError(f"{path}: {rejection}: give JPEG, PNG or WebP images") from None
        blocks.append(embedder.embed(decoded))
    log_turned()
    embeddings = np.concatenate(blocks)
    check_embeddings(embeddings, [str(path) for path in paths])
    return embeddings


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__ or "", config=False)
    add = parser.add_argument
    add("images", type=Path, nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP files")
    add_model_option(parser)
    add("--npy", type=Path, metavar="PATH", help="write the vectors there, and print nothing but the path")
    add_device_option(parser)
    arguments = parser.parse_args(argv)
    with logging_to(None):
        if arguments.npy is not None:
            check_outside_datasets(arguments.npy)
            check_replaceable(arguments.npy, NPY_MARK, arguments.images)
        embeddings = embed_images(
            arguments.images, arguments.model_id, device=arguments.device, trust_remote_code=arguments.trust_remote_code
        )
        if arguments.npy is None:
            for path, embedding in zip(arguments.images, embeddings, strict=True):
                print(json.dumps({"image": decode_name(str(path)), "embedding": embedding.tolist()}))
            return
        with writing_to(arguments.npy.resolve()) as temporary, open(temporary, "wb") as file:  # a link stays
            np.save(file, embeddings)
        print(arguments.npy)


if __name__ == "__main__":
    cli.run_guarded(main)
