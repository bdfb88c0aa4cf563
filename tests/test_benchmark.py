"""benchmark.py compares equal work, and its tables have every variant, with figures that can be."""

import json
import math
import os
import re
import subprocess
import sys
import time

import benchmark
from conftest import ROOT, SAMPLE, run_script


def rows_of(markdown):
    """{variant: {heading: cell}} of the one table in a report, all its figures checked to be finite and positive."""
    headings, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")
    ]
    rows = [dict(zip(headings, row, strict=True)) for row in rows]
    for row in rows:
        for heading in row.keys() - {"group", "variant", "largest logit difference"}:
            values = [float(text) for text in re.findall(r"[\d.]+|nan|inf", row[heading])]
            assert values and all(math.isfinite(value) and value > 0 for value in values), (row, heading)
    return {row["variant"]: row for row in rows}


def test_training_variants_do_the_same_work(tmp_path):
    done = run_script(
        "tests/benchmark.py", "--size", "tiny", "--texts", "24", "--repeats", "1", "--methods", "lora",
        "--only", "training", "--threads", "1", "--output_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    markdown = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "; 24 texts of" in markdown and markdown in done.stdout
    rows = rows_of(markdown)
    recipe, ours = rows["published recipe, fp32"], rows["train.py, fp32"]
    assert any(variant.startswith("Trainer at its best") for variant in rows)  # in bf16 where that is faster

    # The same texts from the same weights, in another order: after six steps the losses differ by .01.
    for loss in ("training loss", "validation loss"):
        assert math.isclose(float(recipe[loss]), float(ours[loss]), abs_tol=0.04)
    facts, *runs = map(json.loads, (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines())
    computed = {run["variant"]: run["tokens_computed"] for run in runs}
    assert computed["published recipe, fp32"] == 24 * 512
    assert computed["train.py, fp32"] == facts["facts"]["tokens"]  # not one of padding
    left = {path.name for path in tmp_path.iterdir()} - {"benchmark.png"}  # which needs matplotlib
    assert left == {"benchmark.md", "results.jsonl"}


def test_evaluation_variants_give_the_same_logits(tmp_path):
    """In this process, as new ones would spend half a minute on imports."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    args = benchmark.parse_args(["--texts", "24", "--only", "evaluation", "--output_dir", str(tmp_path)])
    facts, runs = benchmark.prepare(args, scratch), []
    for group, name, precision in benchmark.variants(args, ["fp32"]):
        run = benchmark.run_evaluation(args, scratch, time.time(), group, name, precision)
        runs.append({"group": group, "variant": f"{name}, {precision}", **run})
    rows = rows_of(benchmark.report(args, facts, runs))
    assert set(rows) == {"one text at a time, fp32", "Trainer.predict, fp32", "evaluate.py, fp32"}
    assert all(float(row["largest logit difference"]) < 1e-4 for row in rows.values())


def test_the_tiny_base_can_be_made(tmp_path):
    """The script that pretrained tests/tiny-qwen, for one step on the sample: its folder is a base for train.py."""
    command = [sys.executable, ROOT / "tests" / "make_tiny_qwen.py", "--data", SAMPLE, "--output_dir", tmp_path]
    options = ["--steps", "1", "--tokens_per_step", "64", "--vocab_size", "600", "--hidden_size", "16", "--layers", "1"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    tokenizer = benchmark.data.load_tokenizer(benchmark.data.fetch_model(str(tmp_path)))
    benchmark.data.load_classifier(tmp_path, tokenizer, benchmark.data.LABELS, new_head=1)


def test_a_failure_is_reported_and_the_rest_goes_on(tmp_path):
    """The reasons of train.py and of a library, and a process that the system kills, each as one line."""
    assert benchmark.quietly(benchmark.train.main, ["--data", "none", "--output_dir", str(tmp_path)]) == {
        "error": "'none' is neither a file nor a subset (subsets: " + ", ".join(benchmark.data.SUBSETS) + ", all)"
    }
    assert benchmark.quietly(int, "x")["error"].startswith("ValueError: invalid literal")
    assert "killed" in benchmark.in_fresh_process(os._exit, 9)["error"]
    args = benchmark.parse_args(["--output_dir", str(tmp_path)])
    facts = {"base": "tiny", "parameters": 1, "tokens": 1, "device": "CPU", "threads": 1, "versions": {}, "matmul": {}}
    runs = [{"group": "lora", "variant": "train.py, fp32", "repetition": 0, "error": "no memory"}]
    assert "| lora | train.py, fp32 |" in benchmark.report(args, facts, runs)
