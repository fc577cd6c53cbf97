"""The published model: photographs in, one L2-normalised embedding each out.

It is published with the model, so it needs torch, transformers and the files beside it alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_spatial_embeddings import SpatialEmbeddingsConfig
from .pooling import embed_views
from .projector import Projector


@dataclass
class SpatialEmbeddingsOutput(ModelOutput):
    """`embeddings` (B, embedding_dim) float32 of norm 1, again as `pooler_output`; the rest on request.

    `hidden_states` and `attentions` are the backbone's own.
    """

    embeddings: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class SpatialEmbeddingsModel(PreTrainedModel):
    """A backbone and a projector: together they map a photograph to an embedding of the building that it shows."""

    config_class = SpatialEmbeddingsConfig
    base_model_prefix = "spatial_embeddings"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # Without these, `attn_implementation` is refused here before the backbone is asked what it can do.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The projector is small, and centring features in half precision would lose most of them.
    _keep_in_fp32_modules_strict = ["projector"]
    # This one names the modules that quantisers leave alone.
    _keep_in_fp32_modules = ["projector"]

    def __init__(self, config: SpatialEmbeddingsConfig) -> None:
        super().__init__(config)
        backbone_config: Any = config.backbone_config
        models: Any = MODEL_MAPPING
        can_choose = getattr(models[type(backbone_config)], "_supports_sdpa", True)
        if not can_choose and getattr(backbone_config, "_attn_implementation", None) == "sdpa":
            backbone_config._attn_implementation = (
                "eager"  # a convolutional backbone has no attention, and would refuse
            )
        # from_pretrained(dtype=...) sets the default type; the backbone's own configuration may name another one.
        self.backbone = AutoModel.from_config(backbone_config, dtype=torch.get_default_dtype())
        self.projector = Projector(**(config.projector or {}))
        self._no_split_modules = getattr(self.backbone, "_no_split_modules", None)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that reads the pixels: the backbone's first one, where it does not say."""
        embeddings: nn.Module
        try:
            embeddings = self.backbone.get_input_embeddings()
        except NotImplementedError:
            embeddings = next(self.backbone.children())
        return embeddings

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None, **kwargs: Any
    ) -> SpatialEmbeddingsOutput | tuple[torch.Tensor, ...]:
        """Embed images (B, 3, H, W) as the model's image processor makes them.

        Further arguments (`output_hidden_states`, ...) go to the backbone.
        """
        features, outputs = self.extract(pixel_values, **kwargs)
        embeddings = self.projector(features)
        result = SpatialEmbeddingsOutput(
            embeddings=embeddings,
            pooler_output=embeddings,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )
        use_dict = return_dict if return_dict is not None else getattr(self.config, "return_dict", True)
        return result if use_dict else result.to_tuple()

    def extract(self, pixel_values: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Return the backbone's features (B, input_dim) as the configuration says, and its outputs."""
        config = self.config
        return embed_views(
            self.backbone, pixel_values, config.pooling_type, config.scales, config.flip, return_dict=True, **kwargs
        )
