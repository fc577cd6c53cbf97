"""Pages that need no other file; one of groups: their sizes, and the largest, the least sure and the most alike."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.inference.images import decode_rgb
from pipeline.pages import load_templates, to_data_uri
from pipeline.workspace import writing_to
from publish_model.derived.image_groups import CLUSTER_COLUMN, ROW_COLUMN
from publish_model.new_data.id_lists import describe_id

TEMPLATES_DIR = Path(__file__).resolve().parents[1] / "templates"
SHOWN_CLUSTERS, SHOWN_MEMBERS, THUMBNAIL_PX = 8, 4, 224


def write_html(path: Path, template: str, **content: Any) -> None:
    """Write a page from a template; lone surrogates in it are escaped."""
    page = load_templates(TEMPLATES_DIR).get_template(template).render(content)
    with writing_to(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def make_thumbnail(image: bytes | None) -> str | None:
    """Return an image file as a small data URI."""
    return None if image is None else to_data_uri(decode_rgb(image), THUMBNAIL_PX, 85)


def choose_examples(table: pa.Table) -> dict[str, list[list[int]]]:
    """Return by title lists of places in a table of groups: a medoid, and the members least like it, or most."""
    similarity, sizes = table["similarity"].to_numpy(), np.bincount(table[CLUSTER_COLUMN].to_numpy())
    ends = np.cumsum(sizes)
    starts, several = ends - sizes, np.flatnonzero(sizes > 1)
    if not len(several):
        return {}
    means = (np.add.reduceat(similarity, starts)[several] - 1) / (sizes[several] - 1)
    alike = several[np.argsort(-similarity[starts[several] + 1], kind="stable")]

    def take(numbers: Any) -> list[list[int]]:
        bounds = [(int(starts[number]), int(ends[number])) for number in numbers[:SHOWN_CLUSTERS]]
        return [[first, *range(max(first + 1, end - SHOWN_MEMBERS + 1), end)] for first, end in bounds]

    return {
        "The largest, with their least similar images": take(several),
        "The least sure": take(several[np.argsort(means, kind="stable")]),
        "The most alike": [[int(first), int(first) + 1] for first in starts[alike[:SHOWN_CLUSTERS]]],
    }


def list_facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of a summary as text, without sizes."""
    facts = {key: value for key, value in summary.items() if key != "tool" and not isinstance(value, dict)}
    facts |= summary.get("measures", {})
    return [
        (name.replace("_", " "), f"{one:.4g}" if isinstance(one, float) else str(one)) for name, one in facts.items()
    ]


def write_page(
    path: Path, table: pa.Table, summary: dict[str, Any], read_images: Callable[[list[int]], Mapping[int, bytes]]
) -> None:
    """Write a page of groups; `read_images` returns image files by ascending row."""
    rows, sizes = table[ROW_COLUMN].to_numpy(), np.bincount(table[CLUSTER_COLUMN].to_numpy())
    examples = choose_examples(table)
    images = read_images(sorted({int(rows[place]) for lists in examples.values() for one in lists for place in one}))

    def describe(place: int) -> dict[str, Any]:
        number, similarity = (table[name][place].as_py() for name in (CLUSTER_COLUMN, "similarity"))
        return {
            "picture": make_thumbnail(images.get(int(rows[place]))), "identifier": describe_id(table[0][place]),
            "similarity": similarity, "number": number, "size": sizes[number],
        }  # fmt: skip

    sections = {title: [[describe(place) for place in one] for one in lists] for title, lists in examples.items()}
    things = "images" if "images" in summary else "ids"
    write_html(path, "clusters.html.j2", summary=summary, facts=list_facts(summary), sections=sections, things=things)
