"""Read a list of ids to take out: text, CSV or parquet, as plain values of a dataset's type."""

from pathlib import Path

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.files.tables import open_parquet
from publish_model.new_data.packaged_input import ID_COLUMN, plain_values


def read_id_list(path: Path, kind: pa.DataType) -> list[object]:
    """Return the ids of a list, as plain values of the dataset's type.

    Raises InputError if it cannot be read, is empty, or a line is not of that type.
    """
    if path.suffix == ".parquet":
        with open_parquet(path) as file:
            if ID_COLUMN not in file.schema_arrow.names:
                raise InputError(f"{path}: column {ID_COLUMN} is missing")
            column = file.read([ID_COLUMN]).column(0).combine_chunks()
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as text ({error})") from None
        column = pa.array([line.strip() for line in lines if line.strip()], pa.string())
    if not len(column):
        raise InputError(f"{path}: holds no ids")
    values_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return plain_values(column.cast(values_type))
    except pa.ArrowException as error:
        raise InputError(
            f"{path}: not all of its ids are {values_type}, as those of the dataset are ({error})"
        ) from None
