"""The model against transformers' Llama and Qwen3, and its checkpoints."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from model import attention, model_minimind
from model.attention import blockwise_attention
from model.checkpoint import (
    TOKENIZER_DIR,
    load_model,
    load_tokenizer,
    save_model,
    weights_fingerprint,
)
from model.files import CheckpointError
from model.model_minimind import (
    LinearCrossEntropy,
    MiniMindForCausalLM,
    count_parameters,
    minimind_config,
)

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}


def make_model(seed: int = 0, noise: float = 0.3, **shape: float) -> MiniMindForCausalLM:
    """A random model whose logits differ clearly between positions."""
    torch.manual_seed(seed)
    return stir(MiniMindForCausalLM(minimind_config(**(SMALL | shape))).eval(), noise)


def stir(model: nn.Module, noise: float) -> nn.Module:
    """Moves every weight, norms among them, away from its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.shape[0] == 6400 else noise
            parameter.add_(scale * torch.randn_like(parameter))
    return model


@pytest.fixture(params=[False, True], ids=["llama", "qk_norm"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[MiniMindForCausalLM, nn.Module]:
    """Our model, and transformers' own loaded from the folder that we saved."""
    model = make_model(qk_norm=request.param)
    save_model(model, TOKENIZER_DIR, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(reference) is (Qwen3ForCausalLM if request.param else LlamaForCausalLM)
    return model, reference


def test_default_shape_has_minimind2_smalls_parameters() -> None:
    model = MiniMindForCausalLM(minimind_config())
    matrices = 2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1408
    total = 6400 * 512 + 8 * (matrices + 2 * 512) + 512
    assert total == 25_829_888
    assert count_parameters(model) == (total, total)


def test_logits_equal_transformers(pair: tuple) -> None:
    model, reference = pair
    ids = torch.randint(3, 6400, (2, 40))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, reference(ids).logits, rtol=0, atol=1e-5)


def test_padded_logits_equal_transformers(pair: tuple) -> None:
    model, reference = pair
    ids = torch.randint(3, 6400, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        ours = model(ids, attention_mask=mask).logits
        theirs = reference(
            ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
        ).logits
        alone = model(ids[:1, 7:]).logits
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], rtol=0, atol=1e-5)
    assert torch.allclose(ours[0, 7:], alone[0], rtol=0, atol=1e-5)


def test_padding_on_the_right_needs_no_mask() -> None:
    model = make_model()
    ids = torch.randint(3, 6400, (1, 12))
    padded = F.pad(ids, (0, 9))
    with torch.no_grad():
        assert torch.allclose(model(padded).logits[:, :12], model(ids).logits, rtol=0, atol=1e-5)


def test_loss_and_gradients_equal_transformers(pair: tuple) -> None:
    model, reference = pair
    ids = torch.randint(3, 6400, (2, 30))
    labels = ids.clone()
    labels[0, :11] = -100
    labels[1, 20:] = -100
    ours, theirs = model(ids, labels=labels).loss, reference(ids, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    ours.backward()
    theirs.backward()
    grads = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        error = (parameter.grad - grads[name].grad).norm() / grads[name].grad.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("chunk", [1, 512])
def test_loss_is_the_shifted_mean_over_labels_by_hand(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_minimind, "LOSS_CHUNK", chunk)
    model = make_model()
    ids = torch.randint(3, 6400, (1, 6))
    labels = torch.tensor([[5, -100, int(ids[0, 2]), -100, -100, int(ids[0, 5])]])
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[0]
        # The first label is never predicted; positions 1 and 4 predict the tokens at 2 and 5.
        expected = -(log_probs[1, ids[0, 2]] + log_probs[4, ids[0, 5]]) / 2
        assert model(ids, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-5)
        by_four = model(ids, labels=labels, num_items_in_batch=4).loss
    assert by_four.item() == pytest.approx(expected.item() / 2, abs=1e-5)


def test_loss_outputs_hold_no_logits() -> None:
    ids = torch.randint(3, 6400, (1, 6))
    assert make_model()(ids, labels=ids).logits is None


@pytest.mark.parametrize("frozen", [False, True])
def test_chunked_cross_entropy_equals_plain(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_minimind, "LOSS_CHUNK", 7)
    torch.manual_seed(0)
    states = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=not frozen)
    targets = torch.randint(0, 11, (23,))
    # Float32 sums bound the agreement.
    loss = LinearCrossEntropy.apply(states, weight, targets) * 0.5
    plain = F.cross_entropy(states @ weight.T, targets, reduction="sum") * 0.5
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    loss.backward()
    grads = states.grad.clone(), None if frozen else weight.grad.clone()
    states.grad = weight.grad = None
    plain.backward()
    assert torch.allclose(grads[0], states.grad, atol=1e-6)
    assert (grads[1] is None) if frozen else torch.allclose(grads[1], weight.grad, atol=1e-6)


def test_loss_in_bfloat16_sums_in_float32() -> None:
    """Matrix products are rounded, as autocast does; exponentials and sums are not."""
    torch.manual_seed(0)
    states, weight = torch.randn(40, 16), torch.randn(300, 16)
    targets = torch.randint(0, 300, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = LinearCrossEntropy.apply(states.requires_grad_(), weight, targets)
    logits = (states.bfloat16() @ weight.bfloat16().T).float()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_without_any_label_is_zero_and_trains_nothing() -> None:
    model = make_model()
    ids = torch.randint(3, 6400, (1, 6))
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=3).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def greedy(model: nn.Module, ids: torch.Tensor, **options: object) -> torch.Tensor:
    """24 greedy tokens after the prompt; no token ends the answer."""
    out = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, **options)
    return out[:, ids.shape[1] :]


def test_greedy_generation_equals_transformers_with_and_without_cache(pair: tuple) -> None:
    model, reference = pair
    ids = torch.randint(3, 6400, (2, 9))
    expected = greedy(reference, ids)
    assert expected.unique().numel() > 10  # a constant answer would compare nothing
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(model, ids, use_cache=False), expected)


def test_left_padded_batch_generates_as_alone() -> None:
    model = make_model()
    prompts = [torch.randint(3, 6400, (1, length)) for length in (3, 8, 5)]
    batch = torch.cat([F.pad(ids, (8 - ids.shape[1], 0)) for ids in prompts])
    mask = torch.cat([F.pad(torch.ones_like(i), (8 - i.shape[1], 0)) for i in prompts])
    together = greedy(model, batch, attention_mask=mask)
    for row, ids in enumerate(prompts):
        assert torch.equal(together[row : row + 1], greedy(model, ids)), row


def test_cached_continuation_of_several_tokens_equals_one_pass() -> None:
    model = make_model()
    ids = torch.randint(3, 6400, (1, 16))
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).cache
        rest = model(ids[:, 9:], cache=cache).logits
        assert torch.allclose(rest, model(ids).logits[:, 9:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blockwise_attention_and_its_gradients_equal_the_fused_kernels(
    length: int, kv_heads: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(length)
    heads = (4, kv_heads, kv_heads)
    inputs = [torch.randn(2, n, length, 8).to(dtype).requires_grad_() for n in heads]
    # The reference in float64, from the very numbers that bfloat16 holds.
    precise = [x.detach().double().requires_grad_() for x in inputs]
    out = blockwise_attention(*inputs)
    expected = F.scaled_dot_product_attention(*precise, is_causal=True, enable_gqa=True)
    assert out.dtype == dtype
    grad = torch.randn(2, 4, length, 8).to(dtype)
    gradients = torch.autograd.grad(out, inputs, grad)
    references = torch.autograd.grad(expected, precise, grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for ours, reference in zip((out, *gradients), (expected, *references), strict=True):
        error = (ours - reference).norm()
        assert error <= tolerance * reference.norm() + tolerance * 1e-2


def test_attention_operators_keep_to_their_contract() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, *rest, requires_grad=True) for rest in ((3, 4), (4,), (4,)))
    torch.library.opcheck(attention.attend, (q, k, v))
    torch.library.opcheck(attention.attend, (q, k.detach(), v.detach()))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_queries_alone_equals_that_beside_keys_and_values(compiled: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 70, 8) for heads in (4, 2, 2))
    attend = torch.compile(blockwise_attention, fullgraph=True) if compiled else blockwise_attention
    called = []
    gradients = {}
    for trains in ((True, False, False), (True, True, True)):
        inputs = [x.clone().requires_grad_(t) for x, t in zip((q, k, v), trains, strict=True)]
        loss = attend(*inputs).square().sum()
        with torch.profiler.profile() as profile:
            loss.backward()
        called.append([event.key for event in profile.key_averages() if "attend" in event.key])
        gradients[trains] = inputs[0].grad
    alone, beside = gradients.values()
    assert torch.equal(alone, beside)
    assert "minimind::attend_backward_queries" in called[0]
    assert "minimind::attend_backward" not in called[0]
    assert "minimind::attend_backward" in called[1]


@pytest.mark.parametrize("length", [7, 65])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_blockwise_attention_trains_as_the_fused_kernel(
    length: int, qk_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    blockwise, fused = (make_model(noise=0.1, qk_norm=qk_norm) for _ in range(2))
    ids = torch.randint(3, 6400, (2, length))
    calls = []
    monkeypatch.setattr(
        model_minimind,
        "blockwise_attention",
        lambda *qkv: calls.append(1) or blockwise_attention(*qkv),
    )
    loss = blockwise(ids, labels=ids).loss
    assert len(calls) == 3  # layers
    monkeypatch.setattr(model_minimind, "LONGEST", 0)
    expected = fused(ids, labels=ids).loss
    assert len(calls) == 3
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    expected.backward()
    for (name, ours), other in zip(blockwise.named_parameters(), fused.parameters(), strict=True):
        assert torch.allclose(ours.grad, other.grad, rtol=1e-3, atol=1e-6), name


def test_compiled_blocks_train_as_plain_ones_at_every_length() -> None:
    model, compiled = (make_model(noise=0.1, num_hidden_layers=1) for _ in range(2))
    for layer in compiled.model.layers:
        layer.compile()
    for length in (16, 70, 41):  # compiled for this one, for any, and not again
        ids = torch.randint(3, 6400, (2, length))
        plain, fast = model(ids, labels=ids).loss, compiled(ids, labels=ids).loss
        assert fast.item() == pytest.approx(plain.item(), rel=1e-5)
        model.zero_grad()
        compiled.zero_grad()
        plain.backward()
        fast.backward()
        for (name, ours), other in zip(
            model.named_parameters(), compiled.parameters(), strict=True
        ):
            distance = (other.grad - ours.grad).norm()
            assert ours.grad.norm() > 0 and distance <= 1e-5 * ours.grad.norm(), name


def test_compiled_block_keeps_two_graphs_whatever_the_length() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = make_model()
    for layer in model.model.layers:
        layer.compile(backend=count, fullgraph=True)
    with torch.no_grad():
        for length in (16, 11, 30, 8, 23):
            model(torch.randint(3, 6400, (2, length)))
    assert len(graphs) == 2  # the first length's, and one for all others


# ---------------------------------------------------------------- checkpoints


def test_saved_folder_loads_bit_for_bit(tmp_path: Path) -> None:
    model = make_model()
    save_model(model, TOKENIZER_DIR, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert weights_fingerprint(again) == weights_fingerprint(model)
    with torch.no_grad():
        again.model.norm.weight[0] += 1
    assert weights_fingerprint(again) != weights_fingerprint(model)
    other_heads = make_model(num_attention_heads=2, num_key_value_heads=1)
    other_heads.load_state_dict(model.state_dict())
    assert weights_fingerprint(other_heads) != weights_fingerprint(model)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


@pytest.mark.parametrize(
    ("kind", "saved", "edited"),
    [
        (Qwen3Config, {"head_dim": 32}, {}),  # wider than hidden_size / heads
        (LlamaConfig, {"tie_word_embeddings": False}, {}),
        # At the top of the file, as transformers wrote it before version 5.
        (LlamaConfig, {}, {"rope_theta": 5e4, "rope_parameters": None}),
    ],
    ids=["wide-heads", "untied", "rope_theta"],
)
def test_folder_by_transformers_gives_its_logits(
    kind: type, saved: dict, edited: dict, tmp_path: Path
) -> None:
    config = kind(**SMALL, vocab_size=6400, **({"tie_word_embeddings": True} | saved))
    torch.manual_seed(0)
    stir(AutoModelForCausalLM.from_config(config), 0.1).save_pretrained(tmp_path)
    edit_config(tmp_path, **edited)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    loaded, ids = load_model(tmp_path).eval(), torch.randint(3, 6400, (1, 30))
    save_model(loaded, TOKENIZER_DIR, tmp_path / "again")
    with torch.no_grad():
        expected = reference(ids).logits
        assert torch.allclose(loaded(ids).logits, expected, rtol=0, atol=1e-5)
        again = load_model(tmp_path / "again").eval()
        assert torch.allclose(again(ids).logits, expected, rtol=0, atol=1e-5)


def minimind_tensors(model: MiniMindForCausalLM) -> dict[str, torch.Tensor]:
    """A state dict in the layout of MiniMind's .pth: half precision, head and tables included."""
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    tables = {f"model.freqs_{part}": torch.zeros(16, 16) for part in ("cos", "sin")}
    return tensors | tables


@pytest.mark.parametrize("qk_norm", [False, True])
def test_minimind_pth_loads(tmp_path: Path, qk_norm: bool) -> None:
    # MiniMind's own default, 1e-6 since it normalizes queries and keys.
    model = make_model(qk_norm=qk_norm, rms_norm_eps=1e-6 if qk_norm else 1e-5)
    torch.save(minimind_tensors(model), tmp_path / "pretrain_64.pth")
    loaded = load_model(tmp_path / "pretrain_64.pth", num_attention_heads=4)
    ids = torch.randint(3, 6400, (1, 12))
    with torch.no_grad():
        expected = model.half().float()(ids).logits
        assert torch.equal(loaded.eval()(ids).logits, expected)


class Payload:
    """Pickles to a call that would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model.norm.weight": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="evil.pth: not a plain file of tensors"):
        load_model(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(make_model(), TOKENIZER_DIR, tmp_path)
    return tmp_path


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Rewrites the saved weights; None removes a tensor."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def edit_config(folder: Path, **changes: object) -> None:
    """Rewrites values of the saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_unknown_and_misshapen_weights_are_named(folder: Path) -> None:
    edit_weights(folder, **{"model.norm.weight": None, "model.extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match="missing model.norm.weight; unknown model.extra"):
        load_model(folder)
    edit_weights(folder, **{"model.norm.weight": torch.ones(65), "model.extra": None})
    with pytest.raises(CheckpointError, match=r"model.norm.weight is \(65,\), .* asks \(64,\)"):
        load_model(folder)


def test_config_that_disagrees_with_weights_is_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match="missing model.layers.3"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}, "rope"),
    ],
)
def test_config_that_the_model_does_not_compute_is_refused(
    folder: Path, change: dict, message: str
) -> None:
    edit_config(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_untied_head_under_a_tied_config_is_refused(folder: Path) -> None:
    edit_weights(folder, **{"lm_head.weight": torch.zeros(6400, 64)})
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        load_model(folder)


def test_broken_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(CheckpointError, match="model.safetensors: corrupt"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: broken JSON"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(folder / "absent")
    with pytest.raises(CheckpointError, match="tokenizer.json: missing"):
        load_tokenizer(folder / "absent")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 65}, "hidden_size 65"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads 3"),
    ],
)
def test_impossible_shapes_are_refused(shape: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minimind_config(**(SMALL | shape))
