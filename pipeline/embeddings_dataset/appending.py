"""The parts that one run adds to an embeddings dataset: which are missing, writing them, and the state."""

import textwrap
from pathlib import Path
from typing import Any

from pipeline.embeddings_dataset.dataset import SET_ASIDE, SET_ASIDE_FILES, EmbeddingsDataset
from pipeline.embeddings_dataset.deletions import finish_order, read_order
from pipeline.embeddings_dataset.packaged_input import SHAPING_OPTIONS, PackagedInput
from pipeline.embeddings_dataset.parts import (
    STAGE,
    DatasetFiles,
    Part,
    PartContent,
    PartPlan,
    find_files,
    list_part_files,
    plan_parts,
    refuse_foreign,
    rejects_beside,
    write_part,
)
from pipeline.errors import InputError, PipelineError, StaleOutputError
from pipeline.files.tables import make_provenance
from pipeline.ids import Shard
from pipeline.inference.precision import Precision
from pipeline.log import logger
from pipeline.workspace import remove_made


class Appending:
    """The parts of a dataset that is made from one input by one model, and the `work` that one run has with them.

    Several processes may write at once. Nothing is counted on the way: the state adds up the parts' own counts, so it
    is right whoever finishes last.
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
        settings = {name: getattr(source.options, name) for name in SHAPING_OPTIONS}
        settings["keep_columns"] = list(source.options.keep_columns)
        settings |= {"precision": precision.mode, "embedding_version": version}
        self.recipe = made_from | settings
        self.plans = {plan.name: plan for plan in plan_parts(source)}
        noted = {"embedding_version": version, **precision.fidelity}
        self._made_from = make_provenance(STAGE, [made_from], settings) | noted
        folder = Path(model_id).expanduser()
        self._first_state = {  # the names alone: a dataset that is shared shows no one's folders
            "input_path": source.path.resolve().name, "model_id": folder.name if folder.is_dir() else model_id,
            **self.recipe, **noted, "rows_total": source.num_rows, "parts_total": len(self.plans),
        }  # fmt: skip
        self._own = self.plans  # this run's

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

    def take_up(self, files: DatasetFiles) -> dict[str, Part]:
        """Return the parts among a dataset's files, whole or cut, by name; a damaged one counts as missing.

        Raises StaleOutputError for a part of another recipe, InputError for a file that is no part of this input.
        """
        for path in (*files.foreign, *files.damaged, *(part.path for part in files.parts)):
            if path.name not in self.plans:
                raise InputError(
                    f"{path}: no part of this input: give the --input and --read-batch-size that it was made with, or "
                    "move it away"
                )
        found, broken = {}, list(files.damaged)
        for part in files.parts:
            self.check(part.recipe, part.path)
            if part.plan == self.plans[part.path.name] and rejects_beside(part.path).exists():
                found[part.path.name] = part
            else:
                broken.append(part.path)
        for path in broken:
            logger.warning("%s: damaged: it is made again", path)
        return found

    def write_part(self, plan: PartPlan, content: PartContent) -> None:
        """Write a part and its rejects, without deleted ids."""
        write_part(self.dataset.folder, plan, read_order(self.dataset.folder).apply(content), self._made_from)

    def write_state(self) -> dict[str, Any]:
        """Write `state.json` from the counts of the parts, and return it; what was set aside goes once it is complete.

        Another process may finish a part while this one counts, so it counts again until nothing has changed: then
        the last to write has seen all.
        """
        while True:
            listed = list_part_files(self.dataset.folder)
            found = self.take_up(find_files(self.dataset.folder))
            state = self.dataset.update_state(found.values(), self._first_state)
            if list_part_files(self.dataset.folder) == listed:
                self.parts = {name: part for name, part in found.items() if name in self._own}
                if state["complete"]:
                    remove_made(self.dataset.folder / SET_ASIDE, SET_ASIDE_FILES)
                return state

    def find_work(self, files: DatasetFiles | None, shard: Shard, limit: int | None) -> None:
        """Find the parts of a shard that are missing among a dataset's files; nothing is written before `begin`.

        Without files the dataset is begun anew. Raises StaleOutputError, naming the difference, where it is of another
        recipe or not ours, PipelineError where a deletion of ids was interrupted.
        """
        folder, self.limit, self._is_anew = self.dataset.folder, limit, files is None
        found = {}
        if files is not None:
            if files.begun is None:
                refuse_foreign(files.others + files.foreign)
            else:
                self.check(files.begun, self.dataset.state_path if files.state else folder)
            if files.parts and not files.state:
                logger.warning("%s: missing or damaged: made again from the parts", self.dataset.state_path)
            if not read_order(folder).done:
                raise PipelineError(
                    f"{folder}: a deletion of ids was interrupted: run delete_ids.py again, or --overwrite"
                )
            found = self.take_up(files)
            refuse_foreign(files.others + files.foreign)
        row_groups = set(shard.take(list(range(len(self.source.row_group_rows)))))
        self._own = {name: plan for name, plan in self.plans.items() if plan.row_group in row_groups}
        self.parts = {name: part for name, part in found.items() if name in self._own}  # as they are there
        done = {name: part.counts["in"] for name, part in self.parts.items()}
        # The parts to make, in input order, and the rows that this run leaves as they are and that it works on.
        self.work = [plan for name, plan in self._own.items() if plan.rows_within(limit) > done.get(name, 0)]
        kept = sum(done.values()) - sum(done.get(plan.name, 0) for plan in self.work)
        self.num_rows = kept, sum(plan.rows_within(limit) for plan in self.work)

    def begin(self) -> None:
        """Take up the dataset or begin it; where it is begun anew, what is there is set aside first.

        Raises StaleOutputError where another process has just begun one of another recipe, or a file is not ours.
        """
        if self._is_anew:
            self.dataset.set_all_aside()
            finish_order(self.dataset.folder)
        if self.dataset.state is None:
            self.dataset.update_state((), self._first_state)
        self.check(self.dataset.state or self.recipe, self.dataset.state_path)
