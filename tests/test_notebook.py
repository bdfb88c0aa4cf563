"""tests/kaggle.ipynb, cell by cell in a real Jupyter kernel: what somebody on Kaggle runs, and sees.

The cells run as they stand, in an empty folder and offline. What a test must change is in `notebook` and nowhere else:
optional cells and the offline options are uncommented, /kaggle/input is a temporary folder, the two GPUs are two CPU
processes, and a line of the test's own makes training quick.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT, SAMPLE, TINY
from make_notebook import NOTEBOOK, SCRIPTS
from make_notebook import notebook as make_notebook
from nbclient import NotebookClient

QUICK = "OPTIONS += ' --epochs 1 --batch_size 32 --learning_rate 2e-3 --lora_dropout 0'"  # dropout: see the two GPUs
TWO_GPUS = "accelerate launch --multi_gpu --num_processes 2"
TWO_CPUS = "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2"
HELD = """
import gc, torch
gc.collect()
print(sum(o.nbytes for o in gc.get_objects() if issubclass(type(o), torch.Tensor)))"""


class Notebook:
    """A kernel in `folder`. `run` executes a cell as Jupyter does, and returns it with what it put out."""

    def __init__(self, folder):
        self.folder = folder
        notebook = nbformat.v4.new_notebook()
        self.client = NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(folder)}})

    def run(self, source, fails=False, stop_in=None):
        """`fails`: the cell may end with an exception. `stop_in`: press the stop button in this run's first step."""
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["raises-exception"] * fails})
        self.client.nb.cells.append(cell)
        if stop_in:
            threading.Thread(target=self.stop, args=(self.folder / stop_in,), daemon=True).start()
        self.client.execute_cell(cell, len(self.client.nb.cells) - 1)
        return cell

    def stop(self, folder):
        while not (folder / "state.pt").exists():  # which appears at the first epoch's end
            time.sleep(0.05)
        asyncio.run(self.client.km.interrupt_kernel())


def text_of(cell, name=None):
    """The text under a cell, of one stream or both."""
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and name in (None, o.name))


def lines_of(cell):
    """The lines under a cell as a page shows them: a carriage return begins its line anew, and nothing moves up."""
    text, before, lines = "", None, []
    for output in cell.outputs:
        if output.output_type == "stream":  # the two streams never share a line
            text += ("" if output.name == before else "\n") + output.text
            before = output.name
    for line in text.replace("\r\n", "\n").split("\n"):
        visible = ""
        for part in line.split("\r"):
            visible = part + visible[len(part) :]
        lines.append(visible.rstrip())
    return lines


def digest(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def make_read_only(folder, cleanup):
    """As the folders under /kaggle/input are; root ignores permissions, so that it needs a mount."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.access(folder, os.W_OK):
        mounted = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True)
        if mounted.returncode == 0:
            cleanup.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


def notebook_cells():
    """The sources of the notebook's code cells, optional ones without their comment marks."""
    cells = [cell["source"] for cell in nbformat.read(NOTEBOOK, 4).cells if cell["cell_type"] == "code"]
    return [re.sub(r"^# ?", "", cell, flags=re.M).partition("\n")[2] if cell.startswith("# Optional:") else cell
            for cell in cells]  # fmt: skip


def test_notebook_is_up_to_date():
    """After a change of README's cells or of a script: python tests/make_notebook.py"""
    assert nbformat.read(NOTEBOOK, 4) == make_notebook()
    assert nbformat.validate(make_notebook()) is None


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """README's cells, executed: an object that holds each by a name, with more cells that look into the kernel."""
    folder, inputs = tmp_path_factory.mktemp("working"), tmp_path_factory.mktemp("input")
    shutil.copytree(TINY, inputs / "qwen" / "Qwen1.5-0.5B")
    (inputs / "hc3").mkdir()
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()[:60]
    (inputs / "hc3" / "baike.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pip, *scripts = notebook_cells()[: 1 + len(SCRIPTS)]
    commands, in_kernel, read_only, two_gpus = (
        cell.replace("/kaggle/input", str(inputs)) for cell in notebook_cells()[1 + len(SCRIPTS) :]
    )
    assert "\n# OPTIONS = " in commands and "\n!accelerate" in commands
    commands = commands.replace("\n# OPTIONS", "\nOPTIONS").replace("\n!accelerate", f"\n{QUICK}\n!accelerate")
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        **{f"JUPYTER_{kind}_DIR": str(tmp_path_factory.mktemp("jupyter")) for kind in ("CONFIG", "DATA", "RUNTIME")},
        "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),
    }
    with contextlib.ExitStack() as cleanup:
        patch = cleanup.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("PYTHONPATH", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        for name in ("qwen", "hc3"):
            make_read_only(inputs / name, cleanup)
        before = {name: digest(inputs / name) for name in ("qwen", "hc3")}
        book = Notebook(folder)
        cleanup.enter_context(book.client.setup_kernel())
        it = SimpleNamespace(folder=folder)

        it.pip = book.run(pip)
        it.pip_code = book.run("print(_exit_code)")
        for script in scripts:
            book.run(script)
        it.commands = book.run(commands)
        it.in_kernel = book.run(in_kernel)
        it.held = book.run(HELD)

        shutil.copytree(folder / "out", inputs / "my-run" / "out")
        before["my-run"] = digest(inputs / "my-run")
        make_read_only(inputs / "my-run", cleanup)
        it.enforced = not os.access(inputs / "my-run" / "out", os.W_OK)
        it.read_only = book.run(read_only)
        it.changed = [name for name in before if digest(inputs / name) != before[name]]

        assert TWO_GPUS in two_gpus
        it.two_gpus = book.run(two_gpus.replace(TWO_GPUS, TWO_CPUS))
        it.wrong = book.run("main(['--epochs', '0'])", fails=True)
        book.run("OPTIONS += ' --epochs 12 --batch_size 32'")
        it.stopped = book.run("main([*OPTIONS.split(), '--output_dir', 'stopped'])", fails=True, stop_in="stopped")
        it.held_when_stopped = book.run(HELD)
        it.left = {path.name for path in (folder / "stopped").iterdir()}
        it.continued = book.run("main([*OPTIONS.split(), '--output_dir', 'stopped', '--resume'])")
        yield it


def json_of(notebook, folder, name="run"):
    return json.loads((notebook.folder / folder / f"{name}.json").read_text(encoding="utf-8"))


def test_only_what_kaggle_lacks_is_installed(notebook):
    *command, peft, modelscope = shlex.split(notebook.pip.source)
    assert command == ["!pip", "install", "-q"]
    assert peft.startswith("peft>=") and modelscope.startswith("modelscope>=")
    assert {peft, modelscope} <= set((ROOT / "requirements.txt").read_text(encoding="utf-8").split())
    assert text_of(notebook.pip_code).strip() == "0"


def test_pasted_scripts_are_the_scripts(notebook):
    for script in SCRIPTS:
        assert (notebook.folder / f"{script}.py").read_bytes() == (ROOT / f"{script}.py").read_bytes()


def test_commands(notebook):
    assert json_of(notebook, "out")["arguments"]["lora"]
    assert (notebook.folder / "out" / "eval-test.json").exists()
    text = text_of(notebook.commands)
    assert "saved to out; next" in text and "written to out: eval-test.json" in text


def test_pictures_are_shown(notebook):
    shown = [output.data for output in notebook.commands.outputs if output.output_type == "display_data"]
    assert ["image/png" in data for data in shown] == [True, True]


@pytest.mark.parametrize(("cell", "runs"), [("commands", 1), ("in_kernel", 2)])
def test_output_is_tidy(notebook, cell, runs):
    """A page cannot move up a line as a terminal can, and has two streams: bars must neither repeat nor split up."""
    lines = lines_of(getattr(notebook, cell))
    assert not [line for line in lines if "\x1b[A" in line or line.startswith(("validation", "check"))]
    bars = [line for line in lines if line.startswith("train:")]
    assert len(bars) == runs and all(bar.startswith("train: 100%|") and "█" in bar for bar in bars)
    assert all(bar.endswith("texts/s]") for bar in bars)  # a command has 80 columns: the bar must fit
    for position, line in enumerate(lines):
        if line.startswith("Epoch  Training Loss"):
            assert re.match(r" +1( +[\d.]+){3}$", lines[position + 1])
            runs -= 1
    assert runs == 0
    warnings = [line for line in lines if "Warning" in line and "ipywidgets" not in line]  # which Kaggle has
    assert not warnings


def test_two_runs_in_one_kernel(notebook):
    assert [json_of(notebook, f"seed-{seed}")["arguments"]["seed"] for seed in (1, 2)] == [1, 2]
    assert json_of(notebook, "seed-1")["epochs"] != json_of(notebook, "seed-2")["epochs"]
    assert int(text_of(notebook.held)) < 1_000_000  # bytes of tensors in the kernel; the model alone has 6 MB


def test_inputs_are_read_only(notebook):
    """Model, data and checkpoint lie where nothing can be written, and nothing was."""
    if not notebook.enforced:
        assert set(notebook.changed) <= {"my-run"}
        pytest.skip("root needs the right to mount, to have something that it cannot write to")
    assert notebook.changed == []
    assert "written to .: eval-test.json" in text_of(notebook.read_only)
    where_it_lies, as_written = (json_of(notebook, folder, "eval-test") for folder in (".", "out"))
    assert where_it_lies["accuracy_interval"] == as_written["accuracy_interval"]
    assert where_it_lies["loss"] == pytest.approx(as_written["loss"], abs=1e-5)


def test_two_processes_equal_one(notebook):
    one, two = json_of(notebook, "out"), json_of(notebook, "two")
    assert [one["processes"], two["processes"]] == [1, 2]
    assert one["validation"]["accuracy"] == two["validation"]["accuracy"]
    assert one["validation"]["loss"] == pytest.approx(two["validation"]["loss"], abs=1e-4)


def test_wrong_option_is_one_line(notebook):
    """IPython adds that there was a SystemExit, and how to exit; the cells after it show that the kernel lives on."""
    first, *others = text_of(notebook.wrong, "stderr").splitlines()
    assert first == "error: argument --epochs: must be >= 1 and <= 2147483648, got 0 (--help lists the options)"
    assert not [line for line in others if "To exit" not in line]
    assert [output.ename for output in notebook.wrong.outputs if output.output_type == "error"] == ["SystemExit"]


def test_stop_button_in_the_kernel(notebook):
    """The last saved state is kept and the memory given back, though IPython keeps the last exception."""
    assert re.search(
        r"^error: interrupted; train.py continues with --resume$", text_of(notebook.stopped, "stderr"), re.M
    )
    assert "state.pt" in notebook.left and "run.json" not in notebook.left
    assert int(text_of(notebook.held_when_stopped)) < 1_000_000
    assert "continuing after step" in text_of(notebook.continued)
    assert len(json_of(notebook, "stopped")["epochs"]) == 12
