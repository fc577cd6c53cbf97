"""Stage 9's page in a real browser: it opens from disk, asks for nothing, and its hover and filter work.

The screenshots lie in pytest's temporary folder (`--basetemp` chooses it), for a person to look at.
"""

import shutil

import pytest
from browser import Watched, open_browser
from evaluation_data import IMAGES_PER_BUILDING, NUM_BUILDINGS, make_workplace

from evaluate_embeddings.evaluate import run
from evaluate_embeddings.scores.standalone import EvaluateOptions
from pipeline.cli import Options
from pipeline.config import load_config

NUM_IMAGES = NUM_BUILDINGS * IMAGES_PER_BUILDING
WIDTHS = (390, 1280)  # a phone, a desk


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with photographs, moved away from what it was made of."""
    config_path = make_workplace(tmp_path_factory.mktemp("made"), camera=True)
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
    assert links.count() == 13
    for number in range(links.count()):
        links.nth(number).click()
        heading = page.locator(f"section{page.evaluate('location.hash')} h2")
        assert heading.inner_text() == links.nth(number).inner_text()
        assert heading.is_visible()


def test_pointing_at_a_mark_of_the_map_shows_its_photograph(browser, report):
    watched = open_report(browser, report, 1280)
    page, tip = watched.page, watched.page.locator("#tip")
    assert page.locator("#map [data-mark]").count() == NUM_IMAGES
    assert not tip.is_visible()
    # Marks lie one above the other: the one in front is pointed at.
    mark = page.locator("#map [data-mark]").last
    mark.hover()
    assert tip.is_visible()
    assert mark.get_attribute("data-ids") in tip.inner_text()
    assert page.evaluate("document.querySelector('#tip img').naturalWidth") > 0
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1280
    page.mouse.move(5, 5)
    assert not tip.is_visible()
    assert watched.problems == []


def test_a_tap_on_a_phone_shows_it_too_within_the_screen(browser, report):
    page = open_report(browser, report, 390, has_touch=True).page
    page.locator("#map [data-mark]").last.tap()
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    page.screenshot(path=report.parent / "tapped_390.png")


def count_shown(page, selector):
    is_shown = "elements => elements.filter(element => getComputedStyle(element).display !== 'none').length"
    return page.locator(selector).evaluate_all(is_shown)


def test_the_filter_keeps_what_was_asked_for_and_counts_it(browser, report):
    page = open_report(browser, report, 1280).page
    marks, examples = "#map [data-mark]", "article[data-ids]"
    everything = count_shown(page, examples)
    said = page.locator("#filter-count")
    assert said.inner_text() == f"{NUM_IMAGES} of {NUM_IMAGES} marks, {everything} of {everything} examples"
    page.select_option("#filter-dataset", "0001")
    assert count_shown(page, marks) == NUM_IMAGES // 2
    assert all("0001" in text for text in page.locator(f"{examples}:not(.away)").evaluate_all(
        "elements => elements.map(element => element.dataset.dataset)"))  # fmt: skip
    page.select_option("#filter-answer", "0")
    wrong = page.evaluate('document.querySelectorAll(\'#map [data-dataset="0001"][data-right="0"]\').length')
    assert count_shown(page, marks) == wrong
    page.select_option("#filter-answer", "")
    page.select_option("#filter-dataset", "")
    page.fill("#filter-words", "of building 0002_7")
    assert count_shown(page, marks) == IMAGES_PER_BUILDING
    assert said.inner_text().startswith(f"{IMAGES_PER_BUILDING} of {NUM_IMAGES} marks")
    page.fill("#filter-words", "no such building")
    assert count_shown(page, marks) == count_shown(page, examples) == 0
    page.fill("#filter-words", "")
    assert count_shown(page, examples) == everything


def test_without_scripts_it_can_be_read_all_the_same(browser, report):
    page = open_report(browser, report, 1280, java_script_enabled=False).page
    assert not page.locator("#filter").is_visible()
    assert page.locator("article").first.is_visible()
    assert "The projector finds the building at first try" in page.locator(".verdict").inner_text()


def test_a_page_without_images_hovers_without_a_photograph(browser, tmp_path):
    config_path = make_workplace(tmp_path)
    run(load_config(config_path), EvaluateOptions(no_images=True))
    watched = open_report(browser, tmp_path / "report" / "report.html", 1280)
    watched.page.locator("#map [data-mark]").last.hover()
    assert "of building" in watched.page.locator("#tip").inner_text()
    assert watched.page.locator("img").count() == 0
    assert watched.problems == []
