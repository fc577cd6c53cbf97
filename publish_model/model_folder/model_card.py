"""Write the published model's README, a model card in the hub's format, and put stage 9's results on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, one_line
from pipeline.files.tables import PROVENANCE_KEY, as_provenance
from pipeline.inference.model_files import LICENCE_FILES, is_within
from pipeline.log import logger
from pipeline.pages import load_templates
from pipeline.retrieval.scores import list_unreached
from pipeline.workspace import read_json_object, writing_to

if TYPE_CHECKING:
    from pipeline.retrieval.checkpoint import Checkpoint

TEMPLATES_DIR = Path(__file__).resolve().parents[1] / "templates"
NAME = "Spatial building embeddings"
_LICENCE_BYTES = 2**20
LICENCE_KEYS = ("license", "license_name", "license_link")
ROWS = {
    "raw": "backbone alone",
    "pca_whitened": "backbone, PCA-whitened",
    "whitening": "within-class whitening alone",
    "projector": "**this model**",
}
BASELINES = tuple(row for row in ROWS if row != "projector")
SCORES = {
    "recall_at_1": "Recall@1",
    "recall_at_5": "Recall@5",
    "recall_at_10": "Recall@10",
    "map": "mAP",
    "mrr": "MRR",
}
# Rounding moves the mAP of a projector that is still the whitening it started from by less; tables show no more.
TOLERANCE = 1e-4
# The card is searched for these, to write stage 9's results between them.
BEGIN, END = "<!-- test results -->", "<!-- end of test results -->"

Metrics = Mapping[str, Mapping[str, Any]]  # by row, then by score


@dataclass(frozen=True)
class ModelParts:
    """What a published model is made of.

    `folder` has the backbone with its image processor, card and licence, `vision` is its configuration; `config` is
    the published config.json without provenance.
    """

    folder: Path
    vision: Any
    config: dict[str, Any]
    checkpoint: "Checkpoint"
    image_size: int | None
    metrics: dict[str, dict[str, float]]  # of the validation split, empty where not measured
    pair_rates: dict[str, Any] | None  # the content of pair_rates.json


def worse_than(metrics: Metrics) -> list[str]:
    """Return the baselines whose validation mAP the projector does not reach; see `list_unreached`."""
    return list_unreached({row: metrics[row] for row in BASELINES}, metrics["projector"]["map"], TOLERANCE)


def is_measured(metrics: Mapping[str, Any]) -> bool:
    """Return whether the mAP of the projector and of each baseline is known."""
    rows = [metrics.get(row) for row in ROWS]
    return all(isinstance(row, dict) and isinstance(row.get("map"), int | float) for row in rows)


def write_card(folder: Path, model: ModelParts, dtype: str, licence_files: list[str]) -> None:
    """Write README.md; `dtype` is the type of the published backbone weights, the files lie beside it."""
    from huggingface_hub import ModelCard, ModelCardData

    licence = _read_licence(model.folder / "README.md")
    backbone_name = model.config["backbone_model_name"]
    named: dict[str, Any] = dict(licence) or {"license": "other", "license_name": "unknown"}
    if named.get("license") == "other" and licence_files:
        named.setdefault("license_link", licence_files[0])
    metadata = ModelCardData(
        **named,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        base_model=backbone_name if backbone_name.count("/") == 1 else None,  # else it is no hub id
        tags=["image-retrieval", "place-recognition", "street-view", "buildings"],
    )
    text = _render(
        "model_card.md.j2", model.checkpoint.path, metadata=metadata.to_yaml(), name=NAME,
        config=model.config, image_size=model.image_size, checkpoint=model.checkpoint, metrics=model.metrics,
        dtype=dtype, licence=licence,
        unreached={row: ROWS[row] for row in worse_than(model.metrics)} if model.metrics else {},
        licence_files=licence_files,
        has_pair_rates=model.pair_rates is not None,
        versions={package: version(package) for package in ("torch", "transformers")},
    )  # fmt: skip
    ModelCard(text + "\n").save(folder / "README.md")


def list_licences(folder: Path) -> list[Path]:
    """List the licence texts in a backbone's folder; a link out of it could publish any file of the user's."""
    paths = {path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.suffix != ".py"}
    found = []
    for path in sorted(paths):
        if not is_within(path):
            logger.warning("%s: a link out of the model's folder, which is not followed", path)
        elif path.is_file() and path.stat().st_size > _LICENCE_BYTES:
            logger.warning("%s: over %d bytes, no licence: left out", path, _LICENCE_BYTES)
        elif path.is_file():
            found.append(path)
    return found


def _read_licence(path: Path) -> dict[str, str]:
    """Return what the backbone's card says of its licence; raise InputError where its metadata cannot be read."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        if path.is_file() and path.stat().st_size > _LICENCE_BYTES:
            raise ValueError(f"over {_LICENCE_BYTES} bytes")
        found = (metadata_load(path) or {}) if path.is_file() else {}
        listed = {key: value if isinstance(value := found.get(key), list) else [value] for key in LICENCE_KEYS}
        # Text alone: a few lines of lists in lists, by reference, are written out without end.
        texts = {key: ", ".join(one for one in values if isinstance(one, str)) for key, values in listed.items()}
        return {key: text for key, text in texts.items() if text}
    except (YAMLError, ValueError, OSError, RecursionError, AttributeError) as error:
        raise InputError(
            f"{path}: its metadata cannot be read ({one_line(error)[:100]}): fetch the model again"
        ) from None


def add_test_results(folder: Path, metrics_path: Path) -> bool:
    """Write stage 9's scores and their intervals onto a published folder's card; return whether the card changed.

    The card stays as it is if there is no such folder, if there are no scores or those of another checkpoint, or if
    somebody has removed the place for them.
    """
    card_path = folder / "README.md"
    metrics, config = read_json_object(metrics_path), read_json_object(folder / "config.json")
    published_from = _checkpoint_hashes(config.get(PROVENANCE_KEY.decode()))
    if not card_path.is_file() or not published_from & _checkpoint_hashes(metrics.get("provenance")):
        return False
    card = card_path.read_text(encoding="utf-8")
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    updated = before + _render("test_results.md.j2", metrics_path, test=metrics) + after
    if not (begin and end) or updated == card:
        return False
    with writing_to(card_path) as temporary:
        temporary.write_text(updated, encoding="utf-8")
    return True


def _checkpoint_hashes(provenance: Any) -> set[str]:
    inputs = (as_provenance(provenance) or {}).get("inputs", [])
    return {str(item["hash"]) for item in inputs if str(item.get("name")).endswith(".pt") and "hash" in item}


def _render(template: str, source: Path, **content: Any) -> str:
    """Fill a template; raise InputError, naming the file that the scores come from, where they have another shape."""
    from jinja2 import TemplateError

    environment = load_templates(TEMPLATES_DIR)
    environment.globals |= {"begin": BEGIN, "end": END, "results_table": _format_table}
    environment.filters["code"] = _format_code
    try:
        return environment.get_template(template).render(content)
    except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
        raise InputError(
            f"{source}: scores that cannot be shown ({type(error).__name__}: {one_line(error)[:200]}): make it again"
        ) from None


def _format_code(value: object) -> str:
    """Return a value as a code span, in which neither Markdown nor HTML is read."""
    text = "".join(character if character.isprintable() else " " for character in str(value))
    return f"`{text.replace('`', chr(39))}`"


def _format_table(metrics: Metrics) -> str:
    keys = [key for key in SCORES if key in metrics["projector"]]
    lines = [["", *(SCORES[key] for key in keys)], ["---"] * (len(keys) + 1)]
    for row, title in ROWS.items():
        intervals = (metrics[row].get(f"{key}_ci95") for key in keys)
        ends = (" [{:.3f}, {:.3f}]".format(*one) if one else "" for one in intervals)
        lines.append([title, *(f"{metrics[row][key]:.3f}{end}" for key, end in zip(keys, ends, strict=True))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
