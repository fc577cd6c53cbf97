"""The published folder in a virtual environment that has only torch, torchvision and transformers."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from published_models import make_picture, publish, write_backbone

REPO = Path(__file__).resolve().parents[1]
# What a first user runs: every way in, from a folder that is not the model's.
USE = """
import json, sys
import numpy as np, torch, transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

folder, picture_path = sys.argv[1:]
picture = Image.open(picture_path)
model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
inputs = AutoImageProcessor.from_pretrained(folder)(images=[picture], return_tensors="pt")
found = {}
with torch.inference_mode():
    found["AutoModel"] = model.eval()(**inputs).embeddings[0].tolist()
    for dtype in (torch.float32, torch.bfloat16):
        for attention in ("eager", "sdpa"):
            other = AutoModel.from_pretrained(
                folder, trust_remote_code=True, dtype=dtype, attn_implementation=attention
            ).eval()
            assert other.backbone.dtype == dtype and other.backbone.config._attn_implementation == attention
            found[f"{dtype} {attention}"] = other(**inputs).embeddings[0].tolist()
    other.save_pretrained("saved")
    # Unless told otherwise, transformers 4 loads everything as float32.
    again = AutoModel.from_pretrained("saved", trust_remote_code=True, dtype="auto").eval()
    assert again.backbone.dtype == torch.bfloat16 and again.projector.shortcut.weight.dtype == torch.float32
    found["saved again in bfloat16"] = again(**inputs).embeddings[0].tolist()
extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True, device="cpu")
found["pipeline"] = np.array(extract(picture_path)).ravel().tolist()
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).backbone_model_name == "backbone"
assert not {"pipeline", "publish_model", "pyarrow"} & {name.partition(".")[0] for name in sys.modules}
print(json.dumps({"version": transformers.__version__, "found": found}))
"""
# Every snippet of the card in order, and accelerate's placement, beside what they need.
SNIPPETS = """
import json, os, re, sys

os.chdir(sys.argv[1])
names = {}
for code in re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL):
    exec(compile(code, "README.md", "exec"), names)
from transformers import AutoModel

placed = AutoModel.from_pretrained(".", trust_remote_code=True, device_map="auto").eval()
with names["torch"].inference_mode():
    inputs = names["processor"](images=names["photographs"][:1], return_tensors="pt").to(placed.device)
    embedding = placed(**inputs).embeddings[0].tolist()
found = {"device_map": embedding}
print(json.dumps({"version": "", "found": found}))
"""


def lowest_transformers():
    """The oldest version that the project claims."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lowest = next(line for line in project["dependencies"] if line.startswith("transformers>="))
    return lowest.removeprefix("transformers>=")


class Environment:
    """A virtual environment, and folders of packages that are put before its own."""

    def __init__(self, folder):
        self.folder, self.python = folder, folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)

    def install(self, *arguments, overlay=None):
        target = ["--target", str(self.folder / overlay)] if overlay else []
        command = [str(self.python), "-m", "pip", "install", "--quiet", *target, *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=self.folder)

    def run(self, script, *arguments, overlay=None):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
        own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / f"home-{overlay}"), "PYTHONSAFEPATH": "1"}
        own |= {"PYTHONPATH": str(self.folder / overlay)} if overlay else {}
        command = [str(self.python), "-c", script, *map(str, arguments)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=self.folder, env=kept | own)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


def embed(folder, picture):
    """Return what this process gives for the picture."""
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        return model(**AutoImageProcessor.from_pretrained(folder)(images=[picture], return_tensors="pt")).embeddings[0]


def check(outcome, expected):
    """Every way in gives the expected embedding of norm 1, to the precision of its type."""
    for how, values in outcome["found"].items():
        found = torch.tensor(values)
        assert found.shape == (256,)
        assert abs(found.norm().item() - 1) < 1e-5, how
        assert found @ expected > (0.999 if "bfloat16" in how else 0.9999), (outcome["version"], how)


@pytest.fixture
def environment(tmp_path):
    """An environment below the test's folder, which is removed at once: pytest would keep its 5 GB."""
    yield Environment(tmp_path)
    for folder in ("venv", "oldest", "extras"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)


@pytest.mark.slow
def test_the_folder_loads_in_an_environment_of_its_own_at_the_oldest_and_the_newest_transformers(environment, tmp_path):
    """One test and not four, because its environment takes 5 GB and a minute."""
    oldest = environment.install(f"transformers=={lowest_transformers()}", overlay="oldest")
    if oldest.returncode:
        pytest.skip(f"no package index to install from: {oldest.stderr.strip().splitlines()[-1][:200]}")
    newest = environment.install("torch", "torchvision", "transformers", "--constraint", REPO / "constraints.txt")
    assert newest.returncode == 0, newest.stderr[-3000:]

    picture = make_picture(3, (300, 280))
    picture.save(tmp_path / "picture.png")
    for kind in ("dinov2", "dinov3"):
        source = tmp_path / f"made-{kind}"
        published = publish(source, write_backbone(source / "backbone", kind)).rename(tmp_path / kind)
        expected = embed(published, picture)
        versions = []
        for overlay in ("oldest", None):
            outcome = environment.run(USE, published, tmp_path / "picture.png", overlay=overlay)
            check(outcome, expected)
            versions.append(outcome["version"])
        assert versions[0].startswith(lowest_transformers())
        assert int(versions[1].partition(".")[0]) >= 5

    assert environment.install("psutil", overlay="extras").returncode == 0
    # Its own requirements would bring torch a second time.
    assert environment.install("--no-deps", "accelerate", overlay="extras").returncode == 0
    picture.save(published / "a.jpg", quality=95)
    picture.save(published / "b.jpg", quality=95)
    check(environment.run(SNIPPETS, published, overlay="extras"), expected)
