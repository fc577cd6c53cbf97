"""Templates: escaped, strict, in the installed package too, and nothing of them in Python's strings."""

import re
import tomllib

import jinja2
import pytest
from test_layering import FILES, REPO

from pipeline.pages import load_templates


def test_what_is_put_in_is_escaped_and_a_file_of_the_folder_stands_as_it_is(tmp_path):
    (tmp_path / "page.html.j2").write_text('<b title="{{ text }}">{{ text }}</b>{{ source("page.css") }}')
    (tmp_path / "page.css").write_text("a > b {#c} \"'&")
    page = load_templates(tmp_path).get_template("page.html.j2").render(text="<i>\"'&")
    assert page == '<b title="&lt;i&gt;&#34;&#39;&amp;">&lt;i&gt;&#34;&#39;&amp;</b>a > b {#c} "\'&'


def test_a_name_that_is_missing_is_an_error(tmp_path):
    (tmp_path / "page.html.j2").write_text("{{ nobody }}")
    with pytest.raises(jinja2.UndefinedError, match="nobody"):
        load_templates(tmp_path).get_template("page.html.j2").render()


def test_every_template_goes_into_the_installed_package():
    packaged = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {
        path
        for package, patterns in packaged.items()
        for pattern in patterns
        for path in (REPO / package.replace(".", "/")).glob(pattern)
        if path.is_file()
    }
    wanted = {path for folder in REPO.glob("*/**/templates") if ".venv" not in folder.parts
              for path in folder.rglob("*") if path.is_file()}  # fmt: skip
    assert len(wanted) > 10
    assert shipped == wanted


def test_no_page_is_written_in_pythons_strings():
    markup = re.compile(r"<(div|p|span|figure|section|td|style|script)\b")
    wrong = [
        str(path.relative_to(REPO))
        for path in FILES
        if path.relative_to(REPO).parts[0] not in ("tests", "benchmarks")
        and markup.search(path.read_text(encoding="utf-8"))
    ]
    assert wrong == []
