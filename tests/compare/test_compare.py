"""Rates, steps and the split by hash; a whole comparison of a toy base; what users do wrong."""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from filelock import FileLock

from dataset import lm_dataset
from evaluation import compare
from evaluation.comparison import train
from evaluation.comparison.measure import Pairs, choose_held_out, split_pairs, split_prompts
from evaluation.comparison.train import (
    Comparison,
    choose_start_rate,
    define_methods,
    find_next_rate,
)
from evaluation.probe.prompts import Prompt
from model.checkpoint import TOKENIZER_DIR, save_model
from model.cli import UserError
from tests.model.small import make_model
from tests.trainer.runs import call, exit_code, write_jsonl

DIVERGED = (math.inf, math.inf)


def make_pairs(count: int, prompts: int) -> list[tuple[str, list[dict]]]:
    """Make different conversations with rising hashes; they take turns with the prompts."""
    pairs = []
    for i in range(count):
        user = {"role": "user", "content": f"Say {i % prompts}."}
        pairs.append((f"{i:04}", [user, {"role": "assistant", "content": str(i)}]))
    return pairs


def test_the_lowest_hashes_are_held_out() -> None:
    pairs = make_pairs(25, prompts=25)
    assert list(choose_held_out(pairs[::-1])) == ["0000", "0001"]  # a tenth of 25, rounded down
    assert list(choose_held_out(pairs[:19] * 3)) == ["0000"]  # repeated ones count once
    assert list(choose_held_out(make_pairs(60, prompts=20)[::-1])) == ["0000", "0001"]
    assert len(choose_held_out(make_pairs(6000, prompts=6000))) == 500


def count_parts(pairs: Pairs) -> tuple[int, int, int]:
    """Return how many pairs train, choose and judge."""
    return len(pairs.train), len(pairs.choose), len(pairs.judge)


def test_the_same_conversation_never_stands_on_both_sides(tmp_path: Path) -> None:
    data = [{"instruction": f"Say {i % 30}.", "output": str(i % 30)} for i in range(60)]
    path = write_jsonl(tmp_path / "mine.jsonl", data)
    pairs = split_pairs([path], [])
    assert count_parts(pairs) == (54, 2, 1)  # 3 of 30 different ones, each of them twice
    held_out = {messages[0]["content"] for messages in pairs.choose + pairs.judge}
    trained = {messages[0]["content"] for messages in pairs.train}
    assert len(held_out) == 3
    assert not held_out & trained

    shuffled = write_jsonl(tmp_path / "shuffled.jsonl", data[::-1])
    assert split_pairs([shuffled], []).judge == pairs.judge

    held = write_jsonl(tmp_path / "held.jsonl", data[:4])
    given = split_pairs([path], [held])
    assert count_parts(given) == (52, 2, 2)
    assert "8 pairs stand in both files" in given.note


def test_a_held_out_prompt_trains_only_where_the_user_says_so(tmp_path: Path) -> None:
    data = [{"instruction": f"Say {i % 30}.", "output": str(i)} for i in range(60)]
    path = write_jsonl(tmp_path / "mine.jsonl", data)
    pairs = split_pairs([path], [])
    assert count_parts(pairs) == (54, 2, 1)
    held_out = {messages[0]["content"] for messages in pairs.choose + pairs.judge}
    trained = {messages[0]["content"] for messages in pairs.train}
    assert not held_out & trained
    assert "3 others have the prompt" in pairs.note

    held = write_jsonl(tmp_path / "held.jsonl", [data[0], data[1]])
    given = split_pairs([path], [held])
    assert count_parts(given) == (58, 1, 1)
    assert "2 training pairs have the prompt" in given.note


def test_conversations_that_begin_alike_stay_on_one_side(tmp_path: Path) -> None:
    data = []
    for _, messages in make_pairs(40, prompts=40):
        more = [{"role": "user", "content": "More."}, {"role": "assistant", "content": "No."}]
        data += [{"conversations": messages}, {"conversations": messages + more}]
    pairs = split_pairs([write_jsonl(tmp_path / "mine.jsonl", data)], [])
    assert count_parts(pairs) == (72, 2, 2)  # 4 of 40 beginnings, each of them twice
    assert "4 others have the prompt" in pairs.note


def test_rates_are_extended_at_an_edge_twice_at_most() -> None:
    losses = {0.5: (0, 1.2), 1.0: (0, 1.1), 2.0: (0, 1.3)}
    assert find_next_rate(losses) is None
    assert find_next_rate(losses | {2.0: (0, 1.0)}) == 4
    assert find_next_rate(losses | {0.5: (0, 1.0)}) == 0.25
    assert find_next_rate(losses | {2.0: (0, 1.0), 4.0: (0, 0.9)}) == 8
    assert find_next_rate(losses | {2.0: (0, 1.0), 4.0: (0, 0.9), 8.0: (0, 0.8)}) is None
    assert find_next_rate(losses | {2.0: (0, 1.0), 4.0: DIVERGED}) is None
    assert find_next_rate(dict.fromkeys((0.5, 1.0, 2.0), DIVERGED)) == 0.25
    assert find_next_rate(losses | {2.0: (-0.1, 9.9)}) == 4  # fewer wrong answers go first


def test_rates_start_from_the_width() -> None:
    assert choose_start_rate("lora", 128) == pytest.approx(3e-3)
    assert choose_start_rate("full_sft", 512) == pytest.approx(1e-4)
    assert choose_start_rate("lora", 64) == pytest.approx(3e-3)
    between = math.sqrt(3e-3 * 1.5e-3)
    assert choose_start_rate("lora", round(128 * math.sqrt(2))) == pytest.approx(between, rel=0.01)
    assert choose_start_rate("lora", 2000) == pytest.approx(5e-4)
    assert choose_start_rate("full_sft", 4000) == pytest.approx(5e-5 / 2**0.781)
    methods = define_methods(128)
    assert methods["lora-all-r8"].list_first_rates(128) == [1.5e-3, 3e-3, 6e-3]
    assert methods["lora-original"].list_first_rates(512) == [2e-3, 4e-3, 8e-3]
    ranks = [define_methods(width)["lora-all-high-rank"].flags[-1] for width in (64, 128, 1024)]
    assert ranks == ["32", "64", "64"]


def test_steps_by_default() -> None:
    assert compare.count_steps(15, None, None) == 150  # 10 epochs
    assert compare.count_steps(212, None, None) == 300
    assert compare.count_steps(2333, None, None) == 2333  # an epoch
    assert compare.count_steps(15, 2.5, None) == 38
    assert compare.count_steps(15, None, 7) == 7


def test_the_plan_tells_minutes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    methods = {"full": define_methods(128)["full"]}
    rates = {"full": methods["full"].list_first_rates(128)}
    seconds = {"measuring": 60.0, "full": [0.2, 60.0]}
    comparison = Comparison(tmp_path, "base", methods, [], steps=300, jobs=1)
    compare.print_plan(comparison, seconds, rates)
    printed = capsys.readouterr().out
    assert "full fine-tuning: 5e-4, 1e-3, 2e-3 (200 ms a step, 2.0 minutes a run)" in printed
    assert "about 7 minutes, 11 if all rates are extended twice" in printed  # 3 runs, then 2


def test_the_final_command_trains_on_all_data(tmp_path: Path) -> None:
    flags = f"--from_weight org/base --data_path a.jsonl b.jsonl --save_dir {tmp_path} --name mine"
    args = compare.make_compare_parser().parse_args(flags.split())
    method = define_methods(128)["lora-all-r8"]
    assert compare.write_final_command(args, method, 1.5e-3, epochs=10 / 3) == (
        "python trainer/train_lora.py --lora_targets all-linear --lora_alpha 32 --lora_rank 8 "
        "--lora_name mine --from_weight org/base --data_path a.jsonl b.jsonl --epochs 3.33 "
        "--learning_rate 0.0015 --seed 42 --batch_size 32 --max_seq_len 340"
    )


def test_checked_prompts_choose_if_they_are_enough() -> None:
    prompts = [Prompt(str(i), "s", [], check={"exact": True}) for i in range(200)]
    prompts.append(Prompt("free", "s", []))
    choosing, others = split_prompts(prompts)
    assert len(choosing) == 100
    assert len(others) == 101
    assert others[-1].id == "free"
    assert split_prompts(prompts[1:]) == ([], prompts[1:])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a random base, and pairs."""
    home = tmp_path_factory.mktemp("home")
    base = make_model(noise=0.0, num_hidden_layers=1, hidden_size=32)
    save_model(base, TOKENIZER_DIR, home / "base")
    pairs = [
        {"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i % 9 + 1)))}
        for i in range(60)
    ]
    write_jsonl(home / "mine.jsonl", pairs)
    return home


@dataclass
class User:
    """Someone who types `compare.py`; it trains in this process, which needs no start."""

    home: Path
    save_dir: Path
    trained: list[str] = field(default_factory=list)  # runs, without those that are timed
    before_run: Callable[[Path], None] = lambda log: None  # may raise

    async def call_script(self, words: list[str], log: Path, threads: int) -> bool:
        """Stand for the function of this name in evaluation/runs.py."""
        stage = re.search(r"train_(\w+)\.py", words[0])[1]
        if log.parent.name == "runs":
            self.trained.append(log.stem)
            try:
                self.before_run(log)
            except UserError as error:
                log.write_text(f"step 1\nerror: {error}\n")
                return False
        flags = " ".join(words[1:])
        with log.open("a") as file, contextlib.redirect_stdout(file):
            code = call(stage, f"{flags} --log_interval 1", self.home, keeps_state=False)
        return code == 0

    def compare(self, flags: str, base: str = "base", data: str = "mine.jsonl") -> Path:
        """Compare, and return the folder."""
        words = f"--from_weight {self.home / base} --data_path {self.home / data}"
        words += f" --save_dir {self.save_dir} --name here"
        words += f" --max_steps 12 --batch_size 8 --max_seq_len 32 {flags}"
        compare.main(words.split())
        return self.save_dir / "here"


@pytest.fixture
def user(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    user = User(home, tmp_path)
    monkeypatch.setattr(train, "call_script", user.call_script)
    monkeypatch.setattr(lm_dataset, "CACHE_DIR", home / "cache")
    return user


def test_a_dry_run_trains_nothing(user: User, capsys: pytest.CaptureFixture) -> None:
    user.compare("--methods lora-all-r8 --dry_run")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("about ")  # below the commands
    assert not user.trained
    assert "a step" in printed
    assert printed.count("python trainer/train_lora.py") == 3
    user.compare("--methods lora-all-r8 --dry_run --seed 1")  # no run binds the settings yet


def test_a_whole_comparison(user: User, capsys: pytest.CaptureFixture) -> None:
    folder = user.compare("--methods lora-all-r8 full --jobs 2")
    count = len(user.trained)
    assert 6 <= count <= 10
    assert len({*user.trained}) == count
    printed = capsys.readouterr().out
    assert "too few to order the methods" in printed
    assert "--epochs 1.71" in printed  # 12 steps, 7 of them an epoch of 54 pairs
    report = (folder / "report.md").read_text()
    page = (folder / "index.html").read_text()
    for title in ("rank-8 LoRA on all layers", "full fine-tuning", "the base, before training"):
        assert title in report
        assert title in page
    assert report.count("### Prompt") == 3  # all that judge
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert 'src="' not in page
    assert len([*folder.glob("figures/*.svg")]) == 3
    run = json.loads((folder / "runs" / user.trained[0] / "run.json").read_text())
    assert run["status"] == "completed"
    assert run["steps"] == 12

    with pytest.raises(UserError, match="exists: give another --name, or --from_resume"):
        user.compare("--methods full")
    with pytest.raises(UserError, match="--seed changed; restore it"):
        user.compare("--methods full --from_resume --seed 1")
    user.compare("--methods lora-all-r8 full --from_resume")
    assert len(user.trained) == count  # nothing ran again
    assert (folder / "report.md").read_text() == report


def test_ctrl_c_in_the_second_method(user: User, capsys: pytest.CaptureFixture) -> None:
    def stop(log: Path) -> None:
        if log.stem.startswith("full"):
            raise KeyboardInterrupt

    user.before_run = stop
    with pytest.raises(KeyboardInterrupt):
        user.compare("--methods lora-all-r8 full")
    assert "--from_resume continues" in capsys.readouterr().out
    *done, stopped = user.trained
    assert len(done) == 3
    assert stopped == "full-lr0.0005"
    assert not (user.save_dir / "here" / "report.md").exists()
    user.before_run = lambda log: None
    folder = user.compare("--methods lora-all-r8 full --from_resume")
    assert (folder / "index.html").is_file()
    assert [user.trained.count(run) for run in done] == [1, 1, 1]


def test_a_method_that_fails_or_diverges_is_left_out(
    user: User, home: Path, capsys: pytest.CaptureFixture
) -> None:
    def break_run(log: Path) -> None:
        if log.stem.startswith("full-lr"):
            raise UserError("resume.pt: not written (No space left on device)")
        if log.stem.startswith("full-frozen") or log.stem == "lora-all-r8-lr0.006":
            record = {"status": "diverged", "reason": "loss nan", "eval_loss": None}
            folder = log.with_name(log.name.removesuffix(".log"))
            folder.mkdir()
            (folder / "run.json").write_text(json.dumps(record | {"train_seconds": 1.0}))
            raise UserError("diverged")

    user.before_run = break_run
    (home / "mine.md").write_text("### mine\n> Count to 3, please.\n")
    write_jsonl(home / "other.jsonl", [{"text": f"The cat saw {i} birds."} for i in range(40)])
    given = f"--text_data {home}/other.jsonl --prompts {home}/mine.md"
    folder = user.compare(f"--methods full full-frozen-embedding lora-all-r8 {given}")
    printed = capsys.readouterr().out
    failure = "left out: full: full-lr0.0005 failed (error: resume.pt: not written (No space"
    assert printed.count(failure) == 1
    assert "full-lr0.001" not in user.trained
    assert printed.count("diverged, loss nan") == 6  # frozen full fine-tuning tried lower rates
    why = "full-frozen-embedding: every rate diverged, so"
    assert f"{why} 2.5e-4 runs as well" in printed
    assert f"{why} 1.25e-4 runs as well" in printed
    report = (folder / "report.md").read_text()
    assert "full was left out" in report
    assert "diverged at every learning rate" in report
    assert "nothing to compare rank-8 LoRA on all layers at" in report
    assert "Count to 3, please." in report
    assert "by how much the NLL of other.jsonl rose" in report
    assert "diverged" in (folder / "figures" / "rates.svg").read_text()


def test_no_method_is_left(user: User) -> None:
    def break_run(log: Path) -> None:
        raise UserError("out of memory")

    user.before_run = break_run
    with pytest.raises(UserError, match="no method is left"):
        user.compare("--methods full")


def test_a_folder_with_other_files_is_left_alone(user: User) -> None:
    notes = user.save_dir / "here" / "data" / "train.jsonl"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(UserError, match="holds other files; give another --name"):
        user.compare("--methods full")
    assert notes.read_text() == "mine"


def test_a_folder_that_another_process_uses_is_refused(user: User) -> None:
    with (
        FileLock(user.save_dir / ".here.lock"),
        pytest.raises(UserError, match="another compare.py works there"),
    ):
        user.compare("--methods full --dry_run")
    assert not (user.save_dir / "here").exists()


def remove_template(base: Path, folder: Path) -> None:
    """Copy a base without its chat template."""
    shutil.copytree(base, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))


def test_what_cannot_work_is_refused_in_one_line(
    user: User, home: Path, capsys: pytest.CaptureFixture
) -> None:
    (home / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    write_jsonl(home / "one.jsonl", [{"instruction": "a", "output": "b"}])
    (home / "empty.jsonl").write_text("\n")
    write_jsonl(home / "no_text.jsonl", [{"text": "a"}, {"texts": "b"}])
    remove_template(home / "base", home / "plain")
    (home / "adapter").mkdir()
    adapter = {"base_model_name_or_path": str(home / "base")}
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    cases = {
        "no JSON object": {"flags": "", "data": "broken.jsonl"},
        "too few examples (1 to train on": {"flags": "", "data": "one.jsonl"},
        "plain: the tokenizer has no chat_template; write one": {"flags": "", "base": "plain"},
        "nowhere/config.json: missing": {"flags": "", "base": "nowhere"},
        "adapter: is an adapter; merge it": {"flags": "", "base": "adapter"},
        "no held-out prompt has 4 tokens": {"flags": "--max_seq_len 4"},
        "contradict each other": {"flags": "--epochs 2"},
        "--prompts nowhere.md: no such file": {"flags": "--prompts nowhere.md"},
        "is a folder; name a file in it": {"flags": "", "data": "base"},
        "no_text.jsonl:2: pretraining reads": {"flags": f"--text_data {home}/no_text.jsonl"},
        "empty.jsonl: holds no record": {"flags": f"--text_data {home}/empty.jsonl"},
        "is of --text_data": {"flags": "--wrap_documents"},
        "must be a plain folder name": {"flags": "--name a/b"},
        "drop it": {"flags": "--from_resume"},
    }
    for message, given in cases.items():
        assert exit_code(lambda given: user.compare(**given), given) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert {path.name for path in user.save_dir.iterdir()} <= {".here.lock"}


@pytest.mark.parametrize("flag", ["--eval_data_path", "--prompts", "--text_data"])
def test_a_broken_line_is_refused_before_the_base_is_asked(
    user: User, tmp_path: Path, flag: str
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"instruction": "a", "output": "b", "text": "a"}\n{"instruction": \n')
    with pytest.raises(UserError, match=r"broken\.jsonl:2: no JSON object"):
        user.compare(f"{flag} {path}")
    assert not (user.save_dir / "here").exists()
