"""The page in headless Chromium: what a reader does with it, and what a hostile output can't.

Without a `chromium` on the machine these tests are skipped, since a laptop may have none. Where the
variable CI is set, as .ci/run and hosted runners set it, they fail instead: there it is installed.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from evaluation.page.build import page_html
from evaluation.records import RATES
from tests.report_data import (
    HOSTILE,
    make_tree,
    records_in,
    results_of,
    run_record,
    samples_of,
    write_probe,
    write_run,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox",  # with its sandbox it does not start as root; the page is our own
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 120_000  # ms that a busy machine may take for a step
pytestmark = pytest.mark.skipif(
    not CHROMIUM and "CI" not in os.environ, reason="no chromium: apt-get install chromium"
)
# Text whose color stands out from its background by less than WCAG AA asks (2.1, 1.4.3).
LOW_CONTRAST = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const backOf = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = numbers(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    throw new Error("no background");
  };
  const low = [];
  let seen = 0;
  for (const element of document.body.querySelectorAll("*")) {
    const texts = [...element.childNodes].filter((n) => n.nodeType === 3 && n.data.trim());
    if (!texts.length || !element.checkVisibility() || element.disabled) continue;
    if (element.closest("noscript, select, .skip")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [style[element instanceof SVGElement ? "fill" : "color"], backOf(element)];
    const [x, y] = [light(numbers(a)), light(b)].sort((p, q) => q - p);
    seen += 1;
    if ((x + 0.05) / (y + 0.05) < 4.5) low.push([element.tagName, texts[0].data, a, b]);
  }
  return [seen, low];
}"""
# Controls without a name, and drawings that are neither named nor kept from screen readers.
UNNAMED = """() => [...document.querySelectorAll("input, select, button, svg, a, summary")].filter(
  (e) => !(e.labels?.length || e.textContent.trim() || e.ariaLabel || e.ariaHidden === "true"),
).map((e) => e.outerHTML)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "CI is set, but there is no chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        yield running
        running.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    """The page of a small tree; one checkpoint has markup for a name."""
    root = make_tree(tmp_path_factory.mktemp("tree"))
    name = "<b onclick=hack()>x&amp;"
    write_run(root, name, run_record(name, "lora", from_weight="none", parameters=2000))
    write_probe(root, name, results_of(3.9), samples_of("Rome."))
    file = root / "index.html"
    file.write_text(page_html(records_in(root), RATES), encoding="utf-8")
    return file


@pytest.fixture
def page(browser: Browser, page_file: Path) -> Iterator[Page]:
    """The page at desktop width; whatever it complains of, or asks the network for, fails."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    context.set_default_timeout(PATIENCE)
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    opened.on("request", lambda request: complaints.append(request.url))
    opened.goto(page_file.as_uri())
    yield opened
    others = [c for c in complaints if not c.startswith((page_file.as_uri(), "data:"))]
    context.close()
    assert others == []


# Texts are read as text content: what is far off the screen is not laid out, and has no inner text.
def prompt_ids(page: Page) -> list[str]:
    return page.locator(".prompt h3").all_text_contents()


def compared(page: Page) -> list[str]:
    """Names above the answers to the first prompt."""
    return page.locator(".prompt").first.locator("h4").all_text_contents()


def test_it_opens_with_the_base_and_what_was_trained_from_it(page):
    assert prompt_ids(page) == ["facts-01", "facts-02", "story-01"]
    assert compared(page) == ["base", "lora", "fft"]
    assert page.locator("#count").inner_text() == "3 of 3 prompts"
    assert page.locator("#table tbody tr").count() == 2 + 4 + 1  # families, checkpoints, references
    row = page.locator("#table tr", has_text="LoRA on square").first.inner_text()
    assert "0.50" in row and "67% 21%–94%" in row
    assert page.locator("#curve-charts svg").count() == 2  # pretraining, fine-tuning
    assert "r90 2, effective rank 2.5" in page.locator("#spectrum-chart").inner_text()
    ticks = page.locator("#spectrum-chart text.axis").all_text_contents()
    assert ticks == ["0.5", "1", "2", "1", "2", "rank"]  # of .5 to 2, and of ranks 1 to 3


def test_failures_are_marked_in_place(page):
    answer = page.locator("[data-id=story-01] .answer").first
    assert answer.locator("mark").text_content() == "the cat sat. the cat sat. the cat sat."
    assert "loops" in answer.locator(".facts").text_content()
    assert "check failed" in page.locator("[data-id=facts-01] .answer").first.text_content()
    assert "(nothing)" in page.locator("[data-id=facts-01] .answer").first.text_content()


def test_filters(page):
    page.select_option("#section", "Stories")
    assert prompt_ids(page) == ["story-01"]
    page.select_option("#section", "")
    page.select_option("#failure", "runaway")
    assert prompt_ids(page) == ["facts-02"]
    page.select_option("#failure", "check passed loosely")
    assert page.locator(".answer.match h4").all_text_contents() == ["lora"]
    page.select_option("#failure", "check passed")
    assert prompt_ids(page) == ["facts-01"]
    assert page.locator(".answer.match h4").all_text_contents() == ["fft"]
    page.click("#clear")
    assert len(prompt_ids(page)) == 3


def test_decoding_and_seed(page):
    assert page.locator("#seed").is_disabled()
    page.select_option("#decoding", "t0.85p0.85")
    assert page.locator("[data-id=facts-01] .answer").nth(1).locator(
        ".said"
    ).all_text_contents() == [
        "Lyon. (seed 0)",
        "Lyon. (seed 1)",
    ]
    page.select_option("#seed", "1")
    assert page.locator("[data-id=facts-01] .said").all_text_contents()[1:] == [
        "Lyon. (seed 1)",
        "Paris. (seed 1)",
    ]
    assert page.locator("[data-id=story-01] .facts").first.text_content() == "not asked"


def test_search_finds_prompts_and_answers_in_any_case(page):
    page.fill("#query", "lyon")
    assert prompt_ids(page) == ["facts-01"]
    assert page.evaluate("[...CSS.highlights.get('found')].map(String)") == ["Lyon"]
    page.fill("#query", "ABOUT A CAT.")
    assert prompt_ids(page) == ["story-01"]
    page.fill("#query", ".*")
    assert prompt_ids(page) == []


def test_any_checkpoints_are_compared(page):
    page.click("#picker summary")
    page.locator("#choices input[value=lora]").uncheck()
    page.get_by_label("<b onclick=hack()>x&amp;").check()
    assert compared(page) == ["base", "fft", "<b onclick=hack()>x&amp;"]
    page.keyboard.press("Escape")
    assert not page.locator("#choices").is_visible()


def test_a_link_holds_prompt_checkpoints_and_filters(page, page_file):
    page.goto(page_file.as_uri() + "#show=fft,lora&failure=loop&prompt=story-01")
    assert compared(page) == ["lora", "fft"]
    assert prompt_ids(page) == ["story-01"]
    assert page.evaluate("document.activeElement.dataset.id") == "story-01"
    page.click("#clear")
    link = page.locator("[data-id=facts-02] header a").get_attribute("href")
    assert link == "#show=fft%2Clora&prompt=facts-02"
    page.goto(page_file.as_uri() + link)
    page.reload()
    assert compared(page) == ["lora", "fft"]
    assert page.locator(".prompt.current h3").text_content() == "facts-02"
    assert page.locator("#missing").inner_text() == ""


def test_a_link_to_what_is_not_there_says_so(page, page_file):
    page.goto(page_file.as_uri() + "#show=gone,fft&section=Nowhere")
    assert compared(page) == ["fft"]
    assert page.locator("#missing").inner_text() == "Not on this page: gone, Nowhere."


def test_keyboard(page):
    current = page.locator(".prompt.current h3")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert current.text_content() == "facts-02"
    assert page.evaluate("location.hash") == "#prompt=facts-02"
    page.keyboard.press("k")
    assert current.text_content() == "facts-01"
    page.keyboard.press("f")
    assert page.input_value("#failure") == "any"
    page.keyboard.press("d")
    assert page.input_value("#decoding") == "t0.85p0.85"
    page.keyboard.press("x")
    assert page.input_value("#failure") == ""
    page.keyboard.press("3")  # the third with outputs, fft
    assert compared(page) == ["base", "lora"]
    page.keyboard.press("/")
    page.keyboard.type("jk?")
    assert page.input_value("#query") == "jk?"


def test_help_names_the_keys_and_can_turn_them_off(page):
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog")
    assert "next, previous prompt" in dialog.inner_text()
    dialog.get_by_label("Single-key shortcuts").uncheck()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.keyboard.press("j")
    assert page.locator(".prompt.current").count() == 0


def test_a_hostile_output_is_inert(page):
    shown = page.locator("[data-id=facts-02] .said").first.text_content()
    expected = HOSTILE.replace("\u2028", "\\u2028").replace("\u202e", "\\u202e")
    assert shown == expected.replace("\x1b", "\\u001b")
    assert page.locator("[data-id=facts-02] .question").text_content() == shown
    page.locator("[data-id=facts-02] .said").first.click()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, #prompts script, [onerror], [onclick]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.reload()
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
    page.click("#picker summary")
    seen, low = page.evaluate(LOW_CONTRAST)
    assert seen > 100
    assert low == []
    assert page.evaluate(UNNAMED) == []


def test_the_theme_can_be_turned(page):
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_phone_scrolls_down_only(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    boxes = [answer.bounding_box() for answer in page.locator(".answer").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    assert len({box["x"] for box in boxes}) == 1  # one below the other
