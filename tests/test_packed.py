"""The packed batch gives each text the logits it has alone, and the library's own."""

import sys
import types

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification as SequenceClassifier
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MiniMaxConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import data

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 96,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "qwen2": Qwen2Config(**{k: v for k, v in SIZE.items() if k != "head_dim"}),
    "qwen2 with windows": Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZE),
    "llama": LlamaConfig(**SIZE),
    "mistral with a window": MistralConfig(**SIZE, sliding_window=5),
    "gemma3 with a window": Gemma3TextConfig(**SIZE, sliding_window=5, query_pre_attn_scalar=8),
}


def random_texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 95, (length,), generator=generator).tolist() for length in lengths]


def library_logits(model, texts):
    """Each text alone through the library's own forward pass and attention."""
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids]), use_cache=False).logits for ids in texts])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_one_by_one(name):
    torch.manual_seed(0)
    model = SequenceClassifier.from_config(CONFIGS[name]).eval()
    texts = random_texts([7, 1, 30, 12, 3])
    expected = library_logits(model, texts)
    packed = data.PackedClassifier(model)
    with torch.no_grad():
        together = packed(**data.pack(texts))
        alone = torch.cat([packed(**data.pack([ids])) for ids in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-6)


def test_neighbours_do_not_matter():
    """What fails as soon as attention or positions leak over a boundary, in either direction."""
    torch.manual_seed(0)
    packed = data.PackedClassifier(SequenceClassifier.from_config(CONFIGS["qwen2"]).eval())
    text, *neighbours = random_texts([9, 5, 17, 40, 2])
    with torch.no_grad():
        alone = packed(**data.pack([text]))[0]
        for before in neighbours:
            for after in neighbours:
                logits = packed(**data.pack([before, text, after]))[1]
                torch.testing.assert_close(logits, alone, rtol=0, atol=1e-6)
        assert not torch.allclose(packed(**data.pack([neighbours[0] + text])), alone, atol=1e-3)


def test_tiny_qwen_lora_packed_equals_library():
    from peft import LoraConfig, get_peft_model

    tokenizer = data.load_tokenizer(str(TINY))
    torch.manual_seed(0)
    model = data.load_classifier(TINY, tokenizer, data.LABELS, new_head=0)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "o_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at zero, and then the adapter would be invisible
            torch.nn.init.normal_(parameter, std=0.1)
    texts = data.tokenize(tokenizer, ["总之，需要注意的是…", "我上次在家就这么弄的 没啥问题", "a<|endoftext|>", "短"])[
        0
    ]
    expected = library_logits(model.eval(), texts)
    packed = data.PackedClassifier(model)
    with torch.no_grad():
        torch.testing.assert_close(packed(**data.pack(texts)), expected, rtol=0, atol=2e-6)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SequenceClassifier.from_config(CONFIGS["qwen2"])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        data.PackedClassifier(model)(**data.pack(random_texts([7, 12]))).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_bf16_on_a_cpu_equals_fp32(window, kv_heads):
    """Its matrix products give the outputs and gradients of PyTorch's kernel, up to the rounding of bf16."""
    torch.manual_seed(0)
    batch, results = data.pack([[1] * length for length in (5, 1, 33, 12)]), []
    options = {"lengths": batch["lengths"], "cu_seqlens": batch["cu_seqlens"], "sliding_window": window}
    states = [torch.randn(1, heads, 51, 32, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    for bf16 in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output, _ = data.packed_attention(None, *states, None, scaling=32**-0.5, **options)
        assert output.dtype == (torch.bfloat16 if bf16 else torch.float32)
        results.append([output.float(), *torch.autograd.grad(output.float().square().sum(), states)])
    for rounded, exact in zip(*results, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05 * exact.abs().max().item())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=20), min_size=1, max_size=8))
def test_pack_can_be_unpacked(texts):
    batch = data.pack(texts)
    row, positions = batch["input_ids"][0], batch["position_ids"][0]
    assert [part.tolist() for part in row.split(batch["lengths"])] == texts
    assert [part.tolist() for part in positions.split(batch["lengths"])] == [list(range(len(ids))) for ids in texts]
    assert row[batch["cu_seqlens"][1:] - 1].tolist() == [ids[-1] for ids in texts]


def test_neighbours_that_are_seen_are_refused():
    """MiniMax's linear attention is not one that packing replaces: its state runs on into the next text."""
    torch.manual_seed(0)
    texts = random_texts([5, 9])
    model = data.PackedClassifier(SequenceClassifier.from_config(MiniMaxConfig(**SIZE, block_size=16)))
    with pytest.raises(data.InputError, match="the text in front changes"):
        data.check_packed(model, texts, "cpu")
    model = data.PackedClassifier(SequenceClassifier.from_config(CONFIGS["mistral with a window"]))
    data.check_packed(model, texts, "cpu")
    with pytest.raises(data.InputError, match="lower --max_length"):
        data.check_packed(model, [[1] * 257], "cpu")
    with pytest.raises(data.InputError, match="do not belong together"):
        data.check_packed(model, [[97]], "cpu")


REFUSED = {
    "a custom attention": BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4),
    "caps its attention": Gemma2Config(**SIZE, attn_logit_softcapping=1.0),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_attention_that_packing_cannot_replace_is_refused(reason):
    with pytest.raises(data.InputError, match=reason):
        data.PackedClassifier(SequenceClassifier.from_config(REFUSED[reason]))(**data.pack([[1, 2, 3]]))


SIGNATURES = {  # of PyTorch's kernel, and what a call with all that packing needs gives
    "2.10": (lambda q, k, v, *bounds, is_causal=False, scale=None: "called", None),
    "2.11": (lambda q, k, v, *bounds, scale=None, window_size=(-1, -1): "called", "called"),
    "2.13": (lambda q, k, v, *bounds, scale=None, window_size=(-1, -1), enable_gqa=False: enable_gqa, True),
}


@pytest.mark.parametrize("release", SIGNATURES)
def test_kernel_is_used_only_if_it_takes_every_argument(release, monkeypatch):
    """PyTorch 2.10's varlen_attn has no windows, and 2.11's has no `enable_gqa`: passing it would be a TypeError."""
    stub, expected = SIGNATURES[release]
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = stub
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    data.varlen_attention.cache_clear()
    try:
        kernel = data.varlen_attention()
        assert (kernel and kernel("q", "k", "v", scale=1.0, window_size=(-1, 0))) == expected
    finally:
        data.varlen_attention.cache_clear()
