"""The published model's configuration: its backbone's, its projector's, and how the one feeds the other.

It is published with the model, so it needs transformers alone.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class SpatialEmbeddingsConfig(PretrainedConfig):
    """A vision backbone, and the projector that maps its pooled output to an L2-normalised embedding."""

    model_type = "spatial_embeddings"
    sub_configs = {"backbone_config": AutoConfig}
    attribute_map = {"hidden_size": "embedding_dim"}

    def __init__(
        self,
        backbone_config: dict[str, Any] | PretrainedConfig | None = None,
        backbone_model_name: str | None = None,
        pooling_type: str = "pooler_output",
        scales: list[int] | None = None,
        flip: bool = False,
        projector: dict[str, Any] | None = None,
        embedding_dim: int = 256,
        **kwargs: Any,
    ) -> None:
        """Take the backbone's own configuration, its hub id, and the arguments of `Projector`.

        `pooling_type` is `pooler_output` or `cls_token`; `scales` (sides in pixels, the image processor makes the
        largest) and `flip` say over which views of a picture the backbone's features are averaged.
        """
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.backbone_model_name = backbone_model_name
        self.pooling_type = pooling_type
        self.scales = scales or []
        self.flip = flip
        self.projector = projector
        self.embedding_dim = embedding_dim
        super().__init__(**kwargs)
