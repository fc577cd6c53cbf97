"""What the campaign works on: a toy model in two weight files, packaged pictures, and the datasets they should give."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from faults.harness import Outcome, Run, count_operations
from published_models import make_photographs, publish, write_backbone, write_packaged

from publish_model import generate_embeddings_from_parquet, verify_embeddings

NUM_IMAGES = 24
Files = dict[str, bytes]


class Failure(Exception):
    """What a try did that it must not do."""


@dataclass
class Tally:
    """What came of the tries of one fault."""

    name: str
    recovered: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def tries(self) -> int:
        """How often it was tried."""
        return self.recovered + self.refused + len(self.failures)


def split_weights(folder: Path) -> None:
    """Turn a published model's weights into two files and their index, as those of a large model are."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file_name, own in shards.items():
        save_file({name: weights[name] for name in own}, folder / file_name, metadata={"format": "pt"})
    weight_map = {name: file_name for file_name, own in shards.items() for name in own}
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def write_inputs(folder: Path) -> None:
    """Publish the model and package the pictures: one without bytes, one damaged, one marked invalid."""
    split_weights(publish(folder, write_backbone(folder / "backbone")))
    images: list[bytes | None] = list(make_photographs(NUM_IMAGES))
    images[5], images[11] = None, images[11][:200]
    valid = [row != 7 for row in range(NUM_IMAGES)]
    write_packaged(folder / "in.parquet", images, row_group_size=8, is_valid=valid)
    write_packaged(folder / "other.parquet", list(make_photographs(NUM_IMAGES + 1)), row_group_size=8)


class Bench:
    """The inputs, and the dataset that an undisturbed run makes of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.model_dir, self.input = folder / "published", folder / "in.parquet"
        self.output = folder / "out"
        # In a process of its own: after torch has computed, a fork of this one may hang.
        if Run(lambda _: write_inputs(folder), []).wait().code:
            raise RuntimeError("the inputs could not be made")
        self.num_operations = count_operations(self.output, generate_embeddings_from_parquet.main, self.arguments())
        self.undisturbed = self.read()

    def choose_moments(self, num_operations: int, count: int) -> list[int]:
        """Return some of a run's file operations, at least one, in their order."""
        return sorted(self.random.sample(range(1, num_operations + 1), min(num_operations, max(1, count))))

    def arguments(self, *more: object, source: Path | None = None, output: Path | None = None) -> list[object]:
        """Return the command line of stage 8."""
        return [
            "-i", source or self.input, "-o", output or self.output, "--model-id", self.model_dir, "--device", "cpu",
            "--read-batch-size", 4, *more,
        ]  # fmt: skip

    def start(self, *more: object, prepare: Callable[[], None] | None = None, **paths: Path) -> Run:
        """Start stage 8 in a process of its own."""
        return Run(generate_embeddings_from_parquet.main, self.arguments(*more, **paths), prepare)

    def embed(self, *more: object, prepare: Callable[[], None] | None = None, **paths: Path) -> Outcome:
        """Run stage 8."""
        return self.start(*more, prepare=prepare, **paths).wait()

    def verify(self, *more: object, output: Path | None = None) -> Outcome:
        """Run the checks."""
        return Run(verify_embeddings.main, [output or self.output, "--input", self.input, *more]).wait()

    def read(self, output: Path | None = None) -> Files:
        """Return every parquet of the dataset, byte for byte, and what the state counts."""
        folder = output or self.output
        files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}
        state = json.loads((folder / "state.json").read_text())
        counted = {key: value for key, value in state.items() if key not in ("input_path", "model_id")}
        return files | {"state.json": json.dumps(counted, sort_keys=True).encode()}

    def clear(self) -> None:
        """Begin anew."""
        shutil.rmtree(self.output, ignore_errors=True)

    def finish(self) -> None:
        """Make the dataset without a disturbance."""
        self.clear()
        expect(self.embed(), 0)

    def check_rerun(self, output: Path | None = None) -> None:
        """Run stage 8 again and compare the dataset with the undisturbed one."""
        expect(self.embed(**({"output": output} if output else {})), 0)
        self.check(output)

    def check(self, output: Path | None = None) -> None:
        """Compare the dataset with the undisturbed one, byte for byte."""
        found = self.read(output)
        wrong = sorted(
            name for name in found.keys() | self.undisturbed.keys() if found.get(name) != self.undisturbed.get(name)
        )
        if wrong:
            raise Failure(f"not as undisturbed: {', '.join(wrong[:5])}")

    def part(self) -> Path:
        """Return some part."""
        return self.random.choice(sorted((self.output / "parts").glob("*.parquet")))


def expect(outcome: Outcome, *codes: int) -> None:
    """Raise Failure unless a run ended with one of the codes, and without a traceback."""
    if outcome.code not in codes or "Traceback" in outcome.stderr:
        raise Failure(f"exit code {outcome.code}, wanted {codes}: {outcome.stderr[-1500:]}")


def expect_refusal(outcome: Outcome, *texts: str) -> None:
    """Raise Failure unless a run was refused in one line that holds the texts."""
    last = (outcome.stderr.strip().splitlines() or [""])[-1]
    if not outcome.is_clear_refusal or not all(text in last for text in texts):
        raise Failure(f"no clear refusal with {texts}: exit code {outcome.code}: {outcome.stderr[-1500:]}")


def mount_tmpfs(folder: Path, size: str) -> bool:
    """Mount a small file system; False where that is not permitted."""
    folder.mkdir(exist_ok=True)
    command: Sequence[str] = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def remount(folder: Path, options: str) -> None:
    """Change the options of a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], capture_output=True, check=True)


def unmount(folder: Path) -> None:
    """Unmount a file system."""
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def count_rows(output: Path) -> tuple[int, int]:
    """Return how many rows are embedded and rejected."""
    counts = [
        sum(pq.read_metadata(path).num_rows for path in (output / name).glob("*.parquet"))
        for name in ("parts", "_rejects")
    ]
    return counts[0], counts[1]
