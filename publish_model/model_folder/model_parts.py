"""The parts that stage 7 makes a published model of: the backbone, the trained projector, and what was measured."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, one_line
from pipeline.inference.model_files import LICENCE_FILES, is_within
from pipeline.log import logger
from pipeline.retrieval.checkpoint import Checkpoint

LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class ModelParts:
    """What a published model is made of.

    `folder` has the image processor, card and licence of the backbone; `config` is the published config.json without
    provenance. `load` returns the whole model, its backbone in a type or as stored (`auto`).
    """

    folder: Path
    config: dict[str, Any]
    load: Callable[[str], Any]
    checkpoint: Checkpoint
    image_size: int | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # of the validation split, where measured
    pair_rates: dict[str, Any] | None = None  # the content of pair_rates.json

    def list_licences(self) -> list[Path]:
        """List the licence texts that came with it; a link out of the folder could publish any file of the user's."""
        paths = {path for pattern in LICENCE_FILES for path in self.folder.glob(pattern)}
        found = sorted(path for path in paths if path.is_file() and path.suffix != ".py")
        for path in found:
            if not is_within(path):
                logger.warning("%s: a link out of the model's folder, which is not followed", path)
        return [path for path in found if is_within(path)]

    def read_licence(self) -> dict[str, str]:
        """Return what the backbone's card says of its licence: `license`, `license_name`, `license_link`.

        Raises InputError where the card's metadata cannot be read.
        """
        from huggingface_hub.repocard import metadata_load
        from yaml import YAMLError

        path = self.folder / "README.md"
        try:
            found = (metadata_load(path) or {}) if path.is_file() else {}
            listed = {key: value if isinstance(value := found.get(key), list) else [value] for key in LICENCE_KEYS}
            # Text alone: a few lines of lists in lists, by reference, are written out without end.
            texts = {key: ", ".join(one for one in values if isinstance(one, str)) for key, values in listed.items()}
            return {key: text for key, text in texts.items() if text}
        except (YAMLError, ValueError, OSError, RecursionError, AttributeError) as error:
            raise InputError(
                f"{path}: its metadata cannot be read ({one_line(error)[:100]}): fetch the model again"
            ) from None
