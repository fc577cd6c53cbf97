"""Read a model that the reference implementation published, and rebuild it with our own code.

Its folder has weights under `backbone.` and `projector.`, and a config.json that names the backbone; the backbone's own
folder has the configuration and the image processor. The model's code, which would fetch the backbone, is never run.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import TrainingModelSection
from pipeline.errors import InputError, one_line
from pipeline.files.identity import hash_json
from pipeline.files.workspace import private_folder
from pipeline.inference.model_files import (
    identify_model,
    locate_backbone_settings,
    names_its_backbone,
    read_settings,
)

if TYPE_CHECKING:
    from pipeline.retrieval.checkpoint import Checkpoint

PROCESSOR_NAMES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ReferenceModel:
    """A folder that the reference implementation published, and the folder of its backbone's settings."""

    folder: Path
    config: dict[str, Any]
    backbone_dir: Path

    @property
    def backbone_name(self) -> str:
        """The backbone's public name: its hub id, or a local folder's name, never its path."""
        name = str(self.config["backbone_model_name"])
        return Path(name).name if Path(name).is_dir() else name

    def find_processor(self) -> Path:
        """Return the file of the image processor, the model's own or the backbone's."""
        for folder in (self.folder, self.backbone_dir):
            for name in PROCESSOR_NAMES:
                if (folder / name).is_file():
                    return folder / name
        raise InputError(f"{self.backbone_dir}: {PROCESSOR_NAMES[0]} is missing: fetch the backbone's files again")

    def identify(self) -> str:
        """Return a short id of everything that determines the embeddings, wherever the folders lie."""
        settings = [read_settings(path) for path in (self.backbone_dir / "config.json", self.find_processor())]
        return hash_json([identify_model(self.folder), *settings])[:16]

    def read_projector(self) -> "Checkpoint":
        """Return the projector with the names and the architecture of our own."""
        from pipeline.inference.stored_weights import list_stored
        from pipeline.reference.checkpoints import read_weights
        from pipeline.retrieval.checkpoint import make_checkpoint

        stored = [tensor for tensor in list_stored(self.folder) if tensor.name.startswith("projector.")]
        if not stored:
            raise InputError(f"{self.folder}: holds no projector weights: fetch the model again, in safetensors")
        weights = {tensor.name: tensor.read().float() for tensor in stored}
        section = TrainingModelSection(dropout=0.0, activation=self._find_activation())
        return make_checkpoint(self.folder, read_weights(self.folder, weights, section, is_activation_known=True))

    def _find_activation(self) -> Any:
        """Return the projector's activation."""
        inner = [value for key, value in self.config.items() if isinstance(value, dict) and key != "backbone_config"]
        for settings in (self.config, *inner):
            name = str(settings.get("activation", settings.get("projector_activation"))).lower()
            if name in ("relu", "gelu", "silu"):
                return name
        raise InputError(
            f"{self.folder / 'config.json'}: does not say the projector's activation (relu, gelu or silu): add it as "
            '"activation"'
        )

    def find_pooling(self) -> Literal["cls_token", "pooler_output"]:
        """Return the backbone output that the model's code takes: `pooler_output` if there is one, else `cls_token`.

        The backbone is built on the meta device and run without numbers, to see its outputs.
        """
        import torch

        from pipeline.inference.stored_weights import build_empty

        config, model = build_empty(self.backbone_dir)
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        try:
            with torch.inference_mode():
                pixels = torch.empty(1, getattr(config, "num_channels", 3), height, width, device="meta")
                outputs = model.eval()(pixel_values=pixels)
        except (TypeError, RuntimeError) as error:
            raise InputError(
                f"{self.backbone_dir}: this backbone cannot be run ({one_line(error)[:200]}): use a version of "
                "transformers that knows it"
            ) from None
        return "cls_token" if getattr(outputs, "pooler_output", None) is None else "pooler_output"

    def make_class(self, base: type) -> Any:
        """Return a published model's class that ignores the projector under the reference's names.

        The linked files of `build_folder` hold it; ours is read from another file.
        """
        return type(base.__name__, (base,), {"_keys_to_ignore_on_load_unexpected": [r"^projector\."]})

    def build_folder(self, describe: Callable[..., dict[str, Any]]) -> Path:
        """Make a folder in our own format for as long as this process runs; link the backbone's weights.

        `describe` makes its config.json.
        """
        from safetensors.torch import save_file

        from pipeline.inference.stored_weights import locate_weights

        checkpoint = self.read_projector()
        folder = private_folder("spatial-embeddings-model-")
        paths = {name: path for name, path in locate_weights(self.folder).items() if name.startswith("backbone.")}
        for path in set(paths.values()):  # under other names: a model.safetensors would be read alone
            (folder / f"linked-{path.name}").symlink_to(path.resolve())
        weight_map = {name: f"linked-{path.name}" for name, path in paths.items()}
        projector = {f"projector.{name}": tensor.contiguous() for name, tensor in checkpoint.projector.items()}
        save_file(projector, folder / "projector.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(projector, "projector.safetensors")
        config = describe(
            self.backbone_name,
            read_settings(self.backbone_dir / "config.json"),
            self.find_pooling(),
            checkpoint.architecture,
        )
        contents = {"config.json": config, "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map}}
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(self.find_processor(), folder / self.find_processor().name)
        return folder


def open_reference(folder: Path, *, download: bool) -> ReferenceModel | None:
    """Return the model in a folder of the reference implementation, None for any other folder.

    Raises InputError if the backbone's settings are not on this machine and cannot be downloaded.
    """
    if not names_its_backbone(folder):
        return None
    return ReferenceModel(folder, read_settings(folder / "config.json"), locate_backbone_settings(folder, download))
