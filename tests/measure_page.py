"""Measures how long the page takes to be usable in Chromium, by the wall clock.

    python tests/measure_page.py

The page is made of 20 checkpoints with 200 outputs each. From the start of the navigation until the
outputs are drawn and the browser has painted a frame; the best and the median of five visits, each
in a new context. Not a test: what a busy machine takes says nothing.
"""

import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from playwright.sync_api import Browser, sync_playwright

from evaluation.page.build import page_html
from evaluation.records import RATES, Record
from tests.report_data import results_of, run_record
from tests.test_page import CHROMIUM, FLAGS

CHECKPOINTS, OUTPUTS, VISITS = 20, 200, 5
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "told", "of", "rivers", "kings", "rain")
PAINTED = """() => new Promise((done) => {
  const frame = () => setTimeout(() => done(performance.now()));
  requestAnimationFrame(frame);
})"""


def long_answer(seed: int) -> str:
    """About 100 words that differ between answers."""
    return " ".join(WORDS[(seed * 7 + i * (1 + seed % 5)) % len(WORDS)] for i in range(100))


def checkpoint(number: int) -> Record:
    """A probed run with `OUTPUTS` answers and a curve."""
    name = f"run_{number}"
    samples = [
        {
            "id": f"p-{i}",
            "section": f"Section {i % 9}",
            "decoding": "greedy",
            "seed": None,
            "prompt": f"Question {i}: what is told of {WORDS[i % len(WORDS)]}?",
            "prompt_translation": None,
            "output": long_answer(number * OUTPUTS + i),
            "output_translation": None,
            "tokens": 128,
            "blank": False,
            "runaway": i % 2 == 0,
            "loop": False,
            "check": None,
            "check_strict": None,
            "check_loose": None,
        }
        for i in range(OUTPUTS)
    ]
    curve = [{"step": 10 * i, "loss": 4 - i / 100} for i in range(1, 200)]
    run = run_record(name, "full_sft")
    return Record(name, run=run, curve=curve, results=results_of(3.0), samples=samples)


def visit(browser: Browser, address: str) -> float:
    """Milliseconds from the start of the navigation to the first frame with all outputs."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.goto(address)
    elapsed = page.evaluate(PAINTED)
    if page.locator(".prompt").count() != OUTPUTS:
        raise RuntimeError("the page does not show every prompt")
    context.close()
    return elapsed


def main() -> None:
    html = page_html([checkpoint(number) for number in range(CHECKPOINTS)], RATES)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "index.html"
        file.write_text(html, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        times = [visit(browser, file.as_uri()) for _ in range(VISITS)]
        browser.close()
    print(
        f"{CHECKPOINTS} checkpoints x {OUTPUTS} outputs, {len(html.encode()) / 1e6:.2f} MB: usable "
        f"after {min(times):,.0f} ms at best, {statistics.median(times):,.0f} ms in the median of "
        f"{VISITS} visits"
    )


if __name__ == "__main__":
    main()
