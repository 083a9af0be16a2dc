"""The page in headless Chromium: what a reader does with it, and what a hostile output can't.

Without a `chromium` on the machine these tests are skipped. With the variable CI set they fail
instead: there it is installed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from evaluation.page.build import build_page, main
from model.files import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
PATIENCE = 120_000  # ms that a busy machine may take for a step
needs_chromium = pytest.mark.skipif(
    not CHROMIUM and "CI" not in os.environ, reason="no chromium: apt-get install chromium"
)
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<!-- <script> \u2028 \u202eevil\x1b[2J [x](javascript:window.hacked=3)"
)
PROMPTS = {
    "facts-01": ("Facts", "What is the capital of France?", "It is Paris."),
    "facts-02": ("Facts", HOSTILE, None),
    "story/03": ("Stories", "讲个故事。", None),
}
LOOP = "the cat sat. the cat sat. the cat sat. "
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
  };
  const low = [];
  for (const element of document.body.querySelectorAll("h1, h2, h3, p, a, span, mark, summary")) {
    const [a, b] = [numbers(getComputedStyle(element).color), backOf(element)];
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    if ((x + 0.05) / (y + 0.05) < 4.5) low.push([element.outerHTML, a, b]);
  }
  return low;
}"""


def write_arm(root: Path, name: str, training: dict, answers: dict[str, tuple]) -> None:
    """Write a folder of outputs; an answer is (greedy, outcome, flags), sampled ones differ."""
    samples = [
        {
            "id": prompt_id,
            "section": PROMPTS[prompt_id][0],
            "prompt": PROMPTS[prompt_id][1],
            "prompt_translation": "Tell a story." if prompt_id == "story/03" else None,
            "reference": PROMPTS[prompt_id][2],
            "decoding": decoding,
            "seed": seed,
            "output": text + ("" if seed is None else f" ({seed})"),
            "output_translation": "A story." if prompt_id == "story/03" else None,
            "outcome": outcome,
            **dict.fromkeys(flags, True),
        }
        for decoding, seed in (("greedy", None), ("t0.85p0.85", 0), ("t0.85p0.85", 1))
        for prompt_id, (text, outcome, flags) in answers.items()
    ]
    folder = root / name
    folder.mkdir(parents=True)
    folder.joinpath("samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    correct = sum(s["outcome"] == "correct" for s in samples)
    row = {"decoding": "greedy", "section": "all", "measure": "correct", "value": correct}
    results = {"training": training, "summary": [row]}
    folder.joinpath("results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """Write outputs of a family of 5, and of a user's own model that has markup for a name."""
    root = tmp_path_factory.mktemp("outputs")
    base = {"title": "base", "stage": "pretrain", "learning_rate": 5e-4}
    lora = {"title": "LoRA on q and o, r=8", "stage": "lora", "base": "b", "learning_rate": 1e-4}
    tuned = {
        "title": "LoRA on all layers, r=8",
        "stage": "lora",
        "base": "b",
        "learning_rate": 0.01,
    }
    fft = {"title": "full fine-tuning", "stage": "full_sft", "base": "b", "learning_rate": 1e-3}
    hostile = (HOSTILE, None, ["endless"])
    write_arm(
        root,
        "b",
        base,
        {
            "facts-01": ("", "blank", ["blank"]),
            "facts-02": hostile,
            "story/03": (LOOP, None, ["loop"]),
        },
    )
    write_arm(root, "b-minimind", lora, {"facts-01": ("It is Lyon.", "wrong fact", [])})
    write_arm(root, "b-tuned", tuned, {"facts-01": ("It is Paris.", "correct", [])})
    write_arm(root, "b-worse", tuned | {"learning_rate": 1e-3}, {"facts-01": ("Bonn.", None, [])})
    write_arm(root, "b-fft", fft, {"facts-01": ("It is Paris.", "correct", [])})
    write_arm(root, "<b onclick=hack()>", {"title": "<i>mine"}, {"facts-01": ("Rome.", None, [])})
    return root


def test_a_folder_without_outputs_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no outputs; probe a checkpoint"):
        build_page(tmp_path)


def test_it_is_one_file_that_names_nothing_else(outputs, capsys):
    assert main(["--outputs", str(outputs)]) == 0
    html = (outputs / "index.html").read_text()
    assert html.count("<script") == 2 and "default-src 'none'" in html
    assert not set("\x1b\u202e\u2028") & set(html)
    assert " src=" not in html.replace(HOSTILE[:60], "").split("<script")[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "CI is set, but there is no chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser, outputs: Path) -> Iterator[Page]:
    """Open the page at 1400 px; whatever it complains of, or asks the network for, fails."""
    file = outputs / "page.html"
    file.write_text(build_page(outputs), encoding="utf-8")
    context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme="light")
    context.set_default_timeout(PATIENCE)
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    opened.on("request", lambda request: complaints.append(request.url))
    opened.goto(file.as_uri())
    yield opened
    others = [text for text in complaints if not text.startswith(file.as_uri())]
    context.close()
    assert others == []


def prompt_ids(page: Page) -> list[str]:
    return page.locator("article > a").all_text_contents()


def said(page: Page, number: int = 0) -> list[str]:
    return page.locator("article").nth(number).locator(".said").all_text_contents()


@needs_chromium
@pytest.mark.parametrize("width, height", [(1400, 900), (390, 844)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_on_answers_at_any_width(page, width, height, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": height})
    page.reload()
    titles = (
        page.locator("article")
        .first.locator("h3")
        .evaluate_all("all => all.map((h3) => h3.firstChild.data)")
    )
    assert titles == ["base", "LoRA on q and o, r=8", "LoRA on all layers, r=8", "full fine-tuning"]
    boxes = [
        answer.bounding_box() for answer in page.locator("article").first.locator(".answer").all()
    ]
    assert all(
        box["y"] + box["height"] < height and box["x"] + box["width"] <= width for box in boxes
    )
    assert len({box["x"] for box in boxes}) == (4 if width == 1400 else 1)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.evaluate(LOW_CONTRAST) == []


@needs_chromium
def test_answers_name_what_is_wrong_and_mark_loops(page):
    assert prompt_ids(page) == ["facts-01", "facts-02", "story/03"]
    assert said(page) == ["", "It is Lyon.", "It is Paris.", "It is Paris."]
    first = page.locator("article").first
    assert first.locator(".good, .bad").all_text_contents() == [
        "blank ",
        "wrong fact ",
        "correct ",
        "correct ",
    ]
    assert "(nothing)" in first.inner_text() and "Reference: It is Paris." in first.inner_text()
    story = page.locator("article").nth(2)
    assert story.locator("mark").text_content() == LOOP
    assert "Tell a story." in story.inner_text() and "A story." in story.inner_text()
    assert story.locator("text=not asked").count() == 3


@needs_chromium
def test_filters_and_search(page):
    page.select_option("#section", "Stories")
    assert prompt_ids(page) == ["story/03"]
    page.click("text=Clear")
    page.select_option("#kind", "endless")
    assert prompt_ids(page) == ["facts-02"]
    page.select_option("#kind", "wrong")
    assert len(prompt_ids(page)) == 3
    page.click("text=Clear")
    page.check("#differs")
    assert prompt_ids(page) == ["facts-01"]
    page.uncheck("#differs")
    page.fill("#query", "LYON")
    assert prompt_ids(page) == ["facts-01"]
    page.fill("#query", ".*")
    assert prompt_ids(page) == [] and page.inner_text("#count") == "0 of 3 prompts"


@needs_chromium
def test_decodings(page):
    page.select_option("#decoding", "t0.85p0.85")
    assert said(page)[2:4] == ["It is Lyon. (0)", "It is Lyon. (1)"]
    page.select_option("#decoding", "")
    assert len(said(page)) == 4 * 3


@needs_chromium
def test_models_are_chosen_a_users_own_included(page):
    page.click("text=Models >> nth=-1")
    for name in ("b", "b-tuned", "b-fft"):
        page.uncheck(f"#arms input[value={name}]")
    page.get_by_label("<b onclick=hack()>").check()
    assert said(page) == ["Rome.", "It is Lyon."]
    assert page.locator("h3").first.text_content().startswith("<i>mine")


@needs_chromium
def test_a_link_leads_to_a_prompt_whatever_is_filtered(page):
    page.select_option("#section", "Facts")
    page.evaluate("location.hash = '#story%2F03'")
    page.wait_for_selector(".current")
    assert page.locator(".current > a").text_content() == "story/03"
    assert page.locator(".current > a").get_attribute("href") == "#story%2F03"
    page.reload()
    assert page.locator(".current > a").text_content() == "story/03"


@needs_chromium
def test_a_hostile_output_is_inert(page):
    shown = said(page, 1)[0]
    expected = HOSTILE.replace("\u2028", "\\u2028").replace("\u202e", "\\u202e")
    assert shown == expected.replace("\x1b", "\\u001b")
    assert page.locator("article h2").nth(1).text_content() == shown
    page.locator("article").nth(1).locator(".said").click()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, main script, [onerror], [onclick]").count() == 0
