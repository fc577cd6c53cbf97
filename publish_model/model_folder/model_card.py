"""Write the published model's README: a model card in the hub's format, made of what was measured."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.retrieval.scores import list_unreached
from publish_model.model_folder.card_results import COLUMNS, PENDING, ROWS, wrap

# What needs no training; a checkpoint of before the whitening was measured lacks the last one.
BASELINES = ("raw", "pca_whitened", "whitening")
# mAP: what rounding moves a projector that is still the whitening it started from; tables show as much.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class CardFacts:
    """What the card says."""

    name: str
    backbone_name: str
    licence: dict[str, str]  # license, license_name, license_link of the backbone's own card
    licence_files: list[str]  # texts that travel in the folder
    architecture: dict[str, Any]
    pooling_type: str
    views: str  # what is said behind pooling_type of the sizes and the mirror image
    dtype: str
    metrics: dict[str, dict[str, float]]  # by row, then by measure; empty where nothing was measured
    settings: dict[str, Any] = field(default_factory=dict)
    training_inputs: list[dict[str, Any]] = field(default_factory=list)
    split_hash: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    num_training_samples: int = 0  # embeddings of training images that the folder holds
    republished: bool = False  # from a folder that the reference implementation published
    old_results: list[str] = field(default_factory=list)  # lines of that folder's own card

    @property
    def backbone_is_on_hub(self) -> bool:
        """Whether the backbone's name is a hub id."""
        return self.backbone_name.count("/") == 1


def worse_than(metrics: dict[str, dict[str, float]]) -> list[str]:
    """Return the baselines whose validation mAP the projector does not reach; see `list_unreached`."""
    own = metrics["projector"]["map"]
    return list_unreached({row: metrics[row] for row in BASELINES if row in metrics}, own, TOLERANCE)


def is_measured(metrics: dict[str, Any]) -> bool:
    """Whether the mAP of the projector and of the contract's two baselines is known."""
    return all(
        isinstance(metrics.get(row), dict) and isinstance(metrics[row].get("map"), int | float)
        for row in ("raw", "pca_whitened", "projector")
    )


def read_licence(backbone_dir: Path) -> dict[str, str]:
    """Return what the backbone's own card says of its licence."""
    from huggingface_hub.repocard import metadata_load

    path = backbone_dir / "README.md"
    found = metadata_load(path) if path.is_file() else None
    wanted = ("license", "license_name", "license_link")
    return {key: str(found[key]) for key in wanted if found.get(key)} if isinstance(found, dict) else {}


def read_results(folder: Path) -> list[str]:
    """Return the results that a model folder's own card names in its front matter, one line each."""
    from huggingface_hub.repocard import metadata_load
    from huggingface_hub.repocard_data import model_index_to_eval_results

    path = folder / "README.md"
    found = metadata_load(path) if path.is_file() else None
    if not isinstance(found, dict) or not found.get("model-index"):
        return []
    _, results = model_index_to_eval_results(found["model-index"])
    return [f"{each.metric_name or each.metric_type}: {each.metric_value} ({each.dataset_name})" for each in results]


def make_card(facts: CardFacts) -> str:
    """Return the whole README."""
    sections = [
        _front_matter(facts), _summary(facts), _usage(), _results(facts), _intended_use(), _training(facts),
        _backbone(facts), _files(facts), _citation(),
    ]  # fmt: skip
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if is_measured(facts.metrics):
        results = [
            EvalResult(
                task_type="image-feature-extraction",
                dataset_type="street-view-buildings",
                dataset_name="validation split, by building",
                metric_type=key,
                metric_name=COLUMNS[key],
                metric_value=round(facts.metrics["projector"][key], 4),
            )
            for key in COLUMNS
            if key in facts.metrics["projector"]
        ]
    licence: dict[str, Any] = dict(facts.licence) or {"license": "other", "license_name": "unknown"}
    if licence.get("license") == "other" and facts.licence_files:
        licence.setdefault("license_link", facts.licence_files[0])
    card = ModelCardData(
        **licence,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        base_model=facts.backbone_name if facts.backbone_is_on_hub else None,
        tags=["image-retrieval", "place-recognition", "street-view", "buildings"],
        model_name=facts.name if results else None,
        eval_results=results,
    )
    return f"---\n{card.to_yaml()}\n---"


def _summary(facts: CardFacts) -> str:
    width = facts.architecture["output_dim"]
    input_dim = facts.architecture["input_dim"]
    made_of = wrap(
        f"The model is the vision backbone `{facts.backbone_name}` (frozen; its `{facts.pooling_type}` is "
        f"taken{facts.views}), followed by a projector from {input_dim} to {width} numbers that was trained for "
        f"building identity. The backbone's weights are stored as {facts.dtype}, the projector's as float32. "
        "Position, heading and map data are not used."
    )
    return f"""
# {facts.name}

A photograph of a building taken from the street in, one embedding of {width} numbers out. Photographs of the same
building, from whatever side, lie close together; those of different buildings lie apart. The embeddings are
L2-normalised, so the dot product of two is their cosine similarity.

{made_of}"""


def _usage() -> str:
    return """
## How to use it

It needs `torch`, `torchvision` and `transformers` (4.56 or newer), and after the download no network.

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder = "."  # this folder, or its id on the hub
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(folder)

photographs = [Image.open("a.jpg").convert("RGB"), Image.open("b.jpg").convert("RGB")]
with torch.inference_mode():
    embeddings = model(**processor(images=photographs, return_tensors="pt")).embeddings
print(embeddings @ embeddings.T)
```

`trust_remote_code` runs four short files of this folder: `configuration_spatial_embeddings.py`,
`modeling_spatial_embeddings.py`, `pooling.py` and `projector.py`. They build the backbone that transformers itself
brings along and the projector on top of it; they fetch, read and write nothing.

The pipeline of transformers works too; mind that it turns images by their EXIF tag, which training did not:

```python
from transformers import pipeline

extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True)
embedding = extract("a.jpg")[0]
```

So does sentence-transformers, from version 6 on:

```python
from sentence_transformers import SentenceTransformer

embeddings = SentenceTransformer(folder, trust_remote_code=True).encode(photographs)
```

`from_pretrained` takes `dtype=torch.bfloat16` (transformers 4 widens the weights to float32 unless `dtype="auto"` or a
type is given), `attn_implementation="sdpa"` and, where accelerate is installed, `device_map="auto"`. Embeddings are
float32 of norm 1 in every case."""


def _results(facts: CardFacts) -> str:
    if not is_measured(facts.metrics):
        missing = "Not measured: the checkpoint that this model was made from carries no validation results."
        if facts.republished:
            missing = "Not known: the model folder that this one was made from names no results."
            if facts.old_results:
                listed = "\n".join(f"- {line}" for line in facts.old_results)
                missing = "As the model folder that this one was made from gives them; nobody measured them anew:"
                missing += f"\n\n{listed}"
        return f"## Results\n\n### Validation split\n\n{missing}\n\n### Test split\n\n{PENDING}"
    columns = {key: title for key, title in COLUMNS.items() if key in facts.metrics["raw"]}
    lines = [f"| | {' | '.join(columns.values())} |", f"| --- |{' --- |' * len(columns)}"]
    for row, title in ROWS.items():
        if row in facts.metrics:
            values = " | ".join(
                f"{facts.metrics[row][key]:.3f}" if key in facts.metrics[row] else "-" for key in columns
            )
            lines.append(f"| {title} | {values} |")
    warning = ""
    if below := worse_than(facts.metrics):
        names = " and ".join(ROWS[row] for row in below)
        instead = "use the backbone" if below == ["raw"] else "whiten the backbone's embeddings"
        warning = (
            f"**The projector retrieves worse than the {names}** and was published by `--force` nevertheless: "
            f"{instead} instead.\n\n"
        )
    table = "\n".join(lines)
    return f"""
## Results

### Validation split

{warning}Every image of the validation split searches all others; right is another image of the same building. No
building of the split was trained on, but what is published was chosen by these figures: expect less of a test split.

{table}

### Test split

{PENDING}"""


def _intended_use() -> str:
    return """
## Intended use and limits

For research on the built environment: finding other views of a building, removing duplicates, grouping photographs.
It sees façades at street level; aerial, indoor and close-up photographs are outside what it was trained on.
Neighbouring houses of one design, and one wall that two targets share, are confused. It is not made to identify people
or vehicles, nor to decide anything about persons by where they live."""


def _training(facts: CardFacts) -> str:
    inputs = "".join(f"\n- input `{item.get('name')}`, {item.get('size')} bytes" for item in facts.training_inputs)
    if facts.republished:
        inputs += (
            "\n- backbone and projector with the weights of a model folder of the reference implementation, published "
            "anew; that\n  folder does not say what it was trained on"
        )
    split = f"\n- hash of the split: `{facts.split_hash}`" if facts.split_hash else ""
    settings = "".join(
        f"\n- {name}: " + ", ".join(f"{key} {value}" for key, value in section.items())
        for name, section in sorted(facts.settings.items())
        if isinstance(section, dict)
    )
    versions = ", ".join(f"{package} {version}" for package, version in facts.versions.items())
    return f"""
## Training data and settings

The training pipeline reads crops of Google Street View panoramas, each centred on a target point of a façade that is
seen from several positions (3D Street View, Zamir et al., ECCV 2016); building identity is that of the target. Google's
terms cover such imagery: none of it is part of this folder, and whoever uses the model on Street View images has to
comply with the terms for those. What this model was made from, and how:
{inputs}{split}{settings}
- written with {versions}"""


def _backbone(facts: CardFacts) -> str:
    name = facts.licence.get("license_name") or facts.licence.get("license")
    link = f", {facts.licence['license_link']}" if facts.licence.get("license_link") else ""
    said = f"Its own card gives its licence as `{name}`{link}." if name else "Its own folder does not name its licence."
    texts = ", ".join(f"`{file}`" for file in facts.licence_files)
    beside = (
        f"The text lies beside this file: {texts}." if texts else "It came without a licence text: ask its authors."
    )
    text = wrap(
        f"The weights of `{facts.backbone_name}` are part of this folder, unchanged but for their type, so its "
        f"licence applies to the whole. {said} {beside} Some backbones' licences (DINOv3's is one) forbid certain "
        "uses: read it."
    )
    return f"## Backbone and licence\n\n{text}"


def _files(facts: CardFacts) -> str:
    sample = wrap(
        f"`training_similarity.json` holds the embeddings of {facts.num_training_samples} images of the training "
        "split, as float16 and without ids or places, and how similar held-out images are to them, so that new images "
        "can be compared with it. Whoever has a photograph can also tell whether it is among them. The model loads "
        "without this file: remove it if that is not to be published."
    )
    sample = f"\n\n{sample}" if facts.num_training_samples else ""
    made_from = "the model and the settings" if facts.republished else "the checkpoint, the backbone and the settings"
    return f"""
## Files

`config.json` also records, under `spatial_building_embeddings`, {made_from} that this
folder was made from. `modules.json` and `sentence_bert_config.json` are for sentence-transformers alone.{sample}"""


def _citation() -> str:
    return """
## Citation

Please cite the repository that this model comes from, the backbone's authors, and the Street View dataset
(Zamir et al., *Generic 3D Representation via Pose Estimation and Matching*, ECCV 2016) where you use it."""
