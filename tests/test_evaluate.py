"""The figures equal scikit-learn's, the texts are the run's own, and a stranger's checkpoint runs no code."""

import hashlib
import json
import math
import pickle
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import SAMPLE, TINY, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

import data
import evaluate
import train


def random_case(seed, n=200, classes=2):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    labels[:classes] = range(classes)
    logits = (rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]).round(1).astype(np.float32)  # with ties
    return labels, logits, rng.integers(0, n // 2, n)


def metrics_of(classes, logits, questions, **options):
    return evaluate.metrics(classes, logits, questions, np.arange(len(classes)) * 3, **options)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(10, 300))
def test_metrics_equal_scikit_learn(seed, n):
    labels, logits, questions = random_case(seed, n)
    result = metrics_of(labels, logits, questions, temperature=1.7, threshold=0.6)
    predicted, probability = logits.argmax(1), evaluate.softmax(logits)
    per_class = reference.precision_recall_fscore_support(labels, predicted, labels=[0, 1], zero_division=0)
    assert result["n"] == n
    assert result["accuracy"] == pytest.approx(reference.accuracy_score(labels, predicted))
    assert result["confusion"] == reference.confusion_matrix(labels, predicted, labels=[0, 1]).tolist()
    for k, row in enumerate(result["per_class"].values()):
        assert [row["precision"], row["recall"], row["f1"], row["n"]] == pytest.approx([x[k] for x in per_class])
    assert result["auroc"] == pytest.approx(reference.roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    assert result["loss"] == pytest.approx(reference.log_loss(labels, probability, labels=[0, 1]))
    above = evaluate.softmax(logits / 1.7)[:, 1] > 0.6
    assert result["false_positive_rate_above_threshold"] == pytest.approx(above[labels == 0].mean())
    assert result["macro_f1"] == pytest.approx(reference.f1_score(labels, predicted, average="macro"))
    assert result["largest_class_accuracy"] == pytest.approx(max(np.mean(labels), 1 - np.mean(labels)))
    assert sum(row["n"] for row in result["by_length"]) == n


def test_three_classes_leave_out_what_is_about_two():
    labels, logits, questions = random_case(3, classes=3)
    result = metrics_of(labels, logits, questions, names=("x", "y", "z"), threshold=0.5)
    assert "auroc" not in result and "false_positive_rate_above_threshold" not in result
    macro = np.mean([row["f1"] for row in result["per_class"].values()])
    assert macro == pytest.approx(reference.f1_score(labels, logits.argmax(1), average="macro"))


def test_absent_class_has_no_figures(capsys):
    """99 texts of one class, one of another, none of the third: accuracy alone would look like success."""
    classes = np.array([0] * 99 + [1])
    logits = np.tile(np.float32([3, 0, 1]), (100, 1))
    result = metrics_of(classes, logits, np.arange(100), names=("x", "y", "z"))
    assert result["per_class"]["z"] == {"precision": None, "recall": None, "f1": None, "n": 0}
    assert result["accuracy"] == result["largest_class_accuracy"] == 0.99
    assert result["macro_f1"] == pytest.approx((2 * 99 / 199 + 0) / 2)
    evaluate.print_report(result | {"confident_errors": []})
    printed = capsys.readouterr().out
    assert re.search(r"^z +- +- +- +0 ", printed, re.M)
    assert "always predicting the largest class: 0.9900" in printed and "macro-F1 0.4975" in printed


def test_table_lines_up_with_chinese_names(capsys):
    """A terminal gives a Chinese character two columns, also in the head of the confusion matrix."""
    classes, logits = np.array([0, 1, 2] * 4), np.eye(3, dtype=np.float32)[[0, 1, 1] * 4]
    names = ("正面", "负面评价很长的一个名字", "neutral")
    result = metrics_of(classes, logits, np.arange(12), names=names)
    evaluate.print_report(result | {"confident_errors": []})
    table = [re.sub(r"([\u4e00-\u9fff])", r"\1.", line) for line in capsys.readouterr().out.splitlines()[1:5]]
    ends = [[cell.end() for cell in re.finditer(r"\S+", line)] for line in table]
    assert ends[0][3] == ends[1][4] == ends[2][4] == ends[3][4]  # texts
    assert ends[0][-3:] == ends[1][-3:] == ends[2][-3:] == ends[3][-3:]  # predicted


def test_calibration_error_by_definition():
    """Fifteen equal bins of confidence; the gap of each, weighted by its texts."""
    labels, logits, _ = random_case(5, 400)
    probability = evaluate.softmax(logits)
    confidence, right = probability.max(1), probability.argmax(1) == labels
    expected = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & ((confidence < (low + 1) / 15) | (low == 14))
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert evaluate.calibration_error(labels, probability) == pytest.approx(expected)


def test_temperature_finds_the_scale_that_was_applied():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20000, 2)) * 2
    labels = (rng.random(20000) < evaluate.softmax(logits)[:, 1]).astype(int)
    temperature, threshold = evaluate.fit_calibration(labels, logits * 3)
    assert temperature == pytest.approx(3, rel=0.05)
    called = evaluate.softmax(logits * 3 / temperature)[labels == 0, 1] > threshold
    assert 0.009 <= called.mean() <= 0.01
    assert evaluate.fit_calibration(labels[:150], logits[:150])[1] is None  # fewer than 100 human texts


def test_interval_resamples_questions():
    """Copies of one outcome within a question must not make the interval narrower, as single texts would."""
    rng = np.random.default_rng(0)
    by_question = rng.random(200) < 0.8
    twice, questions = np.repeat(by_question, 2), np.repeat(np.arange(200), 2)
    low, high = evaluate.bootstrap_interval(by_question, np.arange(200))
    assert evaluate.bootstrap_interval(twice, questions) == pytest.approx([low, high])
    expected = 1.96 * math.sqrt(by_question.mean() * (1 - by_question.mean()) / 200)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    narrow = evaluate.bootstrap_interval(twice, np.arange(400))
    assert narrow[1] - narrow[0] < 0.8 * (high - low)


def write_predictions(path, right, texts="ab"):
    rows = [
        {
            "text_sha256": hashlib.sha256(f"{texts}{i}".encode()).hexdigest(),
            "question": f"q{i // 2}",
            "label": "human",
            "prediction": "human" if good else None,
        }
        for i, good in enumerate(right)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_compare(tmp_path, capsys):
    from scipy.stats import binomtest

    first = write_predictions(tmp_path / "first.jsonl", [True] * 90 + [False] * 10)
    second = write_predictions(tmp_path / "second.jsonl", [True] * 80 + [False] * 16 + [True] * 4)
    evaluate.main(["--compare", first, second])
    one, other, figures, _ = capsys.readouterr().out.splitlines()
    assert one == f"0.9000  {first}  (100 texts, 10 of them correct only in this run)"
    assert other == f"0.8400  {second}  (100 texts, 4 of them correct only in this run)"
    difference, low, high, p = map(float, re.findall(r"[+-]?\d\.\d+", figures))
    assert difference == 0.06 and low < 0.06 < high
    assert p == pytest.approx(binomtest(4, 14).pvalue, rel=1e-2)
    evaluate.main(["--compare", first, second, first])
    assert capsys.readouterr().out.count("difference") == 3
    for name, texts, n in (("other", "cd", 100), ("shorter", "ab", 90)):
        third = write_predictions(tmp_path / f"{name}.jsonl", [True] * n, texts=texts)
        with pytest.raises(data.InputError, match="not predictions about the same texts"):
            evaluate.compare([first, second, third])
    other = write_predictions(tmp_path / "other.jsonl", [True] * 100, texts="cd")
    with pytest.raises(data.InputError, match="not predictions about the same texts"):
        evaluate.compare([first, other])


def test_exact_p_of_many_discordant_texts():
    """McNemar's tail is a running sum: 20,000 discordant texts took 17 s when each term was computed anew."""
    from scipy.stats import binomtest

    assert evaluate.mcnemar(9_900, 10_100) == pytest.approx(binomtest(9_900, 20_000).pvalue)
    assert evaluate.mcnemar(0, 0) == evaluate.mcnemar(7, 7) == 1.0
    assert evaluate.mcnemar(3, 11) == evaluate.mcnemar(11, 3)


def test_report_of_the_test_part(lora_checkpoint, tmp_path, capsys):
    """The very test split of the run is rebuilt, and the files say what the terminal says."""
    out = tmp_path / "results"
    evaluate.main(["--ckpt", str(lora_checkpoint), "--output_dir", str(out)])
    printed = capsys.readouterr().out
    result = json.loads((out / "eval-test.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()]
    parts = data.split_examples(data.load_examples([str(SAMPLE)])[0])
    assert [line["text_sha256"] for line in lines] == [
        hashlib.sha256(example["text"].encode()).hexdigest() for example in parts["test"]
    ]
    assert f"accuracy {result['accuracy']:.4f}" in printed and "Qwen2ForSequenceClassification" in printed
    right = np.array([line["label"] == line["prediction"] for line in lines])
    assert result["accuracy"] == right.mean() and result["n"] == len(lines)
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert max(line["probabilities"], key=line["probabilities"].get) == line["prediction"]
    confident = [error["probability"] for error in result["confident_errors"]]
    assert confident == sorted(confident, reverse=True) and len(confident) == min(10, (~right).sum())
    pytest.importorskip("matplotlib")
    assert (out / "report-test.png").read_bytes().startswith(b"\x89PNG")


def test_validation_score_is_the_one_of_the_run(lora_checkpoint, tmp_path):
    evaluate.main(["--ckpt", str(lora_checkpoint), "--split", "validation", "--output_dir", str(tmp_path)])
    result = json.loads((tmp_path / "eval-validation.json").read_text(encoding="utf-8"))
    expected = evaluate.read_run(lora_checkpoint)["validation"]
    assert {"accuracy": result["accuracy"], "loss": result["loss"]} == expected


def test_packed_predictions_equal_one_by_one(lora_checkpoint):
    model, tokenizer = evaluate.load_checkpoint(lora_checkpoint, evaluate.read_run(lora_checkpoint))
    examples, _ = data.load_examples([str(SAMPLE)])
    token_ids, _ = data.tokenize(tokenizer, [example["text"] for example in examples[:60]])
    together = evaluate.predict(model, token_ids)
    alone = np.concatenate([evaluate.predict(model, [ids]) for ids in token_ids])
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-6)


def test_other_data_one_row_a_file(lora_checkpoint, tmp_path, capsys):
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    for name, some in (("first", lines[:20]), ("second", lines[20:50])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some), encoding="utf-8")
    files = [str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")]
    evaluate.main(["--ckpt", str(lora_checkpoint), "--data", *files, "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "first: 40 texts" in printed and "second: 60 texts" in printed
    assert json.loads((tmp_path / "eval-data-second.json").read_text(encoding="utf-8"))["n"] == 60


def test_file_called_test_does_not_replace_the_runs_own_results(lora_checkpoint, tmp_path, capsys):
    shutil.copy(SAMPLE, tmp_path / "test.jsonl")
    out = tmp_path / "results"
    evaluate.main(["--ckpt", str(lora_checkpoint), "--output_dir", str(out)])
    before = {path: path.read_bytes() for path in out.iterdir()}
    evaluate.main(["--ckpt", str(lora_checkpoint), "--data", str(tmp_path / "test.jsonl"), "--output_dir", str(out)])
    assert all(path.read_bytes() == content for path, content in before.items())
    assert json.loads((out / "eval-data-test.json").read_text(encoding="utf-8"))["n"] == 600


def test_bf16_agrees(lora_checkpoint, tmp_path):
    accuracies = []
    for precision in ("no", "bf16"):
        argv = ["--ckpt", str(lora_checkpoint), "--mixed_precision", precision, "--output_dir", str(tmp_path)]
        evaluate.main(argv)
        accuracies.append(json.loads((tmp_path / "eval-test.json").read_text(encoding="utf-8"))["accuracy"])
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.04)


def test_one_text_and_one_example(lora_checkpoint, capsys):
    evaluate.main(["--ckpt", str(lora_checkpoint), "--text", "总之，希望以上信息能够帮到您。"])
    label, probability = capsys.readouterr().out.split()
    assert label in data.LABELS and 0.5 <= float(probability) <= 1
    evaluate.main(["--ckpt", str(lora_checkpoint), "--example", "0"])
    example = data.split_examples(data.load_examples([str(SAMPLE)])[0])["test"][0]
    printed = capsys.readouterr().out.strip()
    assert printed.startswith(("【预测正确!】Label: ", "【预测错误!】Label: "))
    assert f"Label: {example['label']}, Pred_Label: " in printed
    assert printed.endswith(f"\nText: {example['text']}")


def test_other_data_under_the_same_name_is_refused(lora_checkpoint, tmp_path, capsys):
    """The hash in run.json tells that a file was changed after training."""
    copy = tmp_path / "ckpt"
    shutil.copytree(lora_checkpoint, copy)
    changed = tmp_path / "sample.jsonl"
    changed.write_text(SAMPLE.read_text(encoding="utf-8").replace("。", "！"), encoding="utf-8")
    run = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    (copy / "run.json").write_text(json.dumps({**run, "data": [str(changed)]}), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--ckpt", str(copy)])
    assert stopped.value.code == 2 and "does not match the data that this run used" in capsys.readouterr().err


def test_full_checkpoint_is_a_plain_one(tmp_path, capsys):
    """It loads with transformers alone and an adapter with PEFT alone, and both give evaluate.py's logits and names."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    text = "我自己就踩过这个坑，别信客服的"
    for kind in ("full", "lora"):
        out = tmp_path / kind
        lora = ["--lora"] if kind == "lora" else []
        train.main([*lora, "--model", str(TINY), "--data", str(SAMPLE), "--epochs", "1", "--output_dir", str(out),
                    "--max_length", "32", "--batch_size", "32", "--learning_rate", "2e-3"])  # fmt: skip
        ours, tokenizer = evaluate.load_checkpoint(out, evaluate.read_run(out))
        expected = evaluate.predict(ours, data.tokenize(tokenizer, [text])[0])
        assert AutoTokenizer.from_pretrained(out).model_max_length == 32
        if kind == "full":
            model = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
            assert model.config.id2label == {0: "human", 1: "chatgpt"}
            assert model.config.pad_token_id == tokenizer.pad_token_id
            assert json.loads((out / "config.json").read_text(encoding="utf-8"))["rope_theta"] == 1e6  # for 4.x
        else:
            base = AutoModelForSequenceClassification.from_pretrained(
                TINY, dtype=torch.float32, num_labels=2, pad_token_id=tokenizer.pad_token_id
            )
            model = PeftModel.from_pretrained(base, out)
        with torch.no_grad():
            logits = model.eval()(**AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")).logits
        np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_angles_of_rope(lora_checkpoint, dtype):
    """Weights are cast, buffers are not: in bf16 RoPE would be off by .48 rad at position 512.

    So the logits of a long text differ from float32's by no more than those of weights rounded in float32 explain.
    """
    run = evaluate.read_run(lora_checkpoint)
    models = [evaluate.load_checkpoint(lora_checkpoint, run, d)[0] for d in (torch.float32, dtype, torch.float32)]
    exact, half, rounded = models
    frequencies = [name for name, buffer in half.named_buffers() if "inv_freq" in name]
    assert frequencies
    for name in frequencies:
        assert half.get_buffer(name).dtype == torch.float32
        assert torch.equal(half.get_buffer(name), exact.get_buffer(name))
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(dtype).float()
    texts = np.random.default_rng(0).integers(0, 6000, (8, 512)).tolist()
    reference, low, weights_only = (evaluate.predict(model, texts) for model in models)
    assert abs(low - reference).mean() < 4 * abs(weights_only - reference).mean() + 1e-3


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("with_safetensors", [True, False])
def test_checkpoint_from_a_stranger_runs_no_code(lora_checkpoint, tmp_path, capsys, with_safetensors):
    """Pickles under every name that a loader might try, and remote code, are never touched."""
    copy, sprung = tmp_path / "ckpt", tmp_path / "sprung"
    shutil.copytree(lora_checkpoint, copy)
    names = ["adapter_model.bin", "pytorch_model.bin", "training_args.bin", "state.pt", "model.pt", "optimizer.pt"]
    for name in names:
        (copy / name).write_bytes(pickle.dumps(Trap(str(sprung))))
    (copy / "modeling_trap.py").write_text(f"open({str(sprung)!r}, 'w')", encoding="utf-8")
    config = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoTokenizer": ["modeling_trap.Trap", None]}
    (copy / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if not with_safetensors:
        (copy / "adapter_model.safetensors").unlink()
        with pytest.raises(SystemExit):
            evaluate.main(["--ckpt", str(copy), "--text", "一"])
        assert "adapter_model.safetensors is incomplete" in capsys.readouterr().err
    else:
        evaluate.main(["--ckpt", str(copy), "--text", "一"])
    assert not sprung.exists()


def test_read_only_checkpoint_writes_elsewhere(lora_checkpoint, tmp_path, monkeypatch, capsys):
    """As under /kaggle/input: it is evaluated, the results go to the working directory; training there is refused."""
    disk = tmp_path / "input"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        shutil.copytree(lora_checkpoint, disk / "ckpt")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        monkeypatch.chdir(tmp_path)
        evaluate.main(["--ckpt", str(disk / "ckpt")])
        assert (tmp_path / "eval-test.json").exists()
        with pytest.raises(SystemExit) as stopped:
            train.main(["--model", str(TINY), "--data", str(SAMPLE), "--output_dir", str(disk / "new")])
        assert stopped.value.code == 2 and "Read-only file system" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_as_a_script(lora_checkpoint):
    done = run_script("evaluate.py", "--ckpt", lora_checkpoint, "--text", "你好")
    assert done.returncode == 0 and done.stdout.split()[0] in data.LABELS
    missing = run_script("evaluate.py", "--ckpt", lora_checkpoint / "nothing")
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and "Traceback" not in missing.stderr
