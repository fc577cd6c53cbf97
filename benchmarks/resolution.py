"""Measure what image size, scales and mirror images are worth in retrieval, and what they cost in images a second.

    python benchmarks/resolution.py --raw DIR [--backbone DIR] [--work-dir DIR] [--output resolution.json]

Reads the tars of DIR, at least two, and embeds each view of their images once (Lite0 unless another backbone is given);
the settings below are put together of the views, as `embed_views` does it. Each tar is tested by a whitening that was
fitted on the others; no pair is ignored. For the cost stage 2's engine takes turns with the settings on the same
pictures, and the least time of each counts. Prints a table to stderr, and JSON. With --work-dir the views are kept.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path: import from the project, not this folder

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.timing import describe_machine, least
from generate_embeddings import generate_embeddings
from pipeline import cli
from pipeline.config import Config, EmbeddingModelSection, load_config
from pipeline.files.archive import stream_members
from pipeline.inference.backbone import Embedder
from pipeline.inference.engine import embed_stream, use_one_thread
from pipeline.inference.pooling import resize
from pipeline.log import EngineWatch, logger
from pipeline.retrieval.scores import normalise_rows, score_queries, summarize_scores
from pipeline.retrieval.whitening import fit_within_class_whitening
from pipeline.threads import map_in_order
from preprocess_raw_data import process_tar
from sample_data import convert_lite0

# The keys of [embedding_model] by the name that the table gives them; the image size is said in each.
SETTINGS: dict[str, dict[str, Any]] = {
    "224": {"image_size": 224},
    "224, flip": {"image_size": 224, "flip": True},
    "320": {"image_size": 320},
    "320, flip": {"image_size": 320, "flip": True},
    "384": {"image_size": 384},
    "384, flip": {"image_size": 384, "flip": True},
    "224 + 384": {"scales": [224, 384]},
    "224 + 320 + 384": {"scales": [224, 320, 384]},
    "224 + 320 + 384, flip": {"scales": [224, 320, 384], "flip": True},
}
OUTPUT_DIM = 256
SHRINKAGE = 0.5

Matrix = NDArray[np.float32]
Tar = tuple[Matrix, NDArray[np.int32]]  # embeddings (N, D) and the codes (N,) of their buildings


class Views:
    """The backbone's features of all images, (N, D) for each view, made when they are asked for."""

    def __init__(self, backbone_dir: Path, work_dir: Path, pictures: list[bytes]) -> None:
        self._backbone_dir, self._work_dir, self._pictures = backbone_dir, work_dir, pictures

    def combine(self, section: EmbeddingModelSection) -> Matrix:
        """Return what stage 2 gives with these settings."""
        size = section.input_size or 0
        found = []
        for scale in section.scales or [size]:
            rows = self.get(size, scale, False)
            if section.flip:
                rows = (rows + self.get(size, scale, True)) / 2
            found.append(rows)
        return (
            found[0] if len(found) == 1 else normalise_rows(np.mean([normalise_rows(rows) for rows in found], axis=0))
        )

    def get(self, size: int, scale: int, flip: bool) -> Matrix:
        """Return the features of one view: the input of `size` pixels, brought to `scale`, mirrored or not."""
        path = self._work_dir / f"view-{size}-{scale}{'-flip' if flip else ''}.npy"
        if not path.is_file():
            np.save(path, self._embed(size, scale, flip))
        found: Matrix = np.load(path)
        return found

    def _embed(self, size: int, scale: int, flip: bool) -> Matrix:
        embedder = Embedder(self._backbone_dir, image_size=size, device="cpu")

        def embed(data: bytes) -> torch.Tensor:
            inputs = resize(embedder.decode(data)[None], scale / size)
            inputs = (inputs.flip(-1) if flip else inputs).to(memory_format=torch.channels_last)
            with torch.inference_mode():
                return embedder.model(pixel_values=inputs).pooler_output.flatten(1)

        threads = torch.get_num_threads()
        rows = list(map_in_order(embed, self._pictures, threads, initializer=use_one_thread))
        torch.set_num_threads(threads)
        return torch.cat(rows).float().numpy()


def read_pictures(raw_dir: Path, work_dir: Path) -> tuple[list[bytes], NDArray[np.int32], NDArray[np.int32]]:
    """Return the images of buildings with two or more, the codes of their buildings, and the numbers of their tars."""
    config = write_config(work_dir, raw_dir)
    process_tar.run(config, cli.Options())
    pictures, buildings, tars = [], [], []
    for number, path in enumerate(sorted(config.path("intermediates_dir").glob("*.parquet"))):
        table = pq.read_table(path, columns=["image_path", "building_id", "tar_file"])
        building_of = dict(zip(table["image_path"].to_pylist(), table["building_id"].to_pylist(), strict=True))
        for member in stream_members(raw_dir / f"{path.stem}.tar"):
            if member.name in building_of:
                pictures.append(member.read())
                buildings.append(building_of[member.name])
                tars.append(number)
    codes = np.unique(buildings, return_inverse=True)[1]
    kept = np.flatnonzero(np.bincount(codes)[codes] > 1)
    codes = np.unique(codes[kept], return_inverse=True)[1].astype(np.int32)
    return [pictures[row] for row in kept], codes, np.array(tars, np.int32)[kept]


def write_config(work_dir: Path, raw_dir: Path) -> Config:
    """Return the configuration of stage 1 below `work_dir`."""
    path = work_dir / "config.toml"
    path.write_text(f'[paths]\nraw_dir = {json.dumps(str(raw_dir))}\nintermediates_dir = "intermediates"\n')
    return load_config(path)


def score_elsewhere(rows: Matrix, codes: NDArray[np.int32], tars: NDArray[np.int32]) -> dict[str, dict[str, float]]:
    """Return Recall@1 and mAP, the means over the tars, of the raw features and of the other tars' whitening."""
    found: dict[str, list[dict[str, float]]] = {"raw": [], "whitening": []}
    for tar in np.unique(tars):
        test, own = rows[tars == tar], np.unique(codes[tars == tar], return_inverse=True)[1].astype(np.int32)
        others = np.unique(codes[tars != tar], return_inverse=True)[1].astype(np.int32)
        whitening = fit_within_class_whitening(rows[tars != tar], others, OUTPUT_DIM, SHRINKAGE)
        for kind, embeddings in (("raw", normalise_rows(test)), ("whitening", whitening.apply(test))):
            found[kind].append(summarize_scores(score_queries(embeddings, own)))
    return {
        kind: {key: float(np.mean([score[key] for score in scores])) for key in ("recall_at_1", "map")}
        for kind, scores in found.items()
    }


def time_settings(backbone_dir: Path, names: list[str], pictures: list[bytes], rounds: int) -> dict[str, float]:
    """Return the images/s of stage 2's engine with each of the settings."""
    embedders = {}
    for name in names:
        config = Config.model_validate({"embedding_model": SETTINGS[name]})
        embedders[name] = generate_embeddings.load_embedder(backbone_dir, config)

    def run(embedder: Embedder) -> None:
        list(embed_stream(embedder, pictures, embedder.decode, torch.get_num_threads(), EngineWatch()))

    seconds = least({name: partial(run, embedder) for name, embedder in embedders.items()}, rounds)
    return {name: len(pictures) / value for name, value in seconds.items()}


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| settings | raw R@1 | raw mAP | whitening R@1 | whitening mAP | img/s | of 224's time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        scores = [row[kind][key] for kind in ("raw", "whitening") for key in ("recall_at_1", "map")]
        cells = [f"{score:.3f}" for score in scores]
        lines.append(f"| {row['settings']} | {' | '.join(cells)} | {row['images_per_s']:.1f} | {row['cost']:.1f} |")
    return "\n".join(lines)


def measure(
    raw_dir: Path, backbone_dir: Path, work_dir: Path, names: list[str], images: int, rounds: int
) -> list[dict[str, Any]]:
    """Score and time each of the settings."""
    pictures, codes, tars = read_pictures(raw_dir, work_dir)
    views = Views(backbone_dir, work_dir, pictures)
    scores = {}
    for name in names:
        scores[name] = score_elsewhere(views.combine(EmbeddingModelSection(**SETTINGS[name])), codes, tars)
        print(name, scores[name], file=sys.stderr, flush=True)
    rates = time_settings(backbone_dir, names, pictures[:images], rounds)
    return [
        {"settings": name, **scores[name], "images_per_s": rates[name], "cost": rates[names[0]] / rates[name]}
        for name in names
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder of the tars")
    parser.add_argument("--backbone", type=Path, help="model folder (default: EfficientNet-Lite0)")
    parser.add_argument("--work-dir", type=Path, help="keep the views here")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    parser.add_argument("--images", type=int, default=64, help="that the settings are timed on")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    arguments = parser.parse_args(argv)
    logger.setLevel("WARNING")
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = (arguments.work_dir or Path(temporary)).resolve()
        work_dir.mkdir(parents=True, exist_ok=True)
        backbone_dir = arguments.backbone or convert_lite0.run(work_dir / "lite0")
        rows = measure(
            arguments.raw.resolve(), backbone_dir.resolve(), work_dir, arguments.settings, arguments.images,
            arguments.rounds,
        )  # fmt: skip
    print(format_table(rows), file=sys.stderr)
    text = json.dumps({"rows": rows, "machine": describe_machine()}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
