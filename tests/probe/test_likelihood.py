"""NLL and the off-topic measure against the model's logits and by hand."""

import pytest
import torch

from dataset.lm_dataset import encode_conversations, turns
from evaluation.probe import likelihood
from evaluation.probe.likelihood import compare_nll, draw_candidates, measure_nll
from evaluation.probe.prompts import Prompt
from model.checkpoint import load_tokenizer
from model.cli import UserError
from tests.model.small import make_model
from tests.trainer.runs import write_jsonl


def make_prompts(count: int, text: str = "Question {}?", first: str = "p") -> list[Prompt]:
    """Make numbered prompts."""
    talks = [turns(text.format(i)) for i in range(count)]
    return [Prompt(f"{first}{i}", "A", talk) for i, talk in enumerate(talks)]


def log_p(model, ids: list[int]) -> torch.Tensor:
    """Compute the log-probability of every token but the first, (tokens - 1,)."""
    log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].detach()


def test_response_nll_is_the_mean_over_response_tokens(tmp_path):
    pairs = [("Hi", "Hello, you."), ("A longer question?", "No"), ("x", "Some more words")]
    talks = [turns(*pair) for pair in pairs]
    path = write_jsonl(tmp_path / "nll.jsonl", [{"conversations": talk} for talk in talks])
    model, tokenizer = make_model(), load_tokenizer()
    losses = [
        -log_p(model, ids)[torch.tensor(labeled[1:])]
        for ids, labeled in encode_conversations(tokenizer, talks)
    ]
    for batch_size in (1, 3):
        found = measure_nll((model, tokenizer), "sft", [path], 64, batch_size)
        rows = found["sequences"]
        assert rows["tokens"] == list(map(len, losses)) and rows["ends"] == [1, 1, 1]
        assert rows["nats"] == pytest.approx([x.sum().item() for x in losses], abs=1e-3)
        assert rows["end_nats"] == pytest.approx([x[-1].item() for x in losses], abs=1e-3)
        assert found["nats_per_token"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)


def test_text_nll_is_of_blocks_packed_as_in_pretraining(tmp_path):
    texts = ["The sun is a star.", "A dog ran home, and then it slept for a long time."]
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    model, tokenizer, stream = make_model(), load_tokenizer(), []
    for text in texts:
        stream += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.pad_token_id]
    blocks = [stream[i : i + 8] for i in range(0, len(stream), 8)]
    losses = torch.cat([-log_p(model, block) for block in blocks if len(block) > 1])
    found = measure_nll((model, tokenizer), "pretrain", [path], 8, 2)
    assert found["tokens"] == len(losses)
    assert found["nats_per_token"] == pytest.approx(losses.mean().item(), abs=1e-4)


def test_compare_nll_weighs_sequences_by_their_tokens():
    def nll(*nats: float, tokens: tuple[int, ...] = (10, 20, 30)) -> dict:
        sequences = {"nats": list(nats), "tokens": list(tokens)}
        return {"nll": {"nats_per_token": sum(nats) / sum(tokens), "sequences": sequences}}

    a = nll(30, 60, 90)
    (row,) = compare_nll(a, nll(20, 40, 60)).itertuples()
    assert (row.difference, row.low, row.high) == (-1, -1, -1)
    (row,) = compare_nll(a, nll(30, 60, 30)).itertuples()
    assert row.difference == -1  # (0 * 10 + 0 * 20 - 2 * 30) / 60
    with pytest.raises(UserError, match="other tokenizers"):
        compare_nll(a, nll(20, 40, 60, tokens=(11, 20, 30)))


def test_candidates_are_the_prompt_and_nine_others_of_its_script():
    prompts = make_prompts(30) + make_prompts(12, "问题{}", "c")
    candidates = draw_candidates(prompts)
    assert candidates == draw_candidates(prompts)
    for own, (first, *others) in enumerate(candidates):
        assert first == own and own not in others and len(set(others)) == 9
        assert all((other >= 30) == (own >= 30) for other in others)
    twice = [*make_prompts(10), *make_prompts(1, first="again")]
    assert 10 not in draw_candidates(twice)[0]  # the same question
    with pytest.raises(UserError, match="--judge: needs 10 different prompts"):
        draw_candidates(make_prompts(9))


def test_off_topic_is_by_the_judges_logits():
    model, tokenizer = make_model(), load_tokenizer()
    prompts = make_prompts(11, "Tell me about {}!!!")
    opening = turns("Hi", "Hello")  # an earlier answer is not judged
    prompts[1] = Prompt("p1", "A", opening + prompts[1].messages)
    outputs = ["It is a dog.", "No<|endoftext|>", "  ", "I do not know"]
    samples = [{"id": p.id, "output": o} for p, o in zip(prompts[:4], outputs, strict=True)]
    likelihood.add_topic_measures((model, tokenizer), prompts, samples, batch_size=7)
    for sample, candidates in zip(samples, draw_candidates(prompts)[:4], strict=True):
        text, scores = sample["output"].removesuffix("<|endoftext|>").strip(), []
        for i in candidates:
            talk = [*prompts[i].messages, {"role": "assistant", "content": text}]
            ((ids, _),) = encode_conversations(tokenizer, [talk])
            size = len(tokenizer.encode(text, add_special_tokens=False))
            end = len(ids) - ids[::-1].index(tokenizer.eos_token_id) - 1
            scores.append(log_p(model, ids[:end])[end - 1 - size :].sum().item())
        assert sample["off_topic"] == (scores[0] <= max(scores[1:]))
    assert samples[2]["off_topic"] is True  # blank
    assert samples[3]["off_topic"] is False
