"""The parts that one run adds to an embeddings dataset: which are missing, writing them, and the state."""

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.embeddings_dataset import set_aside
from pipeline.embeddings_dataset.content import PartContent, PartPlan
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.deletions import finish_order, read_order
from pipeline.embeddings_dataset.packaged_input import PackagedInput, read_batches
from pipeline.embeddings_dataset.parts import (
    STAGE,
    Part,
    count_rows,
    list_part_files,
    plan_parts,
    read_part,
    write_part,
)
from pipeline.errors import DamagedError, InputError, PipelineError, StaleOutputError
from pipeline.files.tables import make_provenance
from pipeline.files.workspace import write_json_once
from pipeline.ids import Shard
from pipeline.inference.precision import Precision
from pipeline.log import logger


class PartStore:
    """The parts of a dataset that is made from one input by one model; several processes may write at once.

    Nothing is counted on the way: the state adds up the parts' own counts, so it is right whoever finishes last.
    """

    def __init__(
        self, dataset: EmbeddingsDataset, source: PackagedInput, model_id: str, version: str, precision: Precision
    ) -> None:
        """Look at the parts of a dataset as made by the model of an id; `version` is the short id of what computes."""
        self.dataset, self.source = dataset, source
        made_from = {
            "input_size": source.size,
            "input_schema": [f"{field.name}: {field.type}" for field in source.schema],
            "row_group_fingerprint": source.fingerprint,
        }
        settings = {
            "read_batch_size": source.options.read_batch_size,
            "filter_valid": source.options.filter_valid,
            "precision": precision.mode,
            "embedding_version": version,
            "keep_columns": list(source.options.keep_columns),
            "id_column": source.options.id_column,
            "image_column": source.options.image_column,
        }
        self.recipe = made_from | settings
        self.plans = {plan.name: plan for plan in plan_parts(source)}
        noted = {"embedding_version": version, **precision.fidelity}
        self._made_from = make_provenance(STAGE, [made_from], settings) | noted
        folder = Path(model_id).expanduser()
        self._first_state = {  # the names alone: a dataset that is shared shows no one's folders
            "input_path": source.path.resolve().name, "model_id": folder.name if folder.is_dir() else model_id,
            **self.recipe, **noted, "rows_total": source.num_rows, "parts_total": len(self.plans),
        }  # fmt: skip
        self._known: dict[str, tuple[tuple[int, ...], Part | None]] = {}

    def check(self, found: dict[str, Any], where: Path) -> None:
        """Raise StaleOutputError naming the first thing in which what is there was made otherwise."""
        for key, wanted in self.recipe.items():
            if found.get(key) != wanted:
                was, now = (textwrap.shorten(repr(value), 100) for value in (found.get(key), wanted))
                hint = " (another model, processor, pooling or precision)" if key == "embedding_version" else ""
                raise StaleOutputError(
                    f"{where}: made from another input, model or setting: {key} was {was} and is now {now}{hint}: give "
                    "another --output, or --overwrite to begin anew"
                )

    def find_parts(self, names: Iterable[str] | None = None) -> dict[str, Part]:
        """Return the parts that are there (among `names`), whole or cut; a damaged one counts as missing.

        Raises StaleOutputError for a part of another recipe or not ours, InputError for a file that is no part of this
        input, or cannot be read.
        """
        found = list_part_files(self.dataset.folder)
        for name in sorted(found.keys() - self.plans.keys()):
            raise InputError(
                f"{self.dataset.path_of(name)}: no part of this input: remove it, or give another --output"
            )
        rejects = {path.name for path in (self.dataset.folder / "_rejects").glob("rg*.parquet")}
        parts = {}
        for name in found.keys() if names is None else found.keys() & set(names):
            if self._known.get(name, (None,))[0] != found[name]:
                self._known[name] = found[name], self._read_part(self.plans[name])
            part = self._known[name][1]
            if part is not None and name in rejects:
                parts[name] = part
        return parts

    def _read_part(self, plan: PartPlan) -> Part | None:
        """Return a part, None where it is damaged or lies under another's name."""
        path = self.dataset.path_of(plan.name)
        try:
            part = read_part(path)
        except DamagedError:
            logger.warning("%s: damaged: it is made again", path)
            return None
        self.check(part.recipe, path)
        if part.plan != plan:
            logger.warning("%s: holds another part's rows: it is made again", path)
            return None
        return part

    def write_part(self, plan: PartPlan, content: PartContent) -> None:
        """Write a part and its rejects, without deleted ids."""
        write_part(self.dataset.folder, plan, read_order(self.dataset.folder).apply(content), self._made_from)

    def create_state(self) -> None:
        """Write the first state unless another process has just done so.

        Raises StaleOutputError where the other process has begun a dataset of another recipe.
        """
        path = self.dataset.state_path
        if self.dataset.state is None and path.exists():  # damaged
            self.dataset.update_state((), self._first_state)
        elif self.dataset.state is None:
            write_json_once(path, self._first_state | count_rows(()) | {"complete": False})
        self.check(self.dataset.state or self.recipe, self.dataset.folder)

    def write_state(self) -> dict[str, Any]:
        """Write `state.json` from the counts of the parts, and return it.

        Another process may finish a part while this one counts, so it counts again until nothing has changed: then
        the last to write has seen all.
        """
        while True:
            listed = list_part_files(self.dataset.folder)
            state = self.dataset.update_state(self.find_parts().values(), self._first_state)
            if list_part_files(self.dataset.folder) == listed:
                return state


class Appending:
    """The parts that one run of stage 8 makes."""

    def __init__(
        self, store: PartStore, begun: dict[str, Any] | None, shard: Shard, limit: int | None, *, overwrite: bool
    ) -> None:
        """Find the parts that are missing from a dataset (see `find_begun`); nothing is written before `begin`.

        Raises StaleOutputError, naming the difference, where the dataset is of another recipe or not ours,
        PipelineError where a deletion of ids was interrupted. With `overwrite` neither matters.
        """
        self.store, self.dataset = store, store.dataset
        self._limit, self._overwrite = limit, overwrite
        if begun is not None and not overwrite:
            store.check(begun, self.dataset.folder)
        if not (overwrite or read_order(self.dataset.folder).done):
            remedy = "run delete_ids.py again first" if list_part_files(self.dataset.folder) else "give --overwrite"
            raise PipelineError(f"{self.dataset.folder}: a deletion of ids was interrupted: {remedy}")
        row_groups = set(shard.take(list(range(len(store.source.row_group_rows)))))
        self._own = {name: plan for name, plan in store.plans.items() if plan.row_group in row_groups}
        self.parts = {} if overwrite else store.find_parts(self._own)
        self.work: dict[int, list[PartPlan]] = {}  # the parts to make by row group
        for name, plan in self._own.items():
            if plan.rows_within(limit) > (self.parts[name].counts["in"] if name in self.parts else 0):
                self.work.setdefault(plan.row_group, []).append(plan)

    @property
    def num_rows(self) -> tuple[int, int]:
        """Rows of the input that this run leaves as they are, and rows that it works on."""
        redone = {plan.name: plan for plans in self.work.values() for plan in plans}
        kept = sum(part.counts["in"] for name, part in self.parts.items() if name not in redone)
        return kept, sum(plan.rows_within(self._limit) for plan in redone.values())

    def begin(self, width: int = 0) -> None:
        """Take up the dataset or begin it; with `overwrite` what is there is set aside first.

        Embeddings have `width` numbers. Raises StaleOutputError where another process has just begun one of another
        recipe, or a file is not ours, PipelineError where the disk has no room beside the dataset that is replaced.
        """
        folder = self.dataset.folder
        if self._overwrite:
            needed = self.num_rows[1] * width * 4  # bytes: float32 hardly gets smaller when it is compressed
            free = shutil.disk_usage(folder).free if folder.is_dir() else needed
            if free < needed:
                raise PipelineError(
                    f"{folder}: about {needed / 1e9:.1f} GB are needed beside the dataset that is to be overwritten, "
                    f"and {free / 1e9:.1f} GB are free: free some, or remove the dataset yourself"
                )
            set_aside.move_all(self.dataset)
            finish_order(folder)
        self.store.create_state()

    def read_missing(self) -> Iterator[tuple[PartPlan, pa.Table]]:
        """Yield the rows of each missing part, row group by row group.

        Raises InputError if the input ends before the place that its footer names.
        """
        source = self.store.source
        for row_group, plans in self.work.items():
            wanted = {plan.read_batch: plan for plan in plans}
            for read_batch, table in enumerate(read_batches(source, row_group)):
                plan = wanted.pop(read_batch, None)
                if plan is not None:
                    yield plan, table.slice(0, plan.rows_within(self._limit))
                if not wanted:
                    break
            if wanted:
                raise InputError(f"{source.path}: row group {row_group} ends too early: fetch the file again")

    def finish(self) -> dict[str, Any]:
        """Write the state and return it; what was set aside goes once the dataset is complete."""
        if self.work:
            self.parts = self.store.find_parts(self._own)
        state = self.store.write_state()
        if state["complete"]:
            set_aside.discard(self.dataset.folder)
        return state
