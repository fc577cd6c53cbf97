"""docs/migrating.md, typed: a half-finished dataset of the reference implementation becomes a published model."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from published_models import list_parts, make_photographs, read_dataset, write_packaged
from raw_tars import Entry, make_city, write_tar
from reference_files import age
from reference_projector import ReferenceProjector

from generate_embeddings import generate_embeddings
from pipeline import migrate
from preprocess_raw_data import compute_fingerprints, merge_and_split, process_tar
from publish_model.modeling_spatial_embeddings import SpatialEmbeddingsModel

ROOT = Path(__file__).resolve().parents[1]
SIZES = (3, 2, 4, 2)
OLD_CONFIG = """
[paths]
raw_dir = "raw/dataset_unaligned"
intermediates_dir = "intermediates"
embeddings_dir = "embeddings"
merged_dir = "old/merged"
fingerprints_dir = "fingerprints"
difficulty_metadata_path = "difficulty.parquet"
checkpoint_dir = "old"
[embedding_model]
model_name = "{}"
pooling_type = "pooler_output"
[training_model]
hidden_dim = 32
num_hidden_layers = 3
hidden_dim_multiplier = 0.75
activation = "gelu"
use_layer_norm = true
use_residual = true
[difficulty]
neighbors = 5
k0_for_local_scale = 2
[training]
loss_distance = "euclidean"
wandb_enabled = false
"""


def list_commands() -> list[list[str]]:
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def type_command(words: list[str], run_main) -> str:
    """Run a command and return what it logs."""
    assert words[0] == "python"
    name, *arguments = words[2:] if words[1] == "-m" else [words[1].removesuffix(".py").replace("/", "."), *words[2:]]
    outcome = run_main(importlib.import_module(name).main, *arguments)
    assert outcome.code == 0, f"{words}: {outcome.stderr}"
    return " ".join(outcome.stderr.split())


def leave_old_files(folder: Path, config: Path, backbone: Path, run_main) -> ReferenceProjector:
    """Leave two tars embedded, split and fingerprinted, a third untouched, a checkpoint, pictures."""
    for dataset_id in (1, 2, 3):  # the tars have one folder, their intermediates two
        entries = [Entry(entry.name.split("/", 1)[1], entry.data) for entry in make_city(dataset_id, SIZES)]
        write_tar(folder / f"raw/dataset_unaligned/{dataset_id:04d}.tar", entries)
    for stage in (process_tar, generate_embeddings, compute_fingerprints):
        assert run_main(stage.main, "--config", config).code == 0
    for path in folder.glob("*/0003*.parquet"):
        path.unlink()
    old = ("--set", "paths.merged_dir=old/merged", "--set", "global.seed=4")
    ratios = ("--set", "data.train_ratio=0.4", "--set", "data.val_ratio=0.3", "--set", "data.test_ratio=0.3")
    assert run_main(merge_and_split.main, "--config", config, *ratios, *old).code == 0
    for path in (folder / "old/merged").glob("*.parquet"):
        age(path)
    for dataset_id in (1, 2):
        age(folder / f"intermediates/{dataset_id:04d}.parquet", without=("building_id", "streetview_image_id"),
            prefix=f"{dataset_id:04d}/")  # fmt: skip
        age(folder / f"embeddings/{dataset_id:04d}_embeddings.parquet", prefix=f"{dataset_id:04d}/")
        age(folder / f"fingerprints/{dataset_id:04d}_fingerprints.parquet")
    incomplete = folder / "embeddings/0002_embeddings.parquet"
    pq.write_table(pq.read_table(incomplete).slice(2), incomplete)
    torch.manual_seed(1)
    network = ReferenceProjector(24, [32, 24, 18], 256, "gelu", norm=True).eval()
    (folder / "old/config.toml").write_text(OLD_CONFIG.format(backbone))
    torch.save({"model_state_dict": network.state_dict(), "epoch": 3}, folder / "old/checkpoint_best.pt")
    write_packaged(folder / "packaged_images.parquet", list(make_photographs(5)))
    return network


def read_places(folder: Path) -> dict[str, str]:
    """Return the split of each building of a folder of splits."""
    return {
        name: path.stem for path in folder.glob("*.parquet") for name in pq.read_table(path)["building_id"].to_pylist()
    }


def leave_old_dataset(folder: Path) -> None:
    """Leave what the guide's own dataset looks like as the reference implementation writes it."""
    [path] = list_parts(folder / "new")
    table = pq.read_table(path)
    lists = pa.array(table.column("embedding").to_pylist(), pa.list_(pa.float32()))
    (folder / "old_embeddings/parts").mkdir(parents=True)
    pq.write_table(
        pa.table({"OSMID": table.column("OSMID"), "embedding": lists}), folder / "old_embeddings/parts" / path.name
    )
    (folder / "old_embeddings/state.json").write_text(json.dumps({"model_id": "someone/model", "rows_processed": 5}))


def test_the_commands_of_the_guide_change_a_dataset_over(tmp_path, toy_backbone, write_config, run_main, monkeypatch):
    config = write_config(
        tmp_path,
        paths={"raw_dir": "raw/dataset_unaligned"},
        embedding_model={"model_name": str(toy_backbone)},
        difficulty={"neighbors": 5, "k0_for_local_scale": 2},
    )
    network = leave_old_files(tmp_path, config, toy_backbone, run_main)
    before = (tmp_path / "embeddings/0001_embeddings.parquet").read_bytes()
    monkeypatch.chdir(tmp_path)
    first, *commands = list_commands()
    assert first == ["python", "-m", "pipeline.migrate", "old/config.toml"]
    migrated = run_main(migrate.main, first[-1]).stdout
    paths = 'merged_dir = "merged"\nreport_dir = "report"'  # what the guide says to change
    assert 'merged_dir = "old/merged"' in migrated
    migrated = migrated.replace('merged_dir = "old/merged"', paths).replace('"old"', '"checkpoint"')
    config.write_text(migrated + '\n[data]\nsplit_file = "old/merged"\n', encoding="utf-8")
    log = ""
    for words in commands:
        if "adopt_embeddings" in words[1]:
            leave_old_dataset(tmp_path)
        log = type_command(words, run_main)
    assert (tmp_path / "embeddings/0001_embeddings.parquet").read_bytes() == before
    old, new = read_places(tmp_path / "old/merged"), read_places(tmp_path / "merged")
    assert len(old) == 8
    assert {building: new[building] for building in old} == old
    doubt = (
        "Mind: checkpoint_best.pt does not name its training buildings; the scores hold if they are the split file's"
    )
    assert f"{doubt}. The projector " in log
    rows = [len(pq.read_table(path)) for path in sorted((tmp_path / "embeddings").glob("*.parquet"))]
    assert rows == [11, 11, 11]
    merged = pa.concat_tables(
        [pq.read_table(path).select(["dataset_id"]) for path in tmp_path.glob("merged/*.parquet")]
    )
    assert set(merged["dataset_id"].to_pylist()) == {1, 2, 3}
    assert len(merged) == 33
    assert len(pq.read_table(tmp_path / "difficulty.parquet")) == 33
    features = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    model = SpatialEmbeddingsModel.from_pretrained(tmp_path / "published").eval()
    with torch.no_grad():
        torch.testing.assert_close(model.projector(features), network(features), atol=1e-6, rtol=0)
    found = np.stack(read_dataset(tmp_path / "new")["embedding"].to_numpy())
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert found.shape == (5, 256)
    assert read_dataset(tmp_path / "old_embeddings").equals(read_dataset(tmp_path / "new"))
