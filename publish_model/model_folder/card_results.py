"""Put the results of stage 9 on the model card, once there are any of the model that it describes."""

import textwrap
from pathlib import Path
from typing import Any

from pipeline.files.tables import PROVENANCE_KEY
from pipeline.files.writing import read_json_object, writing_to

ROWS = {
    "raw": "backbone alone",
    "pca_whitened": "backbone, PCA-whitened",
    "whitening": "within-class whitening alone",
    "projector": "**this model**",
}
COLUMNS = {
    "recall_at_1": "Recall@1",
    "recall_at_5": "Recall@5",
    "recall_at_10": "Recall@10",
    "map": "mAP",
    "mrr": "MRR",
}
_BEGIN, _END = "<!-- test results -->", "<!-- end of test results -->"
PENDING = f"""{_BEGIN}

Not measured on the test split when this card was written.

{_END}"""


def add_test_results(folder: Path, metrics_path: Path) -> bool:
    """Write stage 9's figures and their intervals onto a published folder's card; whether anything was written.

    Nothing is where there is no such folder, there are no figures, or they are of another checkpoint than the folder's.
    """
    card_path = folder / "README.md"
    metrics, config = read_json_object(metrics_path), read_json_object(folder / "config.json")
    published_from = _checkpoint_hashes(config.get(PROVENANCE_KEY.decode()))
    if not card_path.is_file() or not published_from & _checkpoint_hashes(metrics.get("provenance")):
        return False
    card = card_path.read_text(encoding="utf-8")
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    updated = f"{before}{_BEGIN}\n\n{format_test_results(metrics)}\n\n{_END}{after}"
    if not (begin and end) or updated == card:
        return False
    with writing_to(card_path) as temporary:
        temporary.write_text(updated, encoding="utf-8")
    return True


def format_test_results(metrics: dict[str, Any]) -> str:
    """Return the figures of metrics.json as a table, each with its 95 % interval."""
    lines = [f"| | {' | '.join(COLUMNS.values())} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for row, title in ROWS.items():
        if row in metrics:
            values = [_format_value(metrics[row], key) for key in COLUMNS]
            lines.append(f"| {title} | {' | '.join(values)} |")
    table = "\n".join(lines)
    ignored = f" {metrics['ignored_pairs']} pairs of buildings count as neither." if metrics["ignored_pairs"] else ""
    text = (
        "On the test split, which neither training nor the choice of the epoch has seen: "
        f"{metrics['queries']} images of {metrics['buildings']} buildings search {metrics['gallery']} images; right is "
        f"another image of the same building.{ignored} In brackets are 95 % intervals, from resampling buildings."
    )
    if "headline" in metrics:  # an older stage 9 says none
        table += "\n\n" + wrap(f"**{metrics['headline']}**, by the 95 % interval of the difference in mAP.")
    return f"{wrap(text)}\n\n{table}"


def wrap(text: str) -> str:
    """Break a paragraph into lines."""
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


def _format_value(scores: dict[str, Any], key: str) -> str:
    low, high = scores[f"{key}_ci95"]
    return f"{scores[key]:.3f} [{low:.3f}, {high:.3f}]"


def _checkpoint_hashes(provenance: Any) -> set[str]:
    inputs = provenance.get("inputs", []) if isinstance(provenance, dict) else []
    return {item["hash"] for item in inputs if str(item.get("name")).endswith(".pt") and "hash" in item}
