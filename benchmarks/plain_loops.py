"""The loops that a user would write in an afternoon, against which the stages are timed."""

import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor, AutoModel

BATCH_SIZE, NUM_WORKERS = 16, 4


def extract(tar_paths: list[Path], folder: Path) -> list[Path]:
    """Unpack tars and return their JPEGs in order."""
    for path in tar_paths:
        with tarfile.open(path) as tar:
            tar.extractall(folder / path.stem, filter="data")
    return sorted(folder.rglob("*.jpg"))


def validate(paths: list[Path]) -> int:
    """Open and load every image; return how many could be."""
    num_sound = 0
    for path in paths:
        with suppress(OSError), Image.open(path) as image:
            image.load()
            num_sound += 1
    return num_sound


def fingerprint(paths: list[Path], image_size: int = 16) -> np.ndarray:
    """Decode every image in full and average it to a few cells, (N, image_size, image_size, 3) uint8."""
    cells = []
    for path in paths:
        with Image.open(path) as image:
            cells.append(np.asarray(image.convert("RGB").resize((image_size, image_size), Image.Resampling.BOX)))
    return np.stack(cells)


class ImageFiles(Dataset[torch.Tensor]):
    """Images by their paths, as the model's processor makes them."""

    def __init__(self, paths: list[Path], processor: object) -> None:
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]  # type: ignore[operator,no-any-return]


def embed(paths: list[Path], processor: object, model: torch.nn.Module) -> np.ndarray:
    """Embed images in batches of 16, decoded by 4 workers, in the model's type; (N, D) float32."""
    device = next(model.parameters()).device
    rows = []
    with torch.no_grad():
        for batch in DataLoader(ImageFiles(paths, processor), BATCH_SIZE, num_workers=NUM_WORKERS):
            rows.append(model(pixel_values=batch.to(device)).pooler_output.flatten(1).cpu().numpy())
    return np.concatenate(rows)


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[object, torch.nn.Module]:
    """Load a model's processor and the model, in float32, as the documentation of transformers does."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return AutoImageProcessor.from_pretrained(folder), model


def main() -> None:
    folder, unpacked, *tars = map(Path, sys.argv[1:])
    processor, model = load(folder)
    started = time.perf_counter()
    embed(extract(tars, unpacked), processor, model)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
