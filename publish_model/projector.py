"""The projector under the name by which the published folder imports it; the folder gets pipeline/projector.py."""

from pipeline.projector import Projector

__all__ = ["Projector"]
