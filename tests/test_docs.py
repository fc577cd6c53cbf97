"""The documents say what the code does.

`python tests/test_docs.py` writes docs/configuration.md anew.
"""

import json
import re
import sys
import types
import typing
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from test_layering import ROOMS  # noqa: E402

from pipeline.config import Config, load_config  # noqa: E402
from pipeline.errors import Reason  # noqa: E402

CONFIGURATION = ROOT / "docs" / "configuration.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
HEAD = """# Configuration

Every key of `config.toml`. Relative paths start from the configuration file's folder; `~` and `$VARIABLES` expand.
`--set SECTION.KEY=VALUE` overrides one key for one run. A run with unknown keys, wrong types or contradicting values
stops with exit code 2 and names all of them.
"""


def sections() -> dict[str, type]:
    return {field.alias or name: field.annotation for name, field in Config.model_fields.items() if name != "file_path"}


def render_configuration() -> str:
    parts = [HEAD]
    for section, model in sections().items():
        parts += [f"\n## `[{section}]`\n", "| key | type | default | meaning, unit |", "| --- | --- | --- | --- |"]
        for key, field in model.model_fields.items():
            default = "not set" if field.default is None else f"`{json.dumps(field.default)}`"
            parts.append(f"| `{key}` | {name_type(field.annotation)} | {default} | {field.description} |")
    return "\n".join(parts) + "\n"


def name_type(annotation: object) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f'`"{value}"`' for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return name_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is list:
        return f"list of {name_type(typing.get_args(annotation)[0])}s"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(name_type(part) for part in typing.get_args(annotation) if part is not type(None))
    return {str: "string", int: "integer", float: "number", bool: "boolean"}.get(annotation, str(annotation))


def test_every_key_stands_in_the_configuration_reference_with_its_default_and_meaning():
    assert CONFIGURATION.read_text(encoding="utf-8") == render_configuration(), "run: python tests/test_docs.py"


@pytest.mark.parametrize("path", ["config.toml", "sample_data/demo.toml"])
def test_the_configurations_in_the_tree_load_without_the_environment(path, monkeypatch):
    for name in ("HOME", "SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    config = load_config(ROOT / path)
    config.require_paths(*type(config.paths).model_fields)
    assert "$" not in (ROOT / path).read_text(encoding="utf-8").split("\n\n", 1)[1]


@pytest.mark.parametrize("path", ["docs/architecture.md", "docs/README.md", "CONTRIBUTING.md"])
def test_every_file_that_a_guide_names_is_there(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    named = {ROOT / name for name in re.findall(r"`([\w.-]+/[\w./-]+)`", text)}
    linked = {(ROOT / path).parent / name for name in re.findall(r"\]\(([\w./]+)\)", text)}
    assert linked
    assert [str(name) for name in sorted(named | linked) if not name.exists()] == []


def test_the_table_of_contents_has_every_document():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\((\w+\.md)\)", text))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_readme_can_be_read_in_ten_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_no_page_is_too_long_to_read():
    words = {path: len(path.read_text(encoding="utf-8").split()) for path in DOCUMENTS}
    assert {path: count for path, count in words.items() if count > 1_500 and path != CONFIGURATION} == {}
    assert sum(words.values()) <= 14_000


def test_every_key_that_a_document_names_is_one():
    keys = {(section, key) for section, model in sections().items() for key in model.model_fields}
    for path in DOCUMENTS:
        named = set(re.findall(r"`\[(\w+)\]\.(\w+)", path.read_text(encoding="utf-8")))
        assert named - keys == set(), path.name


def test_every_command_and_link_of_a_document_is_there():
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        named = {ROOT / name for name in re.findall(r"(?:python |^)((?:\w+/)+\w+\.(?:py|sh))", text, re.MULTILINE)}
        named |= {path.parent / name for name in re.findall(r"\]\(([\w./]+)\)", text)}
        assert [str(name) for name in sorted(named) if not name.exists()] == [], path.name


def test_every_room_stands_in_the_picture():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    assert [folder for folder, rooms in ROOMS.items() for room in rooms if f"{room}/" not in text] == []


def test_every_reject_reason_is_explained():
    text = (ROOT / "docs" / "data_architecture.md").read_text(encoding="utf-8")
    assert [reason for reason in typing.get_args(Reason) if f"`{reason}`" not in text] == []


def test_the_hooks_before_a_commit_do_what_make_lint_does():
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint: install\n")[1].split("\n\n")[0]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [line.strip().replace("$(PY)", ".venv/bin/python") for line in lint.splitlines()] == [
        hook["entry"] for hook in hooks
    ]


def test_no_placeholder_is_left_in_the_documents():
    for path in DOCUMENTS:
        assert "@@" not in path.read_text(encoding="utf-8"), path


if __name__ == "__main__":
    CONFIGURATION.write_text(render_configuration(), encoding="utf-8")
