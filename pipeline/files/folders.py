"""Write a folder in one piece: all of it appears under its name, or none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.files.tables import remove_stale_temporaries, sync_file, sync_folder, temporary_path, write_failure


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path` to fill; when the block ends well it is synced to disk and renamed.

    A folder that is there already is moved aside first and removed after. Raises PipelineError naming `path` where
    the disk is full or the place cannot be written.
    """
    temporary, old = temporary_path(path), temporary_path(_old_path(path))
    if path.is_file():
        raise PipelineError(f"{path}: a file, where a folder is to be written: remove it or give another path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(path)
        remove_stale_temporaries(_old_path(path))
        temporary.mkdir()
        yield temporary
        for file_path in temporary.rglob("*"):
            if file_path.is_file():
                sync_file(file_path)
        sync_folder(temporary)
        # For an instant there is neither the old nor the new one: a full folder cannot be renamed over.
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is not None and not Path(str(error.filename)).is_relative_to(path.parent):
            raise  # something else that the block touched
        raise write_failure(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _old_path(path: Path) -> Path:
    return path.with_name(path.name + ".old")
