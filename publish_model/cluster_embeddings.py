"""Group the images of an embeddings dataset: those of one building, or buildings that look alike.

    python publish_model/cluster_embeddings.py OUTPUT --model-id published

Reads what stage 8 wrote. Writes OUTPUT/_clusters/clusters.parquet, sorted by cluster: OSMID, kept columns, cluster (0
is the largest), similarity (cosine to the cluster's medoid), is_medoid, row of the dataset; and clusters.json. Every
image is in one cluster, alone if need be, by average linkage. --positions LAT,LON adds a geometry. A rerun keeps what
is there. --look-alike N makes up to N groups of ids (the means of their images) by k-means, in look_alike.parquet.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder

from pipeline import cli
from pipeline.embeddings_dataset.checks import NORM_TOLERANCE
from pipeline.embeddings_dataset.columns import check_names
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.packaged_input import ID_COLUMN
from pipeline.embeddings_dataset.parts import EMBEDDING_COLUMN, read_table
from pipeline.errors import ConfigError, InputError
from pipeline.files.outputs import carries, check_replaceable, page_mark
from pipeline.files.tables import is_complete, make_provenance, read_provenance, write_parquet
from pipeline.log import logger
from pipeline.retrieval.group_scores import measure_groups
from pipeline.retrieval.labels import label_rows, to_text
from pipeline.retrieval.pair_table import Embeddings, centre
from pipeline.workspace import read_json_object, remove, write_json
from publish_model.derived.embedding_groups import COUNT_COLUMN, average_ids, find_types
from publish_model.derived.image_groups import (
    CLUSTER_COLUMN,
    MADE_COLUMNS,
    POINTS_METADATA,
    ROW_COLUMN,
    count_pairs,
    group_images,
    make_table,
)
from publish_model.derived.pages import list_facts, write_page
from publish_model.model_folder.published_model import find_model, read_pairs
from publish_model.new_data.embed_options import add_model_option, make_tool_parser, run_tool

STAGE = "cluster_embeddings"
# A group of more images than this, and than this share of all, is named: a threshold too low makes one of nearly all.
GIANT_IMAGES, GIANT_SHARE = 50, 0.05
# What an option is above, and at most.
RANGES = {"threshold": (-1, 1), "false_pairs": (0, 0.5), "max_distance_m": (0.001, 30_000)}


@dataclass(frozen=True)
class ClusterOptions:
    model_id: str = ""
    threshold: float | None = None
    false_pairs: float | None = None
    positions: tuple[str, ...] | None = None
    max_distance_m: float = 150.0
    look_alike: int | None = None
    labels: Path | None = None
    html: bool = False
    input: Path | None = None
    overwrite: bool = False


def read_rows(dataset: EmbeddingsDataset) -> tuple[pa.Table, Embeddings]:
    """Return the columns of all embedded images but the embeddings, and these (N, D).

    Raises InputError where one is not finite or not of unit length.
    """
    names = [name for name in dataset.schema.names if name != EMBEDDING_COLUMN]
    if not dataset.num_rows:
        raise InputError(f"{dataset.folder}: holds no embedded image: nothing to group")
    embeddings = np.concatenate(list(dataset.read_blocks()))
    if not (np.abs(np.linalg.norm(embeddings, axis=1) - 1) <= NORM_TOLERANCE).all():
        raise InputError(
            f"{dataset.folder}: holds embeddings that are not finite or not of unit length: run "
            "verify_embeddings.py --repair, then stage 8 again"
        )
    return pa.concat_tables([part.read(names) for part in dataset.parts]).unify_dictionaries(), embeddings


def read_positions(columns: pa.Table, names: tuple[str, ...]) -> NDArray[np.float64]:
    """Return the latitude and longitude of each row (N, 2) in degrees, NaN where one is missing.

    Raises InputError where a column is missing, holds no numbers, or no degrees.
    """
    positions = np.empty((len(columns), 2))
    for place, (name, limit) in enumerate(zip(names, (90, 180), strict=True)):
        if name not in columns.column_names:
            raise InputError(f"--positions: the dataset has no column {name}: run stage 8 with --keep-columns {name}")
        try:
            if pa.types.is_boolean(columns[name].type):
                raise pa.ArrowTypeError("casts to 0 and 1")
            degrees = columns[name].cast(pa.float64(), safe=False).to_numpy()
        except pa.ArrowException:
            raise InputError(
                f"--positions: column {name} holds {columns[name].type}, no degrees: give numbers"
            ) from None
        if (np.abs(degrees) > limit).any():
            raise InputError(
                f"--positions: column {name} holds {np.nanmax(np.abs(degrees)):g}, beyond {limit} degrees: give LAT,LON"
            )
        positions[:, place] = degrees
    if not (np.abs(positions) > (np.pi / 2, np.pi)).any():
        logger.warning("--positions: all lie within a radian or two of 0, 0: give degrees, if these are none")
    positions[~np.isfinite(positions).all(axis=1)] = np.nan
    return positions


def choose_threshold(
    dataset: EmbeddingsDataset, options: ClusterOptions, embeddings: Embeddings, num_pairs: int
) -> tuple[dict[str, Any], Embeddings]:
    """Return the cosine to cut at for so many pairs of images, with what is expected there, and the rows to compare.

    A given threshold needs no model and compares the embeddings; validation's is one of centred rows. Raises
    ConfigError without either, InputError where the model has no table or is another one.
    """
    if options.threshold is not None:
        return {"threshold": options.threshold, "threshold_from": "given"}, embeddings
    if not options.model_id:
        raise ConfigError("--model-id: give the model that made the embeddings, or a --threshold")
    model = find_model(options.model_id, download=False)
    model.check_made(dataset)
    table, centred = read_pairs(model.folder, "near" if options.positions else "all"), centre(embeddings)
    candidates = max(1.0, 2 * num_pairs / dataset.num_rows)
    shift = read_pairs(model.folder, "all").measure_shift(centred)
    if options.false_pairs is None:
        threshold = table.choose_threshold(candidates, shift)
    else:
        threshold = table.threshold_at(options.false_pairs) + shift
    return {
        "threshold": round(threshold, 6), "threshold_from": "validation", "shift": round(shift, 6),
        "false_pairs": float(table.partners_at(threshold, candidates, shift)) / candidates,
        "expected_wrong_pair_share": table.expect_wrong_share(threshold, candidates, shift),
    }, centred  # fmt: skip


def summarize(table: pa.Table, threshold: dict[str, Any] | None, labels: pa.Array | None) -> dict[str, Any]:
    """Return the counts and sizes of groups, and their scores by the buildings of the dataset's rows where known."""
    groups = table[CLUSTER_COLUMN].to_numpy()
    sizes = np.bincount(groups)
    summary: dict[str, Any] = {
        "tool": STAGE, "ids" if threshold is None else "images": len(table), "clusters": len(sizes),
        "alone": int((sizes == 1).sum()), "largest": int(sizes[0]),
        "clusters_by_size": {
            f"{2**power}-{2 ** (power + 1) - 1}" if power else "1": count
            for power, count in enumerate(np.bincount(np.log2(sizes).astype(int)).tolist())
        },
    }  # fmt: skip
    if threshold is not None and summary["largest"] > max(GIANT_IMAGES, GIANT_SHARE * len(table)):
        summary["giant"] = {"cluster": 0, "images": summary["largest"]}
        logger.warning("cluster 0 holds %d of %d images: copies of one picture, or a threshold that is too low",
                       summary["largest"], len(table))  # fmt: skip
    summary |= threshold or {}
    if "expected_wrong_pair_share" in summary:
        summary["expected_wrong_pairs"] = summary["expected_wrong_pair_share"] * (sizes * (sizes - 1.0)).sum() / 2
    if labels is not None:
        own = labels.take(table[ROW_COLUMN].combine_chunks())
        is_known = own.is_valid().to_numpy(zero_copy_only=False)
        codes = own.drop_null().dictionary_encode().indices.to_numpy()
        summary |= {"labelled_images": len(codes), "measures": measure_groups(groups[is_known], codes)}
    return summary


def cluster(dataset: EmbeddingsDataset, options: ClusterOptions) -> tuple[pa.Table, cli.StageResult]:
    """Write the groups with their summary, and return their table, the paths and the counts.

    Raises InputError for a dataset, model or columns that cannot be used, StaleOutputError for groups of another one.
    """
    result = cli.StageResult(STAGE)
    name = "look_alike" if options.look_alike else "clusters"
    marks = {"parquet": STAGE, "json": f'"{STAGE}"', "html": page_mark(STAGE)}
    path, summary_path, page_path = (dataset.folder / "_clusters" / f"{name}.{suffix}" for suffix in marks)
    for place in (path, summary_path, page_path)[: 2 + options.html]:
        check_replaceable(place, marks[place.suffix[1:]])
    source = dataset.open_input(options.input) if options.input is not None else None
    columns, embeddings = read_rows(dataset)
    ids = columns[ID_COLUMN].combine_chunks()
    labels = label_rows(to_text(dataset.folder, ids), options.labels) if options.labels is not None else None
    positions = read_positions(columns, options.positions) if options.positions else None
    rows, threshold, compared = np.arange(dataset.num_rows), None, embeddings
    if options.look_alike:
        columns, embeddings, positions, rows = average_ids(columns, embeddings, positions)
        settings: dict[str, Any] = {"look_alike": options.look_alike}
    else:
        num_pairs = count_pairs(dataset.num_rows, positions, options.max_distance_m)
        threshold, compared = choose_threshold(dataset, options, embeddings, num_pairs)
        settings = {name: threshold[name] for name in ("threshold", "threshold_from")}
    check_names("the dataset's kept columns", MADE_COLUMNS, columns.column_names)
    if options.positions:
        settings |= {"positions": list(options.positions), "max_distance_m": options.max_distance_m}
    provenance = make_provenance(STAGE, [dataset.identify()], settings)
    if is_complete(path, provenance, options.overwrite):
        result.kept.append(path)
    else:
        if threshold is None:
            groups, figure = find_types(embeddings, options.look_alike or 1)
        else:
            groups, figure = group_images(compared, threshold["threshold"], positions, options.max_distance_m)
        noted = {"adjusted_rand_between_starts" if threshold is None else "search_recall": figure}
        made = make_table(columns, embeddings, groups, positions, rows)
        write_parquet(path, made, provenance | {"noted": noted}, {} if positions is None else POINTS_METADATA)
        result.written.append(path)
    table = read_table(path)
    summary = summarize(table, threshold, labels) | (read_provenance(path) or {}).get("noted", {})
    if read_json_object(summary_path) != summary:
        write_json(summary_path, summary)
    logger.info("%s", ", ".join(f"{name} {value}" for name, value in list_facts(summary)))
    if options.html:
        write_page(page_path, table, summary, lambda rows: dict(dataset.read_images(source, rows)) if source else {})
        result.written.append(page_path)
    elif path in result.written and carries(page_path, page_mark(STAGE)):
        remove(page_path)  # it shows the groups that were replaced
    num_out = int(columns[COUNT_COLUMN].to_numpy().sum()) if options.look_alike else dataset.num_rows
    result.add({"in": dataset.num_rows, "out": num_out, "dropped": dataset.num_rows - num_out})
    return table, result


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_tool_parser(__doc__ or "")
    add_model_option(parser, default="")
    add = parser.add_argument
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument(
        "--threshold", type=float, metavar="COSINE", help="mean cosine to cut at (default: by the model's validation)"
    )
    cut.add_argument("--false-pairs", type=float, metavar="RATE", help="share of pairs of two buildings that reach it")
    cut.add_argument(
        "--look-alike", type=cli.whole_number, metavar="N", help="make N groups of ids that look alike, by k-means"
    )
    add("--positions", metavar="LAT,LON", help="kept columns in degrees: compare near images")
    add("--max-distance-m", type=float, default=150.0, metavar="M", help="how far that is (150)")
    add("--labels", type=Path, metavar="FILE", help="parquet or CSV of OSMID and building_id, to measure by")
    add("--html", action="store_true", help="write a page too")
    add("--input", "-i", type=Path, metavar="PATH", help="packaged images, for the page's photographs")
    add("--overwrite", action="store_true", help="make again what is there already")
    arguments = vars(parser.parse_args(argv))
    arguments.pop("trust_remote_code")
    for name, (low, high) in RANGES.items():
        if arguments[name] is not None and not low < arguments[name] <= high:
            raise ConfigError(f"--{name.replace('_', '-')}: give a number above {low:g}, up to {high:g}")
    if arguments["positions"] is not None:
        arguments["positions"] = names = tuple(name.strip() for name in arguments["positions"].split(","))
        if len(set(names)) != 2 or re.match("(.*_)?(lon|lng)", names[0], re.IGNORECASE):
            raise ConfigError("--positions: give two kept columns, LAT,LON")
    run_tool(STAGE, arguments.pop("output"), lambda dataset: cluster(dataset, ClusterOptions(**arguments))[1])


if __name__ == "__main__":
    cli.run_guarded(main)
