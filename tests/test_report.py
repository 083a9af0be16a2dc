"""The report: joining, recovery, tables and escaping by values worked out by hand."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from dataset.command_line import REPO_DIR
from dataset.jsonl import DataError, read_jsonl
from dataset.untrusted import shown
from evaluation.metrics import check_answer, is_blank, is_loop
from evaluation.page.build import embedded_json, loop_span, page_data, page_html, text_parts
from evaluation.page.build import thin_spectrum as spectrum_points
from evaluation.plots import median_energy
from evaluation.records import (
    RATES,
    Record,
    Recovery,
    best_run,
    families,
    measured_rates,
    method,
    read_run_record,
    read_shown_rates,
    recoveries,
    recovery,
    short,
    sweeps,
    thin,
    unfinished,
    where_best,
)
from evaluation.report import (
    build,
    cite,
    main,
    reliability_text,
    replace_block,
    runs_block,
    write_changed,
)
from evaluation.study_report import NO_STUDY
from model.checkpoint import load_tokenizer
from tests.report_data import (
    HOSTILE,
    LOOP,
    make_tree,
    records_in,
    results_of,
    run_record,
    sample,
    write_probe,
    write_run,
)
from tests.tiny import exit_code


def tuned(name: str, nll: float | None, stage: str = "lora", **changes: object) -> Record:
    """A run from `base` and what was measured of it."""
    results = None if nll is None else results_of(nll)
    return Record(name, run=run_record(name, stage, **changes), results=results)


FULL = Recovery(1.0, None)
BASE = Record("base", run=run_record("base", "pretrain"), results=results_of(4.0))


# ---------------------------------------------------------------------------------------- recovery


def test_recovery_by_hand():
    assert recovery(4.0, 3.5, 3.0) == pytest.approx(0.5)
    assert recovery(4.0, 3.0, 3.0) == 1.0
    assert recovery(4.0, 4.2, 3.0) == pytest.approx(-0.2)  # worse than nothing is told
    assert recovery(4.0, 3.9, 3.7) == pytest.approx(1 / 3)  # .3 nats are enough
    assert recovery(4.0, 3.9, 3.71) is None


def test_full_fine_tuning_is_chosen_by_validation_loss():
    chosen = tuned("chosen", 3.0, "full_sft", eval_loss=3.1)
    lower_nll = tuned("lower", 2.0, "full_sft", eval_loss=3.2)
    shares = recoveries([BASE, tuned("lora", 3.5), chosen, lower_nll])
    shares = {name: found.share for name, found in shares.items()}
    assert shares == pytest.approx({"lora": 0.5, "chosen": 1.0, "lower": 2.0})


def test_recovery_needs_a_whole_full_fine_tuning_of_the_same_kind():
    other_data = {"files": [{"name": "x", "sha256": "other"}]}
    for full in (
        tuned("fft", 3.0, "full_sft", status="diverged"),
        tuned("fft", 3.0, "full_sft", trainable="norms"),
        tuned("fft", 3.0, "full_sft", from_weight="out/another"),
        tuned("fft", 3.0, "full_sft", train_data=other_data),
        tuned("fft", None, "full_sft"),
    ):
        assert "lora" not in recoveries([BASE, tuned("lora", 3.5), full])


def test_recovery_needs_nll_of_the_same_data():
    lora = tuned("lora", 3.5)
    lora.results["nll"]["data"] = [{"name": "valid.jsonl", "sha256": "changed"}]
    assert recoveries([BASE, lora, tuned("fft", 3.0, "full_sft")]) == {"fft": FULL}
    lora.results["nll"] = None
    assert recoveries([BASE, lora, tuned("fft", 3.0, "full_sft")]) == {"fft": FULL}


def test_recovery_has_an_interval_where_nll_by_conversation_is_kept():
    of_conversations = {"base": [40.0, 80.0], "lora": [35.0, 60.0], "fft": [30.0, 60.0]}
    records = [tuned(name, 4.0, stage) for name, stage in (("lora", "lora"), ("fft", "full_sft"))]
    records = [Record("base", run=BASE.run, results=results_of(4.0)), *records]
    for record, nll in zip(records, (4.0, 3.5, 3.0), strict=True):
        sequences = [[nats, 10] for nats in of_conversations[record.name]]
        record.results["nll"] |= {"nats_per_token": nll, "sequences": sequences}
    found = recoveries(records)["lora"]
    # Of two conversations, each alone comes in a quarter of the draws: R is 5/10, 20/20 or 25/30.
    assert (found.share, found.interval.low, found.interval.high) == pytest.approx((0.5, 0.5, 1.0))


def test_rates_of_unpublished_prompts_are_told_with_intervals(tmp_path):
    root = make_tree(tmp_path)
    probe = results_of(None) | {"nll": None}
    path = root / "evaluation" / "model_outputs" / "fft" / "rates_private.json"
    path.write_text(json.dumps(probe))
    text = build(root)[root / "evaluation" / "results" / "README.md"]
    assert "| checkpoint | check passed | never ends | loops | blank |" in text
    assert "| fft | 0% [0, 79] / 0% [0, 79] | 33% [6, 79] / 33% [6, 79] |" in text


@pytest.mark.parametrize("stage", ["update_analysis", "merge_lora"])
def test_a_changed_copy_is_compared_with_what_it_was_made_of(tmp_path, stage):
    settings = {"base": "base", "tuned": "fft", "change": "dW of the linears cut to rank 8"}
    run = {"stage": stage, "status": "completed", "settings": settings}
    make_tree(tmp_path)
    write_probe(tmp_path, "fft_rank8", results_of(3.25, run), [sample("facts-01", "Paris.")])
    records = records_in(tmp_path)
    (copy,) = (record for record in records if record.name == "fft_rank8")
    assert recoveries(records)["fft_rank8"].share == pytest.approx(0.75)
    assert method(copy) == "dW of the linears cut to rank 8"
    assert copy in families(records)["base"]


# --------------------------------------------------------------------------- families and sweeps


def test_families_are_in_order_of_size_and_members_of_nll():
    small = [BASE, tuned("good", 3.0), tuned("bad", 3.9), tuned("unknown", None)]
    large = [
        Record("large", run=run_record("large", "pretrain", parameters=9000)),
        tuned("other", 2.0, from_weight="out/large"),
    ]
    found = families([*large, *small])
    assert list(found) == ["base", "large"]
    assert [r.name for r in found["base"]] == ["base", "bad", "good", "unknown"]
    assert [r.name for r in found["large"]] == ["large", "other"]


def test_a_sweep_differs_in_the_rate_alone():
    runs = [
        tuned("a", None, learning_rate=1e-2, eval_loss=3.9, use_compile="on"),
        tuned("b", None, learning_rate=1e-3, eval_loss=3.7),
        tuned("c", None, learning_rate=1e-3, eval_loss=3.6, lora_rank=16),
        tuned("d", None, "full_sft", learning_rate=1e-4),
    ]
    runs[0].settings.pop("use_compile", None)
    assert [[r.name for r in runs] for runs in sweeps(runs)] == [["b", "a"]]


def test_runs_from_before_a_flag_are_swept_with_later_ones(tmp_path):
    old = run_record("old", "lora", learning_rate=1e-2)
    del old["settings"]["modules_to_save_lr_ratio"]
    (tmp_path / "run.json").write_text(json.dumps(old))
    runs = [Record("old", run=read_run_record(tmp_path / "run.json")), tuned("new", None)]
    assert [[r.name for r in found] for found in sweeps(runs)] == [["new", "old"]]


def test_the_best_rate_is_inside_the_grid_or_at_its_edge():
    low, middle, high = (
        tuned(str(loss), None, learning_rate=rate, eval_loss=loss)
        for rate, loss in ((1e-4, 3.9), (1e-3, 3.7), (1e-2, 3.8))
    )
    assert best_run([low, middle, high]) is middle
    assert where_best([low, middle, high], middle) == "inside the grid"
    assert where_best([low, middle], middle) == "at the edge of the grid"
    failed = tuned("failed", None, learning_rate=1e-3, eval_loss=3.0, status="diverged")
    assert best_run([low, failed]) is low
    assert best_run([failed]) is None


# ----------------------------------------------------------------------------------------- telling


def test_methods_are_told_by_what_was_changed():
    assert method(BASE) == "nothing: the base"
    assert method(tuned("x", 3.0, "full_sft")) == "FFT"
    assert method(tuned("x", 3.0, "full_sft", trainable="norms,mlp")) == "FFT of norms, mlp"
    assert method(tuned("x", 3.0)) == "LoRA on square, r=8, alpha 8"
    everything = tuned(
        "x",
        3.0,
        lora_targets="q_proj,v_proj",
        lora_init="gaussian",
        use_rslora=True,
        loraplus_lr_ratio=16.0,
        train_tokens=["<|im_end|>"],
        modules_to_save=["norms"],
        modules_to_save_lr_ratio=20.0,
    )
    assert method(everything) == (
        "LoRA on q_proj, v_proj, r=8, alpha 8, gaussian init, rsLoRA, LoRA+ 16, "
        "rows of <|im_end|>, and norms, these at 20 times the rate"
    )


def test_a_run_that_did_not_complete_is_never_shown_as_one():
    assert unfinished(tuned("x", 3.0)) == ""
    assert unfinished(tuned("x", 3.0, status="diverged", step=20)) == " (diverged at step 20 of 40)"
    running = tuned("x", 3.0, status="running")
    del running.run["step"]
    assert unfinished(running) == " (running)"


@pytest.mark.parametrize(
    ("number", "text"), [(0.003, "3e-3"), (5e-4, "5e-4"), (0.00125, "1.25e-3"), (1.0, "1e0")]
)
def test_short_rates(number, text):
    assert short(number) == text


def test_thin_averages_equal_stretches():
    rows = [{"step": i, "loss": float(i)} for i in range(1, 8)]
    assert thin(rows, "loss", 100) == [(i, float(i)) for i in range(1, 8)]
    assert thin(rows, "loss", 3) == [(2, 1.5), (4, 3.5), (7, 6.0)]
    rows += [{"step": 8, "eval_loss": 1.0}]
    assert thin(rows, "loss", 1) == [(7, 4.0)]
    assert thin(rows, "eval_loss", 5) == [(8, 1.0)]
    assert thin([], "loss", 5) == []


def test_rates_that_the_calibration_hides_or_nobody_measured_are_not_shown(tmp_path):
    assert read_shown_rates(tmp_path / "calibration.json") == RATES
    verdicts = {"loop": False, "blank": True, "off_topic": None}
    (tmp_path / "calibration.json").write_text(json.dumps({"shown": verdicts}))
    allowed = read_shown_rates(tmp_path / "calibration.json")
    assert list(allowed) == ["check_strict", "runaway", "blank", "off_topic"]
    record = Record("x", results=results_of(4.0))
    record.results["decodings"]["greedy"]["blank"] = None
    record.results["decodings"]["t0.85p0.85"]["blank"] = None
    assert list(measured_rates([record], allowed)) == ["check_strict", "runaway"]


# --------------------------------------------------------------------------------------- the README


def test_readme_tables_by_hand(tmp_path):
    root = make_tree(tmp_path)
    text = build(root)[root / "evaluation" / "results" / "README.md"]
    head = "| checkpoint | trained | on | parameters | learning rate | steps | NLL | R | "
    rates = "0% / 0% | 33% / 33% | 67% / 67% | 0% / 0% |"
    link = "(../model_outputs/{0}/samples.md)"
    for line in (
        head + "check passed | never ends | loops | blank |",
        f"| [base]{link.format('base')} | nothing: the base | - | - | - | - | 4.000 | - | {rates}",
        f"| [lora]{link.format('lora')} | LoRA on square, r=8, alpha 8 | sft | 100 | 1e-3 | 40 | "
        f"3.500 | 0.50 | {rates}",
        f"| [fft]{link.format('fft')} | FFT | sft | 1,000 | 1e-3 | 40 | 3.000 | 1.00 | {rates}",
        "| LoRA on square, r=8, alpha 8, from base | sft | 40 | **1e-3: 3.500**, 1e-1: diverged | "
        "1e-3, at the edge of the grid |",
        "![Energy by rank of updates of base](../figures/spectra_base.svg)",
    ):
        assert line in text.splitlines(), line
    for sentence in (
        "**From base**: d=128, 4 layers, 1,000 parameters, pretrained on 0.0M tokens (24 a "
        "parameter) of wiki:",
        "Rates are of 3 prompts (prompts\\_x.md, 01234567, 1 with a check), at most 16 tokens, "
        "greedy / T=.85 top-p .85. NLL is in nats a token, of the 3,456 response tokens in 12 "
        "conversations of valid.jsonl.",
    ):
        assert sentence in " ".join(text.split()), sentence
    assert text.startswith("# Results\n<!-- report:runs -->\n")
    assert "<!-- /report:runs -->\nbetween\n<!-- report:sweeps -->\n" in text
    assert "old" not in text.split()
    text = build(root)[root / "README.md"]
    assert text.startswith("# Title\n<!-- report:bench -->\n`make bench` was not run yet.\n")
    unknown = "`make stress` was not run yet."
    assert f"<!-- report:reliability -->\n{unknown}\n<!-- /report:reliability -->\n" in text
    assert f"<!-- report:study -->\n{NO_STUDY}\n<!-- /report:study -->\nend\n" in text
    assert "old" not in text.split()


def test_what_is_compared_in_one_table_was_measured_alike(tmp_path):
    root = make_tree(tmp_path)
    path = root / "evaluation" / "model_outputs" / "lora" / "results.json"
    results = json.loads(path.read_text())
    results["provenance"]["generation"]["max_new_tokens"] = 64
    path.write_text(json.dumps(results))
    text = "\n".join(runs_block(records_in(root), RATES, []))
    assert text.count("| checkpoint |") == 2
    assert text.count("at most 16 tokens") == text.count("at most 64 tokens") == 1


def test_markers_must_stand_exactly_once():
    text = "<!-- report:x -->old<!-- /report:x -->"
    assert replace_block(text, "x", [r"a\1"], "f") == "<!-- report:x -->\na\\1\n<!-- /report:x -->"
    for wrong in ("", text + text, "<!-- report:x -->"):
        with pytest.raises(ValueError, match="^README: put <!-- report:x -->"):
            replace_block(wrong, "x", [], "README")


def test_readme_and_page_are_in_sync_with_the_committed_results(tmp_path):
    """Fails when results were added, or the report changed, without `make report`."""
    listed = subprocess.run(
        ["git", "-C", REPO_DIR, "ls-files", "-z", "evaluation", "tests/*.json", "README.md"],
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: which results are committed is not known")
    for name in listed.stdout.split("\0")[:-1]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO_DIR / name, tmp_path / name)
    files = build(tmp_path)
    for path, text in files.items():
        if path.suffix == ".html":  # the page is made anew on each machine
            continue
        assert path.is_file(), f"{path.name}: run make report and commit it"
        committed = path.read_text(encoding="utf-8")
        if path.suffix == ".svg":  # whose bytes depend on matplotlib's version
            committed, text = texts_of(committed), texts_of(text)
        assert committed == text, f"{path.name}: run make report"


def test_every_claim_that_was_judged_is_told_in_the_readme():
    details = (REPO_DIR / "evaluation/results/study/README.md").read_text()
    claims = re.findall(r"^\| ([A-Z][^:|]*): [^|]* \| \*\*\w+", details, re.MULTILINE)
    assert len(claims) > 40
    sentences = " ".join((REPO_DIR / "README.md").read_text().split())
    for claim in claims:
        told = rf"[(;] ?{re.escape(claim)}: (supported|refuted|open), "
        assert re.search(told, sentences), f"README.md: no sentence cites {claim}"


def texts_of(svg):
    """Labels, values and ticks of a figure, which matplotlib repeats in comments."""
    texts = re.findall(r"<!-- (.*?) -->", svg, re.DOTALL)
    assert texts
    return texts


def test_sentences_cite_what_was_measured():
    told = {"H1": "supported, +0.290 [+0.273, +0.309]", "X rate, s": "open, 0.177 [0.157, 0.198]"}
    old = "It is the rate (H1:\n  open; X rate,\n  s: supported, 0.3 [0.2, 0.4]; at `s`)."
    new = (
        "It is the rate (H1:\n  supported, +0.290 [+0.273, +0.309]; X rate,\n"
        "  s: open, 0.177 [0.157, 0.198]; at `s`)."
    )
    assert cite(old, told, "README.md") == new
    assert cite(new, told, "README.md") == new
    broken = new.replace("[+0.273, +0.309]", "[+0.273,\n  +0.309]")  # lines are broken as before
    assert cite(broken, told, "README.md") == broken
    others = "Claims (H: what was planned; E: the study's; X scale: H1: open) are judged: H1: open."
    assert cite(others, told, "README.md") == others
    with pytest.raises(DataError, match=r"^README.md: study.toml has no claim 'H1, s'; mend its"):
        cite("(H1, s: open)", told, "README.md")
    with pytest.raises(DataError, match=r"after 'H1' stands 'open, since it is'; put it after"):
        cite("(H1: open, since it is)", told, "README.md")


def test_what_the_stress_command_measured_is_told():
    one = {"phases": {"start": 1, "step": 2, "evaluation": 0}, "runs": 2, "exact_runs": 2}
    other = {"phases": {"start": 0, "step": 4, "evaluation": 1}, "runs": 2, "exact_runs": 1}
    one |= {"name": "lora", "aimed": {"start": 0, "between two renames": 1}}
    other |= {"name": "pretrain", "aimed": {"writing a state": 2, "between two renames": 1}}
    stress = {"git": {"commit": "0123456789"}, "seed": 3, "kills": 12, "survived": 7}
    stress |= {"cases": [one, other], "memory_bytes_by_step": {"500": 2**20, "3000": 3 * 2**20}}
    text = reliability_text(stress)
    kinds = "(8 at random moments, 4 aimed into a save)"
    assert f"at commit 0123456 with seed 3: 7 of 12 SIGKILLs {kinds}" in text
    assert "in 2 combinations" in text
    assert "Those at random fell into: start 1, step 6, evaluation 1." in text
    assert "Those aimed fell into: between two renames 2, writing a state 2." in text
    assert "Not exact: pretrain." in text
    assert text.endswith("was 1.0 MiB at step 500 of a run and 3.0 MiB at step 3,000.")
    one["aimed"], other["aimed"] = {}, {}
    assert "aimed" not in reliability_text(stress)


def test_committed_samples_hold_what_the_measures_say_today():
    """Fails when a measure's definition changed under outputs that were measured by the old one."""
    special = load_tokenizer().all_special_tokens
    for path in (REPO_DIR / "evaluation" / "model_outputs").glob("*/samples.jsonl"):
        for where, saved in read_jsonl(path):
            text = saved["output"]
            for token in special:
                text = text.replace(token, "")
            assert saved["loop"] == is_loop(text), where
            assert saved["blank"] == is_blank(text), where
            assert (saved["diversity"] is None) == (saved["tokens"] < 4), where
            if saved["check"]:
                assert saved["check_strict"] == check_answer(text, saved["check"]), where


# ----------------------------------------------------------------------------------- bytes, errors


def test_the_same_results_give_the_same_bytes(tmp_path):
    root = make_tree(tmp_path)
    (root / "evaluation" / "results" / "demo_x").mkdir()  # make demo's are not committed
    files = build(root)
    assert {path.name for path in write_changed(files)} == {
        "README.md",  # two of this name
        "index.html",
        "rates_base.svg",
        "curves_base.svg",
        "learning_rates_base.svg",
        "spectra_base.svg",
    }
    command = [sys.executable, REPO_DIR / "evaluation" / "report.py", "--root", root]
    again = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert (again.returncode, again.stdout) == (0, ""), again.stderr


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("results/fft/run.json", '{"status": ', "run.json: broken JSON"),
        ("results/fft/run.json", '{"status": "completed"}', "run.json: lacks stage, settings"),
        ("results/fft/metrics.jsonl", '{"step": 1}\n{"st', "metrics.jsonl:2: broken JSON"),
        ("model_outputs/fft/results.json", "[]", "results.json: expected a JSON object"),
        ("model_outputs/fft/samples.jsonl", '{"id": "x"}', "samples.jsonl:1: lacks section"),
        ("calibration.json", "{}", "calibration.json: lacks shown"),
    ],
)
def test_a_broken_result_is_named_and_nothing_is_written(tmp_path, capsys, name, text, told):
    root = make_tree(tmp_path)
    (root / "evaluation" / name).write_text(text)
    before = sorted(path.name for path in root.rglob("*"))
    assert exit_code(main, ["--root", str(root)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {root}") and told in error and error.count("\n") == 1
    assert sorted(path.name for path in root.rglob("*")) == before
    assert "old" in (root / "README.md").read_text()


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert exit_code(main, ["--root", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- page and loops


def test_embedded_json_cannot_end_its_element():
    text = embedded_json({"x": HOSTILE})
    assert "<" not in text
    assert text.isascii()
    assert json.loads(text) == {"x": HOSTILE}
    with pytest.raises(ValueError):
        embedded_json(float("nan"))  # no JSON that a browser would read


def test_the_page_loads_nothing_and_holds_no_hostile_markup(tmp_path):
    page = page_html(records_in(make_tree(tmp_path)), RATES)
    assert "default-src 'none'" in page
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert "\u202e" not in page


def test_the_loop_is_a_piece_of_its_own():
    assert text_parts(sample("story-01", LOOP), marks_loop=True) == [
        "Once upon a time ",
        "the cat sat. the cat sat. the cat sat.",
        "",
    ]
    assert text_parts(sample("story-01", "no loop"), marks_loop=True) == ["no loop"]
    assert (
        text_parts(sample("story-01", "a\u200bb"), marks_loop=True)
        == ["a\\u200bb"]
        == [shown("a\u200bb")]
    )


def test_special_tokens_do_not_hide_a_loop():
    text = "So <|im_start|>a b a b <|endoftext|>a b<|endoftext|>"
    start, end = loop_span(text)
    assert text[start:end] == "a b a b <|endoftext|>a b"
    assert loop_span("a b c") is None


def test_spectra_keep_the_first_and_the_last_value():
    values = [1000.0 / (i + 1) for i in range(1000)]
    points = spectrum_points(values)
    assert points[0] == (1, 1000.0)
    assert points[-1] == (1000, 1.0)
    assert len(points) <= 40
    assert spectrum_points([3.0, 2.0, 1.23456]) == [(1, 3.0), (2, 2.0), (3, 1.23)]
    assert spectrum_points([2.0]) == [(1, 2.0)]


def test_median_energy_by_hand():
    # 9, 1 -> 90, 100; 1, 1, 2 (squares of 1, 1, sqrt 2) -> 25, 50, 100; 1 -> 100.
    assert median_energy([[3.0, 1.0], [1.0, 1.0, 2**0.5], [5.0]]) == pytest.approx([90, 100, 100])


def test_the_page_shows_no_measure_that_its_calibration_or_judge_hides(tmp_path):
    root = make_tree(tmp_path)
    judged = sample("story-01", LOOP) | {"off_topic": True}
    results = results_of(3.9) | {"not_shown": ["off_topic", "check_loose"]}
    loosely = sample("facts-01", "Lyon.") | {"check_loose": True}
    write_probe(root, "unsure", results, [judged, loosely])
    (sure, unsure) = (
        page_data([record], rates)["checkpoints"][0]["outputs"]
        for record in records_in(root)
        if record.name == "unsure"
        for rates in (RATES, {"runaway": "never ends"})
    )
    assert sure[0]["flags"] == ["loop"] and len(sure[0]["text"]) == 3
    assert sure[1]["check"] == "failed"
    assert "flags" not in unsure[0] and len(unsure[0]["text"]) == 1 and "check" not in unsure[1]


def test_page_data_by_hand(tmp_path):
    data = page_data(records_in(make_tree(tmp_path)), RATES)
    assert [c["name"] for c in data["checkpoints"]] == ["base", "lora", "fft", "lora_hot"]
    base, lora, fft, hot = data["checkpoints"]
    assert hot["ending"] == "(diverged at step 20 of 40)"
    assert hot["curve"] == {"train": [(20, 4.0)], "valid": []}
    assert (lora["recovery"], fft["recovery"], base["recovery"]) == ([0.5], [1.0], None)
    assert fft["rates"]["greedy"]["loop"] == [2, 3, 0.208, 0.939]
    assert data["prompts"][0]["check"] == "contains: Paris"
    assert lora["outputs"][0] == {
        "prompt": 0,
        "decoding": "greedy",
        "tokens": 16,
        "text": ["Lyon."],
        "check": "passed loosely",
    }
    assert base["outputs"][0]["flags"] == ["blank"]
    assert lora["outputs"][3]["seed"] == 0


def test_twenty_checkpoints_of_200_outputs_stay_under_five_megabytes():
    record = Record("x", results=results_of(3.0))
    words = "The country is the capital of the country. " * 13  # 560 characters: 128 tokens
    for number in range(20):
        outputs = [sample("facts-01", f"{i} {number} {words}") for i in range(200)]
        record.samples.extend(outputs)
    assert len(page_html([record], RATES).encode()) < 5_000_000


def test_nll_alone_is_told_too(tmp_path):
    root = make_tree(tmp_path)
    folder = root / "evaluation" / "model_outputs" / "lora_hot"
    folder.mkdir()
    measured = {"provenance": {"run": None}, "nll": results_of(3.8)["nll"], "text_nll": None}
    (folder / "nll.json").write_text(json.dumps(measured))
    text = "\n".join(runs_block(records_in(root), RATES, []))
    row = (
        "| lora\\_hot | LoRA on square, r=8, alpha 8 (diverged at step 20 of 40) | sft | 100 | "
        "1e-1 | 20 | 3.800 | 0.20 | - / - | - / - | - / - | - / - |"
    )
    assert row in text


def test_nll_of_other_weights_is_refused(tmp_path, capsys):
    root = make_tree(tmp_path)
    measured = {"provenance": {"weights_sha256": "x"}, "nll": None, "text_nll": None}
    path = root / "evaluation" / "model_outputs" / "lora" / "nll.json"
    path.write_text(json.dumps(measured))
    assert exit_code(main, ["--root", str(root)]) == 2
    assert f"{path}: measured on other weights" in capsys.readouterr().err


def test_a_run_is_filed(tmp_path, capsys):
    root = make_tree(tmp_path / "repo")
    write_run(tmp_path / "elsewhere", "lora_new", run_record("lora_new", "lora"))
    run = tmp_path / "elsewhere" / "evaluation" / "results" / "lora_new"
    write_probe(root, "lora_new", results_of(3.2), [sample("facts-01", "Paris.")])
    assert main(["--root", str(root), "--add", str(run)]) == 0
    assert "| 3.200 | 0.80 |" in (root / "evaluation" / "results" / "README.md").read_text()
    assert exit_code(main, ["--root", str(root), "--add", str(tmp_path)]) == 2
    assert "lacks run.json or metrics.jsonl" in capsys.readouterr().err


def test_another_folder_of_the_study_is_shown_and_nothing_written(tmp_path, capsys):
    root = make_tree(tmp_path / "root")
    study = REPO_DIR / "evaluation" / "study.toml"
    shutil.copyfile(study, root / "evaluation" / "study.toml")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    again = tmp_path / "again"
    again.mkdir()
    assert main(["--root", str(root), "--show_study", str(again)]) == 0
    assert capsys.readouterr().out.startswith(NO_STUDY)
    base = REPO_DIR / "evaluation" / "results" / "study" / "xs-plain42.json"
    shutil.copyfile(base, again / base.name)
    assert main(["--root", str(root), "--show_study", str(again)]) == 0
    out = capsys.readouterr().out
    assert "**At `xs`**: 1 of " in out and "# The study's results" in out and "![" not in out
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    (again / "run.json").write_text('{"status": "completed"}')
    assert exit_code(main, ["--root", str(root), "--show_study", str(again)]) == 2
    assert "run.json: has no 'id', so it is no result of" in capsys.readouterr().err
    assert exit_code(main, ["--show_study", str(again), "--add", str(again)]) == 2
    assert "--show_study writes nothing" in capsys.readouterr().err


def test_results_of_a_probe_without_a_run_are_shown(tmp_path):
    root = make_tree(tmp_path)
    write_probe(root, "foreign", results_of(3.3), [sample("facts-01", "Paris.")])
    write_run(root, "silent", run_record("silent", "lora", lora_rank=4))
    text = "\n".join(runs_block(records_in(root), RATES, []))
    assert "**From foreign:**" in text
    assert "no record of how it was trained" in text
    assert "silent" not in text  # a run whose outputs were not probed has no row
