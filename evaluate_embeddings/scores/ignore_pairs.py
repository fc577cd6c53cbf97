"""Read which pairs of buildings are neither right nor wrong answers, because their pictures may show each other."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from pipeline.errors import InputError, one_line
from pipeline.log import logger
from pipeline.retrieval.candidates import IgnoredPairs

COLUMNS = ("building_id_a", "building_id_b")


def read_ignore_pairs(path: Path | None) -> pa.Table | None:
    """Read the two id columns of a CSV as strings, None where none is asked for; further columns are passed over.

    Raises InputError if the file is missing, is no CSV, or lacks a column.
    """
    if path is None:
        return None
    # As strings, or an id of digits alone would lose its leading zeros.
    options = csv.ConvertOptions(include_columns=list(COLUMNS), column_types=dict.fromkeys(COLUMNS, pa.string()))
    remedy = f"--ignore-pairs takes a CSV with the columns {' and '.join(COLUMNS)}"
    try:
        return csv.read_csv(path, convert_options=options)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: {remedy}") from None
    except KeyError as error:
        raise InputError(f"{path}: a column is missing ({one_line(error)}): {remedy}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable CSV ({one_line(error)[:200]}): {remedy}") from None


def resolve_pairs(pairs: pa.Table | None, building_ids: pa.StringArray) -> IgnoredPairs:
    """Return the pairs of two different buildings of the split, each once, as codes into `building_ids` (B,)."""
    if pairs is None:
        return IgnoredPairs(np.empty(0, np.int64), np.empty(0, np.int64))
    columns = [pairs.column(name).combine_chunks() for name in COLUMNS]
    a, b = (
        pc.fill_null(pc.index_in(ids, value_set=building_ids), -1).to_numpy(zero_copy_only=False).astype(np.int64)
        for ids in columns
    )
    strangers = pa.concat_arrays([ids.filter(pa.array(codes < 0)) for ids, codes in zip(columns, (a, b), strict=True)])
    inside = (a >= 0) & (b >= 0) & (a != b)
    keys = np.unique(np.minimum(a, b)[inside] * len(building_ids) + np.maximum(a, b)[inside])
    logger.info(
        "ignore pairs: %d read, %d of them between buildings of the split; %d ids do not occur in it",
        pairs.num_rows, len(keys), len(strangers.unique()),
    )  # fmt: skip
    return IgnoredPairs(keys // len(building_ids), keys % len(building_ids))
