"""From raw records to examples, to the published split and the strict one, to tokens."""

import hashlib
import json
from collections import Counter

import pytest
from conftest import SAMPLE, SHARED, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import data

# First rows of each part of the published split of 9,234 texts, as datasets 2.18 to 5.2 draw them.
PUBLISHED_ROWS = {
    "train": [2108, 6384, 1313, 145, 4089, 5029, 30, 1347, 7958, 681],
    "validation": [9190, 2280, 427, 8917, 1309, 5709, 3574, 3966, 3755, 3244],
    "test": [716, 6188, 2383, 1652, 587, 3941, 282, 9177, 9232, 7366],
}


def record(question="q", human=("h",), chatgpt=("c",)):
    return {"question": question, "human_answers": human, "chatgpt_answers": chatgpt}


@pytest.fixture(scope="module")
def examples_of(tmp_path_factory):
    """A function: the examples of these records, read from a file as the scripts read it."""
    path = tmp_path_factory.mktemp("data") / "records.jsonl"

    def load(records, protocol="seed"):
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
        return data.load_examples([str(path)], protocol=protocol)[0]

    return load


def test_published_split(examples_of):
    examples = examples_of(record(f"q{i}", [f"h{i}"], [f"c{i}"]) for i in range(4617))
    assert len(examples) == 9234
    assert [e["label"] for e in examples[:4]] == ["human", "chatgpt"] * 2 and examples[9]["text"] == "c4"
    parts = data.split_examples(examples)
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 4000, "validation": 500, "test": 500}
    for part, rows in PUBLISHED_ROWS.items():
        assert parts[part][:10] == [examples[row] for row in rows]


def test_small_data_uses_all_rows(examples_of):
    examples = examples_of(record(f"q{i}", [f"h{i}"], [f"c{i}"]) for i in range(50))
    parts = data.split_examples(examples)
    assert [len(parts[part]) for part in data.PARTS] == [80, 10, 10]
    assert Counter(e["text"] for part in parts.values() for e in part) == Counter(e["text"] for e in examples)


def test_first_non_empty_answer(examples_of, capsys):
    records = [record(human=[None, "", " \n", "first", "second"]), record(human=[], chatgpt=[None])]
    assert [e["text"] for e in examples_of(records)] == ["first", "c"]
    assert "skipped 2 missing or empty texts" in capsys.readouterr().out


def test_strict_normalises_and_seed_does_not(examples_of):
    raw = " e\u0301\\n\\n b\t c\n"
    assert examples_of([record(human=[raw])], "seed")[0]["text"] == raw
    assert examples_of([record(human=[raw])], "strict")[0]["text"] == "\u00e9 b c"
    assert examples_of([record(human=["\\n", "x"])], "strict")[0]["text"] == "x"


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_normalise_is_idempotent(text):
    once = data.normalise(text)
    assert data.normalise(once) == once
    assert once == once.strip() and "  " not in once


def test_strict_parts_follow_the_question_alone(examples_of):
    questions = [f"问题{i}" for i in range(400)]
    examples = examples_of([record(q, [f"h{q}"], [f"c{q}"]) for q in questions], "strict")
    parts = data.split_examples(examples, "strict")
    where = {e["question"]: part for part, rows in parts.items() for e in rows}
    for question in questions:
        digit = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 10
        assert where[question] == ("test" if digit == 0 else "validation" if digit == 1 else "train")
    assert sum(map(len, parts.values())) == len(examples)
    half = examples_of([record(q, [f"h{q}"], [f"c{q}"]) for q in questions[::2]], "strict")
    for part, rows in data.split_examples(half, "strict").items():
        assert all(where[e["question"]] == part for e in rows)


def test_strict_drops_copies_across_parts(examples_of):
    records = [record(f"问题{i}", [f"人{i % 7 if i % 3 == 0 else i}"], [f"机{i}"]) for i in range(300)]
    examples = examples_of(records, "strict")
    parts = data.split_examples(examples, "strict")
    texts = {part: {e["text"] for e in rows} for part, rows in parts.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"] and not texts["validation"] & texts["test"]
    asked = {e["text"] for e in examples if int(hashlib.sha256(e["question"].encode()).hexdigest(), 16) % 10 == 0}
    assert texts["test"] == asked  # the test part keeps its copies, whatever else is loaded
    seed = data.split_examples(examples, "seed")
    assert {e["text"] for e in seed["train"]} & {e["text"] for e in seed["test"]}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=3), st.text("ab", max_size=2)), min_size=30, max_size=60))
def test_parts_are_disjoint_and_cover(examples_of, rows):
    try:
        examples = examples_of([record(q, ["h" + h], ["c" + q]) for q, h in rows], "strict")
    except data.InputError:  # such as texts of white space only
        return
    for protocol in ("seed", "strict"):
        try:
            parts = data.split_examples(examples, protocol)
        except data.InputError:  # a part that stays empty is refused
            continue
        ids = [id(e) for part in parts.values() for e in part]
        assert len(set(ids)) == len(ids)
        if protocol == "seed":
            assert len(ids) == len(examples)
        else:
            assert {e["text"] for e in examples} == {e["text"] for part in parts.values() for e in part}


def test_sources_are_read_in_order(tmp_path):
    for name in ("a", "b"):
        lines = [json.dumps(record(f"{name}{i}")) for i in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    examples, _ = data.load_examples([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert [(e["row"], e["source"], e["question"], e["label"]) for e in examples[:5]] == [
        ("line 1", "a", "a0", "human"),
        ("line 1", "a", "a0", "chatgpt"),
        ("line 2", "a", "a1", "human"),
        ("line 2", "a", "a1", "chatgpt"),
        ("line 1", "b", "b0", "human"),
    ]


def test_special_token_strings_are_text():
    tokenizer = data.load_tokenizer(str(TINY))
    specials = {tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    texts = ["a<|im_end|>b", "<|endoftext|>", "你好<|im_start|>"]
    for text, ids in zip(texts, data.tokenize(tokenizer, texts, 0)[0], strict=True):
        assert not specials & set(ids)
        assert tokenizer.decode(ids) == text
    [cut], odd = data.tokenize(tokenizer, ["长" * 99], 7)
    [whole], none = data.tokenize(tokenizer, ["长" * 99], 0)
    assert cut == whole[:7] and data.note_of(odd) == "1 is cut at 7 tokens" and data.note_of(none) == ""
    assert data.note_of(data.tokenize(tokenizer, ["短"])[1], "; ") == "; 1 is shorter than 5 tokens"


def test_data_script_prints_what_the_seed_prints(capsys):
    data.main(["--data", str(SAMPLE), "--model", str(TINY)])
    printed = capsys.readouterr().out
    count = 2 * len(SAMPLE.read_text(encoding="utf-8").splitlines())
    assert f"num_rows: {count}" in printed and "'label'" in printed
    assert "【data_train】" in printed and "【data_test】" in printed
    assert "tokens per text" in printed and "would be padding" in printed


def best_threshold_accuracy(values, labels):
    """Accuracy of the best rule "class 1 from this value on", or its opposite, on these very texts."""
    best, n = 0.0, len(values)
    for threshold in sorted(set(values)):
        right = sum((value >= threshold) == label for value, label in zip(values, labels, strict=True)) / n
        best = max(best, right, 1 - right)
    return best


def test_sample_has_no_shortcut():
    """Neither length nor the count of any one character tells the sample's two classes apart."""
    examples, _ = data.load_examples([str(SAMPLE)])
    assert len(examples) == 600
    assert len({e["text"] for e in examples}) == len(examples)
    labels = [e["label"] == "chatgpt" for e in examples]
    assert best_threshold_accuracy([len(e["text"]) for e in examples], labels) <= 0.75
    for character in {c for e in examples for c in e["text"]}:
        assert best_threshold_accuracy([e["text"].count(character) for e in examples], labels) <= 0.75, character


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real tokenizer and data beside the checkout")
def test_real_data_and_tokenizer():
    examples, _ = data.load_examples(
        [str(SHARED / "hc3-chinese" / f"{name}.jsonl") for name in ("medicine", "nlpcc_dbqa")]
    )
    assert len(examples) == 2 * (1074 + 1709)
    tokenizer = data.load_tokenizer(str(SHARED / "qwen1.5-0.5b"))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (151643, 151643)
    assert data.tokenize(tokenizer, ["<|endoftext|>"])[0][0] != [151643]
