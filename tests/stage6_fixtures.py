"""What the tests of stage 6 start from."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def workspace(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """A folder with splits, a difficulty table and a configuration."""
    from training_data import SETTINGS, fill_workspace  # which imports torch

    fill_workspace(tmp_path)
    write_config(tmp_path, **SETTINGS)
    return tmp_path
