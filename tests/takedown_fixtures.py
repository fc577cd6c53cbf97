"""Fixtures of the tests of takedowns."""

import pytest
from published_models import make_photographs, write_packaged

from publish_model import delete_ids


@pytest.fixture
def delete(run_main, tmp_path):
    def run(output, *ids):
        (tmp_path / "ids.txt").write_text("".join(f"{one}\n" for one in ids))
        return run_main(delete_ids.main, output, "--delete-ids", tmp_path / "ids.txt")

    return run


@pytest.fixture
def dataset(embed, tmp_path):
    """A dataset of 20 photographs of 10 ids; way/1 has a reject, way/2 an invalid row."""
    images = make_photographs(20)
    images[3] = None
    source = write_packaged(
        tmp_path / "in.parquet", images, row_group_size=10, is_valid=[row != 5 for row in range(20)]
    )
    assert embed(source, tmp_path / "out").code == 0
    return tmp_path / "out"
