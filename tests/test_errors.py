"""The exception tree and its exit codes."""

import pytest

from generate_embeddings import generate_embeddings
from pipeline.errors import (
    ConfigError,
    InputError,
    PipelineError,
    Rejection,
    StaleOutputError,
    Terminated,
    one_line,
    printable,
)
from publish_model import embed_images


@pytest.mark.parametrize(
    ("kind", "code"), [(PipelineError, 1), (InputError, 1), (StaleOutputError, 1), (ConfigError, 2)]
)
def test_every_failure_has_its_exit_code(kind, code):
    assert issubclass(kind, PipelineError)
    assert kind("why").exit_code == code


def test_a_config_error_keeps_every_problem_apart():
    assert ConfigError(["one", "two"]).problems == ["one", "two"]
    assert ConfigError("one").problems == ["one"]
    assert str(ConfigError(["one", "two"])) == "one; two"


def test_a_rejection_is_no_failure_of_the_run_and_termination_no_exception():
    assert not issubclass(Rejection, PipelineError)
    assert not issubclass(Terminated, Exception)
    assert str(Rejection("unreadable_image", "0 bytes")) == "unreadable_image: 0 bytes"


def test_an_errors_text_fits_one_line():
    assert one_line(ValueError("a\n  b\tc\n")) == "a b c"
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("alice:s3cr3t@host/model: no such model", "***@host/model: no such model"),
        ("model_name was 'bob:pw@h.org' and is now 'm'", "model_name was '***@h.org' and is now 'm'"),
        ("--storage=postgresql://u:p@ss/w@host/db", "--storage=postgresql://***@host/db"),
        ("(u:p@h), https://token@host", "(***@h), https://***@host"),
        (
            "owner/model@revision, a@b, way/1:2, a:b/c@2x.jpg, 10:20",
            "owner/model@revision, a@b, way/1:2, a:b/c@2x.jpg, 10:20",
        ),
        ("a\x1b[2J\nb", "a\\x1b[2J\\nb"),
    ],
)
def test_what_is_printed_shows_neither_passwords_nor_control_characters(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("name", ["alice:s3cr3t@host/model", "https://alice:s3cr3t@host/model", "alice:s3cr3t@host"])
def test_no_log_and_no_error_shows_the_password_of_a_setting(run_main, write_config, tmp_path, name):
    """By an option, by a setting and by a path, with a scheme and without."""
    for arguments in (
        [embed_images.main, "--input", tmp_path, "--output", tmp_path / "out", "--model-id", name],
        [generate_embeddings.main, "--config", write_config(tmp_path), "--set", f"embedding_model.model_name={name}"],
        [generate_embeddings.main, "--config", write_config(tmp_path), "--set", f"paths.raw_dir={name}"],
        [generate_embeddings.main, "--config", tmp_path / name / "config.toml"],
    ):
        outcome = run_main(*arguments)
        assert outcome.code in (1, 2)
        assert "s3cr3t" not in outcome.stderr + outcome.stdout
    logged = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert "s3cr3t" not in logged
