"""What is learned depends on the arguments alone, and not on interruptions, processes or micro-batches."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
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
    assert len(data.split_examples(data.make_examples(data.load_hc3([str(path)]))[0])["train"]) == 75
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
    ("train.History.log_lines", 4, "after"),
    ("torch.save", 2, "half"),
    ("os.replace", 3, "after"),
    ("torch.nn.functional.cross_entropy", 5, "after"),
    ("evaluate.predict", 1, "after"),
    ("torch.save", 1, "after"),
    ("train.save_checkpoint", 1, "before"),  # trained, but nothing exported
    ("train.save_checkpoint", 1, "after"),
    ("evaluate.load_checkpoint", 1, "after"),  # exported, but not checked
    ("evaluate.fit_calibration", 1, "after"),
    ("train.move_up", 1, "before"),
    ("os.replace", 5, "after"),  # while the files are moved up
    ("os.replace", 2, "after"),  # and again, while the rest of them is
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
        process.join(120)
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
    assert not (killed / "unfinished").exists()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(signal_number, small_data, tmp_path):
    """A polite end of the real process: exit code 143 or 130, how to go on, and a state to go on from."""
    argv = arguments(small_data, tmp_path / "out", "--lora", "--epochs", "500")
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if "%" in line and "texts/s" in line:  # the bar moves
                process.send_signal(signal_number)
                break
        last = process.stderr.read()
    assert process.returncode == 128 + signal_number
    assert "--resume goes on" in last and "Traceback" not in last
    state = torch.load(tmp_path / "out" / "unfinished" / "state.pt", weights_only=True)
    assert len(state["steps"]) >= 10
    logged = (tmp_path / "out" / "unfinished" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in logged if "loss" in json.loads(line)]
    assert steps == list(range(10, len(state["steps"]) + 1, 10))


def test_closed_terminal_saves(small_data, tmp_path):
    """What stopping a notebook's `!` cell comes to, or a broken ssh: the step ends and is saved, with nowhere to print.

    One step an epoch, so that there would be a line to print after it.
    """
    pty = pytest.importorskip("pty")
    argv = arguments(small_data, tmp_path / "out", "--lora", "--epochs", "500", "--batch_size", "75")
    process, terminal = pty.fork()
    if not process:
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *argv])
    printed = b""
    while b"mixed precision" not in printed:  # the last line before the bar, which a terminal without a size hides
        printed += os.read(terminal, 4096)
    while not (tmp_path / "out" / "unfinished" / "metrics.jsonl").exists():  # the last file before the first step
        time.sleep(0.05)
    time.sleep(0.2)
    os.close(terminal)
    os.waitpid(process, 0)
    assert len(torch.load(tmp_path / "out" / "unfinished" / "state.pt", weights_only=True)["steps"]) >= 1


def test_resume_of_another_run_is_refused(small_data, tmp_path, capsys):
    argv = arguments(small_data, tmp_path / "out", "--lora", "--epochs", "1")
    unfinished = tmp_path / "out" / "unfinished"
    train.main(argv)
    unfinished.mkdir()  # as an interrupted second run leaves it
    state = {"arguments": {"batch_size": 4, "lora_r": 16}, "model": {}, "optimizer": {}, "scaler": {}}
    torch.save(state, unfinished / "state.pt")
    with pytest.raises(SystemExit) as stopped:
        train.main([*argv, "--resume"])
    assert stopped.value.code == 2 and "lora_r was 16 and is 8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(argv)
    assert "--resume continues, --overwrite discards it" in capsys.readouterr().err
    evaluate.read_run(tmp_path / "out")  # the finished run is still there
    train.main([*argv, "--overwrite"])
    assert not unfinished.exists()


def test_resume_without_state_starts_at_the_beginning(small_data, tmp_path, capsys):
    train.main(arguments(small_data, tmp_path / "out", "--lora", "--epochs", "1", "--resume", "--save_steps", "0"))
    assert "nothing saved yet: starting at the beginning" in capsys.readouterr().out
    argv = arguments(small_data, tmp_path / "out", "--lora", "--epochs", "1", "--resume")
    before = results_of(tmp_path / "out")
    train.main(argv)  # as a script that always says --resume does
    assert "has finished: there is nothing to resume" in capsys.readouterr().out
    assert results_of(tmp_path / "out") == before


def test_two_runs_into_one_folder(small_data, tmp_path, capsys):
    """The second is refused whatever it is told, and does not disturb the first."""
    argv = arguments(small_data, tmp_path / "out", "--lora", "--epochs", "500")
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "texts/s" in line:
                break
        for more in ([], ["--resume"], ["--overwrite"]):
            with pytest.raises(SystemExit) as stopped:
                train.main([*argv, *more])
            assert stopped.value.code == 2 and "another run is writing to" in capsys.readouterr().err
        process.kill()
    with pytest.raises(SystemExit):
        train.main(argv)  # the lock went with its process
    assert "an unfinished run is in" in capsys.readouterr().err


def test_scaler_skips_are_counted_and_other_overflows_stop():
    """A gradient that is not finite is the fp16 scaler's business, which skips that step, and otherwise an error."""
    schedule = train.Schedule(texts=40, step_size=2, epochs=1, seed=0, learning_rate=1.0, warmup_ratio=0.0)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.AdamW([weight], fused=True), torch.amp.GradScaler("cpu")
    accelerator = train.Accelerator()
    history = train.History(schedule)
    for step in range(10):
        before = weight.detach().clone()
        scaler.scale(weight.sum() * (float("inf") if step == 3 else 1.0)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_([weight], 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, weight) == (step == 3)
        history.pending.append(torch.stack([torch.tensor(0.5), norm]))
    accelerator.scaler = scaler
    history.read(accelerator)
    (line,) = history.log_lines(10)
    assert line["skipped_steps"] == 1 and math.isfinite(line["grad_norm"])
    accelerator.scaler = None
    history.pending.append(torch.tensor([0.5, float("inf")]))
    with pytest.raises(data.InputError, match=r"step 11 gave loss 0\.5 and gradient norm inf"):
        history.read(accelerator)


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
        assert ("no room in" if not more else "cannot save to") in line
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
        assert one == pytest.approx(other, abs=1e-5)


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
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0, printed
    assert "2 x cpu" in printed and printed.count("trainable params") == 1
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-5)
    assert_same_losses(tmp_path / "one", tmp_path / "two")
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
    printed = [process.communicate(timeout=240)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], printed
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-5)


def test_lost_processes_are_told(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # two independent runs would overwrite one another
    monkeypatch.setattr(train, "Accelerator", AloneAccelerator)
    with pytest.raises(SystemExit):
        train.main(arguments(small_data, tmp_path / "out", "--lora"))
    assert "do not see each other" in capsys.readouterr().err


class AloneAccelerator:
    """What `accelerate launch --multi_gpu` gives without GPUs: world size 2 outside, one process inside."""

    num_processes, process_index, is_main_process, device = 1, 0, True, torch.device("cpu")

    def __init__(self, **options):
        pass


def test_schedule_is_pure_and_complete():
    schedule = train.Schedule(texts=75, step_size=8, epochs=2, seed=1, learning_rate=1.0, warmup_ratio=0.1)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (10, 20)
    epochs = [[schedule.texts_of(step) for step in range(first, first + 10)] for first in (0, 10)]
    for steps in epochs:
        assert sorted(text for texts in steps for text in texts) == list(range(75))
        assert [len(texts) for texts in steps] == [8] * 9 + [3]
    assert epochs[0] != epochs[1]
    rates = [schedule.rate_of(step) for step in range(21)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    from transformers import get_linear_schedule_with_warmup

    reference = get_linear_schedule_with_warmup(optimizer, 2, 20)
    for rate in rates:
        assert rate == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_one_seed_is_bit_equal_and_another_differs(small_data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.main(arguments(small_data, tmp_path / name, "--lora", "--epochs", "1", "--seed", seed))
    assert weights(tmp_path / "a").keys() == weights(tmp_path / "c").keys()
    assert results_of(tmp_path / "a")[1] == results_of(tmp_path / "b")[1]
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "c")


def test_out_of_memory_halves_the_micro_batch(small_data, tmp_path, monkeypatch, capsys):
    """The effective batch and so the result stay; without --auto_batch_size one line says what to do."""
    argv = ["--lora", "--lora_dropout", "0", "--epochs", "1", "--batch_size", "16", "--learning_rate", "1e-5"]
    train.main(arguments(small_data, tmp_path / "whole", *argv))
    forward = data.PackedClassifier.forward

    def small_memory(self, input_ids, position_ids, cu_seqlens, lengths):
        logits = forward(self, input_ids, position_ids, cu_seqlens, lengths)
        if self.training and len(lengths) > 5:  # as on a GPU, in the backward pass
            logits.register_hook(out_of_memory)
            held.append(weakref.ref(logits))
        elif self.training:
            assert all(logits() is None for logits in held), "the failed attempt must be gone before the next"
        return logits

    def out_of_memory(gradient):
        raise torch.OutOfMemoryError("too many texts for this test")

    held = []

    monkeypatch.setattr(data.PackedClassifier, "forward", small_memory)
    train.main(arguments(small_data, tmp_path / "halved", *argv, "--auto_batch_size"))
    printed = capsys.readouterr()
    assert "micro-batches of 4, still 16 texts a step" in printed.out + printed.err
    assert_same_weights(tmp_path / "whole", tmp_path / "halved", 1e-6)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(small_data, tmp_path / "stopped", *argv))
    assert stopped.value.code == 2 and "out of memory with 16 texts at once" in capsys.readouterr().err


def test_loss_that_is_not_finite_stops_the_run(small_data, tmp_path, monkeypatch, capsys):
    """The step and its texts are named, and the state saved before is kept."""
    forward, calls = data.PackedClassifier.forward, []

    def poisoned(self, **batch):
        calls.append(1)
        return forward(self, **batch) * (float("nan") if self.training and len(calls) > 14 else 1.0)

    monkeypatch.setattr(data.PackedClassifier, "forward", poisoned)
    argv = arguments(small_data, tmp_path / "out", "--lora", "--batch_size", "4", "--save_steps", "3")
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    line = capsys.readouterr().err.splitlines()[-1]
    schedule = train.Schedule(75, 4, 2, 233, 2e-3, 0.0)
    assert stopped.value.code == 2 and "step 15 gave loss nan" in line and str(schedule.texts_of(14)) in line
    state = torch.load(tmp_path / "out" / "unfinished" / "state.pt", weights_only=True)
    assert len(state["steps"]) == 12
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


# ---- precision ------------------------------------------------------------------------------------


def test_precision_choices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert train.choose_precision("auto") == ("no", "no CUDA device")
    assert train.choose_precision("bf16") == ("bf16", "asked for")
    with pytest.raises(data.InputError, match="fp16 needs a GPU"):
        train.choose_precision("fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what a bare accelerate launch exports
    assert train.choose_precision("bf16")[0] == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train.choose_precision("auto") == ("bf16", "asked for by accelerate launch")
    with pytest.raises(data.InputError, match="give one of the two"):
        train.choose_precision("no")


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
            train.choose_precision("auto")
    else:
        assert train.choose_precision("auto")[0] == expected


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("lora", [True, False])
def test_dtypes(precision, lora):
    """Under LoRA the frozen base has the compute dtype; whatever is trained is float32, the head too."""
    args = train.parse_args(["--model", str(TINY), *(["--lora"] if lora else [])])
    model = train.build_model(args, str(TINY), data.load_tokenizer(str(TINY)), precision)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    expected = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert frozen == ({expected} if lora else set())


@pytest.mark.parametrize("kind", [["--lora"], []], ids=["lora", "full"])
def test_bf16_learns_what_fp32_learns(kind, small_data, tmp_path):
    tokenizer, base = data.load_tokenizer(str(TINY)), tmp_path / "base"
    for part in (tokenizer, data.load_classifier(str(TINY), tokenizer)):  # with a head, as torch 2.6 draws one of
        part.save_pretrained(base)  # other numbers in bf16
    more = ["--model", base, "--epochs", "1", "--batch_size", "16", "--gradient_checkpointing"]
    for precision in ("bf16", "no"):
        train.main(arguments(small_data, tmp_path / precision, *kind, *more, "--mixed_precision", precision))
    losses = [evaluate.read_run(tmp_path / name)["epochs"][0]["training_loss"] for name in ("bf16", "no")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "bf16").values())


# ---- the model ------------------------------------------------------------------------------------


def test_rotary_embedding_is_not_misread(tmp_path):
    """transformers 4 overlooks where 5 saves its parameters, and would go on with its default."""
    model, tokenizer = tmp_path / "model", data.load_tokenizer(str(TINY))
    shutil.copytree(TINY, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if transformers.__version__.startswith("4."):
        with pytest.raises(data.InputError, match="upgrade transformers"):
            data.load_classifier(model, tokenizer)
    else:
        assert data.load_classifier(model, tokenizer).config.rope_parameters["rope_theta"] == 1e6


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

    def weightless(folder, tokenizer, dtype, labels):
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


def test_second_run_replaces_the_first(small_data, tmp_path):
    """First full, then LoRA into the same folder: nothing of the first is left to be mistaken for the second's."""
    out = tmp_path / "out"
    train.main(arguments(small_data, out, "--epochs", "1"))
    evaluate.main(["--ckpt", str(out)])
    assert (out / "model.safetensors").exists() and (out / "eval-test.json").exists()
    (out / "notes.txt").write_text("the user's own", encoding="utf-8")
    train.main(arguments(small_data, out, "--lora", "--epochs", "1"))
    left = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "run.json", "notes.txt", "metrics.jsonl"} <= left
    assert not left & {"model.safetensors", "config.json", "eval-test.json", "unfinished"}


def test_launched_by_accelerate(small_data, tmp_path):
    """The way the README starts it; afterwards run.json alone tells evaluate.py everything."""
    out = tmp_path / "out"
    launcher = ["-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
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

    train.py keeps only the rows of the embedding that occur in its texts. The biases of the keys are left out: their
    gradient is nothing but rounding noise, which AdamW brings to the size of the learning rate.
    """
    from transformers import AutoModelForSequenceClassification

    out, rate = tmp_path / "out", 1e-4
    argv = arguments(small_data, out, "--epochs", "1", "--batch_size", "8", "--learning_rate", rate, *more)
    train.main(argv)
    args = train.parse_args(argv)
    tokenizer = data.load_tokenizer(str(TINY))
    rows = data.split_examples(data.make_examples(data.load_hc3([str(small_data)]))[0])["train"]
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        TINY, num_labels=2, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    model.get_input_embeddings().requires_grad_(not args.freeze_embedding)
    before = model.get_input_embeddings().weight.detach().clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=args.weight_decay)
    schedule = train.Schedule(len(rows), 8, 1, args.seed, rate, 0.0)
    seen = set()
    for step in range(schedule.total_steps):
        batch = [rows[i] for i in schedule.texts_of(step)]
        inputs = tokenizer([row["text"] for row in batch], max_length=48, truncation=True, padding=True,
                           return_tensors="pt")  # fmt: skip
        seen |= set(inputs["input_ids"].flatten().tolist())
        model(**inputs, labels=torch.tensor([row["label"] for row in batch])).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = schedule.rate_of(step)
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


def test_report_to_tensorboard(small_data, tmp_path, monkeypatch):
    """The tracker gets the lines of metrics.jsonl; without --report_to none is started."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    argv = ["--lora", "--epochs", "2", "--batch_size", "4", "--report_to", "tensorboard"]
    train.main(arguments(small_data, out, *argv))
    (events,) = (out / "qwen-classifier").glob("events*")
    recorded = accumulator.EventAccumulator(str(events)).Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("loss", "learning_rate", "validation_loss", "accuracy"):
        expected = [(line["step"], line[name]) for line in lines if name in line]
        got = [(event.step, event.value) for event in recorded.Scalars(name)]
        assert [step for step, _ in got] == [step for step, _ in expected] != []
        np.testing.assert_allclose([v for _, v in got], [v for _, v in expected], rtol=1e-6)
    train.main(arguments(small_data, tmp_path / "none", "--lora", "--epochs", "1"))
    assert not (tmp_path / "none" / "qwen-classifier").exists()


def test_report_to_what_is_not_installed(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(small_data, tmp_path / "out", "--report_to", "wandb"))
    assert stopped.value.code == 2 and "pip install -U accelerate wandb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
