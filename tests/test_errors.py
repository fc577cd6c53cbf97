"""The exception tree and its exit codes."""

import pytest

from pipeline.errors import ConfigError, InputError, PipelineError, Rejection, StaleOutputError, Terminated, one_line


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
