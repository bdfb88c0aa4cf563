"""Shared by all tests: the scripts on the import path, the offline fixtures, and one trained checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY, SAMPLE = ROOT / "tests" / "tiny-qwen", ROOT / "tests" / "sample.jsonl"
SHARED = ROOT.parent / "shared"  # real data and the real tokenizer, where they lie beside the checkout

sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
if "GPU_TESTS" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests everywhere, with or without a GPU; see test_gpu.py
os.environ["OMP_NUM_THREADS"] = "1"  # two test files run at a time, and torch's threads would fight for the cores


def run_script(script, *arguments, env=None, **options):
    """Run one of the scripts as a user does; returns the completed process with its text."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", **options)


@pytest.fixture(scope="session")
def lora_checkpoint(tmp_path_factory):
    """A LoRA checkpoint trained for one short epoch through the command line's own entry point."""
    import train

    folder = tmp_path_factory.mktemp("checkpoint") / "lora"
    train.main(["--lora", "--model", str(TINY), "--data", str(SAMPLE), "--output_dir", str(folder), "--epochs", "1",
                "--batch_size", "16", "--learning_rate", "2e-3"])  # fmt: skip
    return folder
