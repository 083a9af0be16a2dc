"""Probing from the command line, with tiny random models."""

import hashlib
import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from dataset.lm_dataset import read_jsonl
from eval_llm import main
from evaluation.probe.answers import make_sample
from evaluation.probe.names import SHIPPED_DIR, list_shipped
from evaluation.probe.outputs import OUTPUT_DIR
from evaluation.probe.prompts import Prompt
from model.checkpoint import TOKENIZER_DIR, load_model, load_tokenizer, save_model
from model.cli import UserError
from model.model_lora import LoraSettings, apply_lora, merge_lora
from tests import DEVICE
from tests.model.small import make_model, save_adapter

PROMPTS = """# Test
## Facts
### facts-01
> What is the capital of France?

- reference: France has Paris as its capital.
- check: about = ["country.capital"]

### facts-02
> 狮子住在哪里？

- translation: Where do lions live?

## Chat
### chat-01
> A much longer message, so that the prompts of a batch differ in their length. Hi!
"""
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Make a folder with checkpoints, the prompts above, and held-out data.

    `one` and `two` are models, `adapter` was made for `one`, and `merged` has it in `two`.
    """
    folder = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(["one", "two"]):
        save_model(make_model(seed), TOKENIZER_DIR, folder / name)
    settings = LoraSettings(rank=4, targets="mlp")
    adapted = save_adapter(folder / "one", settings, folder / "adapter").state_dict()
    other = load_model(folder / "two")
    apply_lora(other, settings)
    factors = {name: tensor for name, tensor in adapted.items() if ".lora_" in name}
    other.load_state_dict(other.state_dict() | factors)
    save_model(merge_lora(other), TOKENIZER_DIR, folder / "merged")
    run = {"stage": "full_sft", "settings": {"from_weight": "none", "learning_rate": 1e-3}}
    (folder / "one" / "run.json").write_text(json.dumps(run))
    (folder / "prompts.md").write_text(PROMPTS)
    (folder / "talk.jsonl").write_text(3 * (json.dumps({"conversations": TALK}) + "\n"))
    (folder / "text.jsonl").write_text(json.dumps({"text": "The sun is a star."}) + "\n")
    return folder


def run_script(home: Path, output_dir: Path, *flags: str, models: tuple[str, ...] = ("one",)):
    """Run the script on models of `home`; return the folder of the first model."""
    words = [word for name in models for word in ("--model", str(home / name))]
    words += ["--max_new_tokens", "8", "--device", DEVICE, "--output_dir", str(output_dir)]
    prompts = [] if "--no_generation" in flags else ["--prompts", str(home / "prompts.md")]
    main([*words, *prompts, *flags])
    return output_dir / f"{models[0]}{'-prompts' * len(prompts[:1])}"


@pytest.mark.gpu
def test_outputs_are_complete_and_the_same_bytes_when_made_again(home, tmp_path, capsys):
    first = run_script(home, tmp_path / "a", "--seeds", "0", "1")
    torch.rand(7)  # what else was drawn in between must not matter
    again = run_script(home, tmp_path / "b", "--seeds", "0", "1")
    names = ["results.json", "samples.jsonl", "samples.md"]
    assert sorted(path.name for path in first.iterdir()) == names
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes()

    samples = [record for _, record in read_jsonl(first / "samples.jsonl")]
    ids = ["facts-01", "facts-02", "chat-01"]
    rounds = [("greedy", None), ("t0.85p0.85", 0), ("t0.85p0.85", 1)]
    assert [(s["decoding"], s["seed"], s["id"]) for s in samples] == [
        (decoding, seed, prompt_id) for decoding, seed in rounds for prompt_id in ids
    ]
    assert samples[0]["outcome"] == "endless" and samples[1]["outcome"] is None
    assert samples[1]["prompt_translation"] == "Where do lions live?"
    assert samples[3]["output"] != samples[6]["output"]  # another seed, another sample
    rendered = f"<|im_start|>user\n{samples[1]['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    assert samples[1]["prompt_sha256"] == hashlib.sha256(rendered.encode()).hexdigest()

    results = json.loads((first / "results.json").read_text())
    assert results["training"]["title"] == "full fine-tuning"
    assert results["provenance"]["seeds"] == [0, 1] and results["nll"] == {}
    row = {"decoding": "t0.85p0.85", "section": "all", "measure": "endless", "value": 1.0, "n": 6}
    assert any(row.items() <= found.items() for found in results["summary"])
    page = (first / "samples.md").read_text().splitlines()
    assert page[0].startswith("# Full fine-tuning, 0.") and page[0].endswith("M parameters")
    words = "python eval_llm.py --model one --prompts prompts.md --seeds 0 1"
    assert f"{words} --max_new_tokens 8" in page
    heads = [line for line in page if line.startswith("#")]
    assert heads[1:] == ["## Facts", "### facts-01", "### facts-02", "## Chat", "### chat-01"]
    *said, decodings, head, _, row = capsys.readouterr().out.splitlines()
    assert "prompt: What is the capital of France?" in said
    assert decodings == "greedy / t0.85p0.85:"
    assert re.fullmatch(r"\| trained +\| correct, Facts +\| blank +\| never ends +\|", head)
    assert row.startswith("| one ") and "0% / 0%" in row


def test_fewer_answers_do_not_replace_all(home, tmp_path):
    folder = run_script(home, tmp_path / "whole", "--decoding", "greedy")
    saved = (folder / "samples.jsonl").read_bytes()
    flags = ["--decoding", "greedy", "--limit", "1"]
    with pytest.raises(UserError, match="one-prompts holds answers to all prompts"):
        run_script(home, tmp_path / "whole", *flags)
    assert (folder / "samples.jsonl").read_bytes() == saved
    part = run_script(home, tmp_path / "part", *flags)
    assert len(list(read_jsonl(part / "samples.jsonl"))) == 1
    run_script(home, tmp_path / "part", "--decoding", "greedy")
    assert len(list(read_jsonl(part / "samples.jsonl"))) == 3


def test_another_way_of_asking_has_a_folder_of_its_own(home, tmp_path, capsys):
    flags = ["--decoding", "greedy", "--limit", "1"]
    run_script(home, tmp_path, "--no_template", *flags, models=("one", "two"))
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 1 and f"{home / 'one'} was trained with the chat" in warnings[0]
    (_, sample), *_ = read_jsonl(tmp_path / "one-without-template-prompts" / "samples.jsonl")
    rendered = "<|im_start|>What is the capital of France?"
    assert sample["prompt_sha256"] == hashlib.sha256(rendered.encode()).hexdigest()

    on_other = [*flags, "--on_weights", str(home / "two")]
    run_script(home, tmp_path, *on_other, models=("adapter",))
    run_script(home, tmp_path, *flags, models=("merged", "adapter"))
    assert "warning" not in capsys.readouterr().err
    results = json.loads((tmp_path / "adapter-on-two-prompts" / "results.json").read_text())
    weights = hashlib.sha256((home / "two" / "model.safetensors").read_bytes()).hexdigest()
    assert results["provenance"]["on_weights"] == {"name": "two", "sha256": weights}
    assert results["training"]["model_parameters"] == make_model(0).num_parameters()

    def read_tokens(name: str) -> list[str]:
        lines = read_jsonl(tmp_path / f"{name}-prompts" / "samples.jsonl")
        return [sample["output"] for _, sample in lines]

    # The adapter on `two` is what was merged into `two`, and not what it is on its own base.
    assert read_tokens("adapter-on-two") == read_tokens("merged") != read_tokens("adapter")


@pytest.mark.gpu
def test_nll_and_differences(home, tmp_path, capsys):
    data = ["--nll_data", str(home / "talk.jsonl"), "--text_nll_data", str(home / "text.jsonl")]
    (tmp_path / "one").mkdir(parents=True)
    (tmp_path / "one" / "results.json").write_text("earlier")
    two = run_script(home, tmp_path, "--no_generation", *data, models=("one", "two")).parent / "two"
    assert (tmp_path / "one" / "results.json").read_text() == "earlier"
    assert sorted(path.name for path in two.iterdir()) == ["minus_one.csv", "nll.json"]
    saved, out = json.loads((two / "nll.json").read_text()), capsys.readouterr().out
    assert "two minus one, 95% intervals: nll " in out
    assert f"{saved['nll']['nats_per_token']:.3f}" in out
    wrapped = run_script(home, tmp_path / "w", "--no_generation", *data[2:], "--wrap_documents")
    counts = json.loads((wrapped / "nll.json").read_text())["text_nll"]["tokens"]
    assert counts == saved["text_nll"]["tokens"] + 2  # a start and an end around one text

    two = run_script(home, tmp_path, *data, "--decoding", "greedy", models=("one", "two"))
    two = two.with_name("two-prompts")
    results = json.loads((two / "results.json").read_text())
    assert json.loads((two / "nll.json").read_text()) == saved
    assert results["nll"]["nll"]["nats_per_token"] == saved["nll"]["nats_per_token"]
    table = pd.read_csv(two / "minus_one.csv").set_index("measure")
    assert {"nll", "text_nll", "correct", "endless", "tokens"} <= set(table.index)
    # No answer loops, so no pair of 3 differs: 1 - .025^(1/3).
    assert table.loc["loop", ["a", "b", "low", "high"]].tolist() == [0, 0, -0.707598, 0.707598]
    assert "two-prompts minus one, 95% intervals: correct +0.000 [" in capsys.readouterr().out


def test_a_judge_and_a_translator_fill_their_fields(home, tmp_path):
    prompts = "## A\n" + "".join(f"### p-{i}\n> 狮子 {i}?\n" for i in range(11))
    (home / "judged.md").write_text(prompts)
    flags = ["--prompts", str(home / "judged.md"), "--decoding", "greedy"]
    flags += ["--judge", str(home / "two"), "--translator", "world"]
    folder = run_script(home, tmp_path, *flags).with_name("one-judged")
    samples = [record for _, record in read_jsonl(folder / "samples.jsonl")]
    assert all(type(sample["off_topic"]) is bool for sample in samples)
    assert samples[3]["prompt_translation"] == "[lion 3?]"
    results = json.loads((folder / "results.json").read_text())
    assert "off_topic" in {row["measure"] for row in results["summary"]}


def test_special_tokens_are_shown_and_not_measured():
    tokenizer = load_tokenizer()
    prompt = Prompt("a", "A", [{"role": "user", "content": "Hi"}])
    ids = [0, tokenizer.eos_token_id]  # <|endoftext|> and the end
    sample = make_sample(tokenizer, prompt, [1], ids, "greedy", None)
    assert (sample["output"], sample["blank"], sample["endless"]) == ("<|endoftext|>", True, False)
    repeated = make_sample(tokenizer, prompt, [1], [77] * 13, "greedy", None)
    assert repeated["endless"] and repeated["loop"] and not sample["loop"]
    assert (sample["tokens"], repeated["tokens"]) == (1, 13)


def test_list_shows_runs(tmp_path, capsys):
    settings = {"lora_targets": "mlp", "lora_rank": 8, "from_weight": "out/xs"}
    record = {"stage": "lora", "steps": 90, "eval_loss": 3.80423, "settings": settings}
    for name in ("lora", "merged", "not_a_run"):
        (tmp_path / name).mkdir()
    (tmp_path / "lora" / "run.json").write_text(json.dumps(record))
    (tmp_path / "merged" / "config.json").write_text("{}")
    main(["--list", str(tmp_path)])
    _, _, *rows = [row.replace("|", "").split() for row in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["lora", "xs", "lora", "-", "-", "-", "-", "90", "3.8042"]
    assert rows[1] == ["merged", *"--------"]
    with pytest.raises(UserError, match="holds no run"):
        main(["--list", str(tmp_path / "nowhere")])


def test_ctrl_d_ends_a_chat_which_names_its_model(home, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    main(["--model", str(home / "one"), "--interactive", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[0] == "chat with one"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seeds", "1"], "--seeds: name a --model"),
        (["--model", "model", "--decoding", "hot"], "--decoding hot"),
        (["--model", "model", "--nll_data", "gone"], "gone: not there"),
        (["--model", "x", "--no_generation"], "--no_generation: name --nll_data"),
        (["--model", "x", "--wrap_documents"], "--wrap_documents: is of --text_nll_data"),
        (["--model", "x", "--model", "y/x"], "--model: outputs have the folder's name"),
        (["--model", "x", "--model", "y", "--interactive"], "chats with one --model"),
        (["--model", "model", "--judge", "model"], "--judge: is a probed --model"),
        (["--model", "x", "--interactive", "--limit", "3"], "drop the flags of probing"),
        (["--model", "model", "--prompts", "gone.md"], "gone.md: not there; make it"),
        (["--model", "no/such/folder"], "no/such/folder: not there; make it"),
        (["--model", "model", "--on_weights", "gone"], "gone: not there; make it"),
        (["--model", "model", "--on_weights", "dataset"], "--on_weights: model is a whole model"),
        (["--list", "--on_weights", "model"], "drop the flags of probing"),
    ],
)
def test_what_cannot_work_is_refused(flags, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # which has a folder called model
    with pytest.raises(UserError, match=message):
        main(flags)


def test_without_a_model_ours_answer_side_by_side_and_nothing_is_written(capsys):
    written = {path: path.stat().st_mtime_ns for path in OUTPUT_DIR.rglob("*")}
    main(["--limit", "1", "--device", DEVICE])
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("  ")]
    assert shown == ["1.3M-base", *(folder.name for folder in list_shipped())]
    assert {path: path.stat().st_mtime_ns for path in OUTPUT_DIR.rglob("*")} == written


def test_only_adapters_of_ours_are_put_on_other_weights(capsys):
    weights = SHIPPED_DIR / "1.3M-full-fine-tuning"
    main(["--limit", "1", "--on_weights", str(weights), "--device", DEVICE])
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    assert shown and all(name.startswith("1.3M-lora-") for name in shown)
