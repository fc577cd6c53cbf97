"""The ids that are made of two others, for files that were written before they were stored."""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

# Each is "{dataset_id:04d}_{number}" of this number, as pipeline/ids.py has it for one.
_NUMBERS = {"building_id": "target_id", "streetview_image_id": "patch_id"}


def stored_fields(schema: pa.Schema, fields: Iterable[pa.Field]) -> list[pa.Field]:
    """Return the fields to ask a file for: in place of a composite id that it lacks, the numbers that give it."""
    found: dict[str, pa.Field] = {}
    for field in fields:
        if field.name in _NUMBERS and schema.get_field_index(field.name) < 0:
            numbers = ("dataset_id", _NUMBERS[field.name])
            # One that has neither is told of the id, which is what people know.
            if all(schema.get_field_index(name) >= 0 for name in numbers):
                found |= {name: pa.field(name, pa.int64()) for name in numbers}
                continue
        found.setdefault(field.name, field)
    return list(found.values())


def fill_composite_ids(table: pa.Table) -> pa.Table:
    """Return the table with those composite ids that it lacks and has the numbers for; a null number gives a null."""
    for name, number in _NUMBERS.items():
        if name not in table.column_names and {"dataset_id", number} <= set(table.column_names):
            dataset = pc.utf8_lpad(table["dataset_id"].cast(pa.string()), 4, "0")
            table = table.append_column(
                name, pc.binary_join_element_wise(dataset, table[number].cast(pa.string()), "_")
            )
    return table
