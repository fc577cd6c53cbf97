"""The pooling by the name that the published folder imports; the folder gets pipeline/inference/pooling.py."""

from pipeline.inference.pooling import embed_views

__all__ = ["embed_views"]
