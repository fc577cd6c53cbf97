"""Read an embeddings dataset: `parts/`, `_rejects/` and `state.json` of a folder."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embeddings_dataset.columns import hash_bytes
from pipeline.embeddings_dataset.packaged_input import (
    ID_COLUMN,
    IMAGE_COLUMN,
    SHAPING_OPTIONS,
    InputOptions,
    PackagedInput,
    open_input,
)
from pipeline.embeddings_dataset.parts import (
    EMBEDDING_COLUMN,
    Part,
    count_rows,
    embeddings_of,
    find_files,
    read_image_hashes,
    read_planned,
    read_state,
    refuse_foreign,
    rejects_beside,
)
from pipeline.errors import InputError
from pipeline.files.identity import hash_json
from pipeline.files.tables import open_parquet
from pipeline.log import logger
from pipeline.workspace import locked, make_folder, move, write_json

# Replaced and damaged files wait in a numbered folder there until the dataset is complete again.
SET_ASIDE = "_removed"
SET_ASIDE_FILES = r"[1-9]\d*/(state\.json|(parts|_rejects)/rg\d{5,}_rb\d{5,}\.parquet)"


class EmbeddingsDataset:
    """The dataset that an OUTPUT stands for, there or not; files are read when they are asked for.

    It is OUTPUT itself, or OUTPUT.parts where a file or a dataset forces that. A file without our provenance raises
    StaleOutputError, and is never removed or replaced.
    """

    def __init__(self, output: Path) -> None:
        sidecar = Path(f"{output}.parts")  # `.` has no name
        is_beside = output.is_file() or (not output.exists() and (sidecar / "state.json").exists())
        self.folder = sidecar if is_beside else output
        self.state_path = self.folder / "state.json"

    @property
    def state(self) -> dict[str, Any] | None:
        """What `state.json` says, None where it is missing, damaged or not ours."""
        return read_state(self.state_path)

    def path_of(self, name: str) -> Path:
        return self.folder / "parts" / name

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Its parts in input order; an incomplete dataset is named in the log.

        Raises InputError where there is none or a part is damaged, StaleOutputError where one is not ours.
        """
        files = find_files(self.folder)
        refuse_foreign(files.foreign)
        for path in files.damaged:
            raise InputError(f"{path}: damaged: run verify_embeddings.py --repair and stage 8 again")
        if not files.parts:
            raise InputError(
                f"{self.folder}: holds no embeddings (parts/*.parquet): run stage 8 first, or correct the path"
            )
        state = files.state or files.parts[0].recipe
        for part in files.parts:
            for other in (key for key, value in part.recipe.items() if value != state.get(key)):
                raise InputError(f"{part.path}: made with another {other} than the dataset: run verify_embeddings.py")
        counts = count_rows(files.parts)
        if counts["parts_done"] != state.get("parts_total"):
            logger.warning(
                "%s is not complete: %d of %s rows are embedded, and only those are used",
                self.folder, counts["rows_embedded"], state.get("rows_total", "unknown"),
            )  # fmt: skip
        return tuple(files.parts)

    def update_state(self, parts: Iterable[Part], first: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write the counts of its parts into the state and return it.

        `first` is one for a dataset that has none; where another process has just begun it, its state stays.
        """
        is_new, before, counted = not self.state_path.exists(), self.state, count_rows(parts)
        state = (before or first or {}) | counted
        state["complete"] = counted["parts_done"] == state.get("parts_total")
        if (before or first) and state != before:
            write_json(self.state_path, state, once=is_new)
        return state

    def held(self, *, shared: bool = False) -> AbstractContextManager[None]:
        """Keep other processes from writing to it in a `with` block; `shared`, only those that need it alone.

        Raises PipelineError if another process writes to it.
        """
        if not (shared or self.folder.is_dir()):  # a mistyped path leaves no folder behind
            return nullcontext()
        doing = "is writing to it: wait for that one, or stop it, then run this again"
        return locked(self.folder, doing, self.folder / ".dataset.lock", shared=shared)

    # ------------------------------------------------------------------------------------------ setting aside

    def set_aside(self, doomed: Iterable[Path]) -> None:
        """Move parts, each with its rejects, rejects and the state to a new folder in `_removed/`."""
        for folder in (self.folder / "parts", self.folder / "_rejects"):
            make_folder(folder)  # a link is refused before anything moves
        numbers = [int(path.name) for path in (self.folder / SET_ASIDE).glob("*") if path.name.isdecimal()]
        target = self.folder / SET_ASIDE / str(max(numbers, default=0) + 1)
        for one in doomed:
            for path in (one, rejects_beside(one)) if one.parent.name == "parts" else (one,):
                if path.is_file():
                    move(path, target / path.relative_to(self.folder))
                    logger.info("%s: moved to %s", path, target)

    def set_all_aside(self) -> None:
        """Set the state aside first, so that what a kill leaves still tells its origin, then all parts and rejects.

        Raises StaleOutputError, and moves nothing, where this project did not write the state, a part or rejects.
        """
        files = find_files(self.folder)
        refuse_foreign(files.others + files.foreign)
        self.set_aside([self.state_path, *files.damaged, *(part.path for part in files.parts), *files.orphans])

    # ------------------------------------------------------------------------------------------ reading

    @property
    def schema(self) -> pa.Schema:
        with open_parquet(self.parts[0].path) as file:
            schema: pa.Schema = file.schema_arrow.remove_metadata()
            return schema

    @property
    def num_rows(self) -> int:
        return sum(part.counts["out"] for part in self.parts)

    @property
    def recipe(self) -> dict[str, Any]:
        """What it was made from, and the version of the model that made it."""
        return self.parts[0].recipe

    def open_input(self, path: Path, recipe: dict[str, Any] | None = None) -> PackagedInput:
        """Open the input that it was made from.

        Raises InputError where it cannot be read, or is another one.
        """
        recipe = recipe or self.recipe
        source = open_input(InputOptions(input=path, **{name: recipe[name] for name in SHAPING_OPTIONS}))
        if source.fingerprint != recipe.get("row_group_fingerprint"):
            raise InputError(f"{path}: not the input that {self.folder} was made from: give that one")
        return source

    def identify(self) -> dict[str, Any]:
        """Return a fingerprint of its content, for the provenance of what is made from it."""
        version, parts = self.recipe["embedding_version"], [[part.path.name, part.checksum] for part in self.parts]
        return {"name": "parts", "hash": hash_json(parts), "rows": self.num_rows, "embedding_version": version}

    def read_blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the embeddings of each part (N, D)."""
        return (embeddings_of(part.read([EMBEDDING_COLUMN])) for part in self.parts)

    def locate(self, rows: Sequence[int]) -> Iterator[tuple[Part, int, list[int]]]:
        """Yield each part that holds some of these embedded rows, the number of its first row, and their places in it.

        Rows are counted over all parts in order; the places ascend.
        """
        firsts = np.cumsum([0, *(part.counts["out"] for part in self.parts)]).tolist()
        for part, first, end in zip(self.parts, firsts, firsts[1:], strict=False):
            if places := sorted(row - first for row in rows if first <= row < end):
                yield part, first, places

    def read_ids_at(self, rows: Sequence[int]) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for part, first, places in self.locate(rows):
            column = part.read([ID_COLUMN]).column(0)
            found |= {first + place: column[place] for place in places}
        return found

    def read_images(self, source: PackagedInput, rows: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield some embedded rows, ascending, each with the image file that it was made from, by the hash of that."""
        located = {part.plan: (part, first, places) for part, first, places in self.locate(rows)}
        for plan, table in read_planned(source, located):
            part, first, places = located[plan]
            hashes = read_image_hashes(part.path)[places].tolist()
            images = (image.as_py() or b"" for image in table.column(IMAGE_COLUMN))
            found = {own: image for image in images if (own := hash_bytes(image)) in hashes}
            if not found.keys() >= set(hashes):  # the footer does not tell all pictures apart
                path = source.places[plan.row_group][0]
                raise InputError(f"{path}: not the pictures that {self.folder} was made from: give those")
            yield from ((first + place, found[own]) for place, own in zip(places, hashes, strict=True))
