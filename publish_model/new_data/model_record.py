"""What a dataset records of the model that makes its embeddings."""

from typing import TYPE_CHECKING, Any

from pipeline.embeddings_dataset.packaged_input import PackagedInput, list_pictures
from pipeline.embeddings_dataset.part_plans import ModelRecord
from pipeline.inference.precision import NUM_PICTURES, Precision, settle_precision
from publish_model.model_folder.published_model import PublishedModel
from publish_model.new_data.embed_options import EmbedOptions

if TYPE_CHECKING:
    from pipeline.inference.backbone import Embedder


def record_model(
    options: EmbedOptions, begun: dict[str, Any] | None, source: PackagedInput, model: PublishedModel
) -> ModelRecord:
    """Return the record of a model that computes as asked for, else as the dataset was begun, else as suits."""
    precision = find_precision(options, begun, source, model)
    return ModelRecord(model.model_id, model.name_version(precision.mode), precision)


def find_precision(
    options: EmbedOptions, begun: dict[str, Any] | None, source: PackagedInput, model: PublishedModel
) -> Precision:
    """Return what to compute in: as asked for, else as the dataset was begun, else what suits device and model.

    It is measured on the first pictures of the input, whichever of them are this process's to embed.
    """
    if options.dtype == "auto" and begun is not None and "precision" in begun:
        return Precision(begun["precision"], **begun.get("fidelity", {}))

    def load(mode: str) -> "Embedder":
        from pipeline.inference.backbone import Embedder

        return Embedder(
            model.prepare(), device=options.device, dtype=mode, batch_size=NUM_PICTURES, trust_remote_code=True
        )

    return settle_precision(options.dtype, options.device, load, lambda: list_pictures(source))
