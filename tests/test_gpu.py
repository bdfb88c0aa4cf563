"""What only a GPU can show. All other tests run on the CPU, also where there is a GPU.

GPU_TESTS=1 python -m pytest -n 0 tests/test_gpu.py
"""

import json
import os

import numpy as np
import pytest
import torch
from conftest import SAMPLE, TINY, run_script

import data
import evaluate
import train

pytestmark = pytest.mark.skipif("GPU_TESTS" not in os.environ, reason="needs a GPU: see the top of the file")

ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}
KINDS = {"lora": ["--lora", "--lora_dropout", "0"], "full": []}
TOLERANCE = {"no": 1e-3, "bf16": 0.05, "fp16": 0.01}  # of the largest value


def arguments(output_dir, *more, rate="2e-4"):
    options = ["--model", TINY, "--data", SAMPLE, "--output_dir", output_dir, "--learning_rate", rate]
    return [str(word) for word in (*options, "--batch_size", 16, "--epochs", 1, *more)]


def assert_near(first, second, tolerance):
    np.testing.assert_allclose(first, second, rtol=0, atol=tolerance * np.abs(second).max())


def logits_of(ckpt):
    lines = (ckpt / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)["logits"] for line in lines])


def losses_of(ckpt):
    lines = map(json.loads, (ckpt / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line.get("loss", line.get("training_loss")) for line in lines]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_kernel_equals_attention_text_by_text(window, kv_heads, monkeypatch):
    """Outputs and gradients of the one varlen call a layer are those of a call for each text."""
    if not data.varlen_attention():
        pytest.skip("this torch, or this GPU, has no such kernel")
    torch.manual_seed(0)
    batch = data.pack([[1] * length for length in (5, 1, 33, 12)], "cuda")
    options = {"lengths": batch["lengths"], "cu_seqlens": batch["cu_seqlens"], "sliding_window": window}
    shapes = [(1, heads, 51, 32) for heads in (4, kv_heads, kv_heads)]
    states = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    results = []
    for one_kernel in (True, False):
        if not one_kernel:
            monkeypatch.setattr(data, "varlen_attention", lambda: None)
        output, _ = data.packed_attention(None, *states, None, scaling=32**-0.5, **options)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), states)])
    for one, each in zip(*results, strict=True):
        torch.testing.assert_close(one, each, rtol=0, atol=0.05 * each.abs().max().item())


@pytest.mark.parametrize("precision", data.DTYPES)
def test_packed_equals_one_by_one(precision):
    """A packed row on the GPU gives each text the logits that the library gives it alone on the CPU in fp32."""
    tokenizer = data.load_tokenizer(TINY)
    model = data.load_classifier(TINY, tokenizer, data.LABELS, new_head=0).eval()
    texts = [[7] * 5, [3, 4], list(range(90)), [11] * 300]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in texts]).numpy()
        packed = evaluate.predict(data.PackedClassifier(model.to("cuda", data.DTYPES[precision])), texts)
    assert_near(packed, alone, TOLERANCE[precision])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny base with a head: a new one is drawn in the base's dtype, in which torch draws other numbers."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), data.load_tokenizer(TINY)
    for part in (tokenizer, data.load_classifier(TINY, tokenizer, data.LABELS, new_head=0)):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", data.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_learns_what_a_cpu_learns(kind, precision, base, tmp_path):
    """The losses are the CPU's, and the checkpoint gives the same logits on both."""
    options = [*KINDS[kind], "--model", base]
    train.main(arguments(tmp_path / "gpu", *options, "--mixed_precision", precision))
    cpu = run_script("train.py", *arguments(tmp_path / "cpu", *options), env=ON_THE_CPU)
    assert cpu.returncode == 0, cpu.stderr
    tolerance = 0.15 if precision == "fp16" else TOLERANCE[precision]  # its scaler skips the first steps
    assert_near(losses_of(tmp_path / "gpu"), losses_of(tmp_path / "cpu"), tolerance)
    run = evaluate.read_run(tmp_path / "gpu")
    assert run["device"] == torch.cuda.get_device_name() and run["mixed_precision"] == f"{precision} (as asked)"
    evaluate.main(["--ckpt", str(tmp_path / "gpu")])
    on_gpu = logits_of(tmp_path / "gpu")
    again = run_script("evaluate.py", "--ckpt", tmp_path / "gpu", env=ON_THE_CPU)
    assert again.returncode == 0, again.stderr
    assert_near(on_gpu, logits_of(tmp_path / "gpu"), TOLERANCE["no"])


@pytest.mark.parametrize("precision", data.DTYPES)
def test_interrupted_and_resumed_equals_uninterrupted(precision, tmp_path, monkeypatch):
    """Also with dropout, and with the state of the fp16 scaler; up to rounding, as the GPU adds in any order."""
    options = ["--lora", "--mixed_precision", precision, "--save_steps", "4", "--batch_size", "8"]
    train.main(arguments(tmp_path / "whole", *options))

    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def interrupt(*arguments, **options):
        steps.append(1)
        if len(steps) == 11:
            raise KeyboardInterrupt
        return clip(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
        train.main(arguments(tmp_path / "resumed", *options))
    train.main(arguments(tmp_path / "resumed", *options, "--resume"))
    whole, resumed = losses_of(tmp_path / "whole"), losses_of(tmp_path / "resumed")
    assert_near(resumed, whole, TOLERANCE[precision] / 5)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_equals_a_large_batch(kind, tmp_path):
    options = [*KINDS[kind], "--mixed_precision", "no"]
    train.main(arguments(tmp_path / "whole", *options))
    train.main(arguments(tmp_path / "parts", *options, "--batch_size", "4", "--gradient_accumulation_steps", "4"))
    assert_near(losses_of(tmp_path / "parts"), losses_of(tmp_path / "whole"), TOLERANCE["no"])


def test_out_of_memory_is_one_line_and_frees_the_memory(tmp_path, capsys):
    train.main(arguments(tmp_path / "small"))
    before = torch.cuda.memory_allocated()  # workspaces of the libraries
    torch.cuda.set_per_process_memory_fraction(2**27 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments(tmp_path / "run", "--batch_size", "120"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: out of GPU memory: lower --batch_size")
    assert torch.cuda.memory_allocated() <= before


def test_a_step_does_not_wait_for_the_gpu(tmp_path, monkeypatch):
    """Between two reads of the loss the CPU only issues work, so that it builds batches while the GPU computes."""
    read_steps, clip, steps = train.read_steps, torch.nn.utils.clip_grad_norm_, []

    def read(*arguments):  # the one place that may wait
        torch.cuda.set_sync_debug_mode("default")
        return read_steps(*arguments)

    def watched_clip(*arguments, **options):
        steps.append(1)
        if len(steps) == 2:  # the first step allocates what later ones find
            torch.cuda.set_sync_debug_mode("error")
        return clip(*arguments, **options)

    monkeypatch.setattr(train, "read_steps", read)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched_clip)
    try:
        train.main(arguments(tmp_path / "run", "--lora", "--batch_size", "4"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) > train.LOG_EVERY
