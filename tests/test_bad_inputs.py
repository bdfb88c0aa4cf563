"""A table of what users get wrong, each row with the line that it must give.

Bad input ends as one line on stderr that says what is wrong, exit code 2, no traceback, and nothing written or changed.
A row is (what is wrong, files to lay out, command, words that the line must hold). Commands run in an empty folder that
holds good.jsonl (20 questions) and copies of those of the folders below that the row names; train.py, data.py and
prompt_baseline.py get the tiny base and good.jsonl where the row gives no --model or --data. The lines as printed are
collected while the tests run: `-s` shows them, and pytest's temporary folder keeps them in bad_inputs.md.
"""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SAMPLE, TINY, run_script
from safetensors.torch import load, save

import data
import evaluate
import prompt_baseline
import train

MAINS = {"data.py": data, "train.py": train, "evaluate.py": evaluate, "prompt_baseline.py": prompt_baseline}
RECORDS = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()[:20]]


# ---- file contents --------------------------------------------------------------------------------


def jsonl(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


GOOD = jsonl(RECORDS)
TORN = GOOD[: GOOD.rindex("answers")]


def first(**fields):
    """good.jsonl with the first record changed."""
    return jsonl([RECORDS[0] | fields, *RECORDS[1:]])


def edited(*removed, **fields):
    """A change of a JSON file: fields replaced, fields removed."""
    return lambda old: json.dumps({k: v for k, v in (json.loads(old) | fields).items() if k not in removed})


def half(old):
    return old[: len(old) // 2]


def without_tensor(pattern):
    """A change of a safetensors file: the tensors whose names match are gone."""
    return lambda old: save({k: v for k, v in load(old).items() if not re.search(pattern, k)})


def state(**content):
    """The bytes of a file that torch.save wrote."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def prediction(text, label="human"):
    """A line of a predictions file, with what --compare reads."""
    return {"text_sha256": text, "question": "q", "subset": "s", "label": label, "prediction": "human"}


OTHER_ARGUMENTS = vars(train.parse_args(["--model", str(TINY), "--data", "good.jsonl", "--lora_r", "16"]))
OTHER_ARGUMENTS = {name: value for name, value in OTHER_ARGUMENTS.items() if name not in train.FREE_TO_CHANGE}
# A full checkpoint's run.json, as far as evaluate.py relies on it.
FULL_RUN = {"model": "tiny", "hub": "huggingface", "data": ["good.jsonl"], "labels": ["human", "chatgpt"],
            "max_length": 64, "lora": False, "arguments": {},
            "split": {"protocol": "seed", "sha256": dict.fromkeys(data.PARTS, "")}}  # fmt: skip

# ---- data files -----------------------------------------------------------------------------------

# (what is wrong, the file, words)
HC3_FIELDS = "question, human_answers, chatgpt_answers"
BAD_DATA = [
    ("empty file", "", ["bad.jsonl", "empty", "text and label"]),
    ("blank lines only", "\n \n\t\n", ["bad.jsonl", "empty"]),
    ("bytes of no encoding", GOOD.encode() + b"\xff\xff\n", ["bad.jsonl", "damaged", "UTF-8"]),
    ("UTF-16 cut in the middle", GOOD.encode("utf-16")[:-1], ["bad.jsonl", "damaged", "UTF-16"]),
    ("Parquet", b"PAR1\x15\x04", ["bad.jsonl", "Parquet", ".csv or .jsonl"]),
    ("gzip", b"\x1f\x8b\x08\x00", ["bad.jsonl", "gzip", ".csv or .jsonl"]),
    ("a zip archive", b"PK\x03\x04\x14", ["bad.jsonl", "zip or Excel"]),
    ("an old Excel file", b"\xd0\xcf\x11\xe0\xa1", ["bad.jsonl", "Excel"]),
    ("a Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["Git LFS", "git lfs pull"]),
    ("a damaged array", json.dumps(RECORDS)[:-9], ["bad.jsonl", "array is damaged"]),
    ("an array of numbers", "[1, 2]", ["row 1", "is a JSON int", "text and label"]),
    ("one object over many lines", json.dumps(RECORDS[0], indent=1), ["line 1", "not JSON", "one object per line"]),
    ("a broken second line", GOOD.replace("\n", "\nnot json\n", 1), ["line 2 is not JSON (Expecting value)"]),
    ("a torn last line", TORN, ["line 20 is not JSON (Unterminated string starting at)"]),
    ("nested too deep", "[" * 100_000, ["bad.jsonl", "not JSON"]),
    ("a number a line", "1\n2\n", ["line 1", "int", "text and label"]),
    ("NaN a line", "NaN\n", ["line 1", "float", "text and label"]),
    (
        "other field names",
        jsonl([{"texts": "a", "labeled": 0}]),
        ["line 1", "'texts', 'labeled'", HC3_FIELDS, "text and label"],
    ),
    ("no fields", "{}\n", ["line 1", "none", HC3_FIELDS]),
    ("answers that are a string", first(human_answers="text"), ["line 1", "human_answers", "list of strings"]),
    ("answers that are numbers", first(chatgpt_answers=[1, 2]), ["line 1", "chatgpt_answers", "list of strings"]),
    ("answers in nested lists", first(chatgpt_answers=[["a"]]), ["line 1", "chatgpt_answers", "list of strings"]),
    ("answers that are an object", first(human_answers={"a": 1}), ["line 1", "human_answers", "list of strings"]),
    ("NaN among the answers", first(human_answers=[float("nan")]), ["line 1", "human_answers", "list of strings"]),
    ("a question that is a number", first(question=5), ["line 1", "question", "string"]),
    ("a question that is null", first(question=None), ["line 1", "question", "string"]),
    ("one class only", jsonl(r | {"chatgpt_answers": []} for r in RECORDS), ["no text with the label chatgpt"]),
    ("fewer texts than a split needs", jsonl(RECORDS[:4]), ["8 texts", "10 are needed"]),
    ("no answers", jsonl(r | {"human_answers": None, "chatgpt_answers": [""]} for r in RECORDS), ["holds no texts"]),
    ("white space only", jsonl(r | {"human_answers": [" \n"], "chatgpt_answers": ["\u3000"]} for r in RECORDS),
     ["holds no texts"]),
]  # fmt: skip
LONG = "a very long value that nobody wants to read in an error message " * 9
BAD_TABLES = [  # (what is wrong with a user's own file, the file, words)
    ("no label", jsonl([{"text": "a"}]), ["line 1", "'text'", "text and label"]),
    ("Chinese names", jsonl([{"内容": "a", "标签": "b"}]), ["line 1", "rename 内容 to text and 标签 to label"]),
    ("one other name", jsonl([{"text": "a", "Target": "b"}]), ["rename Target to label"]),
    ("two columns that may be the text", jsonl([{"content": "a", "review": "b", "label": "c"}]),
     ["'content', 'review', 'label'", "are the columns called text and label"]),
    ("a label that is a fraction", jsonl([{"text": "a", "label": 0.5}]), ["line 1", "label 0.5", "whole number"]),
    ("a label that is true", jsonl([{"text": "a", "label": True}]), ["line 1", "label", "name"]),
    ("a label that is null", jsonl([{"text": "a", "label": None}]), ["line 1", "empty label"]),
    ("a label that is empty", jsonl([{"text": "a", "label": " "}]), ["line 1", "empty label"]),
    ("a label that is NaN", jsonl([{"text": "a", "label": float("nan")}]), ["line 1", "empty label"]),
    ("a text that is a number", jsonl([{"text": 1, "label": "a"}]), ["line 1", "text that is not a string"]),
    ("a question that is a number", jsonl([{"text": "a", "label": "a", "question": 1}]), ["line 1", "question"]),
    ("ten labels of one text each", jsonl({"text": f"{i}", "label": i} for i in range(10)), ["part", "is empty"]),
    ("fewer texts than a split needs", jsonl({"text": f"{i}", "label": i % 2} for i in range(9)), ["9 texts", "10"]),
    ("labels that differ in case", jsonl({"text": f"{i}", "label": ["Human", "human"][i % 2]} for i in range(20)),
     ["'Human'", "'human'", "nearly the same"]),
    ("labels that differ in space", jsonl({"text": f"{i}", "label": ["天气", "天气\u3000"][i % 2]} for i in range(20)),
     ["'天气'", "nearly the same"]),
    ("text and label swapped", jsonl({"text": ["a", "b"][i % 2], "label": f"a long text {i}"} for i in range(20)),
     ["20 labels", "2 texts", "swapped"]),
    ("a long label", jsonl([{"text": "a", "label": LONG}] * 20), [LONG[:40], "two labels"]),
]  # fmt: skip
BAD_CSVS = [
    ("empty", "", ["bad.csv", "empty", "text and label"]),
    ("a header only", "text,label\n", ["bad.csv", "empty"]),
    ("no header", "a,b\nc,d\n", ["line 2", "'a', 'b'", "is there a header"]),
    ("a comma in a text", "text,label\na,b,c\n", ["line 2", "has 3 fields", "the header has 2", "double quotes"]),
    ("a field too few", "text,label\na,b\n\nc\n", ["line 4", "has 1 fields", "the header has 2"]),
    ("two columns of one name", "text,label,text\na,b,c\n", ["two columns named text"]),
    ("an empty label", "text,label\na,b\nc,\n", ["line 3", "empty label"]),
    ("a label that is nan", "text,label\na,b\nc,nan\n", ["line 3", "empty label"]),
    ("a label that is a fraction", "text,label\na,b\nc,0.5\n", ["line 3", "0.5", "whole number"]),
    ("bytes of no encoding", b"text,label\n\xff\xff,a\n", ["bad.csv", "damaged"]),
    (
        "a quote that is never closed, in the last column",
        'label,text\na,"b\n' + "c,d\n" * 40,
        ["bad.csv", "CSV", "quote"],
    ),
    ("one label", "text,label\n" + "a,spam\n" * 40, ["'spam'", "two labels"]),
    ("a quote that is never closed", 'text,label\n"a,b\n' + "c,d\n" * 40_000, ["bad.csv", "CSV", "quote"]),
]

ROWS = [(what, {"bad.jsonl": content}, "train.py --data bad.jsonl", words) for what, content, words in BAD_DATA]
ROWS += [(f"own task: {what}", {"bad.jsonl": c}, "train.py --data bad.jsonl", words) for what, c, words in BAD_TABLES]
ROWS += [(f".csv: {what}", {"bad.csv": content}, "train.py --data bad.csv", words) for what, content, words in BAD_CSVS]
ROWS += [
    ("no such file", {}, "train.py --data gone.jsonl", ["gone.jsonl", "subsets: baike"]),
    ("no such subset", {}, "train.py --data biake", ["'biake'", "subsets: baike"]),
    ("a folder as data", {"dir/": ""}, "train.py --data dir", ["dir", "is a folder", ".jsonl"]),
    ("an empty name", {}, "train.py --data ''", ["''"]),
    ("an Excel file", {"my.xlsx": "PK\x03\x04"}, "train.py --data my.xlsx", ["my.xlsx", "Excel", ".csv"]),
    ("a typo in --data comes before the model", {}, "train.py --data gone.jsonl --model no/model", ["gone.jsonl"]),
    ("a broken file comes before the model", {"bad.jsonl": "junk"}, "train.py --data bad.jsonl --model no/model",
     ["bad.jsonl", "line 1"]),
    ("a file comes before a download", {}, "train.py --data baike gone.jsonl", ["gone.jsonl"]),
    ("the second file is missing", {}, "train.py --data good.jsonl gone.jsonl", ["gone.jsonl"]),
    ("questions too few for whole ones", {"bad.jsonl": jsonl(r | {"question": "q"} for r in RECORDS)},
     "train.py --data bad.jsonl --protocol strict", ["part", "is empty", "more questions"]),
    ("other field names", {"bad.jsonl": '{"text": 1}'}, "data.py --data bad.jsonl", ["line 1", "'text'"]),
    ("no such file", {}, "data.py --data gone.jsonl", ["gone.jsonl", "subsets: baike"]),
    ("one class only", {"bad.jsonl": jsonl(r | {"human_answers": []} for r in RECORDS)}, "data.py --data bad.jsonl",
     ["no text with the label human"]),
    ("no such file", {}, "evaluate.py --ckpt trained --data gone.jsonl", ["gone.jsonl", "subsets: baike"]),
    ("a torn last line", {"bad.jsonl": TORN}, "evaluate.py --ckpt trained --data bad.jsonl", ["line 20"]),
    ("no answers at all", {"bad.jsonl": first(human_answers=[], chatgpt_answers=[]).splitlines()[0]},
     "evaluate.py --ckpt trained --data bad.jsonl", ["bad.jsonl", "holds no texts"]),
    ("two files of one name", {"a/x.jsonl": GOOD, "b/x.jsonl": GOOD},
     "evaluate.py --ckpt trained --data a/x.jsonl b/x.jsonl", ["two sources", "x", "rename"]),
    ("one question for every part", {"bad.jsonl": jsonl(r | {"question": "q"} for r in RECORDS)},
     "data.py --audit --data bad.jsonl",
     ["part", "is empty", "more questions"]),
    ("no punctuation anywhere",
     {"bad.jsonl": jsonl({"question": f"{i}", "human_answers": ["你"], "chatgpt_answers": ["我"]} for i in range(60))},
     "data.py --audit --data bad.jsonl", ["--audit"]),
    ("questions too few", {"bad.jsonl": jsonl(RECORDS[:3])}, "prompt_baseline.py --data bad.jsonl",
     ["3 questions", "5 are needed"]),
]  # fmt: skip

# ---- arguments ------------------------------------------------------------------------------------

FROM_ZERO, RATE = ["-1", "nan", "inf", "1.5"], ["-1", "0", "nan", "inf", "-inf"]
COUNT = ["0", *FROM_ZERO]
TRAIN_NUMBERS = {  # option: values that it refuses
    "lora_r": [*COUNT, "9" * 30],
    "lora_alpha": COUNT,
    "lora_dropout": ["-0.1", "1", "nan", "inf"],
    "epochs": COUNT,
    "batch_size": [*COUNT, "9" * 30],
    "gradient_accumulation_steps": COUNT,
    "learning_rate": RATE,
    "warmup_ratio": ["-0.1", "1.1", "nan", "inf"],
    "weight_decay": ["-0.1", "nan", "inf"],
    "max_grad_norm": RATE,
    "max_length": [*FROM_ZERO, "9" * 30],
    "save_steps": FROM_ZERO,
    "seed": [*FROM_ZERO, "9" * 30],
}
NUMBERS = [("train.py", name, value) for name, values in TRAIN_NUMBERS.items() for value in values]
NUMBERS += [("data.py", "max_length", value) for value in FROM_ZERO]
NUMBERS += [("evaluate.py --ckpt trained", "example", value) for value in FROM_ZERO]
NUMBERS += [
    ("prompt_baseline.py", name, value) for name in ("questions", "max_new_tokens", "batch_size") for value in COUNT
]
ROWS += [(f"{name} {value}", {}, f"{script} --{name}={value}", [f"--{name}", value]) for script, name, value in NUMBERS]
ROWS += [
    ("unknown option", {}, "train.py --learning_rates 1", ["--learning_rates", "--help"]),
    ("unknown option", {}, "data.py --epochs 1", ["--epochs", "--help"]),
    ("unknown option", {}, "evaluate.py --ckpt trained --batch 3", ["--batch", "--help"]),
    ("unknown option", {}, "prompt_baseline.py --lora", ["--lora", "--help"]),
    ("a line break in an argument", {}, "train.py 'a\nb'", ["a b", "--help"]),
    ("not a number", {}, "train.py --epochs two", ["--epochs", "int", "'two'"]),
    ("no value", {}, "train.py --lora_targets", ["--lora_targets", "expected"]),
    ("not a choice", {}, "train.py --mixed_precision fp8", ["--mixed_precision", "fp8", "bf16"]),
    ("not a choice", {}, "train.py --protocol random", ["--protocol", "random", "strict"]),
    ("not a choice", {}, "evaluate.py --ckpt trained --split dev", ["--split", "dev", "validation"]),
    ("a Trainer's option", {}, "train.py --num_train_epochs 3", ["--num_train_epochs is --epochs here"]),
    ("a Trainer's option", {}, "train.py --per_device_train_batch_size 8", ["is --batch_size here"]),
    ("a Trainer's option", {}, "train.py --fp16", ["--fp16 is --mixed_precision fp16 here"]),
    ("a Trainer's option", {}, "train.py --output-dir out", ["--output-dir is --output_dir here"]),
    ("nothing asked", {}, "evaluate.py", ["python evaluate.py --ckpt FOLDER"]),
    ("--ckpt left out", {}, "evaluate.py trained", ["python evaluate.py --ckpt trained"]),
    ("a hub id as checkpoint", {}, "evaluate.py --ckpt Qwen/Qwen1.5-0.5B", ["Qwen/Qwen1.5-0.5B", "train.py"]),
    ("the head as a target", {}, "train.py --lora --lora_targets score", ["score", "q_proj"]),
    ("no such layer", {}, "train.py --lora --lora_targets q_proh", ["q_proh", "q_proj", "down_proj"]),
    ("one of the layers is misspelt", {}, "train.py --lora --lora_targets q_proh k_proj v_proj o_proj",
     ["q_proh", "q_proj"]),
    ("no such layer, and a finished run is there", {},
     "train.py --lora --lora_targets no --output_dir trained --overwrite", ["no such layer"]),
    ("no such layer, and an unfinished run is there", {"held/state.pt": "precious"},
     "train.py --lora --lora_targets no --output_dir held --overwrite", ["no such layer"]),
    ("fp16 on a CPU", {}, "ACCELERATE_USE_CPU=true train.py --mixed_precision fp16", ["fp16", "GPU", "bf16"]),
    ("a precision that is none of ours", {}, "ACCELERATE_MIXED_PRECISION=fp8 train.py", ["fp8", "no or bf16"]),
    ("--prior_correction without logprob", {}, "prompt_baseline.py --prior_correction", ["--method logprob"]),
]  # fmt: skip

# ---- base models ----------------------------------------------------------------------------------

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988097824\n"
NO_SAFETENSORS = {"tiny/model.safetensors": None}
BAD_MODELS = [  # (what is wrong, files, words)
    ("no config.json", {"tiny/config.json": None}, ["tiny", "config.json"]),
    ("config.json is broken JSON", {"tiny/config.json": "{"}, ["tiny", "damaged"]),
    ("config.json is a Git LFS pointer", {"tiny/config.json": LFS}, ["tiny", "Git LFS pointer"]),
    ("unknown model_type", {"tiny/config.json": edited(model_type="nosuch")}, ["tiny", "nosuch"]),
    ("weights of other sizes", {"tiny/config.json": edited(intermediate_size=8)}, ["tiny", "size"]),
    ("no weights", NO_SAFETENSORS, ["tiny", "model.safetensors"]),
    ("truncated weights", {"tiny/model.safetensors": half}, ["tiny", "model.safetensors", "cut off"]),
    ("weights that are no safetensors", {"tiny/model.safetensors": "junk"}, ["tiny", "model.safetensors", "damaged"]),
    ("an index that is a Git LFS pointer", {"tiny/model.safetensors.index.json": LFS}, ["index", "LFS pointer"]),
    ("config.json is a list", {"tiny/config.json": "[]"}, ["config.json", "damaged"]),
    ("weights that are a Git LFS pointer", {"tiny/model.safetensors": LFS}, ["model.safetensors", "Git LFS pointer"]),
    ("pickled weights only", NO_SAFETENSORS | {"tiny/pytorch_model.bin": "x"}, ["pytorch_model.bin", "safetensors"]),
    ("GGUF weights only", NO_SAFETENSORS | {"tiny/q4.gguf": "GGUF"}, ["q4.gguf", "safetensors"]),
    ("GPTQ weights", {"tiny/config.json": edited(quantization_config={"quant_method": "gptq"})},
     ["quantization_config", "unquantised"]),
    ("a layer's weights are missing", {"tiny/model.safetensors": without_tensor("layers.0.*q_proj")},
     ["tiny", "layers.0", "incomplete"]),
    ("no tokenizer", {"tiny/tokenizer.json": None, "tiny/tokenizer_config.json": None}, ["tiny", "tokenizer"]),
    ("tokenizer.json is broken JSON", {"tiny/tokenizer.json": half}, ["tiny", "tokenizer"]),
    ("tokenizer_config.json is broken JSON", {"tiny/tokenizer_config.json": "{"}, ["tiny", "tokenizer"]),
    ("unknown tokenizer class",
     {"tiny/tokenizer.json": None, "tiny/tokenizer_config.json": '{"tokenizer_class": "No"}'}, ["tiny", "tokenizer"]),
]  # fmt: skip
ROWS += [(what, files, "train.py --model tiny", words) for what, files, words in BAD_MODELS]
ROWS += [(what, files, "prompt_baseline.py --model tiny", words) for what, files, words in BAD_MODELS]
ROWS += [
    ("no such folder, offline", {}, "train.py --model gone",
     ["'gone'", "not a local folder", "--model", "--hub modelscope"]),
    ("no such folder, offline", {}, "train.py --model ./gone/away", ["'./gone/away'", "not a local folder", "--model"]),
    ("no such folder, offline", {}, "data.py --model gone", ["'gone'", "not a local folder"]),
    ("no such folder, offline", {}, "prompt_baseline.py --model gone", ["'gone'", "not a local folder"]),
    ("a file as model", {}, "train.py --model good.jsonl", ["good.jsonl", "--model"]),
    ("an empty name", {}, "train.py --model ''", ["''", "not a local folder", "--model"]),
    ("an empty folder", {"dir/": ""}, "train.py --model dir", ["dir"]),
    ("an adapter as base", {}, "train.py --model trained", ["trained", "adapter"]),
    ("an encoder", {}, "train.py --model encoder", ["Bert", "decoder"]),
    ("a tokenizer of another model", {}, "train.py --model wordless", ["wordless"]),
    ("no chat template", {"tiny/tokenizer_config.json": edited("chat_template"), "tiny/chat_template.jinja": None},
     "prompt_baseline.py --model tiny", ["chat template", "--model"]),
    ("a chat template without system role",
     {"tiny/chat_template.jinja": "{{ raise_exception('System role not supported') }}"},
     "prompt_baseline.py --model tiny", ["chat template", "System role not supported"]),
    ("a chat template that is broken", {"tiny/chat_template.jinja": "{% for"}, "prompt_baseline.py --model tiny",
     ["chat template"]),
    ("a chat template without the message", {"tiny/chat_template.jinja": "hello"}, "prompt_baseline.py --model tiny",
     ["chat template"]),
]  # fmt: skip

# ---- checkpoints ----------------------------------------------------------------------------------

BAD_RUNS = [  # (what is wrong in run.json, its content or the change, words)
    ("gone", None, ["no run.json"]),
    ("broken JSON", "{", ["run.json", "damaged"]),
    ("a list", "[]", ["run.json", "damaged"]),
    ("not UTF-8", b"\xff\xfe", ["run.json", "damaged"]),
    ("no model", edited("model"), ["run.json", "damaged", "model"]),
    ("model is a number", edited(model=3), ["run.json", "damaged"]),
    ("lora is a string", edited(lora="yes"), ["run.json", "lora"]),
    ("data is a string", edited(data="baike"), ["run.json", "data"]),
    ("data holds numbers", edited(data=[1]), ["run.json", "damaged"]),
    ("split is a string", edited(split="seed"), ["run.json", "damaged"]),
    ("a split without hashes", edited(split={"protocol": "seed"}), ["run.json", "sha256"]),
    ("a split with hashes of no part", edited(split={"protocol": "seed", "sha256": {}}), ["run.json", "split"]),
    ("one label", edited(labels=["human"]), ["run.json", "labels"]),
    ("labels are numbers", edited(labels=[0, 1]), ["run.json", "damaged"]),
    ("labels are a string", edited(labels="ab"), ["run.json", "labels"]),
    ("hub is a path", edited(hub="../../x"), ["run.json", "hub"]),
    ("negative temperature", edited(temperature=-1.0), ["run.json", "temperature"]),
    ("temperature 0", edited(temperature=0), ["run.json", "temperature"]),
    ("temperature NaN", edited(temperature=float("nan")), ["run.json", "temperature"]),
    ("temperature is a string", edited(temperature="1"), ["run.json", "damaged"]),
    ("threshold is a string", edited(threshold="0.5"), ["run.json", "damaged"]),
    ("negative max_length", edited(max_length=-5), ["run.json", "a number"]),
    ("max_length is a string", edited(max_length="512"), ["run.json", "a number"]),
    ("no arguments", edited("arguments"), ["run.json", "arguments"]),
    ("its data file is gone", edited(data=["gone.jsonl"]), ["gone.jsonl"]),
    ("its data file is another", edited(data=["good.jsonl"]), ["good.jsonl", "does not match the data"]),
]
BAD_ADAPTERS = [  # (what is wrong, files, --model, words)
    ("the base model is gone", {"trained/run.json": edited(model="gone")}, "", ["'gone'", "base model", "--model"]),
    ("the base given is gone", {}, "--model away", ["'away'", "base model", "--model"]),
    ("a base of another hidden size", {}, "--model narrow", ["adapter", "does not fit", "narrow"]),
    ("a base of fewer layers", {}, "--model shallow", ["adapter", "does not fit", "shallow"]),
    ("a base of more layers", {}, "--model deep", ["adapter", "does not fit", "deep"]),
    ("the base given is an adapter", {}, "--model trained", ["trained", "adapter"]),
    ("no adapter weights", {"trained/adapter_model.safetensors": None}, "",
     ["adapter_model.safetensors", "incomplete"]),
    ("truncated adapter weights", {"trained/adapter_model.safetensors": half}, "", ["trained"]),
    ("no head in the adapter", {"trained/adapter_model.safetensors": without_tensor("score")}, "",
     ["trained", "score"]),
    ("a layer is missing in the adapter", {"trained/adapter_model.safetensors": without_tensor("layers.0.*q_proj")}, "",
     ["trained", "layers.0"]),
    ("another rank than run.json's", {"trained/run.json": edited(arguments={"lora_r": 4, "lora_alpha": 8,
     "lora_targets": ["q_proj"]})}, "", ["trained", "rank"]),
    ("no tokenizer", {"trained/tokenizer.json": None, "trained/tokenizer_config.json": None}, "",
     ["trained", "tokenizer"]),
    ("three labels for a head of two", {"trained/run.json": edited(labels=["a", "b", "c"])}, "", ["trained"]),
]  # fmt: skip
ROWS += [
    (f"run.json: {what}", {"trained/run.json": change}, "evaluate.py --ckpt trained", words)
    for what, change, words in BAD_RUNS
]
ROWS += [
    (what, files, f"evaluate.py --ckpt trained --text 你好 {model}", words)
    for what, files, model, words in BAD_ADAPTERS
]
ROWS += [
    ("no such checkpoint", {}, "evaluate.py --ckpt gone", ["gone", "no run.json"]),
    ("a file as checkpoint", {}, "evaluate.py --ckpt good.jsonl", ["good.jsonl", "no run.json"]),
    ("no checkpoint in the folder", {}, "evaluate.py --ckpt tiny", ["tiny", "no run.json", "not written by train.py"]),
    ("an unfinished run", {"half/metrics.jsonl": ""}, "evaluate.py --ckpt half",
     ["half", "has not finished", "--resume"]),
    ("a full checkpoint without its head", {"tiny/run.json": json.dumps(FULL_RUN)},
     "evaluate.py --ckpt tiny --text 你好", ["tiny", "score", "incomplete"]),
    ("a full checkpoint without weights", {"tiny/run.json": json.dumps(FULL_RUN), "tiny/model.safetensors": None},
     "evaluate.py --ckpt tiny --text 你好", ["tiny", "model.safetensors"]),
    ("no such checkpoint", {}, "prompt_baseline.py --ckpt gone", ["gone", "no run.json"]),
    ("its data file is gone", {"trained/run.json": edited(data=["gone.jsonl"])}, "prompt_baseline.py --ckpt trained",
     ["gone.jsonl"]),
    ("--example out of range", {}, "evaluate.py --ckpt trained --example 9999", ["9999", "0 to "]),
    ("empty --text", {}, "evaluate.py --ckpt trained --text ''", ["--text", "empty"]),
    ("--text of white space", {}, "evaluate.py --ckpt trained --text '\u3000 \n'", ["--text", "empty"]),
    ("a label that the model does not know", {"own.jsonl": jsonl([{"text": "a", "label": "robot"}])},
     "evaluate.py --ckpt trained --data own.jsonl", ["labels robot", "rename the values", "chatgpt, human"]),
    ("a prompt for another task", {"trained/run.json": edited(labels=["cat", "dog"])},
     "prompt_baseline.py --ckpt trained", ["cat, dog", "human or chatgpt"]),
    ("--text with --example", {}, "evaluate.py --ckpt trained --text 你好 --example 0", ["--text", "--example"]),
]  # fmt: skip

TEXTS = jsonl({"text": f"{i}"} for i in range(9))
PREDICT = "evaluate.py --ckpt trained --predict texts.jsonl --output"
ROWS += [
    ("--predict without --output", {}, "evaluate.py --ckpt trained --predict good.jsonl", ["--predict", "--output"]),
    ("--output without --predict", {}, "evaluate.py --ckpt trained --output good.jsonl", ["--predict", "--output"]),
    ("--predict: no such file", {}, f"{PREDICT} out.jsonl", ["texts.jsonl", "No such file"]),
    ("--predict: a folder", {"texts.jsonl/": ""}, f"{PREDICT} out.jsonl", ["texts.jsonl", "is a folder"]),
    ("--predict: empty", {"texts.jsonl": ""}, f"{PREDICT} out.jsonl", ["texts.jsonl", "no row with a text"]),
    ("--predict: no texts", {"texts.jsonl": GOOD}, f"{PREDICT} out.jsonl", ["texts.jsonl", "called text"]),
    ("--predict: Parquet", {"texts.jsonl": b"PAR1"}, f"{PREDICT} out.jsonl", ["texts.jsonl", "Parquet"]),
    ("--predict: bytes of no encoding", {"texts.jsonl": b"\xff\xff\n"}, f"{PREDICT} out.jsonl", ["damaged"]),
    ("--predict: two columns of one name", {"texts.csv": "text,text\na,b\n"},
     "evaluate.py --ckpt trained --predict texts.csv --output out.csv", ["two columns named text"]),
    ("--predict: --output is the file that is read", {"texts.jsonl": TEXTS}, f"{PREDICT} ./texts.jsonl", ["exists"]),
    ("--predict: --output is a folder", {"texts.jsonl": TEXTS, "dir.csv/": ""}, f"{PREDICT} dir.csv", ["dir.csv"]),
    ("--predict: --output is a user's own file", {"texts.jsonl": TEXTS, "mine.csv": "precious"}, f"{PREDICT} mine.csv",
     ["mine.csv", "exists already", "choose another"]),
    ("--predict: --output of another kind", {"texts.jsonl": TEXTS}, f"{PREDICT} out.xlsx", [".jsonl or .csv"]),
    ("--merge of what is no adapter", {"tiny/run.json": json.dumps(FULL_RUN)},
     "evaluate.py --ckpt tiny --merge merged", ["tiny", "not an adapter"]),
    ("--merge into a folder with files", {"held/mine.txt": "x"}, "evaluate.py --ckpt trained --merge held",
     ["held", "not empty"]),
    ("--merge with a base of other size", {}, "evaluate.py --ckpt trained --merge merged --model narrow",
     ["narrow", "does not fit"]),
    ("--report_to is gone", {}, "train.py --report_to wandb", ["--report_to", "--help"]),
]  # fmt: skip

# ---- files that the scripts wrote -----------------------------------------------------------------

A, OTHER = jsonl([prediction("a"), prediction("b")]), jsonl([prediction("a"), prediction("c")])
BAD_COMPARISONS = [  # (what is wrong, files, words)
    ("one file only", {"a.jsonl": A}, ["--compare", "two"]),
    ("a file is missing", {"a.jsonl": A, "b.jsonl": None}, ["b.jsonl"]),
    ("a folder", {"a.jsonl": A, "dir/": ""}, ["dir"]),
    ("different texts", {"a.jsonl": A, "b.jsonl": OTHER}, ["a.jsonl and b.jsonl", "same texts"]),
    ("other labels", {"a.jsonl": A, "b.jsonl": A.replace('"label": "human"', '"label": "x"')}, ["same texts"]),
    ("another order", {"a.jsonl": A, "b.jsonl": jsonl([prediction("b"), prediction("a")])}, ["order"]),
    ("empty files", {"a.jsonl": "", "b.jsonl": ""}, ["a.jsonl", "predictions"]),
    ("HC3 records", {"a.jsonl": A, "b.jsonl": GOOD}, ["b.jsonl", "predictions"]),
    ("numbers", {"a.jsonl": A, "b.jsonl": "1\n2\n"}, ["b.jsonl", "predictions"]),
    ("not JSON", {"a.jsonl": A, "b.jsonl": "junk"}, ["b.jsonl", "predictions"]),
    ("a torn last line", {"a.jsonl": A, "b.jsonl": A[:-9]}, ["b.jsonl", "predictions"]),
    ("not UTF-8", {"a.jsonl": A, "b.jsonl": b"\xff"}, ["b.jsonl", "predictions"]),
]
ROWS += [
    (f"--compare: {what}", files, f"evaluate.py --compare {' '.join(files)}", words)
    for what, files, words in BAD_COMPARISONS
]
BAD_REPLIES = [  # (what is wrong, replies.jsonl, words)
    ("missing", None, []),
    ("empty", "", ["no replies"]),
    ("not JSON", "human\n", ["label", "and a reply"]),
    ("torn", '{"label": "human", "reply": "hum', ["label", "and a reply"]),
    ("unknown label", '{"label": "robot", "reply": "human"}', ["human or chatgpt"]),
    ("reply is null", '{"label": "human", "reply": null}', ["label", "and a reply"]),
    ("reply is a number", '{"label": "human", "reply": 1}', ["label", "and a reply"]),
    ("no reply", '{"label": "human"}', ["label", "and a reply", "'reply'"]),
    ("HC3 records", GOOD, ["label", "and a reply", "'label'"]),
    ("strings", '"human"\n', ["label", "and a reply"]),
    ("not UTF-8", b"\xff", ["label", "and a reply"]),
]
ROWS += [
    (f"--replay: {what}", {"replies.jsonl": content}, "prompt_baseline.py --replay replies.jsonl",
     ["replies.jsonl", *words])
    for what, content, words in BAD_REPLIES
]  # fmt: skip

# ---- output folders -------------------------------------------------------------------------------

ROWS += [
    ("--output_dir is a file", {}, "train.py --output_dir good.jsonl", ["good.jsonl", "file", "folder"]),
    ("--output_dir is below a file", {}, "train.py --output_dir good.jsonl/out", ["good.jsonl"]),
    ("--output_dir is the base model's", {}, "train.py --model tiny --output_dir ./tiny",
     ["tiny", "base model", "another"]),
    ("--output_dir holds an unfinished run", {"held/state.pt": "x"}, "train.py --output_dir held",
     ["unfinished", "--resume", "--overwrite"]),
    ("--output_dir holds a finished run", {}, "train.py --output_dir trained", ["a finished run", "--overwrite"]),
    ("--resume of a finished run with other arguments", {}, "train.py --output_dir trained --resume --epochs 9",
     ["changed: ", "epochs (was 1, now 9)"]),
    ("--output_dir holds a foreign model", {"held/config.json": "{}", "held/model.safetensors": "x"},
     "train.py --output_dir held", ["held", "config.json", "choose another"]),
    ("--output_dir holds a foreign adapter", {"held/adapter_config.json": "{}", "held/adapter_model.safetensors": "x"},
     "train.py --lora --output_dir held --overwrite", ["held", "other files", "choose another"]),
    ("--output_dir holds a user's files", {"held/thesis.docx": "x"}, "train.py --output_dir held --overwrite",
     ["thesis.docx", "choose another"]),
    ("--output_dir holds the data", {"held/run.json": "{}", "held/predictions-mine.jsonl": GOOD},
     "train.py --output_dir held --overwrite --data held/predictions-mine.jsonl", ["held", "training data"]),
    ("--resume with other arguments", {"held/state.pt": state(arguments=OTHER_ARGUMENTS)},
     "train.py --output_dir held --resume", ["--resume", "lora_r (was 16, now 8)"]),
    ("--resume of a broken state", {"held/state.pt": "junk"}, "train.py --output_dir held --resume",
     ["state.pt", "--overwrite"]),
    ("--resume of a state that is another program's", {"held/state.pt": state(a=1)},
     "train.py --output_dir held --resume", ["state.pt", "--overwrite"]),
    ("--output_dir is a file", {}, "evaluate.py --ckpt trained --output_dir good.jsonl",
     ["good.jsonl", "file", "folder"]),
    ("--output_dir is a file", {}, "data.py --audit --output_dir good.jsonl", ["good.jsonl", "file", "folder"]),
    ("--output_dir is a file", {}, "prompt_baseline.py --output_dir good.jsonl", ["good.jsonl", "file", "folder"]),
]  # fmt: skip

# ---- what must be refused -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folders(lora_checkpoint, tmp_path_factory):
    """Folders that a row can name: the tiny base, a LoRA checkpoint on it, and bases that fit neither."""
    made, base = tmp_path_factory.mktemp("bases"), transformers.AutoConfig.from_pretrained(TINY)
    layers = {name: base.num_hidden_layers + more for name, more in (("shallow", -1), ("deep", 1))}
    for name, change in {
        "narrow": {"hidden_size": base.hidden_size // 2},
        **{name: {"num_hidden_layers": n, "layer_types": ["full_attention"] * n} for name, n in layers.items()},
        "wordless": {"vocab_size": 100, "bos_token_id": None, "eos_token_id": None},
    }.items():
        config = transformers.AutoConfig.from_pretrained(TINY, **change)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made / name)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertConfig(vocab_size=base.vocab_size, **small)
    transformers.BertModel(bert).save_pretrained(made / "encoder")
    for folder in made.iterdir():
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / file, folder)
    return {"tiny": TINY, "trained": lora_checkpoint} | {folder.name: folder for folder in made.iterdir()}


@pytest.fixture
def lay_out(folders, tmp_path, monkeypatch):
    """A function that makes a row's files in an empty current folder and gives the row's script and arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where a download would leave something

    def lay_out(files, command):
        Path("good.jsonl").write_text(GOOD, encoding="utf-8")
        for name, source in folders.items():
            if re.search(rf"\b{name}\b", " ".join([command, *files])):
                shutil.copytree(source, name)
        for name, content in files.items():
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir()
            elif content is None:
                path.unlink(missing_ok=True)
            else:
                content = content(path.read_bytes()) if callable(content) else content
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        words = shlex.split(command)
        while "=" in words[0]:
            monkeypatch.setenv(*words.pop(0).split("="))
        script, *argv = words
        if script != "evaluate.py":
            argv += [] if "--model" in argv else ["--model", str(TINY)]
            argv += [] if "--data" in argv else ["--data", "good.jsonl"]
        return script, argv

    return lay_out


def everything_here():
    """All that lies in the current folder, so that anything written, changed or removed shows."""
    return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Collects (what, command, line printed), and writes the table when the tests are through."""
    rows = []
    yield rows
    lines = [f"| {what} | `{' '.join(command.split())}` | {line} |" for what, command, line in rows]
    text = "\n".join(["| what | command | line printed |", "|---|---|---|", *lines, ""]).replace(str(TINY), "TINY")
    (tmp_path_factory.getbasetemp() / "bad_inputs.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


def name_of(row):
    return f"{row[2].partition('.py')[0].split()[-1]}: {row[0]}".replace("/", " ")


def the_one_line(printed, words):
    """The line on stderr, progress bars aside, which must be the only one and hold the words."""
    lines = [line for line in re.split(r"[\r\n]+", printed) if line.strip() and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and printed.endswith("\n"), printed
    assert len(lines[0]) < 400 and "Traceback" not in printed
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    return lines[0]


@pytest.mark.parametrize(("what", "files", "command", "words"), ROWS, ids=map(name_of, ROWS))
def test_refused_in_one_line(what, files, command, words, lay_out, table, capsys):
    """Exit code 2, one line with the words, and the folder is byte for byte what it was."""
    if "--audit" in command:
        pytest.importorskip("sklearn")
    script, argv = lay_out(files, command)
    before = everything_here()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        MAINS[script].main(argv)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    line = the_one_line(printed.err, words)
    after = everything_here()
    assert [str(path) for path in before | after if before.get(path) != after.get(path)] == []
    table.append((what, command, line))


IN_PROCESSES = ["data: other field names", "train: --output_dir holds an unfinished run",
                "evaluate: truncated adapter weights", "prompt_baseline: no chat template"]  # fmt: skip


@pytest.mark.parametrize("name", IN_PROCESSES)
def test_refused_in_a_process(name, lay_out):
    """What a user's shell sees: the exit code, and stderr with whatever the libraries would add to it."""
    _, files, command, words = next(row for row in ROWS if name_of(row) == name)
    script, argv = lay_out(files, command)
    before = everything_here()
    done = run_script(script, *argv)
    assert done.returncode == 2
    the_one_line(done.stderr, words)
    assert everything_here() == before


def test_error_under_a_progress_bar(lay_out, capsys):
    """A run that fails on its way: the bar's line is ended first, so that the error has a line of its own."""
    _, argv = lay_out({}, "train.py --learning_rate 1e30 --save_steps 0")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.main(argv)
    assert ended.value.code == 2
    the_one_line(capsys.readouterr().err, ["step ", "loss", "--learning_rate"])


def test_every_number_of_train_is_in_the_table():
    numbers = {name for name, value in vars(train.parse_args([])).items() if type(value) in (int, float)}
    assert numbers == set(TRAIN_NUMBERS)
    zeros = ["lora_dropout", "warmup_ratio", "weight_decay", "max_length", "save_steps", "seed"]
    args = vars(train.parse_args([word for name in zeros for word in (f"--{name}", "0")]))
    assert [args[name] for name in zeros] == [0] * len(zeros)


# ---- what must work -------------------------------------------------------------------------------

MEGABYTE = "长文本" * 120_000  # 1.08 MB in UTF-8
FINE_TEXTS = {
    "a megabyte": MEGABYTE,
    "control characters": "a\x00b\x1b[31m\x7f\x85c",
    "emoji": "👩‍👩‍👧‍👦🇨🇳 \u200b\ufeff",
    "a lone surrogate": "a\ud800b\udc00",
    "special tokens": "<|endoftext|>a<|im_start|>b<|im_end|><|endoftext|>",
    "line separators": "a\u2028b\u2029c\r\nd",
    "one character": "字",
}
FINE = [  # (what is odd, the file, words that data.py prints)
    ("a byte order mark", "\ufeff" + GOOD, ["num_rows: 40"]),
    ("CRLF", GOOD.replace("\n", "\r\n"), ["num_rows: 40"]),
    ("blank lines", "\n\n" + GOOD.replace("\n", "\n \n"), ["num_rows: 40", "skipped 22 empty rows"]),
    (
        "answers that are null",
        first(human_answers=None, chatgpt_answers=[None]),
        ["num_rows: 38", "2 missing or empty"],
    ),
    (
        "answers that are empty",
        first(human_answers=[], chatgpt_answers=["", ""]),
        ["num_rows: 38", "2 missing or empty"],
    ),
    ("answers of white space", first(human_answers=[" \n\u3000"]), ["num_rows: 39", "1 missing or empty"]),
    ("a null before an answer", first(human_answers=[None, "", "a"]), ["num_rows: 40"]),
    ("one question again and again", jsonl(r | {"question": "q"} for r in RECORDS), ["num_rows: 40"]),
    ("an empty question", first(question=""), ["num_rows: 40"]),
    ("NaN in a field that is not used", first(score=float("nan")), ["num_rows: 40"]),
    *((what, first(question=text, human_answers=[text]), ["num_rows: 40"]) for what, text in FINE_TEXTS.items()),
]


@pytest.mark.parametrize(("what", "content", "words"), FINE, ids=[row[0] for row in FINE])
def test_odd_data_works(what, content, words, lay_out, capsys):
    script, argv = lay_out({"odd.jsonl": content}, "data.py --data odd.jsonl")
    MAINS[script].main(argv)
    printed = capsys.readouterr()
    assert [word for word in words if word not in printed.out] == []
    assert printed.err == ""


def test_odd_texts_are_tokenized_as_text(lay_out):
    """No text gives a special token, none is longer than asked, and each gives at least one token."""
    lay_out({"odd.jsonl": jsonl({"text": text, "label": what} for what, text in FINE_TEXTS.items())}, "data.py")
    examples, _ = data.load_examples(["odd.jsonl"])
    texts = [example["text"] for example in examples]
    assert texts == [text.replace("\ud800", "?").replace("\udc00", "?") for text in FINE_TEXTS.values()]
    tokenizer = data.load_tokenizer(TINY)
    special = {tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    for text, ids in zip(texts, data.tokenize(tokenizer, texts, 64)[0], strict=True):
        assert 0 < len(ids) <= 64 and not special & set(ids), text[:50]


def test_odd_texts_are_learned_and_scored(lay_out, capsys):
    """Through every script that reads them, and the files written are read back."""
    odd = [
        {"question": text[:9], "human_answers": [text], "chatgpt_answers": [f"{text[:9]}。"]}
        for text in FINE_TEXTS.values()
    ]
    files = {"odd.jsonl": jsonl([*odd, *RECORDS[:8]])}
    _, argv = lay_out(files, "train.py --lora --data odd.jsonl --max_length 64 --batch_size 16 --epochs 1")
    train.main(argv)
    evaluate.main(["--ckpt", "out", "--split", "all"])
    evaluate.main(["--compare", "out/predictions-all.jsonl", "out/predictions-all.jsonl"])
    assert f"({2 * len(odd) + 16} texts" in capsys.readouterr().out
    prompt_baseline.main(["--model", str(TINY), "--data", "odd.jsonl", "--questions", "99", "--max_new_tokens", "1"])
    prompt_baseline.main(["--replay", "out/prompt/replies.jsonl"])
    capsys.readouterr()
    for text in FINE_TEXTS.values():
        evaluate.main(["--ckpt", "out", "--text", text])
        assert re.fullmatch(r"(human|chatgpt) [01]\.\d{4}\n", capsys.readouterr().out)
