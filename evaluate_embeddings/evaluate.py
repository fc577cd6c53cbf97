"""Stage 9: score raw, PCA-whitened, whitened and projected embeddings by retrieval on the test split, with a report.

    python evaluate_embeddings/evaluate.py --config config.toml
    python evaluate_embeddings/evaluate.py --compare other_checkpoint.pt
    python evaluate_embeddings/evaluate.py --embeddings OUTPUT --labels labels.parquet --compare OTHER_OUTPUT

Reads merged_dir/{train,val,test}.parquet and checkpoint_dir/checkpoint_best.pt; for the page also photographs from the
tars of raw_dir, if they are there. Writes report_dir/report.html and report_dir/metrics.json. A rerun keeps both if
they were made from the same inputs. With --compare or --embeddings it scores these models instead, prints a table with
the verdict last, and writes nothing.
"""

import contextlib
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: import from the project, not this folder


from evaluate_embeddings.scores.fairness import doubt_split
from evaluate_embeddings.scores.groups import MAX_IMAGES, summarize_groups
from evaluate_embeddings.scores.metrics import (
    GALLERY_SIZES,
    KIND_LABELS,
    KINDS,
    Evaluation,
    build_metrics,
    sample_gallery,
)
from evaluate_embeddings.scores.standalone import CHECKPOINT_NAME, STAGE, EvaluateOptions, run_standalone
from evaluate_embeddings.scores.tables import format_metrics_table
from pipeline import cli
from pipeline.config import PROJECT_ROOT, Config
from pipeline.errors import ConfigError, InputError, StaleOutputError
from pipeline.files.identity import identify
from pipeline.files.outputs import check_replaceable, page_mark
from pipeline.files.tables import make_provenance, open_parquet, read_provenance
from pipeline.files.units import Unit, keep_complete
from pipeline.log import Progress, Stopwatch, logger
from pipeline.retrieval.features import Features, check_one_run, load_features
from pipeline.retrieval.labels import read_ignore_pairs, resolve_pairs
from pipeline.retrieval.scores import Embeddings, normalise_rows, score_queries_twice
from pipeline.stages import STAGES
from pipeline.workspace import write_json

if TYPE_CHECKING:
    import torch

    from pipeline.retrieval.checkpoint import Checkpoint, StateDict

# Width of the whitened baseline, and the projector's default.
PCA_DIM = 256


def read_commit(root: Path = PROJECT_ROOT) -> str | None:
    """Return the git commit that is checked out in the project's folder, None if it is no git checkout."""
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    lines = answer.stdout.split("\n")
    return lines[1] if answer.returncode == 0 and Path(lines[0]).resolve() == root else None


def hash_weights(weights: "StateDict") -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        values = weight.detach().cpu().float().contiguous().numpy()
        digest.update(f"{name}\0{values.shape}\0".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()[:32]


def embed_split(config: Config, device: "torch.device") -> tuple[Features, dict[str, Embeddings], "Checkpoint"]:
    """Return the test split, its embeddings of each kind, and the projector's checkpoint."""
    from pipeline.inference.devices import needing_memory
    from pipeline.retrieval.checkpoint import build_projector, load_checkpoint, project
    from pipeline.retrieval.whitening import DEFAULT_SHRINKAGE, collect_scatters, whiten_by_pca, whiten_within_class

    train_path, test_path = (config.path("merged_dir") / f"{split}.parquet" for split in ("train", "test"))
    check_one_run(train_path, test_path)
    features = load_features(test_path)
    if len(features) == len(features.building_ids):
        raise InputError(f"{test_path}: every building has one image, so that nothing can be found: give more images")
    train = load_features(train_path)
    if train.width != features.width:
        raise InputError(
            f"{train_path}: embeddings of {train.width} numbers, those of {test_path.name} have {features.width}: "
            "run stage 3 again on embeddings of one backbone"
        )
    checkpoint = load_checkpoint(
        config.path("checkpoint_dir") / CHECKPOINT_NAME, config.training_model, input_dim=features.width
    )
    shrinkage = checkpoint.rest.get("start", {}).get("shrinkage", DEFAULT_SHRINKAGE)  # not every checkpoint names one
    with needing_memory("the scatter of the training images", "or set [infrastructure].device to cpu"):
        scatter = collect_scatters(train.embeddings, train.building_codes, device=device)[0]
        whitening = whiten_within_class(scatter, checkpoint.architecture["output_dim"], shrinkage)
        pca = whiten_by_pca(scatter, PCA_DIM)
    embeddings = {
        "raw": normalise_rows(features.embeddings),
        "pca_whitened": pca.apply(features.embeddings),
        "whitening": whitening.apply(features.embeddings),
        "projector": project(build_projector(checkpoint), features.embeddings, device),
    }
    return features, embeddings, checkpoint


def score_split(
    features: Features, embeddings: dict[str, Embeddings], ignored: NDArray[np.int64], seed: int, device: "torch.device"
) -> tuple[Evaluation, dict[str, Any]]:
    total = len(KINDS) * (len(features) + sum(size for size in GALLERY_SIZES if size <= len(features)))
    with Progress("score", total, "queries") as progress:
        codes, scores, apart = features.building_codes, {}, {}
        for kind, rows in embeddings.items():
            try:
                scores[kind], without = score_queries_twice(
                    rows, codes, features.panorama_codes, ignored=ignored, device=device, progress=progress.advance
                )
            except InputError as error:
                raise InputError(f"{KIND_LABELS[kind]} {error}") from None
            if without is not None:
                apart[kind] = without
        evaluation = Evaluation(features, embeddings, ignored, scores, apart or None, device)
        return evaluation, build_metrics(evaluation, seed, progress.advance)


def group_split(
    evaluation: Evaluation, checkpoint: "Checkpoint", merged_dir: Path, seed: int, device: "torch.device"
) -> dict[str, Any] | None:
    """Measure groups of test images that are made without labels, None where there is no validation split to cut by."""
    from pipeline.retrieval.checkpoint import build_projector, project

    if not has_validation(merged_dir):
        return None
    check_one_run(merged_dir / "test.parquet", merged_dir / "val.parquet")
    val = load_features(merged_dir / "val.parquet")
    rows = sample_gallery(val.building_codes, MAX_IMAGES, seed)
    validation = project(build_projector(checkpoint), val.embeddings[rows], device), val.building_codes[rows]
    rows = sample_gallery(evaluation.codes, MAX_IMAGES, seed)
    return summarize_groups((evaluation.embeddings["projector"][rows], evaluation.codes[rows]), validation)


def has_validation(merged_dir: Path) -> bool:
    """Return whether there is a validation split with images; a small run may have none."""
    path = merged_dir / "val.parquet"
    return path.is_file() and open_parquet(path).metadata.num_rows > 0


def describe_inputs(config: Config, ignore_pairs: Path | None) -> dict[str, Any]:
    merged_dir = config.path("merged_dir")
    splits = ("train", "val", "test") if has_validation(merged_dir) else ("train", "test")
    paths = [*(merged_dir / f"{split}.parquet" for split in splits), config.path("checkpoint_dir") / CHECKPOINT_NAME]
    inputs = [identify(path) for path in paths]
    if ignore_pairs is not None:
        inputs.append(identify(ignore_pairs) | {"name": f"--ignore-pairs {ignore_pairs.name}"})
    return make_provenance(STAGE, inputs, {"seed": config.global_.seed})


def find_raw_dir(config: Config) -> Path | None:
    with contextlib.suppress(ConfigError):  # not set, or of an undefined variable: the page has no photographs
        return config.path("raw_dir") if config.path("raw_dir").is_dir() else None
    return None


def list_units(config: Config, ignore_pairs: Path | None = None) -> list[Unit]:
    outputs = STAGES[9].list_outputs(config)
    return [Unit(STAGE, outputs, lambda _: describe_inputs(config, ignore_pairs))]


def run(config: Config, options: cli.Options) -> cli.StageResult:
    """Score the test split, write the page and the metrics, and return the counts; or score what the options name."""
    own = options if isinstance(options, EvaluateOptions) else EvaluateOptions(overwrite=options.overwrite)
    if own.embeddings is not None or own.compare is not None:
        return run_standalone(config, own)
    config.require_paths("merged_dir", "checkpoint_dir", "report_dir")
    (unit,) = list_units(config, own.ignore_pairs)
    metrics_path, report_path = unit.outputs
    result = cli.StageResult(STAGE)
    raw_dir = find_raw_dir(config)
    if keep_complete(unit, result, own.overwrite):
        page = report_path.read_text(encoding="utf-8", errors="replace")
        if not all(
            (one.get("footer") or one["hash"]) in page for one in describe_inputs(config, own.ignore_pairs)["inputs"]
        ):
            raise StaleOutputError(f"{report_path}: not the page of these inputs: give --overwrite to make it again")
        if raw_dir is None and "data:image/" in page:
            logger.warning("%s: shows photographs, though raw_dir is no folder: --overwrite omits them", report_path)
        return result
    from pipeline.inference.devices import choose_device

    check_replaceable(report_path, page_mark(STAGE))
    provenance, merged_dir = describe_inputs(config, own.ignore_pairs), config.path("merged_dir")
    watch, device, seed = Stopwatch(), choose_device(config.infrastructure.device), config.global_.seed
    pairs = read_ignore_pairs(own.ignore_pairs)
    with watch.measure("load and embed"):
        features, embeddings, checkpoint = embed_split(config, device)
    ignored = resolve_pairs(pairs, features.building_ids)
    with watch.measure("score"):
        evaluation, metrics = score_split(features, embeddings, ignored, seed, device)
        metrics["groups"] = group_split(evaluation, checkpoint, merged_dir, seed, device)
    metrics["warning"] = doubt_split(checkpoint, merged_dir / "test.parquet", features.building_ids)
    if metrics["warning"]:
        logger.warning("%s: %s", STAGE, metrics["warning"])
        metrics["headline"] = f"{metrics['warning']}. {metrics['headline']}"
    counts = {"in": len(features), "out": len(features)}
    metrics["provenance"] = provenance | {
        "counts": counts,
        "seed": seed,
        "split_hash": (read_provenance(merged_dir / "test.parquet") or {}).get("split_hash"),
        "commit": read_commit(),
        "weights_hash": hash_weights(checkpoint.projector),
        "training_settings": checkpoint.settings,
    }
    with watch.measure("report"):
        from evaluate_embeddings.page.report import write_report

        write_report(report_path, evaluation, metrics, merged_dir / "test.parquet", raw_dir)
    write_json(metrics_path, metrics)
    logger.info("%s%s\n\n%s\n", STAGE, watch.describe_parts(), format_metrics_table(metrics))
    result.add(counts)
    result.written += [report_path, metrics_path]
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--ignore-pairs", type=Path, metavar="CSV",
        help="pairs of buildings (building_id_a, building_id_b) that count as neither right nor wrong",
    )  # fmt: skip
    parser.add_argument(
        "--embeddings", type=Path, metavar="DIR",
        help="score this embeddings dataset of stage 8 instead; needs no checkpoint and no split",
    )  # fmt: skip
    parser.add_argument(
        "--labels", type=Path, metavar="FILE",
        help="parquet or CSV: building_id of each OSMID or streetview_image_id (default: the OSMID itself)",
    )  # fmt: skip
    parser.add_argument(
        "--compare", type=Path, metavar="OTHER",
        help="another checkpoint, or dataset with --embeddings: which is better on the same images, how surely",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    options = cli.options_from(arguments, EvaluateOptions)
    if options.labels is not None and options.embeddings is None:
        raise ConfigError("evaluate.py: --labels belongs to --embeddings: give both, or neither")
    cli.run_stage(STAGE, run, cli.config_from(arguments), options)


if __name__ == "__main__":
    cli.run_guarded(main)
