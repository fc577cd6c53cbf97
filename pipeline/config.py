"""Read `config.toml`: one frozen model per section, every problem reported at once.

`tests/test_docs.py` makes docs/configuration.md from the fields.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError
from pipeline.reference.settings import names_old_key

PROJECT_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG_PATH = PROJECT_ROOT / "config.toml"

PositiveInt = Annotated[int, Field(ge=1)]
# How alike a name must be to be proposed (difflib's ratio): with 0.75 each of 340 slips of one letter found its key.
_NEAR = 0.75
_VARIABLE = r"\$(\w+|\{[^}]*\})"


def count_cores() -> int:
    """Return how many cores this process may use: under SLURM or taskset fewer than the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK") or cores))  # not every cluster confines its jobs


class Section(BaseModel):
    """A section: no change after loading, no unknown key, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class GlobalSection(Section):
    """`[global]`"""

    seed: int = Field(42, ge=0, lt=2**63, description="seed of every random choice")
    log_dir: str = Field("logs", description="folder of the log files")


class PathsSection(Section):
    """`[paths]`: a path is needed only by the stages that use it."""

    raw_dir: str | None = Field(None, description="folder of the raw tars, NNNN.tar")
    intermediates_dir: str | None = Field(None, description="stage 1 output")
    embeddings_dir: str | None = Field(None, description="stage 2 output")
    merged_dir: str | None = Field(None, description="stage 3 output")
    fingerprints_dir: str | None = Field(None, description="stage 4 output")
    difficulty_metadata_path: str | None = Field(None, description="stage 5 output, one parquet file")
    checkpoint_dir: str | None = Field(None, description="stage 6 output")
    published_model_dir: str | None = Field(None, description="stage 7 output")
    report_dir: str | None = Field(None, description="stage 9 output")


class EmbeddingModelSection(Section):
    """`[embedding_model]`: the pretrained backbone."""

    model_name: str | None = Field(None, description="hub id or local folder of the backbone")
    pooling_type: Literal["pooler_output", "cls_token"] = Field("pooler_output", description="output to keep")
    image_size: PositiveInt | Literal["auto"] = Field("auto", description="input side in pixels; auto: the processor's")
    scales: list[PositiveInt] = Field([], description="several input sides; the embedding is their normalised mean")
    flip: bool = Field(False, description="average the embeddings of an image and its mirror image")
    batch_size: PositiveInt | Literal["auto"] = Field("auto", description="images a pass, at most")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on CPU; on CUDA bfloat16 if the first images agree with float32"
    )
    embedding_dtype: Literal["float32", "float16"] = Field("float32", description="type of the stored embedding")
    compile: bool = Field(False, description="compile the backbone with torch.compile")
    trust_remote_code: bool = Field(False, description="run Python code from the backbone's folder; read it first")

    @model_validator(mode="after")
    def _one_way_to_say_the_size(self) -> "EmbeddingModelSection":
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales: a size is there twice in {self.scales}")
        if self.scales and self.image_size != "auto":
            raise ValueError("image_size, scales: give one of them; the largest of the scales is the image size")
        return self

    @property
    def input_size(self) -> int | None:
        """The side of the model's input in pixels, None for the image processor's own."""
        size = max(self.scales) if self.scales else self.image_size
        return None if size == "auto" else size


class FingerprintsSection(Section):
    """`[fingerprints]`"""

    # Stage 5's covariance takes 1.2 GB at 64.
    image_size: int = Field(16, ge=1, le=64, description="side of the fingerprint in pixels")


class DataSection(Section):
    """`[data]`: the split, and how many rejects are too many."""

    train_ratio: float = Field(0.7, ge=0.0, le=1.0, description="share of the buildings")
    val_ratio: float = Field(0.15, ge=0.0, le=1.0, description="share of the buildings")
    test_ratio: float = Field(0.15, ge=0.0, le=1.0, description="share of the buildings")
    split_cell_m: float = Field(0.0, ge=0.0, description="metres; above 0: split by geographic cells of this size")
    split_file: str | None = Field(None, description="building_id, split; or old merged_dir; wins over the hash")
    max_reject_fraction: float = Field(0.2, ge=0.0, le=1.0, description="a run with a larger share of rejects fails")
    memory_mb: int = Field(1024, ge=16, description="MiB of embeddings in memory in stage 3")

    @model_validator(mode="after")
    def _one_whole_split(self) -> "DataSection":
        total = self.train_ratio + self.val_ratio + self.test_ratio
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"train_ratio, val_ratio, test_ratio: must sum to 1, they sum to {round(total, 9)}")
        return self


class NewDataSection(Section):
    """`[new_data]`: the input and output of stage 8 in a run of the pipeline."""

    input: str | None = Field(None, description="packaged parquet")
    output: str | None = Field(None, description="embeddings dataset directory")


class DifficultySection(Section):
    """`[difficulty]`: visual neighbours and their bands."""

    neighbors: int = Field(150, ge=1, description="images of other buildings to keep per image")
    k0_for_local_scale: int = Field(50, ge=1, description="rank of the neighbour that sets the local scale")
    sample_fraction_for_bands: float = Field(
        0.05, gt=0.0, le=1.0, description="share of images that set the band edges; at least 10,000 images, or all"
    )
    pca_components: int = Field(32, ge=1, description="dimensions of the search space")
    backend: Literal["auto", "balltree", "torch"] = Field("auto", description="exact search engine")
    exclude_within_m: float = Field(0.0, ge=0.0, description="metres; ignore nearer targets; 0: off")


class TrainingModelSection(Section):
    """`[training_model]`: the projector."""

    input_dim: PositiveInt | Literal["auto"] = Field("auto", description="width of the embeddings")
    output_dim: int = Field(256, ge=1, description="width of the final embedding")
    hidden_dim: int = Field(512, ge=1, description="width of the hidden layers")
    num_hidden_layers: int = Field(1, ge=0, description="hidden layers of the MLP branch; 0: linear shortcut only")
    hidden_dim_multiplier: float = Field(1.0, gt=0.0, le=1.25, description="a hidden layer's width by the one before")
    dropout: float = Field(0.1, ge=0.0, lt=1.0, description="dropout of the hidden layers")
    activation: Literal["relu", "gelu", "silu"] = Field("gelu", description="activation of the hidden layers")

    @property
    def hidden_dims(self) -> list[int] | None:
        """The widths of the hidden layers where they differ, else None."""
        if self.hidden_dim_multiplier == 1.0:
            return None
        widths = [self.hidden_dim][: self.num_hidden_layers]
        while len(widths) < self.num_hidden_layers:
            widths.append(max(16, round(widths[-1] * self.hidden_dim_multiplier)))
        return widths


class TrainingSection(Section):
    """`[training]`"""

    num_epochs: int = Field(200, ge=0, description="epochs at most")
    batch_size: PositiveInt | Literal["auto"] = Field("auto", description="anchors a step; auto: images/50, 32 to 512")
    # Batch, rates and noise: chosen on 100 to 840 buildings; docs/measurements.md has the tables.
    learning_rate: float = Field(
        5e-3, gt=0.0, description="rate (AdamW) of the MLP branch, before scaling by width and below 1,600 images"
    )
    shortcut_learning_rate: float = Field(5e-3, ge=0.0, description="the same for the linear shortcut")
    weight_decay: float = Field(1e-4, ge=0.0, description="AdamW weight decay")
    loss: Literal["multi_similarity", "supcon", "triplet"] = Field("multi_similarity", description="loss function")
    margin: float = Field(0.1, gt=0.0, description="triplet margin, in units of triplet_distance")
    triplet_distance: Literal["euclidean", "cosine"] = Field("euclidean", description="of triplets; cosine: 1 - cosine")
    temperature: float = Field(0.1, gt=0.0, description="temperature of supcon")
    input_noise: float = Field(1.8, ge=0.0, description="noise on the inputs, in within-building standard deviations")
    use_residual: bool = Field(True, description="add the linear shortcut; false: the MLP branch alone")
    init: Literal["sharpened", "whitening", "pca", "random"] = Field(
        "sharpened", description="start of the projector; sharpened: sharpened or plain whitening, by validation"
    )
    init_checkpoint: str | None = Field(None, description="start from this checkpoint instead of init")
    min_negative_distance_m: float = Field(25.0, ge=0.0, description="metres; no nearer negatives; 0: same panorama")
    warmup_epochs: float = Field(1.0, ge=0.0, description="epochs of linear warm-up")
    grad_clip: float = Field(1.0, gt=0.0, description="largest gradient norm")
    patience: int = Field(8, ge=0, description="epochs without a better validation mAP before training stops; 0: never")
    save_every_n_epochs: int = Field(10, ge=1, description="epochs between periodic checkpoints")
    anchors_per_epoch: PositiveInt | Literal["auto"] = Field("auto", description="auto: every image")
    band_sampling: Literal["uniform", "ucb"] = Field("uniform", description="a negative's band: uniform or UCB bandit")
    validation_images: int = Field(20_000, ge=2, description="largest number of images in each validation")
    validate_every_n_epochs: int = Field(1, ge=1, description="epochs between; the last and saved epochs are validated")
    recall_ranks: list[PositiveInt] = Field([], description="further k of Recall@k in validation, beside 1, 5, 10, 100")
    sample_buildings: PositiveInt | None = Field(None, description="train on so many buildings, drawn from the seed")


class InfrastructureSection(Section):
    """`[infrastructure]`"""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where models run")
    num_workers: PositiveInt | Literal["auto"] = Field("auto", description="decoding threads; auto: one a core")

    def count_workers(self) -> int:
        return count_cores() if self.num_workers == "auto" else self.num_workers


class LoggingSection(Section):
    """`[logging]`"""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="lowest level to log")
    step_losses: bool = Field(False, description="metrics.jsonl and the two below get the loss of every step")
    tensorboard: bool = Field(False, description="also write checkpoint_dir/_tensorboard")
    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases: checkpoint_dir/_wandb too")
    wandb_project: str = Field("spatial-building-embeddings", min_length=1, description="its project")
    wandb_run_name: str | None = Field(None, description="its name; not set: chosen by Weights & Biases")


class Config(Section):
    """The whole configuration, with the file that its relative paths start from."""

    global_: GlobalSection = Field(default_factory=GlobalSection, alias="global")
    paths: PathsSection = PathsSection()
    embedding_model: EmbeddingModelSection = EmbeddingModelSection()
    fingerprints: FingerprintsSection = FingerprintsSection()
    data: DataSection = DataSection()
    new_data: NewDataSection = NewDataSection()
    difficulty: DifficultySection = DifficultySection()
    training_model: TrainingModelSection = TrainingModelSection()
    training: TrainingSection = TrainingSection()
    infrastructure: InfrastructureSection = InfrastructureSection()
    logging: LoggingSection = LoggingSection()
    file_path: Path = Field(default=DEFAULT_CONFIG_PATH, exclude=True)

    def find_path(self, name: str) -> Path | None:
        """Return the absolute path that a key of [paths], or `section.key`, gives, None where it is not set."""
        section, _, key = name.rpartition(".")
        value = getattr(getattr(self, section or "paths"), key)
        return None if value is None else self.expand(value, f"[{section or 'paths'}].{key}")

    def path(self, name: str) -> Path:
        """Return a path as `find_path` does; raise ConfigError if it is not set or cannot be expanded."""
        found = self.find_path(name)
        if found is None:
            section, _, key = name.rpartition(".")
            raise ConfigError(f"{self.file_path}: [{section or 'paths'}].{key}: not set, and this stage needs it")
        return found

    def expand(self, value: str, where: str) -> Path:
        """Expand `~` and `$VARIABLES` in a path, from the configuration's folder; raise ConfigError naming `where`."""
        # An empty variable would move a path to the root of the file system.
        filled = re.sub(_VARIABLE, lambda found: os.environ.get(found[1].strip("{}")) or found[0], value)
        has_home = os.environ.get("HOME") != ""
        expanded = os.path.expanduser(filled) if has_home else filled  # noqa: PTH111 (takes any text)
        if undefined := re.search(rf"^~[^/]*|{_VARIABLE}", expanded):
            raise ConfigError(f"{self.file_path}: {where}: {undefined[0]} in {value!r} is unset or empty: export it")
        if not expanded.strip() or "\0" in expanded:  # an empty one is the configuration's own folder
            raise ConfigError(f"{self.file_path}: {where}: {value!r} is empty or holds a zero byte: give a path")
        return (self.file_path.parent / expanded).resolve()

    def require_paths(self, *keys: str) -> None:
        """Raise one ConfigError that names every key of `[paths]` that is missing or cannot be expanded."""
        problems = []
        for key in keys:
            try:
                self.path(key)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)

    @property
    def log_dir(self) -> Path:
        return self.expand(self.global_.log_dir, "[global].log_dir")


def load_config(path: Path = DEFAULT_CONFIG_PATH, overrides: list[str] | None = None) -> Config:
    """Read a configuration and apply overrides (see `apply_override`); raise ConfigError with every problem."""
    tables = read_toml(path)
    problems = [problem for override in overrides or [] if (problem := apply_override(tables, override))]
    if "file_path" in tables:  # a field of Config, but not a section
        problems.append(f"{path}: [file_path]: unknown section{suggest(list_keys(), 'file_path')}")
    try:
        config = Config.model_validate({**tables, "file_path": path.resolve()})
    except ValidationError as error:
        by_place: dict[Any, list[Any]] = {}  # one setting of two allowed types has an error for each
        for details in error.errors():
            by_place.setdefault(details["loc"][:2], []).append(details)
        problems += [_describe(path, found) for found in by_place.values()]
        if names_old_key(read_toml(path), list_keys()):  # without the overrides
            problems.append(f"{path}: has old keys: python -m pipeline.migrate {path} maps them")
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return config


def _describe(path: Path, errors: list[Any]) -> str:
    """Turn pydantic's errors of one place into `file: [section].key: what is wrong, nearest valid name`."""
    details = errors[0]
    section, key, *_ = (*map(str, details["loc"]), "")
    where = f"{path}: [{section}]" + (f".{key}" if key else "")
    if details["type"] == "extra_forbidden":
        return f"{where}: unknown {'key' if key else 'section'}{suggest(list_keys(), section, key)}"
    if details["type"] == "value_error":
        return f"{where}: {details['ctx']['error']}"
    allowed = " or ".join(error["msg"][:1].lower() + error["msg"][1:] for error in errors)
    return f"{where}: {allowed}, not {details['input']!r}"


def list_keys() -> dict[str, list[str]]:
    return {
        field.alias or name: list(field.annotation.model_fields)
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def read_toml(path: Path) -> dict[str, Any]:
    """Return a configuration's tables; raise ConfigError if it cannot be read or is no TOML in UTF-8."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror}): correct the path") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def apply_override(tables: dict[str, Any], override: str) -> str | None:
    """Put `SECTION.KEY=VALUE`, or the settings of a TOML file, into the tables; return the problem, if any."""
    if override.endswith(".toml") and "=" not in override:
        try:
            settings = read_toml(Path(override))
        except ConfigError as error:
            return f"--set {error}"
    elif match := re.fullmatch(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)=(.*)", override, re.DOTALL):
        section, key, text = match.groups()
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word: strings need no quotes on a command line
        settings = {section: {key: value}}
    else:
        return f"--set {override}: must read SECTION.KEY=VALUE"
    for section, keys in settings.items():
        known = tables.get(section)
        tables[section] = known | keys if isinstance(known, dict) and isinstance(keys, dict) else keys
    return None


def suggest(valid: Mapping[str, Sequence[str]], section: str, key: str | None = None) -> str:
    """Return `; did you mean X?` for an unknown section or key, nothing if no `valid` name is near."""
    found = [] if key else difflib.get_close_matches(section, valid, n=1, cutoff=_NEAR)
    if not found:
        names = {one for keys in valid.values() for one in keys}
        near = difflib.get_close_matches(key or section, sorted(names), n=1, cutoff=_NEAR)
        places = [other for other, keys in valid.items() if set(near) & set(keys)]
        found = [f"[{other}].{near[0]}" for other in ([section] if section in places else places)]
    return f"; did you mean {' or '.join(found)}?" if found else ""
