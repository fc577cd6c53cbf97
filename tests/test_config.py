"""The configuration: what is accepted, and how what is not is reported."""

import os
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import DEFAULT_CONFIG_PATH, Config, DataSection, TrainingModelSection, count_cores, load_config
from pipeline.errors import ConfigError


def write(folder, text):
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return caught.value.problems


def test_an_empty_file_gives_the_documented_defaults(tmp_path):
    config = load_config(write(tmp_path, ""))
    assert (config.data.train_ratio, config.data.val_ratio, config.data.test_ratio) == (0.7, 0.15, 0.15)
    assert config.data.max_reject_fraction == 0.2
    assert config.fingerprints.image_size == 16
    assert (config.difficulty.neighbors, config.difficulty.k0_for_local_scale) == (150, 50)
    assert config.difficulty.pca_components == 32
    assert config.training_model.output_dim == 256


def test_the_projects_own_file_loads_with_no_environment_variable_and_no_private_path():
    config = load_config()
    values = [value for table in tomllib.loads(DEFAULT_CONFIG_PATH.read_text()).values() for value in table.values()]
    assert not [value for value in values if isinstance(value, str) and (value.startswith("/") or "$" in value)]
    assert config.embedding_model.model_name == "facebook/dinov3-vit7b16-pretrain-lvd1689m"


def test_every_problem_is_reported_at_once_with_file_section_key_and_nearest_name(tmp_path):
    path = write(
        tmp_path,
        """
        [global]
        sed = 1
        [dta]
        train_ratio = 0.7
        [embedding_model]
        batch_size = "many"
        dtype = "float16"
        [data]
        train_ratio = 0.9
        [difficulty]
        neighbors = 0
        [training]
        num_epochs = true
        [paths]
        raw_dir = 5
        """,
    )
    found = problems_of(path, "logging.level=LOUD", "nonsense")
    assert len(found) == 10
    assert all(str(path) in problem for problem in found[1:])
    expected = [
        "--set nonsense: must read SECTION.KEY=VALUE",
        "[global].sed: unknown key; did you mean [global].seed?",
        "[dta]: unknown section; did you mean data?",
        "[embedding_model].batch_size: input should be a valid integer or input should be 'auto', not 'many'",
        "[embedding_model].dtype: input should be 'auto', 'float32' or 'bfloat16', not 'float16'",
        "[data]: train_ratio, val_ratio, test_ratio: must sum to 1, they sum to 1.2",
        "[difficulty].neighbors: input should be greater than or equal to 1, not 0",
        "[training].num_epochs: input should be a valid integer, not True",
        "[paths].raw_dir: input should be a valid string, not 5",
        "[logging].level: input should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR', not 'LOUD'",
    ]
    for text in expected:
        assert [problem for problem in found if text in problem], text


@pytest.mark.parametrize(
    "setting",
    [
        "training.num_epochs=1.5", "training.num_epochs=true", "training.num_epochs='3'", "training.margin=nan",
        "training.margin=inf", "training.margin=true", "embedding_model.compile=1", "embedding_model.batch_size=0",
        "infrastructure.num_workers=0", "global.seed=-1", "global.seed=9223372036854775808", "data.split_cell_m=-1",
        "data.max_reject_fraction=1.1", "training_model.dropout=1.0", "data.memory_mb=15",
    ],
)  # fmt: skip
def test_a_value_of_another_type_or_out_of_range_is_refused(tmp_path, setting):
    found = problems_of(write(tmp_path, ""), setting)
    section, key = setting.split("=")[0].split(".")
    assert len(found) == 1
    assert f"[{section}]" in found[0]
    assert key in found[0]


def test_whole_numbers_serve_as_decimals(tmp_path):
    config = load_config(write(tmp_path, "[data]\ntrain_ratio = 1\nval_ratio = 0\ntest_ratio = 0"))
    assert config.data.train_ratio == 1.0


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("global.seed=7", "global_", "seed", 7),
        ("data.train_ratio=0.7", "data", "train_ratio", 0.7),
        ("embedding_model.compile=true", "embedding_model", "compile", True),
        ("embedding_model.batch_size=auto", "embedding_model", "batch_size", "auto"),
        ("embedding_model.batch_size=64", "embedding_model", "batch_size", 64),
        ("paths.raw_dir=/data/a b=c", "paths", "raw_dir", "/data/a b=c"),
        ('paths.raw_dir="2024"', "paths", "raw_dir", "2024"),
        ("paths.raw_dir=0001", "paths", "raw_dir", "0001"),
        ("embedding_model.model_name=facebook/dinov2-small", "embedding_model", "model_name", "facebook/dinov2-small"),
        ("training.learning_rate=1e-3", "training", "learning_rate", 1e-3),
    ],
)
def test_an_override_wins_over_the_file_and_needs_no_quotes(tmp_path, override, section, key, value):
    path = write(tmp_path, "[global]\nseed = 1\n[paths]\nraw_dir = 'raw'\n[embedding_model]\nbatch_size = 2")
    assert getattr(getattr(load_config(path, [override]), section), key) == value


def test_of_two_overrides_the_later_wins(tmp_path):
    assert load_config(write(tmp_path, ""), ["global.seed=1", "global.seed=2"]).global_.seed == 2


@pytest.mark.parametrize("override", ["seed=1", "a.b.c=1", "data.train_ratio", ".x=1", "data.=1", "=1", ""])
def test_an_override_of_another_form_is_refused(tmp_path, override):
    assert problems_of(write(tmp_path, ""), override) == [f"--set {override}: must read SECTION.KEY=VALUE"]


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("dat.train_ratio=1", "[dat]: unknown section; did you mean data?"),
        ("data.train_ration=1", "[data].train_ration: unknown key; did you mean [data].train_ratio?"),
        ("global_.seed=1", "[global_]: unknown section; did you mean global?"),
        ("file_path.x=1", "[file_path]: unknown section"),
        ("data.neighbors=1", "[data].neighbors: unknown key; did you mean [difficulty].neighbors?"),
        ("training.hidden_dims=1", "[training].hidden_dims: unknown key; did you mean [training_model].hidden_dim?"),
        ("logging.batch_size=1", "unknown key; did you mean [embedding_model].batch_size or [training].batch_size?"),
        ("seed.x=1", "[seed]: unknown section; did you mean [global].seed?"),
        (
            "training.triplets_per_epoch=1",
            "triplets_per_epoch: unknown key",
        ),
        ("training.hard_mining=true", "[training].hard_mining: unknown key"),
        ("training.share_within_building=true", "[training].share_within_building: unknown key"),
        ("training.input_dropout=0.3", "[training].input_dropout: unknown key"),
        ("training.anchor_penalty=1", "[training].anchor_penalty: unknown key"),
    ],
)
def test_an_override_of_an_unknown_name_is_refused(tmp_path, override, answer):
    found = problems_of(write(tmp_path, ""), override)
    assert len(found) == 1
    assert answer in found[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("global = 5", "[global]: input should be"),
        ("seed = 5", "[seed]: unknown section"),
        ("[file_path]\nx = 1", "[file_path]: unknown section"),
    ],
)
def test_what_is_no_section_is_refused(tmp_path, text, answer):
    assert any(answer in problem for problem in problems_of(write(tmp_path, text)))


def test_an_old_file_names_the_command_that_maps_it(tmp_path):
    path = write(tmp_path, "[triplet_training]\nbatch_size = 5\n[training]\nloss_distance = 'cosine'")
    assert problems_of(path)[-1] == (f"{path}: has old keys: python -m pipeline.migrate {path} maps them")
    assert len(problems_of(write(tmp_path, "[training]\nmargn = 1"))) == 1


@pytest.mark.parametrize("override", ["data.temp_dir=1", "training.optimizer=1", "slurm.account=1"])
def test_nothing_is_proposed_where_nothing_is_near(tmp_path, override):
    (found,) = problems_of(write(tmp_path, ""), override)
    assert found.endswith(("unknown key", "unknown section"))


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = write(tmp_path, "[global]\nseed = 7\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_config(path).global_.seed == 7
    fragment = tmp_path / "best.toml"
    fragment.write_bytes(b"\xef\xbb\xbf[global]\nseed = 8\n")
    assert load_config(path, [str(fragment)]).global_.seed == 8


def test_a_missing_file_and_one_that_is_not_toml_are_named(tmp_path):
    assert problems_of(tmp_path / "none.toml") == [
        f"{tmp_path / 'none.toml'}: cannot read the configuration (No such file or directory): correct the path"
    ]
    (found,) = problems_of(tmp_path)
    assert "Is a directory" in found
    (found,) = problems_of(write(tmp_path, "[paths\n"))
    assert f"{tmp_path / 'config.toml'}: not valid TOML: " in found
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe\x00")
    (found,) = problems_of(tmp_path / "config.toml")
    assert "not valid TOML" in found


def test_relative_paths_start_from_the_configurations_folder_not_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    path = write(tmp_path, "[paths]\nraw_dir = 'some/raw'\nmerged_dir = '../up'\nreport_dir = '/abs'")
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("config.toml"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.path("raw_dir") == tmp_path / "some" / "raw"
    assert config.path("merged_dir") == tmp_path.parent / "up"
    assert config.path("report_dir") == Path("/abs")
    assert config.log_dir == tmp_path / "logs"
    assert config.file_path == path


def test_home_and_variables_expand(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = write(tmp_path, "[paths]\nraw_dir = '~/raw'\nmerged_dir = '$SCRATCH/m'\nreport_dir = '${SCRATCH}/r'")
    config = load_config(path)
    assert config.path("raw_dir") == Path("/home/someone/raw")
    assert config.path("merged_dir") == Path("/scratch/me/m")
    assert config.path("report_dir") == Path("/scratch/me/r")


def test_an_undefined_variable_is_an_error_only_where_the_path_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    config = load_config(
        write(
            tmp_path,
            "[paths]\nraw_dir = '$NOWHERE/raw'\nmerged_dir = 'm'\nreport_dir = '${NOWHERE}'\n"
            "embeddings_dir = '~nosuchuser/x'",
        )
    )
    config.require_paths("merged_dir")
    with pytest.raises(ConfigError) as caught:
        config.require_paths("raw_dir", "merged_dir", "report_dir", "checkpoint_dir", "embeddings_dir")
    assert caught.value.problems == [
        f"{tmp_path}/config.toml: [paths].raw_dir: $NOWHERE in '$NOWHERE/raw' is unset or empty: export it",
        f"{tmp_path}/config.toml: [paths].report_dir: ${{NOWHERE}} in '${{NOWHERE}}' is unset or empty: export it",
        f"{tmp_path}/config.toml: [paths].checkpoint_dir: not set, and this stage needs it",
        f"{tmp_path}/config.toml: [paths].embeddings_dir: ~nosuchuser in '~nosuchuser/x' is unset or empty: export it",
    ]


def test_an_empty_path_or_variable_does_not_stand_for_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTHING", "")
    monkeypatch.setenv("HOME", "")
    paths = "raw_dir = ''\nmerged_dir = '${NOTHING}/m'\nreport_dir = \"a\\u0000\"\nembeddings_dir = '~/m'"
    config = load_config(write(tmp_path, f"[paths]\n{paths}"))
    with pytest.raises(ConfigError) as caught:
        config.require_paths("raw_dir", "merged_dir", "embeddings_dir", "report_dir")
    assert caught.value.problems == [
        f"{tmp_path}/config.toml: [paths].raw_dir: '' is empty or holds a zero byte: give a path",
        f"{tmp_path}/config.toml: [paths].merged_dir: ${{NOTHING}} in '${{NOTHING}}/m' is unset or empty: export it",
        f"{tmp_path}/config.toml: [paths].embeddings_dir: ~ in '~/m' is unset or empty: export it",
        f"{tmp_path}/config.toml: [paths].report_dir: 'a\\x00' is empty or holds a zero byte: give a path",
    ]


def test_nothing_changes_after_loading(tmp_path):
    config = load_config(write(tmp_path, ""))
    with pytest.raises(ValidationError):
        config.data.train_ratio = 0.5


def test_ratios_that_sum_to_one_but_for_rounding_are_accepted():
    assert DataSection(train_ratio=0.1 + 0.2, val_ratio=0.3, test_ratio=0.4).test_ratio == 0.4


def test_workers_are_counted_by_the_cores_that_this_process_may_use(tmp_path, monkeypatch):
    assert load_config(write(tmp_path, "")).infrastructure.count_workers() == count_cores()
    assert count_cores() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")  # where a cluster does not confine its jobs
    assert count_cores() == 1
    assert load_config(write(tmp_path, "[infrastructure]\nnum_workers = 3")).infrastructure.count_workers() == 3


def test_every_key_says_what_it_is():
    for section in Config.model_fields.values():
        if section.alias == "global" or hasattr(section.annotation, "model_fields"):
            for key, field in section.annotation.model_fields.items():
                assert field.description, key


def test_each_hidden_layer_is_the_one_before_times_the_multiplier_at_least_sixteen():
    section = TrainingModelSection(hidden_dim=384, num_hidden_layers=3, hidden_dim_multiplier=0.75)
    assert section.hidden_dims == [384, 288, 216]
    assert TrainingModelSection(hidden_dim=25, num_hidden_layers=3, hidden_dim_multiplier=0.7).hidden_dims == [
        25,
        18,
        16,
    ]
    wider = TrainingModelSection(hidden_dim=512, num_hidden_layers=3, hidden_dim_multiplier=1.25)
    assert wider.hidden_dims == [512, 640, 800]
    assert TrainingModelSection(num_hidden_layers=0, hidden_dim_multiplier=0.5).hidden_dims == []
    assert TrainingModelSection(hidden_dim=384, num_hidden_layers=3).hidden_dims is None
