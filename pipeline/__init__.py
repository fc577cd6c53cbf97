"""What the stages share."""

import os

VERSION = "0.1.0"

# OpenMP threads that wait by spinning take the cores from whoever has work: beside other processes a forward pass was
# seen to slow down a hundredfold (102 img/s against 1). It has to be said before torch, scikit-learn or faiss load.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
