"""Find the images of an embeddings dataset that are most like a photograph: an exact search, best first.

    python publish_model/search_embeddings.py OUTPUT --query photo.jpg --model-id published

Reads what stage 8 wrote, and embeds the photograph with the same model; you name it, as a dataset of others may name
any. Prints rank, similarity (cosine) and OSMID, separated by tabs; unprintable characters of an id are escaped.
--html PAGE writes a page, --input adds thumbnails from the packaged images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.errors import ConfigError
from pipeline.files.outputs import check_outside_datasets, check_replaceable, page_mark
from pipeline.log import logging_to
from publish_model.derived.pages import make_thumbnail, write_html
from publish_model.embed_images import embed_photographs
from publish_model.model_folder.published_model import find_model
from publish_model.new_data.embed_options import add_device_option, add_model_option, make_tool_parser
from publish_model.new_data.id_lists import describe_id

PAGE_MARK = page_mark("search_embeddings")


def write_page(path: Path, query: Path, hits: Sequence[tuple[float, Any]], images: Sequence[bytes | None]) -> None:
    found = [
        {"rank": rank, "picture": make_thumbnail(image), "identifier": identifier, "similarity": similarity}
        for rank, ((similarity, identifier), image) in enumerate(zip(hits, images, strict=True), start=1)
    ]
    # A link is the user's: it stays.
    write_html(path.resolve(), "search.html.j2", query=make_thumbnail(query.read_bytes()), found=found)


def search(arguments: argparse.Namespace) -> None:
    """Print the images most similar to a photograph, and write the page of --html.

    Raises InputError for a dataset, model or photograph that cannot be used or do not belong together.
    """
    if arguments.html is not None:
        check_outside_datasets(arguments.html)
        check_replaceable(arguments.html, PAGE_MARK, [arguments.query, arguments.input])
    dataset = EmbeddingsDataset(arguments.output)
    recipe = dataset.recipe
    if not arguments.model_id:
        named = (dataset.state or {}).get("model_id", "unknown")
        raise ConfigError(f"--model-id: give the model that made the embeddings ({named!r} by its state)")
    model = find_model(
        arguments.model_id, download=False, device=arguments.device, trust_remote_code=arguments.trust_remote_code
    )
    model.check_made(dataset)
    source = dataset.open_input(arguments.input) if arguments.input is not None else None
    embedding = embed_photographs([arguments.query], model, str(recipe["precision"]))
    similarities = np.concatenate([block @ embedding[0] for block in dataset.read_blocks()])
    rows = np.argsort(-similarities, kind="stable")[: arguments.top].tolist()
    ids = dataset.read_ids_at(rows)
    hits = [(float(similarities[row]), describe_id(ids[row])) for row in rows]
    for rank, (similarity, identifier) in enumerate(hits, start=1):
        print(f"{rank}\t{similarity:.6f}\t{identifier}")
    if arguments.html is not None:
        images = dict(dataset.read_images(source, rows)) if source else {}
        write_page(arguments.html, arguments.query, hits, [images.get(row) for row in rows])


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_tool_parser(__doc__ or "")
    add = parser.add_argument
    add("--query", type=Path, required=True, metavar="IMAGE", help="photograph to look for")
    add("--top", type=cli.whole_number, default=10, metavar="N", help="how many to print (10)")
    add_model_option(parser, default="")
    add_device_option(parser)
    add("--html", type=Path, metavar="PAGE", help="write a page with what was found")
    add("--input", "-i", type=Path, metavar="PATH", help="packaged images, for the page's thumbnails")
    arguments = parser.parse_args(argv)
    with logging_to(None):
        search(arguments)


if __name__ == "__main__":
    cli.run_guarded(main)
