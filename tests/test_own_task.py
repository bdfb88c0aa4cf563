"""A user's own task: texts and labels of a .csv or .jsonl, any number of classes, from training to a labelled file."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

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
    ours, tokenizer, run = evaluate.load_checkpoint(out)
    texts = [row["text"] for row in rows_of_topics(12)]
    expected = evaluate.predict(ours, data.tokenize(tokenizer, texts), ours.device)
    model = AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        padded = AutoTokenizer.from_pretrained(merged)(texts, padding=True, return_tensors="pt")
        np.testing.assert_allclose(model(**padded).logits.numpy(), expected, rtol=0, atol=1e-4)
    assert model.config.id2label == dict(enumerate(run["labels"]))
    for batch_size in (1, 4):
        answers = pipeline("text-classification", model=str(merged))(texts, batch_size=batch_size)
        assert [answer["label"] for answer in answers] == [run["labels"][k] for k in expected.argmax(1)]
        scores = [answer["score"] for answer in answers]
        np.testing.assert_allclose(scores, evaluate.softmax(expected).max(1), rtol=0, atol=1e-4)
    evaluate.main(["--ckpt", str(out)])
    evaluate.main(["--ckpt", str(merged)])
    results = [json.loads((folder / "eval-test.json").read_text(encoding="utf-8")) for folder in (out, merged)]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)
    capsys.readouterr()


def test_names_of_labels(tmp_path):
    """Numbers as numbers, words as words; human and ChatGPT as HC3 has them, so that own files go with HC3's."""

    def names(*labels):
        path = tmp_path / "own.jsonl"
        path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
        return data.class_names(data.load_hc3([str(path)]))

    assert names(10, 2, 1) == ("1", "2", "10")
    assert names("b", "a", "c") == ("a", "b", "c")
    assert names("chatgpt", "human") == names("chatgpt") == data.LABELS
    assert names(" b", "a ", "b") == ("a", "b")
    assert names("01", "1") == ("01", "1")


def test_own_rows_of_any_label_are_all_used(tmp_path):
    """The published protocol's 5,000 rows are HC3's; more detector data of one's own is not cut."""
    rows = [{"text": f"t{i}", "label": data.LABELS[i % 2]} for i in range(5500)]
    examples, _ = data.make_examples(data.load_hc3([write_csv(tmp_path / "own.csv", rows)]))
    assert sum(map(len, data.split_examples(examples).values())) == 5500


def test_rows_of_one_question_stay_together(tmp_path):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2], "question": f"q{i // 4}"} for i in range(400)]
    records = data.load_hc3([write_csv(tmp_path / "own.csv", rows)])
    examples, _ = data.make_examples(records, "strict", data.class_names(records))
    parts = data.split_examples(examples, "strict", ("a", "b"))
    asked = {part: {example["question"] for example in examples} for part, examples in parts.items()}
    assert not asked["train"] & asked["test"] and not asked["validation"] & asked["test"]
    assert sum(map(len, parts.values())) == 400


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
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_predict_keeps_every_row_in_its_place(three_classes, texts_file, tmp_path, capsys):
    _, out = three_classes
    results = predict(out, texts_file, tmp_path / "new" / "labels.jsonl")
    bad = {3: "line 4 is not JSON", 70: "line 71 has no text", 71: "line 72 has no text",
           72: "line 73 has list", 240: "line 241 has no text"}  # fmt: skip
    assert len(results) == 250 and "250 rows, 5 of them" in capsys.readouterr().out
    assert {i for i, result in enumerate(results) if "error" in result} == set(bad)
    assert all(results[i]["error"].startswith(words) for i, words in bad.items())
    rows = rows_of_topics(250)
    good = [i for i in range(250) if i not in bad]
    model, tokenizer, run = evaluate.load_checkpoint(out)
    token_ids = data.tokenize(tokenizer, [rows[i]["text"] for i in good])
    probabilities = evaluate.softmax(evaluate.predict(model, token_ids, model.device) / run["temperature"])
    assert [results[i]["label"] for i in good] == [run["labels"][k] for k in probabilities.argmax(1)]
    np.testing.assert_allclose([results[i]["probability"] for i in good], probabilities.max(1), atol=1e-5)


def test_predict_a_csv(three_classes, tmp_path, capsys):
    """A text may hold commas, quotes and line breaks; a row with a field too many is kept in its place."""
    _, out = three_classes
    texts = ['今天下雨，"气温"很低,\n记得带伞', "球队进球", "", "先放油，再炒鸡蛋"]
    path = write_csv(tmp_path / "texts.csv", [{"id": i, "text": text} for i, text in enumerate(texts)])
    with open(path, "a", encoding="utf-8") as file:
        file.write("4,a,b\n5,球迷欢呼\n")
    results = predict(out, path, tmp_path / "labels.jsonl")
    assert [result.get("label") for result in results] == ["天气", "足球", None, "菜谱", None, "足球"]
    assert results[2]["error"] == "line 5 has no text" and results[4]["error"].startswith("line 7 has not the 2 fields")
    capsys.readouterr()


@pytest.mark.parametrize("cut", ["between chunks", "within a chunk", "within a line", "at the end"])
def test_predict_goes_on_with_what_is_there(three_classes, texts_file, tmp_path, capsys, cut):
    _, out = three_classes
    whole = tmp_path / "whole.jsonl"
    predict(out, texts_file, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    kept = {"between chunks": lines[: 2 * evaluate.CHUNK], "within a chunk": lines[:150],
            "within a line": [*lines[:150], lines[150][:14]], "at the end": lines}[cut]  # fmt: skip
    part = tmp_path / "part.jsonl"
    part.write_bytes(b"".join(kept))
    scored = []

    def counting(model, token_ids, *args, predict=evaluate.predict):
        scored.append(len(token_ids))
        return predict(model, token_ids, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "predict", counting)
        predict(out, texts_file, part)
    assert part.read_bytes() == whole.read_bytes()
    assert sum(scored) <= 150, "lines that were there must not all be made anew"
    capsys.readouterr()


def test_predict_does_not_go_on_with_other_labels(three_classes, texts_file, tmp_path, capsys):
    """A label that this checkpoint does not give, at the same probability: the output is another's, and is kept."""
    _, out = three_classes
    output = tmp_path / "labels.jsonl"
    last = predict(out, texts_file, output)[-1]["label"]
    lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[-1] = lines[-1].replace(last, next(topic for topic in TOPICS if topic != last))
    output.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        predict(out, texts_file, output)
    assert stopped.value.code == 2 and "holds other lines" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "".join(lines)


def test_predict_killed_and_called_again(three_classes, tmp_path, capsys):
    _, out = three_classes
    texts = write_csv(tmp_path / "texts.csv", rows_of_topics(2500))
    predict(out, texts, tmp_path / "whole.jsonl")
    output = tmp_path / "part.jsonl"
    command = [sys.executable, str(ROOT / "evaluate.py"), "--ckpt", str(out), "--predict", texts]
    process = subprocess.Popen([*command, "--output", str(output)], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not (output.exists() and output.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert output.stat().st_size < (tmp_path / "whole.jsonl").stat().st_size
    predict(out, texts, output)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    capsys.readouterr()
