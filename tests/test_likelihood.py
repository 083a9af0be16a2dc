"""NLL and prompt retrieval against the model's logits and by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.jsonl import DataError
from dataset.lm_dataset import encode_batch, encode_conversations
from evaluation.checkpoints import Checkpoint
from evaluation.likelihood import (
    CANDIDATES,
    Judge,
    add_topic_measures,
    check_independence,
    draw_candidates,
    held_out_nll,
    topic_of,
)
from evaluation.prompts import Prompt
from model.checkpoint import TOKENIZER_DIR, load_tokenizer, save_model, weights_fingerprint
from model.files import CheckpointError
from tests.tiny import tiny_model


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def log_p(model, ids: list[int]) -> torch.Tensor:
    """(tokens - 1,) log-probability of every token but the first."""
    log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].detach()


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ------------------------------------------------------------------------------------------- NLL


def test_response_nll_is_the_mean_over_response_tokens(tmp_path):
    pairs = [
        ("Hi", "Hello, you."),
        ("A longer question?", "No"),
        ("x", "Some words more than that"),
    ]
    talks = [[*user(asked), {"role": "assistant", "content": answer}] for asked, answer in pairs]
    path = write_lines(tmp_path / "nll.jsonl", [{"conversations": talk} for talk in talks])
    model, tokenizer = tiny_model(), load_tokenizer()
    losses = []
    for ids, labeled in encode_conversations(tokenizer, talks):
        losses.append(-log_p(model, ids)[torch.tensor(labeled[1:])])
    for batch_size in (1, 3):
        result = held_out_nll("sft", model, tokenizer, [path], 64, batch_size, tmp_path / "cache")
        assert result["response_tokens"] == sum(map(len, losses))
        assert result["nats_per_token"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
        for (nats, tokens, end_nats, ends), loss in zip(result["sequences"], losses, strict=True):
            assert (nats, tokens) == (pytest.approx(loss.sum().item(), abs=1e-3), len(loss))
            assert (end_nats, ends) == (pytest.approx(loss[-1].item(), abs=1e-3), 1)  # <|im_end|>
    assert result["conversations"] == 3


def test_text_nll_is_of_blocks_packed_as_in_pretraining(tmp_path):
    texts = ["The sun is a star.", "A dog ran home, and then it slept for a long time."]
    path = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    model, tokenizer = tiny_model(), load_tokenizer()
    stream = []
    for ids in encode_batch(tokenizer.backend_tokenizer, texts, special=False):
        stream += [*ids, tokenizer.pad_token_id]
    blocks = [stream[i : i + 8] for i in range(0, len(stream), 8)]
    blocks = [block for block in blocks if len(block) > 1]
    losses = torch.cat([-log_p(model, block) for block in blocks])
    result = held_out_nll("pretrain", model, tokenizer, [path], 8, 2, tmp_path / "cache")
    assert (result["blocks"], result["tokens"]) == (len(blocks), len(losses))
    assert len(blocks) > 2
    assert result["nats_per_token"] == pytest.approx(losses.mean().item(), abs=1e-4)


# ------------------------------------------------------------------------------------- retrieval


def test_topic_by_hand():
    # Own prompt e^-1, nine others e^-3: p(y) is their mean.
    scores = np.array([-1.0] + [-3.0] * 9)
    off_topic, pmi = topic_of(scores)
    assert not off_topic
    assert pmi == pytest.approx(math.log(10 / (1 + 9 * math.exp(-2))))
    # log p(y) is the same under all prompts: what is subtracted from all changes nothing.
    assert topic_of(scores - 100) == (False, pytest.approx(pmi))
    assert topic_of(np.array([-3.0, -1.0, -4.0])) == (True, pytest.approx(topic_pmi_of_second()))
    assert topic_of(np.zeros(10)) == (True, 0)  # a tie is no first rank
    assert topic_of(np.array([0.0] + [-1e4] * 9)) == (False, pytest.approx(math.log(10)))


def topic_pmi_of_second() -> float:
    """-3 minus the log of the mean of e^-3, e^-1 and e^-4."""
    return -3 - math.log((math.exp(-3) + math.exp(-1) + math.exp(-4)) / 3)


def numbered(count: int, text: str = "Question {}?") -> list[Prompt]:
    return [Prompt(f"p{i}", "A", user(text.format(i))) for i in range(count)]


def test_candidates_are_the_prompt_and_nine_others_of_its_script():
    prompts = numbered(30) + [
        Prompt(f"c{i}", "A", user(f"问题{i}"), translation="x") for i in range(12)
    ]
    candidates = draw_candidates(prompts)
    assert candidates == draw_candidates(prompts)
    for own, (first, *others) in enumerate(candidates):
        assert first == own and own not in others
        assert len(set(others)) == CANDIDATES - 1
        assert all((other >= 30) == (own >= 30) for other in others)
    assert len({tuple(others) for _, *others in candidates[:30]}) == 30


def test_a_prompt_asked_twice_is_no_distractor_of_itself():
    twice = [*numbered(10), Prompt("again", "A", user("Question 3?"))]
    assert 10 not in draw_candidates(twice)[3] and 3 not in draw_candidates(twice)[10]
    with pytest.raises(DataError, match="--judge: 9 different prompts"):
        draw_candidates(numbered(9))


def sample_of(prompt: Prompt, text: str) -> dict:
    return {"id": prompt.id, "text": text}


def test_topic_measures_are_those_of_the_judges_logits():
    model, tokenizer = tiny_model(), load_tokenizer()
    judge = Judge(Checkpoint("judge", Path("judge"), None), model, tokenizer)
    prompts = numbered(11, "Tell me about {}" + "!" * 3)
    texts = ["It is a dog.", "No", "  ", "Something that goes on"]
    samples = [sample_of(prompt, text) for prompt, text in zip(prompts[:4], texts, strict=True)]
    add_topic_measures(judge, prompts, samples, batch_size=7)
    candidates = draw_candidates(prompts)
    for index, sample in enumerate(samples):
        scores = []
        for candidate in candidates[index]:
            talk = [
                *prompts[candidate].messages,
                {"role": "assistant", "content": sample["text"]},
            ]
            ((ids, labeled),) = encode_conversations(tokenizer, [talk])
            end = max(i for i, flag in enumerate(labeled) if flag)  # the end token is not judged
            answer = torch.tensor(labeled[1:end], dtype=torch.bool)
            scores.append(log_p(model, ids[:end])[answer].sum().item())
        off_topic, pmi = topic_of(np.array(scores))
        assert sample["off_topic"] == off_topic
        assert sample["prompt_pmi"] == pytest.approx(pmi, abs=1e-3)
    assert samples[2] == sample_of(prompts[2], "  ") | {"off_topic": True, "prompt_pmi": 0}


def test_a_judge_that_is_probed_or_its_base_is_refused(tmp_path):
    models = {name: tiny_model(seed) for seed, name in enumerate(["base", "other"])}
    for name, model in models.items():
        save_model(model, TOKENIZER_DIR, tmp_path / name)
    base = weights_fingerprint(models["base"])
    for name in ("tuned", "sibling"):  # both trained from "base"
        save_model(tiny_model(len(name)), TOKENIZER_DIR, tmp_path / name)
        (tmp_path / name / "run.json").write_text(json.dumps({"base_fingerprint": base}))

    def judge(name: str) -> Judge:
        model = models.get(name, tiny_model(len(name)))
        return Judge(Checkpoint(name, tmp_path / name, None), model, load_tokenizer())

    def probed(name: str, base: Path | None = None) -> list[Checkpoint]:
        return [Checkpoint(name, tmp_path / name, base)]

    for checkpoint in (probed("base"), probed("tuned"), probed("other", base=tmp_path / "base")):
        with pytest.raises(CheckpointError, match="is the probed .* or its base"):
            check_independence(judge("base"), checkpoint)
    models["base"].bfloat16()  # as --dtype bfloat16 loads it: other weights than were trained on
    with pytest.raises(CheckpointError, match="is the probed tuned or its base"):
        check_independence(judge("base"), probed("tuned"))
    assert check_independence(judge("other"), probed("tuned") + probed("base")) == []
    assert check_independence(judge("sibling"), probed("tuned") + probed("other")) == ["tuned"]
    assert check_independence(judge("sibling"), probed("base") + probed("other")) == ["base"]
