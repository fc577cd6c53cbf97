"""How much memory publishing takes: a backbone of 27 GB must not lie in memory twice."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from published_models import make_config, write_backbone, write_checkpoint

TESTS = Path(__file__).resolve().parent
# Publishes in a process of its own and prints by how many bytes the peak of resident memory rises.
SCRIPT = """
import re, sys
from pathlib import Path

sys.path[:0] = sys.argv[2:]
from published_models import PublishOptions, convert_to_hf, make_config
from publish_model.model_folder import published_folder
from publish_model.modeling_spatial_embeddings import SpatialEmbeddingsModel
from transformers import Dinov2Model

def resident_bytes(key):
    return int(re.search(rf"^{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024

folder = Path(sys.argv[1])
published_folder.MAX_SHARD_BYTES = 50_000_000  # several shards, as above 5 GB
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (proc(5))
before = resident_bytes("VmRSS")
convert_to_hf.run(make_config(folder, folder / "backbone"), PublishOptions())
print(resident_bytes("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone of about 200 MB and its checkpoint."""
    folder = tmp_path_factory.mktemp("medium")
    shape = {"hidden_size": 768, "num_hidden_layers": 7, "num_attention_heads": 12, "mlp_ratio": 4}
    write_backbone(folder / "backbone", "dinov2", **shape)
    write_checkpoint(folder / "checkpoint" / "checkpoint_best.pt", 768)
    return folder


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.slow
def test_publishing_never_holds_a_second_copy_of_the_weights(folder):
    size = (folder / "backbone" / "model.safetensors").stat().st_size
    assert size > 190e6
    arguments = [str(folder), str(TESTS), str(TESTS.parent)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(re.findall(r"-?\d+", done.stdout)[-1]) < 1.5 * size
    published = make_config(folder, folder / "backbone").path("published_model_dir")
    assert len(list(published.glob("model-*.safetensors"))) > 1


def test_the_shards_load_as_the_one_file_does(toy_backbone, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModel

    from publish_model import convert_to_hf
    from publish_model.model_folder import published_folder

    write_checkpoint(tmp_path / "checkpoint" / "checkpoint_best.pt")
    config = make_config(tmp_path, toy_backbone)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    found = []
    for limit in (published_folder.MAX_SHARD_BYTES, 20_000):
        monkeypatch.setattr(published_folder, "MAX_SHARD_BYTES", limit)
        convert_to_hf.run(config, convert_to_hf.PublishOptions(overwrite=True))
        model = AutoModel.from_pretrained(tmp_path / "published", trust_remote_code=True).eval()
        with torch.inference_mode():
            found.append(model(pixel_values=pixels).embeddings)
    assert (tmp_path / "published" / "model.safetensors.index.json").is_file()
    assert torch.equal(*found)
