"""Pages for a browser: templates that escape their values, and pictures as data URIs."""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image


def load_templates(folder: Path) -> "Environment":
    """Return the templates of a folder; values are escaped in `*.html.j2`, and a missing name is an error.

    In a template, `source("page.css")` inserts a style sheet or a script of the folder.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["source"] = lambda name: Markup((folder / name).read_text(encoding="utf-8"))
    return environment


def to_data_uri(image: "Image.Image", side: int, quality: int) -> str:
    """Return an RGB image, its longest side at most `side` pixels, as a JPEG data URI."""
    small, buffer = image.copy(), io.BytesIO()
    small.info = {}  # a comment would be written too
    small.thumbnail((side, side))
    small.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
