"""Write the published model's README, a model card in the hub's format, and put stage 9's results on it."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.files.tables import PROVENANCE_KEY
from pipeline.files.workspace import read_json_object, writing_to
from pipeline.pages import load_templates
from pipeline.retrieval.scores import list_unreached

if TYPE_CHECKING:
    from publish_model.model_folder.model_parts import ModelParts

TEMPLATES_DIR = Path(__file__).resolve().parents[1] / "templates"
NAME = "Spatial building embeddings"
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


def worse_than(metrics: Metrics) -> list[str]:
    """Return the baselines whose validation mAP the projector does not reach; see `list_unreached`."""
    return list_unreached({row: metrics[row] for row in BASELINES}, metrics["projector"]["map"], TOLERANCE)


def is_measured(metrics: Mapping[str, Any]) -> bool:
    """Return whether the mAP of the projector and of each baseline is known."""
    rows = [metrics.get(row) for row in ROWS]
    return all(isinstance(row, dict) and isinstance(row.get("map"), int | float) for row in rows)


def write_card(folder: Path, model: "ModelParts", dtype: str) -> None:
    """Write README.md; `dtype` is the type of the published backbone weights."""
    from huggingface_hub import ModelCard

    licence, licence_files = model.read_licence(), [path.name for path in model.list_licences()]
    backbone_name = model.config["backbone_model_name"]
    text = _render(
        "model_card.md.j2", metadata=_make_metadata(backbone_name, licence, licence_files), name=NAME,
        config=model.config, image_size=model.image_size, checkpoint=model.checkpoint, metrics=model.metrics,
        dtype=dtype, licence=licence,
        unreached={row: ROWS[row] for row in worse_than(model.metrics)} if model.metrics else {},
        licence_files=licence_files,
        has_pair_rates=model.pair_rates is not None,
        versions={package: version(package) for package in ("torch", "transformers")},
    )  # fmt: skip
    ModelCard(text + "\n").save(folder / "README.md")


def _make_metadata(backbone_name: str, licence: Mapping[str, Any], licence_files: list[str]) -> str:
    """Return the card's YAML, which the hub reads."""
    from huggingface_hub import ModelCardData

    named = dict(licence) or {"license": "other", "license_name": "unknown"}
    if named.get("license") == "other" and licence_files:
        named.setdefault("license_link", licence_files[0])
    data = ModelCardData(
        **named,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        base_model=backbone_name if backbone_name.count("/") == 1 else None,  # else it is no hub id
        tags=["image-retrieval", "place-recognition", "street-view", "buildings"],
    )
    return data.to_yaml()


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
    updated = before + _render("test_results.md.j2", test=metrics) + after
    if not (begin and end) or updated == card:
        return False
    with writing_to(card_path) as temporary:
        temporary.write_text(updated, encoding="utf-8")
    return True


def _checkpoint_hashes(provenance: Any) -> set[str]:
    inputs = provenance.get("inputs", []) if isinstance(provenance, dict) else []
    return {item["hash"] for item in inputs if str(item.get("name")).endswith(".pt") and "hash" in item}


def _render(template: str, **content: Any) -> str:
    environment = load_templates(TEMPLATES_DIR)
    environment.globals |= {"begin": BEGIN, "end": END, "results_table": _format_table}
    environment.filters["code"] = _format_code
    return environment.get_template(template).render(content)


def _format_code(value: object) -> str:
    """Return a value as a code span, in which neither Markdown nor HTML is read."""
    text = "".join(character if character.isprintable() else " " for character in str(value))
    return f"`{text.replace('`', chr(39))}`"


def _format_table(metrics: Metrics) -> str:
    """Return the scores as a Markdown table with a line for each row, and the 95 % intervals where they are known."""
    keys = [key for key in SCORES if key in metrics["projector"]]
    lines = [["", *(SCORES[key] for key in keys)], ["---"] * (len(keys) + 1)]
    lines += [[title, *(_format_score(metrics[row], key) for key in keys)] for row, title in ROWS.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _format_score(scores: Mapping[str, Any], key: str) -> str:
    interval = scores.get(f"{key}_ci95")
    return f"{scores[key]:.3f}" + (" [{:.3f}, {:.3f}]".format(*interval) if interval else "")
