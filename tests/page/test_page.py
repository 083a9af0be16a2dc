"""The page in headless Chromium: what a reader does with it, and what a hostile output can't.

Without a `chromium` on the machine these tests are skipped. With the variable CI set they fail
instead: there it is installed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from evaluation.page.build import build_page, main
from model.cli import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
PATIENCE = 120_000  # ms that a busy machine may take for a step
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<!-- <script> \u2028 \u202eevil\x1b[2J [x](javascript:window.hacked=3)"
)
PROMPTS = {
    "facts-01": ("Facts", "What is the capital of France?", "It is Paris.", None),
    "facts-02": ("Facts", HOSTILE, None, None),
    "story/03": ("Stories", "讲个故事。", None, "Tell a story."),
}
LOOP = "the cat sat. the cat sat. the cat sat. "


def write_arm(root: Path, name: str, training: dict, answers: dict[str, tuple]) -> None:
    """Write a folder of outputs; an answer is (greedy, outcome, flags), sampled ones differ."""
    samples = []
    for decoding, seed in (("greedy", None), ("t0.85p0.85", 0), ("t0.85p0.85", 1)):
        for prompt_id, (text, outcome, *flags) in answers.items():
            section, prompt, reference, translation = PROMPTS[prompt_id]
            sample = {"id": prompt_id, "section": section, "prompt": prompt, "reference": reference}
            sample |= {"decoding": decoding, "seed": seed, "prompt_translation": translation}
            sample["output"] = text + ("" if seed is None else f" ({seed})")
            sample |= {"output_translation": translation and "A story.", "outcome": outcome}
            samples.append(sample | dict.fromkeys(flags, True))
    (root / name).mkdir()
    (root / name / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    correct = sum(s["outcome"] == "correct" for s in samples)
    row = {"decoding": "greedy", "section": "all", "measure": "correct", "value": correct}
    results = {"training": training, "summary": [row]}
    (root / name / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """Write outputs of a family of 6, and of a user's own model that has markup for a name."""
    root = tmp_path_factory.mktemp("outputs")
    said = {"facts-01": ("", "blank", "blank"), "facts-02": (HOSTILE, None, "endless")}
    said["story/03"] = (LOOP, None, "loop")
    base = {"title": "base", "stage": "pretrain", "learning_rate": 5e-4}
    lora = {"title": "LoRA on q and o, r=8", "stage": "lora", "base": "b", "learning_rate": 1e-4}
    tuned = lora | {"title": "LoRA on all layers, r=8", "learning_rate": 0.01}
    fft = {"title": "full fine-tuning", "stage": "full_sft", "base": "b", "learning_rate": 1e-3}
    fft["parts"] = "all weights"
    write_arm(root, "b", base, said)
    write_arm(root, "b-minimind", lora, {"facts-01": ("It is Lyon.", "wrong fact")})
    write_arm(root, "b-tuned", tuned, {"facts-01": ("It is Paris.", "correct")})
    write_arm(root, "b-worse", tuned | {"learning_rate": 1e-3}, {"facts-01": ("Bonn.", None)})
    write_arm(root, "b-fft", fft, {"facts-01": ("It is Paris.", "correct")})
    write_arm(root, "b-frozen", fft | {"parts": "mlp"}, {"facts-01": ("It is Paris.", "correct")})
    write_arm(root, "<b onclick=hack()>", {"title": "<i>mine"}, {"facts-01": ("Rome.", None)})
    return root


def test_it_is_one_file_that_names_nothing_else(outputs, tmp_path):
    with pytest.raises(UserError, match="holds no outputs; probe a checkpoint"):
        build_page(tmp_path)
    main(["--outputs", str(outputs)])
    html = (outputs / "index.html").read_text()
    assert html.count("<script") == 2 and "default-src 'none'" in html
    assert not set("\x1b\u202e\u2028") & set(html)
    assert " src=" not in html.split("<script")[0]
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert data["shown"] == ["b", "b-minimind", "b-tuned", "b-fft"]
    looped = next(a for a in data["arms"][1]["answers"] if "loop" in a["kinds"])
    assert data["arms"][1]["name"] == "b" and looped["text"] == ["", LOOP, ""]


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """Start Chromium; whatever a page complains of, or asks the network for, fails in the end."""
    if not CHROMIUM:
        give_up = pytest.fail if "CI" in os.environ else pytest.skip
        give_up("no chromium: apt-get install chromium")
    complaints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        tab = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
        tab.set_default_timeout(PATIENCE)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        tab.on("request", lambda request: complaints.append(request.url))
        yield tab
        browser.close()
    assert not [x for x in complaints if not re.match("about:blank|file:.*/page.html", x)]


@pytest.fixture
def page(tab: Page, outputs: Path) -> Page:
    """Open the page anew: no filter, no link."""
    (outputs / "page.html").write_text(build_page(outputs), encoding="utf-8")
    tab.goto("about:blank")
    tab.goto((outputs / "page.html").as_uri())
    return tab


def prompt_ids(page: Page) -> list[str]:
    return page.locator("article > a").all_text_contents()


def read_answers(page: Page, number: int = 0) -> list[str]:
    return page.locator("article").nth(number).locator(".said").all_text_contents()


def test_it_opens_on_answers_at_any_width(page):
    for width, height, scheme in ((390, 844, "dark"), (1400, 900, "light")):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": height})
        page.reload()
        first = page.locator("article").first
        titles = first.locator("h3").evaluate_all("all => all.map((h3) => h3.firstChild.data)")
        assert titles[:2] == ["Base", "LoRA on q and o, r=8"]
        assert titles[2:] == ["LoRA on all layers, r=8", "Full fine-tuning"]
        boxes = [answer.bounding_box() for answer in first.locator(".answer").all()]
        assert all(box["y"] + box["height"] < height for box in boxes)
        assert len({box["x"] for box in boxes}) == (4 if width == 1400 else 1)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_answers_name_what_is_wrong_mark_loops_and_are_inert(page):
    assert prompt_ids(page) == ["facts-01", "facts-02", "story/03"]
    assert read_answers(page) == ["", "It is Lyon.", "It is Paris.", "It is Paris."]
    first, hostile, story = page.locator("article").all()
    kinds = first.locator(".good, .bad").all_text_contents()
    assert kinds == ["blank ", "wrong fact ", "correct ", "correct "]
    assert "(nothing)" in first.inner_text() and "Reference: It is Paris." in first.inner_text()
    assert story.locator("mark").text_content() == LOOP
    assert "Tell a story." in story.inner_text() and "A story." in story.inner_text()
    assert story.locator("text=not asked").count() == 3

    expected = HOSTILE.replace("\u2028", "\\u2028").replace("\u202e", "\\u202e")
    assert read_answers(page, 1)[0] == expected.replace("\x1b", "\\u001b")
    assert hostile.locator("h2").text_content() == read_answers(page, 1)[0]
    hostile.locator(".said").click()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, main script, [onerror], [onclick]").count() == 0


def test_filters_and_search(page):
    filters = {"#section": ("Stories", ["story/03"]), "#kind": ("endless", ["facts-02"])}
    for control, (value, found) in filters.items():
        page.select_option(control, value)
        assert prompt_ids(page) == found
        page.click("text=Clear")
    page.select_option("#kind", "wrong")
    assert len(prompt_ids(page)) == 3
    page.check("#differs")
    assert prompt_ids(page) == ["facts-01"]
    page.uncheck("#differs")
    page.fill("#query", "LYON")
    assert prompt_ids(page) == ["facts-01"]
    page.fill("#query", ".*")
    assert prompt_ids(page) == [] and page.inner_text("#count") == "0 of 3 prompts"


def test_decodings_models_and_links(page):
    page.select_option("#decoding", "t0.85p0.85")
    assert read_answers(page)[2:4] == ["It is Lyon. (0)", "It is Lyon. (1)"]
    page.select_option("#decoding", "")
    assert len(read_answers(page)) == 4 * 3
    page.select_option("#decoding", "greedy")
    page.click("text=Models >> nth=-1")
    for name in ("b", "b-tuned", "b-fft"):
        page.uncheck(f"#arms input[value={name}]")
    page.get_by_label("<b onclick=hack()>").check()  # a user's own
    assert read_answers(page) == ["Rome.", "It is Lyon."]
    assert page.locator("h3").first.text_content().startswith("<i>mine")

    page.evaluate("location.hash = '#story%2F03'")  # which the models on the page were not asked
    page.wait_for_selector(".current")
    assert page.locator(".current > a").text_content() == "story/03"
    assert page.locator(".current > a").get_attribute("href") == "#story%2F03"
    page.reload()
    assert page.locator(".current > a").text_content() == "story/03"
    page.evaluate("location.hash = '#100%'")  # of no prompt
