"""What one run adds to an embeddings dataset: which parts are missing, writing them, and the state."""

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.embeddings_dataset import set_aside
from pipeline.embeddings_dataset.dataset import EmbeddingsDataset
from pipeline.embeddings_dataset.deletions import DeletionOrder, read_order, without_ids, write_order
from pipeline.embeddings_dataset.packaged_input import PackagedInput, read_batches
from pipeline.embeddings_dataset.part_plans import (
    ModelRecord,
    PartContent,
    PartPlan,
    PartRecord,
    count_rows,
    make_recipe,
    plan_parts,
)
from pipeline.embeddings_dataset.parts import STAGE, list_part_files, read_part, write_part
from pipeline.errors import DamagedError, InputError, PipelineError
from pipeline.files.tables import make_provenance
from pipeline.files.writing import write_json, write_json_once
from pipeline.ids import Shard
from pipeline.log import logger

# Float32 hardly gets smaller when it is compressed.
BYTES_A_NUMBER = 4
# While parts are made, counting reads the footers of what other processes have written.
STATE_TIME_SHARE, STATE_INTERVAL_SECONDS = 0.02, 30.0


class Appending:
    """The parts that a run adds to a dataset, to which several processes may write at once.

    Nothing is counted on the way: the state is made from what the parts say, so it is right whoever finishes last.
    """

    def __init__(
        self,
        dataset: EmbeddingsDataset,
        source: PackagedInput,
        model: ModelRecord,
        *,
        shard: Shard | None = None,
        limit: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Compare what is there with what is wanted; nothing is written before `begin`.

        Raises StaleOutputError, naming the difference, where the dataset is of another recipe or not ours,
        PipelineError where a deletion of ids was interrupted. With `overwrite` neither matters.
        """
        self.dataset, self.source, self.limit, self.overwrite = dataset, source, limit, overwrite
        plans = plan_parts(source)
        self._plans = {plan.name: plan for plan in plans}
        self._next_state = time.monotonic() + STATE_INTERVAL_SECONDS
        self._known: dict[str, tuple[tuple[int, ...], PartRecord | None]] = {}
        self._fidelity = model.precision.fidelity
        self.recipe = make_recipe(source, model.precision.mode, model.version)
        begun = None if overwrite else dataset.find_begun()
        if begun is not None:
            self.recipe.check(begun, dataset.folder)
        self._order = read_order(dataset.folder)
        if self._order is not None and not self._order.done and not overwrite:
            raise PipelineError(f"{dataset.folder}: a deletion of ids was interrupted: run delete_ids.py again first")
        self._identity = {
            "input_path": str(source.path), "model_id": model.model_id,
            **asdict(self.recipe), **self._fidelity,
        }  # fmt: skip
        row_groups = set((shard or Shard()).take(list(range(len(source.row_group_rows)))))
        self._own = {plan.name: plan for plan in plans if plan.row_group in row_groups}
        self.records = {} if overwrite else self.find_parts(self._own)
        self.work = find_work(self._own.values(), self.records, limit)

    @property
    def part_paths(self) -> list[Path]:
        """Where all parts of the dataset lie, or will, in input order."""
        return [self.dataset.path_of(name) for name in self._plans]

    @property
    def num_rows(self) -> tuple[int, int]:
        """Rows of the input that this run leaves as they are, and rows that it works on."""
        redone = {plan.name: plan for plans in self.work.values() for plan in plans}
        kept = sum(record.counts["in"] for name, record in self.records.items() if name not in redone)
        return kept, sum(plan.rows_within(self.limit) for plan in redone.values())

    def begin(self, width: int = 0) -> None:
        """Take up the dataset or begin it; with `--overwrite` what is there is set aside first.

        Embeddings have `width` numbers. Raises StaleOutputError where another process has just begun one of another
        recipe, PipelineError where the disk has no room for what is to replace a dataset.
        """
        if self.overwrite:
            self._check_space(width)
            self._set_aside()
        state = self.dataset.state or self._create_state()
        self.recipe.check(state, self.dataset.folder)
        self._identity |= {key: state[key] for key in ("input_path", "model_id") if key in state}

    def _check_space(self, width: int) -> None:
        folder = self.dataset.folder
        needed = self.num_rows[1] * width * BYTES_A_NUMBER
        free = shutil.disk_usage(folder).free if folder.is_dir() else needed
        if free < needed:
            raise PipelineError(
                f"{folder}: about {needed / 1e9:.1f} GB are needed beside the dataset that is to be overwritten, and "
                f"{free / 1e9:.1f} GB are free: free some, or remove the dataset yourself"
            )

    def _set_aside(self) -> None:
        """Make room; rows that an interrupted deletion has left go for good, and the order is fulfilled by that."""
        set_aside.move_all(self.dataset.folder)
        if self._order is not None and not self._order.done:
            set_aside.discard(self.dataset.folder)
            write_order(self.dataset.folder, DeletionOrder(self._order.id_hashes, done=True))

    # ------------------------------------------------------------------------------------------ parts

    def find_parts(self, names: Iterable[str] | None = None) -> dict[str, PartRecord]:
        """Return the parts that are there (among `names`), whole or cut; a damaged one is as if not there.

        Raises StaleOutputError for a part of another recipe or not ours, InputError for a file that is no part of this
        input, or cannot be read.
        """
        found = list_part_files(self.dataset.folder)
        strange = sorted(found.keys() - self._plans.keys())
        if strange:
            raise InputError(
                f"{self.dataset.path_of(strange[0])}: no part of this input: remove it, or give another --output"
            )
        rejects = {path.name for path in (self.dataset.folder / "_rejects").glob("rg*.parquet")}
        records = {}
        for name in found.keys() if names is None else found.keys() & set(names):
            signature, record = self._known.get(name, ((), None))
            if signature != found[name]:
                record = self._read_record(self._plans[name])
                self._known[name] = (found[name], record)
            if record is not None and name in rejects:
                records[name] = record
        return records

    def _read_record(self, plan: PartPlan) -> PartRecord | None:
        """Return what a part says of itself, None where it is damaged or lies under another's name."""
        path = self.dataset.path_of(plan.name)
        try:
            part = read_part(path)
        except DamagedError:
            logger.warning("%s: damaged: it is made again", path)
            return None
        self.recipe.check(part.recipe, path)
        if part.plan != plan:
            logger.warning("%s: holds another part's rows: it is made again", path)
            return None
        return part.record

    def read_missing(self) -> Iterator[tuple[PartPlan, pa.Table]]:
        """Yield the rows of each missing part, row group by row group.

        Raises InputError if the input cannot be read to where its footer says it goes.
        """
        for row_group, plans in self.work.items():
            wanted = {plan.read_batch: plan for plan in plans}
            for read_batch, table in enumerate(read_batches(self.source, row_group)):
                plan = wanted.pop(read_batch, None)
                if plan is not None:
                    yield plan, table.slice(0, plan.rows_within(self.limit))
                if not wanted:
                    break
            if wanted:
                raise InputError(f"{self.source.path}: row group {row_group} ends too early: fetch the file again")

    def describe(self, plan: PartPlan) -> dict[str, Any]:
        """Say what a part is made from."""
        recipe = asdict(self.recipe)
        inputs = [{key: recipe.pop(key) for key in ("input_size", "input_schema", "row_group_fingerprint")}]
        return {
            **make_provenance(STAGE, inputs, recipe),
            **self._fidelity,
            "embedding_version": self.recipe.embedding_version,
            "part": asdict(plan),
        }

    def write_part(self, plan: PartPlan, content: PartContent) -> None:
        """Write a part and its rejects, and the state now and then."""
        id_hashes = self._order.id_hashes if self._order else frozenset()
        write_part(self.dataset.folder, plan, without_ids(content, id_hashes), self.describe(plan))
        self._write_state_now_and_then()

    # ------------------------------------------------------------------------------------------ state

    def finish(self) -> dict[str, Any]:
        """Write the state and return it; what was set aside goes once the dataset is complete."""
        if self.work:
            self.records = self.find_parts(self._own)
        state = self.write_state()
        if state["complete"]:
            set_aside.discard(self.dataset.folder)
        return state

    def write_state(self) -> dict[str, Any]:
        """Write `state.json` from what the parts say, and return it.

        Another process may finish a part while this one counts, so it counts again until nothing has changed: then
        the last to write has seen all.
        """
        while True:
            listed = list_part_files(self.dataset.folder)
            state = self._count(self.find_parts())
            if state != self.dataset.state:
                write_json(self.dataset.state_path, state)
            if list_part_files(self.dataset.folder) == listed:
                return state

    def _write_state_now_and_then(self) -> None:
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
            "rows_total": self.source.num_rows,
            **counted,
            "parts_total": len(self._plans),
            "complete": counted["parts_done"] == len(self._plans),
        }

    def _create_state(self) -> dict[str, Any]:
        """Write the first state unless another process has just done so, and return whichever is there."""
        state, path = self._count({}), self.dataset.state_path
        if path.exists() and self.dataset.state is None:  # damaged
            write_json(path, state)
        elif not write_json_once(path, state):
            return self.dataset.state or state
        return state


def find_work(
    plans: Iterable[PartPlan], records: dict[str, PartRecord], limit: int | None
) -> dict[int, list[PartPlan]]:
    """Return the parts to make by row group: those that are missing, or hold fewer rows than the limit now allows."""
    work: dict[int, list[PartPlan]] = {}
    for plan in plans:
        rows = plan.rows_within(limit)
        record = records.get(plan.name)
        if rows and (record is None or record.counts["in"] < rows):
            work.setdefault(plan.row_group, []).append(plan)
    return work
