"""What is learned depends on the arguments alone, and not on interruptions, processes or micro-batches."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate.utils import DistributedType
from conftest import ROOT, SAMPLE, SHARED, TINY, run_script
from safetensors.torch import load_file

import data
import evaluate
import train

SMALL = ["--max_length", "48", "--learning_rate", "2e-3"]


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """75 texts for training: steps of 8 leave a ragged last one of 3."""
    path = tmp_path_factory.mktemp("data") / "small.jsonl"
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()[:47]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert len(data.split_examples(data.load_examples([str(path)])[0])["train"]) == 75
    return path


def arguments(small_data, output_dir, *more):
    return ["--model", str(TINY), "--data", str(small_data), "--output_dir", str(output_dir), *SMALL, *map(str, more)]


def weights(folder):
    name = "adapter_model.safetensors" if (folder / "adapter_model.safetensors").exists() else "model.safetensors"
    return load_file(folder / name)


def assert_same_weights(first, second, tolerance=0.0):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def results_of(folder):
    """What must not depend on how a run went: run.json without its times, and the bytes of the other files."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for varying in ("seconds", "peak_memory_gib", "arguments"):
        run.pop(varying)
    names = ["metrics.jsonl", *(path.name for path in folder.glob("*.safetensors"))]
    return run, {name: (folder / name).read_bytes() for name in names}


# ---- interruptions --------------------------------------------------------------------------------

# (function, which call of it, before or after it or half-way through a save): where the process is killed
MOMENTS = [
    ("torch.nn.functional.cross_entropy", 1, "before"),  # in the first step: nothing is saved yet
    ("torch.nn.functional.cross_entropy", 3, "after"),
    ("torch.save", 1, "before"),  # in a save
    ("torch.save", 1, "half"),
    ("os.replace", 2, "before"),  # a whole state lies beside its final name
    ("os.replace", 2, "after"),
    ("torch.nn.utils.clip_grad_norm_", 2, "after"),  # between backward and step
    ("torch.optim.AdamW.step", 1, "before"),
    ("torch.optim.AdamW.step", 2, "after"),
    ("evaluate.predict", 1, "before"),  # at an epoch's end
    ("evaluate.predict", 1, "after"),
    ("train.read_steps", 2, "after"),
    ("torch.save", 2, "half"),
    ("os.replace", 3, "after"),
    ("torch.nn.functional.cross_entropy", 5, "after"),
    ("evaluate.predict", 1, "after"),
    ("torch.save", 1, "after"),
    ("evaluate.save_model", 1, "before"),  # trained, but nothing exported
    ("evaluate.save_model", 1, "after"),
    ("transformers.PreTrainedTokenizerBase.save_pretrained", 1, "before"),  # half of it is exported
    ("evaluate.load_checkpoint", 1, "after"),  # exported, but not checked
    ("evaluate.fit_calibration", 1, "after"),
    ("train.plot_curves", 1, "before"),
    ("train.plot_curves", 1, "after"),
    ("data.write_atomically", 2, "before"),  # checked, but run.json is not written
]


def train_until(moment, argv):
    """In a process of its own: train, and die by SIGKILL at the moment, as on a machine that is taken away."""
    import importlib

    torch.set_num_threads(1)
    if moment:
        path, call, when = moment
        owner, name = path.rsplit(".", 1)
        try:
            owner = importlib.import_module(owner)
        except ImportError:
            module, of_class = owner.rsplit(".", 1)
            owner = getattr(importlib.import_module(module), of_class)
        function, calls = getattr(owner, name), 0

        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call and when == "before":
                die()
            if calls == call and when == "half":
                Path(args[1]).write_bytes(b"half of a state")
                die()
            result = function(*args, **kwargs)
            if calls == call and when == "after":
                die()
            return result

        setattr(owner, name, counted)
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        train.main(argv)


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have torch and the scripts imported already, so that each costs a moment only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "peft", "matplotlib.figure", "datasets"])

    def run(moment, argv):
        process = context.Process(target=train_until, args=(moment, argv))
        process.start()
        process.join(1200)  # generous: the machine may be busy
        return process.exitcode

    return run


@pytest.mark.parametrize("kind", [["--lora"], []], ids=["lora with dropout", "full"])
def test_killed_and_resumed_equals_uninterrupted(kind, small_data, tmp_path, processes):
    """A run is killed at every moment in turn, and goes on each time; it ends bit-equal to one never killed."""
    argv = [*kind, "--batch_size", "8", "--save_steps", "3", "--epochs", "3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert processes(None, arguments(small_data, whole, *argv)) == 0
    assert len(MOMENTS) >= 20
    for moment in MOMENTS:
        assert processes(moment, arguments(small_data, killed, *argv, "--resume")) == -signal.SIGKILL, moment
        with pytest.raises(data.InputError, match="no finished run"):
            evaluate.read_run(killed)
    assert processes(None, arguments(small_data, killed, *argv, "--resume")) == 0
    assert results_of(whole) == results_of(killed)
    for folder in (whole, killed):
        evaluate.main(["--ckpt", str(folder)])
    assert (whole / "predictions-test.jsonl").read_bytes() == (killed / "predictions-test.jsonl").read_bytes()
    assert {path.name for path in whole.iterdir()} == {path.name for path in killed.iterdir()}
    assert not (killed / "state.pt").exists()


def everything_in(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_finished_run_is_never_lost(small_data, tmp_path, capsys):
    """Without --overwrite nothing is touched; --resume says that the run has finished, or which arguments differ."""
    argv = arguments(small_data, tmp_path / "out", "--lora", "--epochs", "1")
    train.main(argv)
    before = everything_in(tmp_path)
    for more, words in (
        ([], "holds a finished run: --overwrite deletes it"),
        (["--resume", "--epochs", "3"], "changed: epochs (was 1, now 3)"),
        (["--resume", "--learning_rate", "1e-4"], "changed: learning_rate (was 0.002, now 0.0001)"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train.main([*argv, *more])
        assert stopped.value.code == 2 and words in capsys.readouterr().err
        assert everything_in(tmp_path) == before
    train.main([*argv, "--resume"])  # as a script that always says --resume does
    assert "has finished: there is nothing to resume" in capsys.readouterr().out
    assert everything_in(tmp_path) == before


def test_unfinished_run_is_resumed_or_overwritten(small_data, tmp_path, capsys, monkeypatch):
    argv = arguments(small_data, tmp_path / "out", "--lora", "--epochs", "1", "--save_steps", "3")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(evaluate, "predict", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
        train.main(argv)
    before = everything_in(tmp_path)
    for more, words in (
        ([], "holds an unfinished run: --resume continues it, --overwrite deletes it"),
        (["--resume", "--lora_r", "16"], "changed: lora_r (was 8, now 16)"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train.main([*argv, *more])
        assert stopped.value.code == 2 and words in capsys.readouterr().err
        assert everything_in(tmp_path) == before
    train.main([*argv, "--overwrite"])
    assert "continuing after" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "state.pt").exists() and evaluate.read_run(tmp_path / "out")


def test_resume_without_state_starts_at_the_beginning(small_data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").touch()  # as a run leaves it that is killed in its first steps
    train.main(arguments(small_data, tmp_path / "out", "--lora", "--epochs", "1", "--resume", "--save_steps", "0"))
    assert "no saved state: starting at the beginning" in capsys.readouterr().out


class Scaled:
    """An accelerator with the fp16 scaler, which accelerate has on a GPU only."""

    scaler, num_processes = torch.amp.GradScaler("cpu"), 1

    @staticmethod
    def reduce(tensor, _):
        return tensor


def test_scaler_skips_steps_and_many_in_a_row_end_the_run():
    """A gradient that overflows in fp16 leaves the weights as they are; that is an error only if it goes on and on."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.AdamW([weight], fused=True), Scaled.scaler
    steps = []
    for step in range(5):
        before = weight.detach().clone()
        scaler.scale(weight.sum() * (float("inf") if step == 3 else 1.0)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_([weight], 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, weight) == (step == 3)
        train.read_steps(Scaled, [torch.stack([torch.tensor(0.5), norm])], steps, str)
    overflow = torch.tensor([float("nan"), float("inf")])
    train.read_steps(Scaled, [overflow] * train.MAX_SKIPPED, steps, str)
    with pytest.raises(data.InputError, match=r"step 6 gave loss nan .* --mixed_precision bf16 or no"):
        train.read_steps(Scaled, [overflow], steps, str)
    assert len(steps) == 5 + train.MAX_SKIPPED + 1


@pytest.mark.parametrize(
    ("size", "more"), [("300k", []), ("300k", ["--save_steps", "0"]), ("1600k", ["--epochs", "3"])]
)
def test_full_disk(size, more, small_data, tmp_path, capsys):
    """Room is checked before training; where it runs out all the same, one line says so and the state is kept."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        argv = arguments(small_data, disk / "out", "--lora", "--epochs", "1", *more)
        if more[:1] == ["--epochs"]:
            (disk / "filler").write_bytes(b"0" * 700_000)  # enough for the state, not for the tokenizer as well
        with pytest.raises(SystemExit) as stopped:
            train.main(argv)
        line = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and line.startswith("error: ")
        assert "cannot save to" in line and "make room" in line
        assert not (disk / "out" / "run.json").exists()
        if more[:1] == ["--epochs"]:
            (disk / "filler").unlink()
            train.main([*argv, "--resume"])
            assert (disk / "out" / "run.json").exists()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---- division of the work -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [["--lora", "--lora_dropout", "0"], []], ids=["lora", "full"])
def test_accumulation_equals_a_large_batch(kind, small_data, tmp_path):
    """75 texts in steps of 16: the last step has 11, in micro-batches of 4, 4 and 3.

    At a low learning rate, because AdamW makes steps of up to that size even of the rounding noise that is the
    gradient of a key projection's bias (softmax does not see it).
    """
    argv = [*kind, "--epochs", "1", "--learning_rate", "1e-5"]
    train.main(arguments(small_data, tmp_path / "large", *argv, "--batch_size", "16"))
    accumulated = [*argv, "--batch_size", "4", "--gradient_accumulation_steps", "4"]
    train.main(arguments(small_data, tmp_path / "accumulated", *accumulated))
    assert_same_weights(tmp_path / "large", tmp_path / "accumulated", 1e-6)
    assert_same_losses(tmp_path / "large", tmp_path / "accumulated")


def assert_same_losses(first, second):
    first, second = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in (first, second)
    )
    assert [line.keys() for line in first] == [line.keys() for line in second]
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def launch(*torchrun, argv):
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun, str(ROOT / "train.py"), *argv]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )


def test_two_processes_equal_one(small_data, tmp_path):
    """As the README starts them. The last step has 3 texts in micro-batches of 2: one process has none of the last."""
    argv = ["--lora", "--lora_dropout", "0", "--epochs", "1", "--batch_size", "2", "--gradient_accumulation_steps", "4"]
    train.main(arguments(small_data, tmp_path / "one", *argv))
    process = launch("--standalone", "--nproc_per_node", "2", argv=arguments(small_data, tmp_path / "two", *argv))
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    assert "2 x cpu" in printed and printed.count("trainable params") == 1
    # AdamW turns rounding into steps of up to the learning rate; one text left out changes weights by 1e-2.
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-3)
    assert_same_losses(tmp_path / "one", tmp_path / "two")  # with gradient norms, which AdamW would hide
    one, two = (evaluate.read_run(tmp_path / name) for name in ("one", "two"))
    assert one["validation"]["accuracy"] == two["validation"]["accuracy"]
    assert two["processes"] == 2


def test_two_machines_equal_one(small_data, tmp_path):
    argv = ["--lora", "--lora_dropout", "0", "--epochs", "1", "--batch_size", "8"]
    train.main(arguments(small_data, tmp_path / "one", *argv))
    port = 20000 + os.getpid() % 10000
    node = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    nodes = [
        launch(*node, "--node_rank", str(rank), argv=arguments(small_data, tmp_path / "two", *argv)) for rank in (0, 1)
    ]
    printed = [process.communicate()[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], printed
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-3)
    assert_same_losses(tmp_path / "one", tmp_path / "two")


def test_lost_processes_are_told(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # two independent runs would overwrite one another
    monkeypatch.setattr(train, "Accelerator", AloneAccelerator)
    with pytest.raises(SystemExit):
        train.main(arguments(small_data, tmp_path / "out", "--lora"))
    assert "do not see each other" in capsys.readouterr().err


def test_sharding_is_refused(small_data, tmp_path, monkeypatch, capsys):
    """accelerate makes FSDP of a GPU run only, so this stands in for it."""
    monkeypatch.setattr(AloneAccelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(train, "Accelerator", AloneAccelerator)
    with pytest.raises(SystemExit):
        train.main(arguments(small_data, tmp_path / "out", "--lora"))
    assert "FSDP is not supported" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_processes_wait_long_enough(monkeypatch):
    """NCCL gives up after ten minutes; the main process may download or check the checkpoint for longer."""
    options = {}
    monkeypatch.setattr(AloneAccelerator, "__init__", lambda self, **given: options.update(given))
    monkeypatch.setattr(train, "Accelerator", AloneAccelerator)
    train.make_accelerator(train.parse_args([]), "no")
    timeout, ddp = (handler.to_kwargs() for handler in options["kwargs_handlers"])
    assert timeout["timeout"].total_seconds() >= 3600 and ddp == {"broadcast_buffers": False}


class AloneAccelerator:
    """What `accelerate launch --multi_gpu` gives without GPUs: world size 2 outside, one process inside."""

    num_processes, process_index, is_main_process, device = 1, 0, True, torch.device("cpu")
    distributed_type = DistributedType.NO

    def __init__(self, **options):
        pass


def test_schedule_is_pure_and_complete():
    epochs = [[train.texts_of(step, 75, 8, seed=1) for step in range(first, first + 10)] for first in (0, 10)]
    for steps in epochs:
        assert sorted(text for texts in steps for text in texts) == list(range(75))
        assert [len(texts) for texts in steps] == [8] * 9 + [3]
    assert epochs[0] != epochs[1]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = transformers.get_linear_schedule_with_warmup(optimizer, 2, 20)
    for step in range(21):
        assert train.learning_rate_of(step, 20, 1.0, 0.1) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_one_seed_is_bit_equal_and_another_differs(small_data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.main(arguments(small_data, tmp_path / name, "--lora", "--epochs", "1", "--seed", seed))
    assert weights(tmp_path / "a").keys() == weights(tmp_path / "c").keys()
    assert results_of(tmp_path / "a")[1] == results_of(tmp_path / "b")[1]
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "c")


def test_out_of_memory_is_one_line(small_data, tmp_path, monkeypatch, capsys):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(data.PackedClassifier, "forward", out_of_memory)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(small_data, tmp_path / "out", "--lora"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "out of GPU memory: lower --batch_size" in line


def test_loss_that_is_not_finite_stops_the_run(small_data, tmp_path, monkeypatch, capsys):
    """The step and the beginning of a text are named, the state saved before is kept, and the advice works."""
    forward, calls = data.PackedClassifier.forward, []

    def poisoned(self, **batch):
        calls.extend([1] * self.training)
        return forward(self, **batch) * (float("nan") if self.training and len(calls) > 14 else 1.0)

    monkeypatch.setattr(data.PackedClassifier, "forward", poisoned)
    argv = arguments(small_data, tmp_path / "out", "--lora", "--batch_size", "4", "--save_steps", "3")
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    line = capsys.readouterr().err.splitlines()[-1]
    text = data.split_examples(data.load_examples([str(small_data)])[0])["train"][train.texts_of(14, 75, 4, 233)[0]][
        "text"
    ]
    assert stopped.value.code == 2 and "step 15 gave loss nan" in line and data.short(text) in line
    assert "start again with --overwrite and a lower --learning_rate" in line
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    assert len(state["steps"]) == 12
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    monkeypatch.undo()
    train.main([*argv, "--overwrite", "--learning_rate", "1e-4", "--epochs", "1"])


# ---- precision ------------------------------------------------------------------------------------


def test_precision_choices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert data.choose_precision("auto") == ("no", "no GPU")
    assert data.choose_precision("bf16") == ("bf16", "as asked")
    with pytest.raises(data.InputError, match="fp16 needs a GPU"):
        data.choose_precision("fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what a bare accelerate launch exports
    assert data.choose_precision("auto")[0] == "no" and data.choose_precision("bf16")[0] == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert data.choose_precision("auto") == ("bf16", "as accelerate launch says")
    assert data.choose_precision("no") == ("no", "as asked")


@pytest.mark.parametrize(
    ("name", "capability", "built_for", "expected"),
    [
        ("Tesla T4", (7, 5), ["sm_75", "sm_80", "sm_90a"], "fp16"),
        ("NVIDIA A100", (8, 0), ["sm_75", "sm_80"], "bf16"),
        ("Tesla P100", (6, 0), ["sm_60", "sm_75"], "no"),
        ("Tesla P100", (6, 0), ["sm_75", "sm_80"], None),
    ],
)
def test_precision_by_hardware(name, capability, built_for, expected, monkeypatch):
    for variable in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if expected is None:
        with pytest.raises(data.InputError, match="no kernels for Tesla P100"):
            data.choose_precision("auto")
    else:
        assert data.choose_precision("auto")[0] == expected


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("lora", [True, False])
def test_dtypes(precision, lora):
    """Under LoRA the frozen base has the compute dtype; whatever is trained is float32, the head too."""
    args = train.parse_args(["--model", str(TINY), *(["--lora"] if lora else [])])
    model = train.build_model(args, TINY, data.load_tokenizer(TINY), precision)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    expected = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert frozen == ({expected} if lora else set())


@pytest.mark.parametrize("kind", [["--lora"], []], ids=["lora", "full"])
def test_bf16_learns_what_fp32_learns(kind, small_data, tmp_path):
    tokenizer, base = data.load_tokenizer(str(TINY)), tmp_path / "base"
    for part in (
        tokenizer,
        data.load_classifier(TINY, tokenizer, data.LABELS, new_head=0),
    ):  # with a head, as torch 2.6 draws one of
        part.save_pretrained(base)  # other numbers in bf16
    more = ["--model", base, "--epochs", "1", "--batch_size", "16", "--gradient_checkpointing"]
    for precision in ("bf16", "no"):
        train.main(arguments(small_data, tmp_path / precision, *kind, *more, "--mixed_precision", precision))
    losses = [evaluate.read_run(tmp_path / name)["epochs"][0]["training_loss"] for name in ("bf16", "no")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "bf16").values())


# ---- the model ------------------------------------------------------------------------------------

QWEN_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


@pytest.mark.parametrize("source", ["written here", "the real configuration"])
def test_parameter_counts_at_full_size(source, tmp_path, monkeypatch):
    """1,574,912 trainable; with the three layers that the published run really adapted 1,181,696 of 465,171,456."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = tmp_path
    (tmp_path / "config.json").write_text(json.dumps(QWEN_05B), encoding="utf-8")
    if source == "the real configuration":
        folder = SHARED / "qwen1.5-0.5b"
        if not folder.is_dir():
            pytest.skip("needs the real configuration beside the checkout")

    def weightless(folder, *_, **__):
        """The full-size model without its weights, which are not to be had offline."""
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=2))

    monkeypatch.setattr(data, "load_classifier", weightless)
    for targets, expected in (
        (["q_proj", "k_proj", "v_proj", "o_proj"], 1574912),
        (["k_proj", "v_proj", "o_proj"], 1181696),
    ):
        args = train.parse_args(["--lora", "--model", "Qwen/Qwen1.5-0.5B", "--lora_targets", *targets])
        parameters = list(train.build_model(args, folder, None, "no").parameters())
        assert sum(p.numel() for p in parameters if p.requires_grad) == expected
    assert sum(p.numel() for p in parameters) == 465171456


def test_overwrite_deletes_the_first_run_only(small_data, tmp_path):
    """First full, then LoRA into the same folder: nothing of the first is left, and what is the user's stays."""
    out = tmp_path / "out"
    train.main(arguments(small_data, out, "--epochs", "1"))
    evaluate.main(["--ckpt", str(out)])
    assert (out / "model.safetensors").exists() and (out / "eval-test.json").exists()
    for name in ("notes.txt", "README.md"):
        (out / name).write_text("the user's own", encoding="utf-8")
    train.main(arguments(small_data, out, "--lora", "--epochs", "1", "--overwrite"))
    left = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "run.json", "metrics.jsonl"} <= left
    assert not left & {"model.safetensors", "config.json", "eval-test.json"}
    assert {(out / name).read_text(encoding="utf-8") for name in ("notes.txt", "README.md")} == {"the user's own"}


def test_overwrite_with_an_unsuitable_model_deletes_nothing(small_data, lora_checkpoint, tmp_path, capsys):
    """Gemma 2 is refused only when its layers run, which must be before the finished run is deleted."""
    out, base = tmp_path / "out", tmp_path / "gemma2"
    shutil.copytree(lora_checkpoint, out)
    tokenizer = data.load_tokenizer(TINY)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Gemma2Config(vocab_size=len(tokenizer), **size, num_key_value_heads=4, head_dim=8)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments(small_data, out, "--overwrite", "--epochs", "1"), "--model", str(base)])
    assert stopped.value.code == 2 and "cannot read several texts in one row" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_launched_by_accelerate(small_data, tmp_path):
    """The way the README starts it, also if the launcher asks for compilation; run.json tells evaluate.py the rest."""
    out = tmp_path / "out"
    launcher = ["-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "inductor", "--dynamo_use_regional_compilation"]
    command = [sys.executable, *launcher, ROOT / "train.py", *arguments(small_data, out, "--lora", "--epochs", "1")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (
        "【model.config】" in done.stdout
        and "Epoch  Training Loss  Validation Loss  Accuracy" in done.stdout + done.stderr
    )
    scored = run_script("evaluate.py", "--ckpt", out, "--split", "validation", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    result = json.loads((out / "eval-validation.json").read_text(encoding="utf-8"))
    assert (result["accuracy"], result["loss"]) == (run["validation"]["accuracy"], run["validation"]["loss"])
    assert np.isfinite(run["temperature"]) and run["arguments"]["lora"] is True


@pytest.mark.parametrize("more", [[], ["--freeze_embedding"], ["--weight_decay", "0.1"]], ids=" ".join)
def test_full_fine_tuning_equals_a_plain_loop(more, small_data, tmp_path):
    """transformers' padded model, its own attention and AdamW over the whole embedding end with the same weights.

    The biases of the keys are left out: their
    gradient is nothing but rounding noise, which AdamW brings to the size of the learning rate.
    """
    from transformers import AutoModelForSequenceClassification

    out, rate = tmp_path / "out", 1e-4
    argv = arguments(small_data, out, "--epochs", "1", "--batch_size", "8", "--learning_rate", rate, *more)
    train.main(argv)
    args = train.parse_args(argv)
    tokenizer = data.load_tokenizer(str(TINY))
    rows = data.split_examples(data.load_examples([str(small_data)])[0])["train"]
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        TINY, num_labels=2, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    model.get_input_embeddings().requires_grad_(not args.freeze_embedding)
    before = model.get_input_embeddings().weight.detach().clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=args.weight_decay)
    seen = set()
    for step in range(10):
        batch = [rows[i] for i in train.texts_of(step, len(rows), 8, args.seed)]
        inputs = tokenizer([row["text"] for row in batch], max_length=48, truncation=True, padding=True,
                           return_tensors="pt")  # fmt: skip
        seen |= set(inputs["input_ids"].flatten().tolist())
        model(**inputs, labels=torch.tensor([row["label"] == "chatgpt" for row in batch]).long()).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = train.learning_rate_of(step, 10, rate, 0.0)
        optimizer.step()
        optimizer.zero_grad()
    expected, got = model.state_dict(), weights(out)
    assert expected.keys() == got.keys()
    for name in expected.keys() - {f"model.layers.{i}.self_attn.k_proj.bias" for i in range(4)}:
        torch.testing.assert_close(
            got[name], expected[name], rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    embedding = got["model.embed_tokens.weight"]
    moved = (embedding != before).any(1).nonzero().flatten().tolist()
    assert {"": 0 < len(moved) < len(seen) < len(before), "--freeze_embedding": not moved,
            "--weight_decay": len(moved) > len(seen)}[more[0] if more else ""]  # fmt: skip
