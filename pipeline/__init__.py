"""What the stages share."""

import logging
import os

VERSION = "0.1.0"
LOGGER = logging.getLogger("spatial_building_embeddings")

# OpenMP threads that spin while they wait slowed a forward pass beside other processes from 102 img/s to 1. This has
# to be set before torch, scikit-learn or faiss load.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
