"""The embeddings dataset directory: its parts, its state, and what may be added to it."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, PipelineError, StaleOutputError
from pipeline.files.tables import PROVENANCE_KEY, make_provenance, open_parquet, read_provenance, write_parquet
from pipeline.files.writing import sync_file, temporary_path, write_failure, write_json
from pipeline.log import logger
from publish_model.dataset.deletions import read_order, without_ids
from publish_model.dataset.hashes import checksum_tables
from publish_model.dataset.part_plans import PartContent, PartPlan, PartRecord, Recipe, count_rows
from publish_model.new_data.packaged_input import ID_COLUMN, PackagedInput, plain_values

STAGE = "generate_embeddings_from_parquet"
HASHES_KEY = PROVENANCE_KEY + b".image_hashes"
# While parts are made, counting reads the footers of what other processes have written.
STATE_TIME_SHARE, STATE_INTERVAL_SECONDS = 0.02, 30.0


def resolve_dataset_dir(output: Path) -> Path:
    """Return the directory that an OUTPUT stands for: itself, or OUTPUT.parts where a file or a dataset forces that."""
    sidecar = output.with_name(output.name + ".parts")
    if output.is_file() or (not output.exists() and (sidecar / "state.json").exists()):
        return sidecar
    return output


class EmbeddingsDataset:
    """`parts/`, `_rejects/` and `state.json` of one directory, to which several processes may write at once.

    Nothing is counted on the way: the state is made from what the parts say, so it is right whoever finishes last.
    """

    def __init__(self, folder: Path, source: PackagedInput, plans: list[PartPlan]) -> None:
        self.folder = folder
        self.parts_dir = folder / "parts"
        self.rejects_dir = folder / "_rejects"
        self.state_path = folder / "state.json"
        self._source = source
        self._plans = {plan.name: plan for plan in plans}
        self._next_state = time.monotonic() + STATE_INTERVAL_SECONDS
        self._known: dict[str, tuple[tuple[int, ...], PartRecord | None]] = {}

    def path(self, plan: PartPlan) -> Path:
        """Return where a part lies."""
        return self.parts_dir / plan.name

    def find_begun(self) -> dict[str, Any] | None:
        """Return what the dataset that is there was made from: by its state, or, where that is lost, by a part.

        None stands for a dataset that has not begun. Raises StaleOutputError for parts that were not made here.
        """
        state = self._read_state()
        for name in sorted(self._list_parts()) if state is None else ():
            provenance = read_part_provenance(self.parts_dir / name)
            if provenance is not None:
                logger.warning("%s: missing or damaged: made again from the parts", self.state_path)
                return recipe_of(provenance)
        return state

    def remove(self) -> None:
        """Remove state, parts and rejects, the state first: what a kill leaves then still says what it is."""
        for doomed in (self.state_path, self.parts_dir, self.rejects_dir):  # what was deleted stays so
            if doomed.is_dir():
                shutil.rmtree(doomed)
            doomed.unlink(missing_ok=True)

    def begin(self, recipe: Recipe, model_id: str, begun: dict[str, Any] | None) -> None:
        """Take up the dataset that has begun if it is of this recipe, or begin it.

        Raises StaleOutputError, naming the difference, where it is of another recipe, PipelineError where a deletion
        of ids was interrupted.
        """
        if begun is not None:
            recipe.check(begun, self.folder)
        order = read_order(self.folder)
        if order is not None and not order.done:
            raise PipelineError(f"{self.folder}: a deletion of ids was interrupted: run delete_ids.py again first")
        self._deleted_hashes = order.id_hashes if order else frozenset()
        self.recipe = recipe
        self._identity = {"input_path": str(self._source.path), "model_id": model_id, **asdict(recipe)}
        state = self._read_state() or self._create_state()
        recipe.check(state, self.folder)  # another process may have begun just now
        self._identity |= {key: state[key] for key in ("input_path", "model_id") if key in state}

    # ------------------------------------------------------------------------------------------ parts

    def find_parts(self, names: Iterable[str] | None = None) -> dict[str, PartRecord]:
        """Return the parts that are there (among `names`), whole or cut; what cannot be read is as if not there.

        Raises StaleOutputError for a part of another recipe, InputError for a file that is no part of this input.
        """
        found = self._list_parts()
        foreign = sorted(found.keys() - self._plans.keys())
        if foreign:
            raise InputError(
                f"{self.parts_dir / foreign[0]}: no part of this input: remove it, or give another --output"
            )
        rejects = {path.name for path in self.rejects_dir.glob("rg*.parquet")}
        records = {}
        for name in found.keys() if names is None else found.keys() & set(names):
            signature, record = self._known.get(name, ((), None))
            if signature != found[name]:
                record = self._read_part(self._plans[name])
                self._known[name] = (found[name], record)
            if record is not None and name in rejects:
                records[name] = record
        return records

    def _list_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the part files by name, with what changes when a file is replaced."""
        if not self.parts_dir.is_dir():
            return {}
        with os.scandir(self.parts_dir) as entries:
            parquets = [entry for entry in entries if entry.name.endswith(".parquet") and entry.name[0] not in "._"]
            stats = {entry.name: entry.stat() for entry in parquets}
        return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def _read_part(self, plan: PartPlan) -> PartRecord | None:
        """Return what a part says of itself, None where it cannot be read or lies under another's name."""
        path = self.path(plan)
        provenance = read_part_provenance(path)
        if provenance is None:
            logger.warning("%s: damaged: it is made again", path)
            return None
        self.recipe.check(recipe_of(provenance), path)
        if provenance.get("part") != asdict(plan):
            logger.warning("%s: holds another part's rows: it is made again", path)
            return None
        return PartRecord(provenance["counts"], provenance["reasons"])

    def write_part(self, plan: PartPlan, content: PartContent) -> None:
        """Write a part and its rejects; the part comes last, so that where it is, both are."""
        recipe = asdict(self.recipe)
        inputs = [{key: recipe.pop(key) for key in ("input_size", "input_schema", "row_group_fingerprint")}]
        provenance = {
            **make_provenance(STAGE, inputs, recipe),
            "embedding_version": self.recipe.embedding_version,
            "part": asdict(plan),
        }
        write_part_files(self.folder, plan, without_ids(content, self._deleted_hashes), provenance)

    # ------------------------------------------------------------------------------------------ state

    def write_state(self) -> dict[str, Any]:
        """Write `state.json` from what the parts say, and return it.

        Another process may finish a part while this one counts, so it counts again until nothing has changed: then
        the last to write has seen all.
        """
        while True:
            listed = self._list_parts()
            state = self._count(self.find_parts())
            if state != self._read_state():
                write_json(self.state_path, state)
            if self._list_parts() == listed:
                return state

    def write_state_now_and_then(self) -> None:
        """Let `state.json` show the progress, seldom enough that this costs little however many parts there are."""
        started = time.monotonic()
        if started >= self._next_state:
            self.write_state()
            took = time.monotonic() - started
            self._next_state = time.monotonic() + max(STATE_INTERVAL_SECONDS, took / STATE_TIME_SHARE)

    def _count(self, records: dict[str, PartRecord]) -> dict[str, Any]:
        counted = count_rows((record, self._plans[name].num_rows) for name, record in records.items())
        return {
            **self._identity,
            "rows_total": self._source.num_rows,
            **counted,
            "parts_total": len(self._plans),
            "complete": counted["parts_done"] == len(self._plans),
        }

    def _read_state(self) -> dict[str, Any] | None:
        return read_state(self.state_path)

    def _create_state(self) -> dict[str, Any]:
        """Write the first state unless another process has just done so, and return whichever is there."""
        state = self._count({})
        temporary = temporary_path(self.state_path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            sync_file(temporary)
            if self.state_path.exists() and self._read_state() is None:
                temporary.replace(self.state_path)
            else:
                _put_if_absent(temporary, self.state_path)
        except FileExistsError:
            return self._read_state() or state
        except OSError as error:
            raise write_failure(self.state_path, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return state


def _put_if_absent(temporary: Path, path: Path) -> None:
    """Give a file a name unless it is taken, which raises FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        temporary.replace(path)


def write_part_files(folder: Path, plan: PartPlan, content: PartContent, provenance: dict[str, Any]) -> None:
    """Write a part and its rejects; the part comes last, so that where it is, both are.

    `provenance` says what the part was made from; what became of its rows is added here.
    """
    provenance = provenance | {
        "cut": content.counts["in"] < plan.num_rows,
        "counts": content.counts,
        "reasons": content.reasons,
        "checksum": checksum_tables(content.embedded, content.rejects),
    }
    hashes = {HASHES_KEY: content.hashes}  # beside the rejects, where no reader of the data carries them along
    write_parquet(folder / "_rejects" / plan.name, content.rejects, provenance, hashes)
    write_parquet(folder / "parts" / plan.name, content.embedded, provenance)


def read_state(path: Path) -> dict[str, Any] | None:
    """Return a dataset's state, None where it is missing or damaged."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return state if isinstance(state, dict) and state.get("embedding_version") else None


def recipe_of(provenance: dict[str, Any]) -> dict[str, Any]:
    inputs = provenance.get("inputs") or [{}]
    return {**inputs[0], **provenance.get("settings", {})}


def read_part_provenance(path: Path) -> dict[str, Any] | None:
    """Return what a part says of itself, None where it cannot be read.

    Raises StaleOutputError for a sound file that says nothing: it is not ours to replace.
    """
    try:
        provenance = read_provenance(path)
    except InputError:
        return None
    if provenance is None or provenance.get("stage") != STAGE:
        raise StaleOutputError(
            f"{path}: it does not say what it was made from: give another --output, or --overwrite to begin anew"
        )
    return provenance


def read_hashes(part_path: Path) -> bytes:
    """Return the hashes that `write_part` kept for a part."""
    with open_parquet(part_path.parents[1] / "_rejects" / part_path.name) as file:
        value: bytes = (file.metadata.metadata or {}).get(HASHES_KEY, b"")
        return value


def read_ids(path: Path) -> list[object]:
    """Return the ids of a part as plain Python values."""
    with open_parquet(path) as file:
        return [value for chunk in file.read([ID_COLUMN]).column(0).chunks for value in plain_values(chunk)]
