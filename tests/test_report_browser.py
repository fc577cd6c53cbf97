"""Stage 9's page in a real browser: it opens from disk and asks for nothing.

The screenshots lie in pytest's temporary folder (`--basetemp` chooses it), for a person to look at.
"""

import shutil

import pytest
from browser import Watched, open_browser
from evaluation_data import make_workplace

from evaluate_embeddings.evaluate import run
from pipeline.cli import Options
from pipeline.config import load_config

WIDTHS = (390, 1280)  # a phone, a desk


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with photographs, moved away from what it was made of."""
    config_path = make_workplace(tmp_path_factory.mktemp("made"))
    run(load_config(config_path), Options())
    path = tmp_path_factory.mktemp("sent round") / "report.html"
    shutil.copy(config_path.parent / "report" / "report.html", path)
    shutil.rmtree(config_path.parent)
    return path


def open_report(browser, report, width, **options):
    watched = Watched(browser, width, **options)
    watched.page.goto(report.as_uri())
    return watched


@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_from_disk_without_a_complaint_or_a_request_and_fits_the_screen(browser, report, width):
    watched = open_report(browser, report, width)
    page = watched.page
    page.screenshot(path=report.parent / f"report_{width}.png", full_page=True)
    assert watched.problems == []
    assert [url for url in watched.requests if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("Array.from(document.images).every(image => image.complete && image.naturalWidth > 0)")
    assert (report.parent / f"report_{width}.png").stat().st_size > 100_000


def test_every_link_of_the_contents_leads_to_a_section_that_can_be_seen(browser, report):
    page = open_report(browser, report, 1280).page
    links = page.locator("nav a")
    assert links.count() == 6
    for number in range(links.count()):
        links.nth(number).click()
        heading = page.locator(f"section{page.evaluate('location.hash')} h2")
        assert heading.inner_text() == links.nth(number).inner_text()
        assert heading.is_visible()


def test_without_scripts_it_can_be_read_all_the_same(browser, report):
    page = open_report(browser, report, 1280, java_script_enabled=False).page
    assert page.locator("article").first.is_visible()
    assert "Its gain in mAP, with the 95% interval" in page.locator(".verdict").inner_text()
