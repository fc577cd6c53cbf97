"""Rebuild a model that the reference implementation published, in our own format.

Its folder has weights under `backbone.` and `projector.`, and a config.json that names the backbone; the backbone's own
folder has the configuration and the image processor. The model's code, which would fetch the backbone, is never run.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import EmbeddingModelSection, TrainingModelSection
from pipeline.errors import InputError, one_line
from pipeline.inference.model_files import (
    find_missing_files,
    locate_model,
    read_index,
    read_settings,
    take_snapshot,
)
from pipeline.workspace import private_folder, read_json_object

if TYPE_CHECKING:
    from pipeline.retrieval.checkpoint import Checkpoint

PROCESSOR_NAMES = ("preprocessor_config.json", "processor_config.json")
# The files of a backbone without its weights, which may take 27 GB.
SETTINGS_FILES = ["config.json", "*processor_config.json"]


@dataclass(frozen=True)
class Located:
    """A published model's folder and its config.json."""

    folder: Path
    config: dict[str, Any]


def locate_published(name: str, *, download: bool) -> Located | None:
    """Locate a published model as `locate_model` does; with `download` all that it needs is here then."""
    remedy = "give --model-id a folder that stage 7 wrote, or a hub id"
    folder = locate_model(
        name, remedy, download=download,
        is_whole=lambda found: _is_foreign(read_json_object(found / "config.json")) or not find_missing_files(found),
    )  # fmt: skip
    if folder is None:
        return None
    config = read_settings(folder / "config.json", remedy)
    if download and _is_foreign(config):  # a later job has no internet
        _locate_settings(folder, config, download=True)
    return Located(folder, config)


def in_own_format(found: Located, describe: Callable[..., dict[str, Any]], *, download: bool) -> Path:
    """Return a published folder; one of the reference implementation is rebuilt, for as long as this process runs.

    The backbone's weights are linked. `describe` makes the config.json. Raises InputError where the backbone's settings
    are neither here nor, with `download`, to be had, or a weight is missing.
    """
    folder, config = found.folder.resolve(), found.config
    if not _is_foreign(config):
        return folder
    settings_dir = _locate_settings(folder, config, download)
    paths, weights = _read_weights(folder)
    projector = _map_projector(folder, config, weights)
    rebuilt = private_folder("spatial-embeddings-model-") / folder.name
    rebuilt.mkdir()
    weight_map = _write_weights(rebuilt, paths, projector.projector)
    name = str(config["backbone_model_name"])
    described = describe(
        Path(name).name if Path(name).is_dir() else name,  # a hub id, never a path
        read_settings(settings_dir / "config.json"),
        EmbeddingModelSection(pooling_type=_find_pooling(settings_dir)),
        projector.architecture,
    )
    contents = {"config.json": described, "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map}}
    for file_name, content in contents.items():
        (rebuilt / file_name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    processor = _list_processors(folder, settings_dir)[0]  # the model's own, or the backbone's
    shutil.copyfile(processor, rebuilt / processor.name)
    return rebuilt


def _is_foreign(config: dict[str, Any]) -> bool:
    """Whether a config.json is the reference implementation's: its backbone's settings lie elsewhere."""
    return isinstance(config.get("backbone_model_name"), str) and not isinstance(config.get("backbone_config"), dict)


def _locate_settings(folder: Path, config: dict[str, Any], download: bool) -> Path:
    """Return the folder with the configuration and image processor of the backbone that a published folder names."""

    def is_whole(found: Path) -> bool:
        return (found / "config.json").is_file() and bool(_list_processors(folder, found))

    name = config["backbone_model_name"]
    is_here = Path(name).is_dir()
    found, problem = (Path(name), "") if is_here else take_snapshot(name, SETTINGS_FILES, is_whole, download)
    if found is not None and is_whole(found):
        return found
    raise InputError(
        f"{folder}: the settings of its backbone {name!r} are not to be had, from a folder or the hub "
        f"({problem or 'config.json or preprocessor_config.json is missing there'}): correct "
        "backbone_model_name in its config.json, or fetch the model where there is internet"
    )


def _list_processors(*folders: Path) -> list[Path]:
    return [place / name for place in folders for name in PROCESSOR_NAMES if (place / name).is_file()]


def _read_weights(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Return the safetensors file of each weight, and the projector's weights in float32."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    paths: dict[str, Path] = {}
    weights: dict[str, Any] = {}
    for path in map(folder.joinpath, sorted(read_index(index)) if index.is_file() else ["model.safetensors"]):
        try:
            with safe_open(path, framework="pt") as file:
                paths |= dict.fromkeys(file.keys(), path)
                own = (name for name in file.keys() if name.startswith("projector."))  # noqa: SIM118 (no dict)
                weights |= {name: file.get_tensor(name).float() for name in own}
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"{folder}: its weights cannot be read ({one_line(error)[:200]}): fetch the model again"
            ) from None
    return paths, weights


def _map_projector(folder: Path, config: dict[str, Any], weights: dict[str, Any]) -> "Checkpoint":
    from pipeline.reference.weights import read_weights
    from pipeline.retrieval.checkpoint import make_checkpoint

    if not weights:
        raise InputError(f"{folder}: holds no projector weights: fetch the model again, in safetensors")
    places = (config, *(value for value in config.values() if isinstance(value, dict)))
    names = [str(one.get("activation", one.get("projector_activation"))).lower() for one in places]
    activation: Any = next((name for name in names if name in ("relu", "gelu", "silu")), None)
    if activation is None:
        raise InputError(
            f"{folder / 'config.json'}: does not say the projector's activation (relu, gelu or silu): add it as "
            '"activation"'
        )
    section = TrainingModelSection(dropout=0.0, activation=activation)
    return make_checkpoint(folder, read_weights(folder, weights, section, is_activation_known=True))


def _find_pooling(settings_dir: Path) -> Any:
    """Return the backbone output that the model's code takes: `pooler_output` if there is one, else `cls_token`.

    The backbone is built on the meta device and run without numbers, to see its outputs.
    """
    import torch
    from transformers import AutoModel

    from pipeline.inference.loading import find_vision_config, naming_model

    config = find_vision_config(settings_dir)
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    with naming_model(settings_dir), torch.device("meta"), torch.inference_mode():
        model = AutoModel.from_config(config, trust_remote_code=False).eval()
        outputs = model(pixel_values=torch.empty(1, getattr(config, "num_channels", 3), height, width))
    return "cls_token" if getattr(outputs, "pooler_output", None) is None else "pooler_output"


def _write_weights(rebuilt: Path, paths: dict[str, Path], projector: dict[str, Any]) -> dict[str, str]:
    """Link the backbone's weights, write the projector's, and return the file of each for the index."""
    from safetensors.torch import save_file

    from pipeline.inference.loading import writing_weights

    for path in set(paths.values()):  # under other names: a model.safetensors would be read alone
        (rebuilt / f"linked-{path.name}").symlink_to(path.resolve())
    weights = {f"projector.{name}": tensor.contiguous() for name, tensor in projector.items()}
    with writing_weights(rebuilt):
        save_file(weights, rebuilt / "projector.safetensors", {"format": "pt"})
    linked = {name: f"linked-{path.name}" for name, path in paths.items() if name.startswith("backbone.")}
    # In one order, as the index is part of the model's identity.
    return dict(sorted((linked | dict.fromkeys(weights, "projector.safetensors")).items()))
