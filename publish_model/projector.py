"""The projector by the name that the published folder imports; the folder gets pipeline/retrieval/projector.py."""

from pipeline.retrieval.projector import Projector

__all__ = ["Projector"]
