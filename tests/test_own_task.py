"""A user's own task: texts and labels of a .csv or .jsonl, any number of classes, from training to a labelled file."""

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import data
import evaluate
import train

TOPICS = {
    "天气": "今天下雨，气温很低，记得带伞",
    "足球": "球队进球，比赛赢了，球迷欢呼",
    "菜谱": "先放油，再炒鸡蛋，加一点盐",
}


def rows_of_topics(count):
    """Texts of three topics, easy to tell apart, each a different arrangement of its topic's characters."""
    rng, rows = random.Random(0), []
    for i in range(count):
        label = list(TOPICS)[i % len(TOPICS)]
        text = "".join(rng.choices(TOPICS[label], k=rng.randint(4, 16)))
        rows.append({"text": f"{text}，{i}", "label": label})
    return rows


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8-sig", newline="") as file:  # as a spreadsheet saves it
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory):
    """(the .csv, a LoRA checkpoint trained on it)"""
    folder = tmp_path_factory.mktemp("topics")
    path, out = write_csv(folder / "topics.csv", rows_of_topics(240)), folder / "out"
    train.main(["--lora", "--model", str(TINY), "--data", path, "--output_dir", str(out), "--epochs", "3",
                "--batch_size", "16", "--learning_rate", "5e-3"])  # fmt: skip
    return path, out


def test_three_classes_from_end_to_end(three_classes, capsys):
    """All rows are used, the names are kept, and figures that only two classes have are left out."""
    _, out = three_classes
    run = evaluate.read_run(out)
    assert run["labels"] == sorted(TOPICS) and sum(run["split"]["sizes"].values()) == 240
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_CLS"
    evaluate.main(["--ckpt", str(out)])
    printed = capsys.readouterr().out
    result = json.loads((out / "eval-test.json").read_text(encoding="utf-8"))
    assert list(result["per_class"]) == sorted(TOPICS) and np.shape(result["confusion"]) == (3, 3)
    assert result["accuracy"] >= 0.9 and np.trace(result["confusion"]) == round(result["accuracy"] * result["n"])
    assert not {"auroc", "threshold", "false_positive_rate"} & result.keys() and "AUROC" not in printed
    evaluate.main(["--ckpt", str(out), "--text", "球队赢了比赛，球迷欢呼"])
    assert capsys.readouterr().out.split()[0] == "足球"


def test_merged_model_is_a_plain_one(three_classes, tmp_path, capsys):
    """transformers alone gives evaluate.py's logits and names, as does its pipeline; evaluate.py takes it as well."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    _, out = three_classes
    merged = tmp_path / "merged"
    evaluate.main(["--ckpt", str(out), "--merge", str(merged)])
    assert sorted(tmp_path.iterdir()) == [merged]
    run = evaluate.read_run(out)
    ours, tokenizer = evaluate.load_checkpoint(out, run)
    texts = [row["text"] for row in rows_of_topics(12)]
    texts[0] *= 60  # longer than max_length
    expected = evaluate.predict(ours, data.tokenize(tokenizer, texts, run["max_length"])[0])
    model = AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        padded = AutoTokenizer.from_pretrained(merged)(texts, padding=True, truncation=True, return_tensors="pt")
        np.testing.assert_allclose(model(**padded).logits.numpy(), expected, rtol=0, atol=1e-4)
    assert model.config.id2label == dict(enumerate(run["labels"]))
    for batch_size in (1, 4):
        answers = pipeline("text-classification", model=str(merged))(texts, batch_size=batch_size, truncation=True)
        assert [answer["label"] for answer in answers] == [run["labels"][k] for k in expected.argmax(1)]
        scores = [answer["score"] for answer in answers]
        np.testing.assert_allclose(scores, evaluate.softmax(expected).max(1), rtol=0, atol=1e-4)
    evaluate.main(["--ckpt", str(out)])
    evaluate.main(["--ckpt", str(merged)])
    results = [json.loads((folder / "eval-test.json").read_text(encoding="utf-8")) for folder in (out, merged)]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert f"test accuracy {results[0]['accuracy']:.4f}" in card and "足球" in card and "truncation=True" in card
    assert "truncation=True" in capsys.readouterr().out


def write_labels(path, *labels):
    lines = (json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(labels))
    path.write_text("\n".join(lines), encoding="utf-8")
    return [str(path)]


def test_names_of_labels(tmp_path):
    """Numbers as numbers, words as words; human and ChatGPT as HC3 has them, so that own files go with HC3's."""

    def names(*labels):
        return data.load_examples(write_labels(tmp_path / "own.jsonl", *labels))[1]

    assert names(10, 2, 1) == ("1", "2", "10")
    assert names("b", "a", "c") == ("a", "b", "c")
    assert names("chatgpt", "human") == names("chatgpt") == data.LABELS
    assert names(" b", "a ", " b") == ("a", "b")
    assert names("01", "1") == ("01", "1")
    assert names(0, 1.0, "0.0", "1", "1.0") == ("0", "1")


def test_numbers_are_the_same_labels_in_every_format(tmp_path):
    for name, labels in {"a.csv": "0.0 1.0", "b.csv": "0 1", "c.tsv": "0 1.0"}.items():
        mark = "\t" if name.endswith(".tsv") else ","
        rows = [f"text {i}{mark}{label}" for i, label in enumerate(labels.split())]
        (tmp_path / name).write_text("\n".join([f"text{mark}label", *rows]), encoding="utf-8")
        assert [e["label"] for e in data.load_examples([str(tmp_path / name)])[0]] == ["0", "1"]


def test_own_rows_of_any_label_are_all_used(tmp_path):
    """The published protocol's 5,000 rows are HC3's; more detector data of one's own is not cut."""
    rows = [{"text": f"t{i}", "label": data.LABELS[i % 2]} for i in range(5500)]
    examples, labels = data.load_examples([write_csv(tmp_path / "own.csv", rows)])
    assert sum(map(len, data.split_examples(examples, labels=labels).values())) == 5500


def test_each_class_has_its_share_in_each_part(tmp_path):
    """A rare class of 1 % would be missing in the test part of a random split of 300 rows more often than not."""
    rows = [{"text": f"t{i}", "label": "rare" if i % 30 == 0 else "common"} for i in range(300)]
    examples, labels = data.load_examples([write_csv(tmp_path / "own.csv", rows)])
    parts = data.split_examples(examples, labels=labels)
    count = {part: Counter(example["label"] for example in parts[part]) for part in parts}
    assert count == {"train": {"common": 232, "rare": 8}, "validation": {"common": 29, "rare": 1},
                     "test": {"common": 29, "rare": 1}}  # fmt: skip
    assert parts == data.split_examples(examples, labels=labels)


@pytest.mark.parametrize("validation", ["validation.csv", "Dev.csv", "valid.csv", None])
def test_given_parts_are_used(validation, tmp_path, capsys):
    """train, validation (dev, val) and test given together are these parts, and the checkpoint remembers it."""
    topics = rows_of_topics(150)
    parts = {"train.csv": topics[:90], "test.csv": topics[90:120]} | ({validation: topics[120:]} if validation else {})
    files = [write_csv(tmp_path / name, rows) for name, rows in parts.items()]
    out = tmp_path / "out"
    train.main(["--lora", "--model", str(TINY), "--data", *files, "--output_dir", str(out), "--epochs", "1"])
    sizes = evaluate.read_run(out)["split"]["sizes"]
    assert sizes == {"train": 90 if validation else 81, "validation": 30 if validation else 9, "test": 30}
    assert "【data_test】 num_rows: 30 (10 天气, 10 菜谱, 10 足球)" in capsys.readouterr().out
    evaluate.main(["--ckpt", str(out)])
    lines = (out / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["question"] for line in lines] == [row["text"] for row in topics[90:120]]


def test_parts_without_train_are_refused(tmp_path):
    files = [write_csv(tmp_path / name, rows_of_topics(30)) for name in ("dev.csv", "test.csv")]
    examples, labels = data.load_examples(files)
    with pytest.raises(data.InputError, match="give its train file as well"):
        data.split_examples(examples, labels=labels)


def test_class_that_a_part_lacks_is_said(tmp_path, capsys):
    rows = [{"text": f"t{i}", "label": "c" if i == 0 else "ab"[i % 2]} for i in range(40)]
    examples, labels = data.load_examples([write_csv(tmp_path / "own.csv", rows)])
    data.print_parts(data.split_examples(examples, labels=labels), labels)
    assert "the test part has no text of the class c" in capsys.readouterr().out


def test_rows_of_one_question_stay_together(tmp_path):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2], "question": f"q{i // 4}"} for i in range(400)]
    examples, labels = data.load_examples([write_csv(tmp_path / "own.csv", rows)], protocol="strict")
    parts = data.split_examples(examples, "strict", labels)
    asked = {part: {example["question"] for example in examples} for part, examples in parts.items()}
    assert not asked["train"] & asked["test"] and not asked["validation"] & asked["test"]
    assert sum(map(len, parts.values())) == 400


# ---- files as people have them --------------------------------------------------------------------

SENTENCES = ["今天下雨，\n记得带伞", 'she said "no", twice', "球队进球；比赛赢了", "长" * 200_000]


def as_table(delimiter=",", newline="\r\n"):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerows([["text", "label"], *([text, "ab"[i % 2]] for i, text in enumerate(SENTENCES))])
    return file.getvalue()


ROWS = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(SENTENCES)]
LINES = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in ROWS)
READABLE = {  # file name and content, whose texts must be SENTENCES
    "UTF-8 .csv": ("a.csv", as_table().encode()),
    "a byte-order mark": ("a.csv", as_table().encode("utf-8-sig")),
    "GBK as Excel saves it in China": ("a.csv", as_table().encode("gbk")),
    "GB18030 .jsonl": ("a.jsonl", LINES.encode("gb18030")),
    "UTF-16": ("a.csv", as_table().encode("utf-16")),
    "UTF-16 with tabs, as Excel's Unicode text": ("a.tsv", as_table("\t").encode("utf-16")),
    "semicolons": ("a.csv", as_table(";").encode()),
    "tabs in a .csv": ("a.csv", as_table("\t").encode()),
    "tabs in a .tsv": ("a.tsv", as_table("\t").encode()),
    "old Mac line ends": ("a.csv", as_table(newline="\r").encode()),
    "Unix line ends": ("a.csv", as_table(newline="\n").encode()),
    "rows of empty cells": ("a.csv", (as_table() + ",\r\n , \r\n\r\n").encode()),
    "an array in .json": ("a.json", json.dumps(ROWS, indent=1).encode()),
    "an array in .jsonl": ("a.jsonl", json.dumps(ROWS, ensure_ascii=False).encode()),
    "an array with a byte-order mark": ("a.json", json.dumps(ROWS).encode("utf-8-sig")),
    "lines in .json": ("a.json", LINES.encode()),
    "CRLF .jsonl": ("a.jsonl", LINES.replace("\n", "\r\n").encode()),
    "blank lines": ("a.jsonl", LINES.replace("\n", "\n\n \n").encode()),
}


@pytest.mark.parametrize("what", READABLE)
def test_files_as_people_have_them(what, three_classes, tmp_path, capsys):
    """Training, evaluation and --predict read the very same texts."""
    name, content = READABLE[what]
    (tmp_path / name).write_bytes(content)
    examples, labels = data.load_examples([str(tmp_path / name)])
    assert [e["text"] for e in examples] == SENTENCES and labels == ("a", "b")
    printed = capsys.readouterr().out
    assert ("reading it as GB18030" in printed) == ("GB" in what)
    assert ("skipped" in printed) == ("empty" in what or "blank" in what)
    results = predict(three_classes[1], tmp_path / name, tmp_path / "out.jsonl")
    assert [row["text"] for row in results] == SENTENCES and all(row["predicted_label"] in TOPICS for row in results)
    capsys.readouterr()


# ---- --predict ------------------------------------------------------------------------------------


@pytest.fixture
def texts_file(tmp_path, monkeypatch):
    """250 rows, so two whole chunks of 100 and a part of one, some of which cannot be read."""
    monkeypatch.setattr(evaluate, "CHUNK", 100)
    lines = [json.dumps({"text": row["text"]}, ensure_ascii=False) for row in rows_of_topics(250)]
    lines[3], lines[70], lines[71], lines[72], lines[240] = "{", "", '{"text": "  "}', '["text"]', "\u2028"
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def predict(ckpt, source, output):
    evaluate.main(["--ckpt", str(ckpt), "--predict", str(source), "--output", str(output)])
    text = output.read_text(encoding="utf-8-sig")
    return (
        [json.loads(line) for line in text.splitlines()]
        if output.suffix == ".jsonl"
        else list(csv.DictReader(io.StringIO(text, newline="")))
    )


def test_predict_keeps_every_row_in_order(three_classes, texts_file, tmp_path, capsys):
    _, out = three_classes
    results = predict(out, texts_file, tmp_path / "new" / "labels.jsonl")
    bad = ["line 4 is not JSON", "line 72 has no text", "line 73 is a JSON list"]
    assert len(results) == 248 and "245 rows labelled, 3 skipped" in (printed := capsys.readouterr().out)
    assert "2 empty rows left out" in printed
    errors = [result["error"] for result in results if "error" in result]
    assert all(error.startswith(words) for error, words in zip(errors, bad, strict=True))
    good = [row["text"] for i, row in enumerate(rows_of_topics(250)) if i not in (3, 70, 71, 72, 240)]
    run = evaluate.read_run(out)
    model, tokenizer = evaluate.load_checkpoint(out, run)
    probabilities = evaluate.softmax(evaluate.predict(model, data.tokenize(tokenizer, good)[0]) / run["temperature"])
    results = [result for result in results if "error" not in result]
    assert [result["text"] for result in results] == good
    assert [result["label"] for result in results] == [run["labels"][k] for k in probabilities.argmax(1)]
    np.testing.assert_allclose([result["probability"] for result in results], probabilities.max(1), atol=1e-5)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_predict_a_csv(three_classes, tmp_path, capsys, suffix):
    """The row's own columns come back; a text may hold commas, quotes and line breaks; a broken row keeps its place."""
    _, out = three_classes
    texts = ['今天下雨，"气温"很低,\n记得带伞', "球队进球", "", "先放油，再炒鸡蛋"]
    path = write_csv(tmp_path / "texts.csv", [{"id": i, "text": text} for i, text in enumerate(texts)])
    with open(path, "a", encoding="utf-8") as file:
        file.write("4,a,b\n5,球迷欢呼\n")
    output = tmp_path / f"labels.{suffix}"
    results = predict(out, path, output)
    assert [result.get("label") or None for result in results] == ["天气", "足球", None, "菜谱", None, "足球"]
    assert [result.get("text") or None for result in results] == [texts[0], texts[1], None, texts[3], None, "球迷欢呼"]
    assert results[2]["error"] == "line 5 has no text" and results[4]["error"].startswith("line 7 has 3 fields, but")
    assert output.read_bytes().startswith(b"\xef\xbb\xbf") == (suffix == "csv")  # Excel wants the mark
    if suffix == "csv":
        assert list(results[0]) == ["id", "text", "label", "probability", "error"]
    capsys.readouterr()


def test_predict_keeps_columns_that_are_there(three_classes, tmp_path, capsys):
    _, out = three_classes
    path = write_csv(tmp_path / "texts.csv", [{"text": "球队进球", "label": "gold", "probability": "mine"}])
    [row] = predict(out, path, tmp_path / "labels.csv")
    assert (row["label"], row["predicted_label"], row["probability"]) == ("gold", "足球", "mine")
    assert 0 < float(row["predicted_probability"]) <= 1
    again = predict(out, tmp_path / "labels.csv", tmp_path / "again.jsonl")  # with a column `error` of our own
    assert [(row["label"], row["predicted_label"]) for row in again] == [("gold", "足球")]
    assert again[0]["predicted_predicted_label"] == "足球"  # a second model's answer does not replace the first's
    capsys.readouterr()


@pytest.mark.parametrize("cut", ["between chunks", "within a chunk", "within a line", "at the end"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_predict_continues(three_classes, texts_file, tmp_path, capsys, monkeypatch, cut, suffix):
    """Stopped anywhere, the same command goes on after the finished chunks and ends with the same bytes."""
    _, out = three_classes
    whole, part = tmp_path / f"whole.{suffix}", tmp_path / f"part.{suffix}"
    predict(out, texts_file, whole)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        predict(out, texts_file, part)
    [partial] = tmp_path.glob("part.*.partial")
    lines = partial.read_bytes().splitlines(keepends=True)
    kept = {"between chunks": lines[: 2 * evaluate.CHUNK], "within a chunk": lines[:150],
            "within a line": [*lines[:150], lines[150][:14]], "at the end": lines}[cut]  # fmt: skip
    partial.write_bytes(b"".join(kept))
    scored = []

    def counting(model, token_ids, *args, predict=evaluate.predict):
        scored.append(len(token_ids))
        return predict(model, token_ids, *args)

    monkeypatch.setattr(evaluate, "predict", counting)
    predict(out, texts_file, part)
    assert part.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("*.partial"))
    assert sum(scored) <= 150, "rows that were finished must not all be labelled again"
    capsys.readouterr()


def test_predict_does_not_continue_another_run(three_classes, texts_file, tmp_path, capsys):
    """The name of the partial file depends on the source and on the run; a finished output is never replaced."""
    _, out = three_classes
    output = tmp_path / "labels.jsonl"
    (tmp_path / "labels.jsonl.01234567.partial").write_text('{"text": "another run\'s"}\n' * evaluate.CHUNK)
    assert len(predict(out, texts_file, output)) == 248
    before = output.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        predict(out, texts_file, output)
    assert stopped.value.code == 2 and "exists already" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_predict_killed_and_called_again(three_classes, tmp_path, capsys):
    _, out = three_classes
    texts = write_csv(tmp_path / "texts.csv", rows_of_topics(2500))
    predict(out, texts, tmp_path / "whole.csv")
    output = tmp_path / "part.csv"
    command = [sys.executable, str(ROOT / "evaluate.py"), "--ckpt", str(out), "--predict", texts]
    process = subprocess.Popen(
        [*command, "--output", str(output)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not any(path.stat().st_size for path in tmp_path.glob("part.csv.*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    predict(out, texts, output)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    capsys.readouterr()
