"""Choose the precision that a backbone computes in on a GPU, by comparing its embeddings with those of float32.

Imports torch only to measure: a finished run's precision is read without it.
"""

import gc
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DeviceMemoryError, InputError, catch_rejection
from pipeline.inference.images import check_image
from pipeline.log import logger
from pipeline.workspace import read_json_object, write_json

# What a backbone can compute in, the fastest first. Under autocast weights and sums stay in float32, and products alone
# are bfloat16; TF32 has products with 10 bits of mantissa instead of 23.
MODES = ("bfloat16", "bfloat16_autocast", "tf32", "float32")
# The least cosine to float32 that an embedding may have.
LEAST_COSINE = 0.999
NUM_PICTURES = 16
Load = Callable[[str], Any]  # the Embedder of a mode


@dataclass(frozen=True)
class Precision:
    """The mode that a run computes in, and the `least` and `median` cosine to float32 of each that was tried.

    `pictures` were tried; without any cosines the GPU could not hold the model in float32.
    """

    mode: str
    cosines: dict[str, dict[str, float]] = field(default_factory=dict)
    pictures: int = 0

    @property
    def fidelity(self) -> dict[str, Any]:
        """The measurement for the provenance, as a dictionary to merge; empty where nothing was measured."""
        return {"fidelity": {"pictures": self.pictures, "cosines": self.cosines}} if self.pictures else {}


def settle_precision(
    dtype: str, device: str, load: Load, pictures: Callable[[], Iterable[bytes]], note: Path | None = None
) -> Precision:
    """Return the precision to compute in: the one asked for, else float32 on a CPU and a measured one on a GPU.

    `load` loads the model in a mode, `pictures` yields the run's encoded pictures; both are called only to measure.
    The file `note` keeps the result for all processes of the run and later ones.
    Raises InputError where that file is damaged.
    """
    if dtype == "bfloat16":
        logger.warning("computing in bfloat16, as asked for: how near that comes to float32 is only measured for auto")
    if dtype != "auto":
        return Precision(dtype)
    if not is_measured_on(device):
        return Precision("float32")
    return agree_on(note, lambda: choose_precision(load, pictures()))


def is_measured_on(device: str) -> bool:
    from pipeline.inference.devices import choose_device

    return device != "cpu" and choose_device(device).type == "cuda"


def choose_precision(load: Load, pictures: Iterable[bytes]) -> Precision:
    """Return the fastest mode in which the first pictures' embeddings have a cosine of LEAST_COSINE to float32's.

    The model is loaded for each mode after the previous one is released: its weights are never in memory twice.
    """
    readable = (data for data in pictures if catch_rejection(check_image, data) is None)
    chosen = list(itertools.islice(readable, NUM_PICTURES))
    if not chosen:
        logger.warning("computing in bfloat16, not measured: there is no picture that can be read")
        return Precision("bfloat16")
    cosines: dict[str, dict[str, float]] = {}
    try:
        expected = embed_in("float32", load, chosen)
    except DeviceMemoryError as error:
        logger.warning("computing in bfloat16, not measured: in float32, %s", error)
        return Precision("bfloat16", pictures=len(chosen))
    for mode in MODES[:-1]:
        cosines[mode] = summarize(measure_cosines(embed_in(mode, load, chosen), expected))
        least, median = cosines[mode].values()
        logger.info(
            "%s: cosine to float32 %.6f at the least, %.6f in the median of %d pictures; at least %s is asked for",
            mode, least, median, len(chosen), LEAST_COSINE,
        )  # fmt: skip
        if least >= LEAST_COSINE:
            break
    else:
        mode = "float32"
    if mode != "bfloat16":
        logger.warning("computing in %s: slower than bfloat16", mode)
    return Precision(mode, cosines, len(chosen))


def embed_in(mode: str, load: Load, pictures: Sequence[bytes]) -> NDArray[np.float32]:
    """Return the embeddings (N, D) of pictures in a mode, and release the model."""
    embedder = load(mode)
    found: NDArray[np.float32] = embedder.embed([embedder.decode(data) for data in pictures])
    del embedder
    release()
    return found


def release() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def measure_cosines(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosines (N,) between the rows of two matrices, -1 where one is not finite or zero."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return np.where(np.isfinite(cosines), cosines, -1.0)


def summarize(cosines: NDArray[np.float64]) -> dict[str, float]:
    """Return the least cosine, rounded down, and the median."""
    return {"least": float(np.floor(cosines.min() * 1e6) / 1e6), "median": round(float(np.median(cosines)), 6)}


def agree_on(note: Path | None, choose: Callable[[], Precision]) -> Precision:
    """Return the precision noted in a file, else the one that `choose` returns, and note it if it was measured.

    The first of several processes decides for all. Raises InputError where the file is damaged.
    """
    if note is None or not note.exists():
        chosen = choose()
        if note is None or not chosen.pictures:
            return chosen
        write_json(note, asdict(chosen), once=True)
    noted = read_json_object(note)
    if noted.get("mode") not in MODES or noted.keys() != {"mode", "cosines", "pictures"}:
        raise InputError(f"{note}: does not say what to compute in: remove it, and it is measured again")
    return Precision(**noted)
