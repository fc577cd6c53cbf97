"""Run the demo: render streets, convert a small backbone, run stages 1 to 9, group the new images, show what came out.

    python sample_data/run_demo.py [--raw some/tars]

Writes below demo_output/; with --raw the tars of that folder take the place of the rendered ones, and everything is
written below demo_output/NAME-HASH/ instead. A second call redoes nothing.
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

import pyarrow as pa

import run_pipeline
from evaluate_embeddings.scores.tables import format_metrics_table
from pipeline import cli
from pipeline.config import PROJECT_ROOT, Config, load_config
from pipeline.errors import InputError
from pipeline.files.archive import read_placed
from pipeline.files.identity import identify
from pipeline.files.tables import is_complete, make_provenance, open_parquet, parquet_writer
from pipeline.ids import tar_name
from pipeline.log import logger
from publish_model import cluster_embeddings
from sample_data import convert_lite0, render_streets

PACKAGE_SCHEMA = pa.schema([("image_bytes", pa.binary()), ("OSMID", pa.string()), ("is_valid", pa.bool_())])
# Images in memory at a time, and in a row group of the package.
BATCH_ROWS = 256
DEMO_CONFIG_PATH = PROJECT_ROOT / "sample_data" / "demo.toml"
OUTPUT_DIR = PROJECT_ROOT / "demo_output"


def configure(raw_dir: Path | None) -> Config:
    """Return the demo's configuration, for the rendered tars or for a folder of the user's own."""
    if raw_dir is None:
        return load_config(DEMO_CONFIG_PATH)
    raw_dir = raw_dir.resolve()
    name = f"{raw_dir.name}-{hashlib.sha256(str(raw_dir).encode()).hexdigest()[:8]}"
    template = DEMO_CONFIG_PATH.read_text(encoding="utf-8")
    moved = template.replace("../demo_output/", f"../demo_output/{name}/")
    moved = moved.replace(f"../demo_output/{name}/efficientnet-lite0", "../demo_output/efficientnet-lite0")
    moved = moved.replace(f'"../demo_output/{name}/raw"', json.dumps(str(raw_dir)))
    config_path = OUTPUT_DIR / f"{name}.toml"
    config_path.parent.mkdir(parents=True, exist_ok=True)
    config_path.write_text(moved, encoding="utf-8")
    return load_config(config_path)


def package_split(config: Config, split: str, output_path: Path) -> None:
    """Package the images of a split for stage 8, the building id in place of the OSMID, unless that is done."""
    split_path, raw_dir = config.path("merged_dir") / f"{split}.parquet", config.path("raw_dir")
    provenance = make_provenance("package_split", [identify(split_path)], {"split": split})
    if is_complete(output_path, provenance, overwrite=False):
        return
    with parquet_writer(output_path, PACKAGE_SCHEMA, provenance) as writer:
        for batch in open_parquet(split_path).iter_batches(BATCH_ROWS):
            places = zip(
                *(batch[name].to_pylist() for name in ("dataset_id", "image_offset", "image_size")), strict=True
            )
            images = [read_placed(raw_dir / tar_name(dataset_id), *place) for dataset_id, *place in places]
            columns = [images, batch["building_id"], pa.repeat(pa.scalar(True), len(batch))]
            writer.write_table(pa.table(columns, schema=PACKAGE_SCHEMA))


def show_results(config: Config, results: list[cli.StageResult], seconds: float) -> None:
    """Print the ledger, the metrics and the path of the page."""
    report_dir = config.path("report_dir")
    metrics = json.loads((report_dir / "metrics.json").read_text(encoding="utf-8"))
    print(f"\n{run_pipeline.format_ledger(results)}\n\n{format_metrics_table(metrics)}", file=sys.stderr)
    print(f"\n{seconds:.0f} s; the page to look at:", file=sys.stderr)
    print(report_dir / "report.html")


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__, config=False)
    parser.add_argument("--raw", type=Path, metavar="DIR", help="folder of NNNN.tar files (default: render some)")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    config, options = configure(arguments.raw), cli.Options()
    if arguments.raw is None:
        render_streets.main(["--output", str(config.path("raw_dir"))])
    convert_lite0.main([str(OUTPUT_DIR / "efficientnet-lite0")])
    results: list[cli.StageResult] = []
    run_pipeline.run_stages(config, options, results, 1, 7)
    packaged = config.expand(config.new_data.input or "", "[new_data].input")
    package_split(config, "test", packaged)
    run_pipeline.run_stages(config, options, results, 8, 9)
    embeddings_dir = config.expand(config.new_data.output or "", "[new_data].output")
    command = [embeddings_dir, "--model-id", config.path("published_model_dir"), "--html", "--input", packaged]
    try:
        cluster_embeddings.main(list(map(str, command)))
    except InputError as error:  # a few tars of the user's own may leave validation without pairs
        logger.warning("not grouped: %s", error)
    show_results(config, results, time.monotonic() - started)


if __name__ == "__main__":
    cli.run_guarded(main)
