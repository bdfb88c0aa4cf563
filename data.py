"""Read HC3-Chinese or your own file, split it, and pack a batch of texts into one row without padding.

    python data.py                                                     # the baike subset: split and token lengths
    python data.py --data tests/sample.jsonl --model tests/tiny-qwen   # any file, any tokenizer, offline
    python data.py --data tests/sample.jsonl --audit                   # leaks and baselines (needs scikit-learn)

The first downloads 4,617 questions and a tokenizer, once; each of the others takes less than ten seconds.

A batch is one row: its texts laid end to end, without padding. `position_ids` restart with every text, attention stays
inside a text, and the classifier reads the hidden state of each text's last token. So there is no pad token to set,
no computation is wasted, and a text's logits do not depend on its neighbours.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers  # lazy: each part is imported at its first use
from accelerate.utils import parse_flag_from_env, release_memory
from safetensors import safe_open

SUBSETS = ("baike", "open_qa", "nlpcc_dbqa", "finance", "medicine", "law", "psychology")
LABELS = ("human", "chatgpt")  # class 0 and class 1 of HC3; your own task has its own
FIELDS = ("question", "human_answers", "chatgpt_answers")  # of an HC3 row; the answers are lists
REPOSITORIES = {"huggingface": "Hello-SimpleAI/HC3-Chinese", "modelscope": "AI-ModelScope/HC3-Chinese"}
PARTS = ("train", "validation", "test")
FILE_PARTS = dict.fromkeys(("validation", "valid", "val", "dev"), "validation") | {"train": "train", "test": "test"}
PROTOCOLS = ("seed", "strict")  # see split_examples
SPLIT_SEED = 233  # the published one, and fixed: --seed changes the training but never the split
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --mixed_precision
MODEL_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt"]  # all we download: none of these can hold Python code
COLUMNS = {"text": ("text", "content", "sentence", "review", "文本", "内容"),  # what people call the two columns
           "label": ("label", "labels", "target", "intent", "标签", "类别")}  # fmt: skip
SIGNATURES = {b"PAR1": "Parquet", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip or Excel", b"\xd0\xcf\x11\xe0": "Excel",
              b"version https://git-lfs": "a Git LFS pointer (run `git lfs pull`)"}  # fmt: skip
TRAINER_OPTIONS = {"--num_train_epochs": "--epochs", "--per_device_train_batch_size": "--batch_size",
                   "--fp16": "--mixed_precision fp16", "--output-dir": "--output_dir"}  # fmt: skip


class InputError(ValueError):
    """The user's input cannot be used; the message says in one line what is wrong and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser with one-line errors, which also recognises the Trainer's names for our options."""

    def format_help(self):
        self.formatter_class = argparse.ArgumentDefaultsHelpFormatter
        return re.sub(r"\s+\(default:\s+(None|False)\)", "", super().format_help())

    def error(self, message):
        hints = [f"{theirs} is {ours} here" for theirs, ours in TRAINER_OPTIONS.items() if theirs in message]
        self.exit(2, f"error: {short(message, 200)} ({'; '.join(hints) or '--help lists the options'})\n")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or a float from `low` (if `above`: greater than `low`) to `high`, and never infinite."""

    def parse(text):
        value = kind(text)
        if low <= value <= high and value != math.inf and not (above and value == low):
            return value
        most = f" and <= {high}" if high < math.inf else ""
        raise argparse.ArgumentTypeError(f"must be {'>' if above else '>='} {low}{most}, got {short(text)}")

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def folder(text):
    """An argparse type: the path of a folder that exists or can be made."""
    if file := next((path for path in (Path(text), *Path(text).parents) if path.is_file()), None):
        raise argparse.ArgumentTypeError(f"{file} is a file: choose a folder")
    return Path(text)


def one_line_errors(main):
    """Decorate `main(argv=None)`: an error that the user can fix ends as one line on stderr and exit code 2."""

    def wrapped(argv=None):
        if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
            sys.stdout.reconfigure(errors="backslashreplace")  # the console's encoding may lack some characters
        try:
            return main(argv)
        except torch.OutOfMemoryError:
            line = "out of GPU memory: lower --batch_size (and raise --gradient_accumulation_steps) or --max_length"
        except (InputError, OSError) as error:
            line = short(error, 300)
        except KeyboardInterrupt:
            line = "interrupted; train.py continues with --resume"
        finally:
            if torch.cuda.is_initialized():
                release_memory()  # a notebook's kernel lives on, and something else may need the GPU
        print(f"error: {line}", file=sys.stderr)  # out here, where no traceback keeps the model alive
        sys.exit(2)

    return wrapped


def short(value, most=40):
    """A value as one short line for an error message; of a library's exception, the type and text of its root cause."""
    if isinstance(value, Exception) and not isinstance(value, InputError | OSError):
        while cause := value.__cause__ or (not value.__suppress_context__ and value.__context__):
            value = cause  # the hubs' clients wrap an exception several times
        value = f"{type(value).__name__}: {value}"
    words = " ".join(str(value).split())
    return words if len(words) <= most else f"{words[:most]}..."


@contextlib.contextmanager
def refusing(problem, kinds=Exception):
    """Turn an exception of these kinds into an InputError that says what the problem is and, in brackets, why."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # one_line_errors knows what helps
    except kinds as error:
        raise InputError(f"{problem} ({short(error, 200)})") from None


@contextlib.contextmanager
def replacing(path):
    """The path of a temporary file that becomes `path` at the end, so that it appears whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there if the disk was full


def write_atomically(path, content):
    """Write the str `content` to `path` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace"))


def choose_precision(asked="auto"):
    """(mixed precision, why): as asked, as accelerate launch says, or as suits the hardware. Raises InputError."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # a bare launch exports "no" without being asked
    gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    major, minor = torch.cuda.get_device_capability() if gpu else (0, 0)
    built_for = [int(re.sub(r"\D", "", arch)) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    if gpu and built_for and 10 * major + minor < min(built_for):  # such as a P100 under a recent PyTorch
        raise InputError(f"this PyTorch has no kernels for {torch.cuda.get_device_name()}: choose another GPU")
    if asked != "auto" or launched != "no":
        chosen, why = (asked, "as asked") if asked != "auto" else (launched, "as accelerate launch says")
    else:  # by capability and not by is_bf16_supported, which is true on a T4, where bf16 is emulated
        chosen = "bf16" if major >= 8 else "fp16" if major == 7 else "no"
        why = f"compute capability {major}.{minor}" if gpu else "no GPU"
    if chosen not in DTYPES or (chosen == "fp16" and not gpu):  # on a CPU fp16 would silently be fp32
        raise InputError(f"{chosen} does not work here: use --mixed_precision no or bf16 (fp16 needs a GPU)")
    return chosen, why


def snapshot(hub, name, files, kind="model"):
    """The folder that holds these files of a repository on a hub. Raises InputError.

    The hub's client downloads what is missing from its cache; without a network, the cache must be complete.
    """
    options = {"repo_type": kind, "allow_patterns": files}
    try:
        if hub == "modelscope":
            from modelscope import snapshot_download  # imported here: it costs seconds
        else:
            from huggingface_hub import HfApi, constants, errors, snapshot_download

            with contextlib.suppress(errors.HfHubHTTPError):  # only to time out: snapshot_download would wait for ever
                HfApi().repo_info(name, repo_type=kind, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return Path(snapshot_download(name, **options))
    except Exception as error:  # the clients raise a dozen types
        reason = f"{hub}: {short(error, 80)}"
        if hub == "modelscope" and not isinstance(error, OSError):  # offline it would give a cache that lacks files
            raise InputError(reason) from None
    try:
        return Path(snapshot_download(name, local_files_only=True, **options))
    except Exception as error:
        lacks = re.search(r"\d+ file\(s\) are missing \(.*?\)", str(error))
        raise InputError(f"{reason}{f', and in the cache {lacks[0]}' if lacks else ''}") from None


@functools.cache  # with the time of the last change as part of the key; so the note below is printed once
def text_encoding(path, modified):
    """Encoding of a file: UTF-8, UTF-16 with a byte-order mark, or GB18030 (Excel in China). Raises InputError."""
    if not Path(path).is_file():  # a folder, or a pipe, which cannot be read twice
        raise InputError(f"{path} is a folder or a pipe: give a .jsonl or .csv file")
    with open(path, "rb") as file:
        start = file.read(64)
    for signature, kind in SIGNATURES.items():
        if start.startswith(signature):
            raise InputError(f"{path} is {kind}: a .csv or .jsonl file of text is needed")
    for encoding in ["utf-16"] if start[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "gb18030"]:
        with contextlib.suppress(UnicodeError), open(path, encoding=encoding) as file:
            while file.read(2**20):
                pass
            if encoding == "gb18030":
                print(f"{path} is not UTF-8: reading it as GB18030 (GBK)")
            return encoding
    raise InputError(f"{path} is damaged: it is neither UTF-8, UTF-16 nor GB18030 text")


def read_rows(path):
    """Yield (place, row) from a .csv or .tsv, else from JSON: an array, or an object per line. Raises InputError.

    `place` says where a row stands ("line 3"). `row` is a dict, None if it is empty, or an InputError about it.
    """
    with open(path, encoding=text_encoding(path, os.path.getmtime(path)), newline="") as file:
        yield from table_rows(file) if Path(path).suffix.lower() in (".csv", ".tsv") else json_rows(file)


def table_rows(file):
    """The rows of a .csv or .tsv; the separator is comma, semicolon or tab, whichever its header has most of."""
    csv.field_size_limit(2**31 - 1)  # else a text of more than 131,072 characters is an error
    header = file.readline()
    file.seek(0)
    rows, names, line = csv.reader(file, delimiter=max(",;\t", key=header.count), strict=True), None, 1
    try:
        for cells in rows:
            place, line = f"line {line}", rows.line_num + 1  # a quoted text may have several lines
            if names is None:
                names = [cell.strip() for cell in cells]
                if twice := [name for name in names if name and names.count(name) > 1]:
                    raise InputError(f"{file.name} has two columns named {short(twice[0])}: rename or remove one")
            elif not any(cell.strip() for cell in cells):
                yield place, None
            elif len(cells) != len(names):
                counts = f"has {len(cells)} fields, but the header has {len(names)}"
                yield place, InputError(f"{counts}: put texts that contain the separator in double quotes")
            else:
                yield place, dict(zip(names, cells, strict=True))
    except csv.Error as error:  # not strict, it would read on from a quote that is never closed to the file's end
        raise InputError(f"{file.name} is no valid CSV from line {line} on ({error}): is a quote not closed?") from None


def json_rows(file):
    """The rows of one JSON array, or of one JSON object per line."""
    array = next((line for line in file if line.strip()), "").lstrip().startswith("[")
    file.seek(0)
    with refusing(f"{file.name} is not JSON: its array is damaged", (ValueError, RecursionError)):
        lines = map(json.dumps, json.load(file)) if array else file
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
            if "\\u" in line:  # lone surrogates, which JSON allows but no tokenizer reads, become question marks
                row = json.loads(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
            if not isinstance(row, dict | None):
                row = InputError(f"is a JSON {type(row).__name__}, not an object with text and label (or HC3's fields)")
        except (ValueError, RecursionError) as error:
            row = InputError(f"is not JSON ({getattr(error, 'msg', error)}): give one object per line, or one array")
        yield f"{'row' if array else 'line'} {number}", row


def answers_of(row):
    """A row as a list of (label, texts, question); 1, 1.0 and "1.0" all are the label "1". Raises InputError."""
    if isinstance(row, InputError):
        raise row
    if "text" in row and "label" in row:
        label = re.sub(r"^(\s*-?\d+)\.0+(\s*)$", r"\1\2", str(row["label"]))
        if row["label"] is None or label.strip().lower() in ("", "nan", "null"):
            raise InputError("has an empty label: give it one, or remove the row")
        if isinstance(row["label"], bool | list | dict) or re.fullmatch(r"\s*-?\d*\.\d+\s*", label):
            raise InputError(f"has the label {short(label)}, which is neither a name nor a whole number")
        found = [(label, [row["text"]], row.get("question") or row["text"] or "")]
    elif all(field in row for field in FIELDS):
        found = [(label, row[f"{label}_answers"] or [], row["question"]) for label in LABELS]
    else:
        named = {column: [name for name in row if name.strip().lower() in COLUMNS[column]] for column in COLUMNS}
        advice = f"is there a header, and are the columns called text and label (HC3: {', '.join(FIELDS)})?"
        if [len(names) for names in named.values()] == [1, 1]:
            advice = "rename " + " and ".join(f"{name} to {new}" for new, [name] in named.items() if name != new)
        raise InputError(f"has the columns {short(', '.join(map(repr, row)) or 'none', 80)}: {advice}")
    for label, texts, question in found:
        name, kind = (f"{label}_answers", "a list of strings") if "label" not in row else ("text", "a string")
        if not isinstance(texts, list) or not all(isinstance(text, str | None) for text in texts):
            raise InputError(f"has a {name} that is not {kind}")
        if not isinstance(question, str):
            raise InputError("has a question that is not a string")
    return found


def normalise(text):
    """NFC, with each run of white space and literal backslash-n's as one space, and none at the ends.

    In HC3 such marks betray the class: a literal backslash-n stands in 91 % of medicine's ChatGPT answers and in no
    human one. The strict protocol applies this to every text, in training and afterwards.
    """
    return re.sub(r"(?:\\n|\s)+", " ", unicodedata.normalize("NFC", text)).strip()


def load_examples(sources, hub="huggingface", protocol="seed", labels=None):
    """(examples, class names): the texts of HC3-Chinese subsets ("all": each of them) and of files, in order.

    An example is a dict: `text`, `label` (a name), `question`, `source`, `hc3` (whether it is HC3's) and `row`, which
    the two answers to a question share. Of several answers the first that is not empty is used. `labels`: the names
    that may occur, if they are known. Raises InputError.
    """
    examples, paths = [], {}
    for source in (name for given in sources for name in (SUBSETS if given == "all" else (given,))):
        if source not in SUBSETS and not (source and Path(source).exists()):
            raise InputError(f"{source!r} is neither a file nor a subset (subsets: {', '.join(SUBSETS)}, all)")
        paths[source] = Path(source) if source not in SUBSETS else None
    for source, path in paths.items():  # every file exists: only now may a download start
        path, before, skipped = path or fetch_subset(source, hub), len(examples), Counter()
        for place, row in read_rows(path):
            try:
                found = answers_of(row) if row is not None else []
            except InputError as error:
                raise InputError(f"{path}, {place} {error}") from None
            skipped["empty rows"] += row is None
            for label, texts, question in found:
                texts = (text if protocol == "seed" else normalise(text) for text in texts if text)
                text = next((text for text in texts if text.strip()), None)
                skipped["missing or empty texts"] += text is None
                if text is not None:
                    example = {"text": text, "label": label, "question": question, "source": path.stem}
                    examples.append(example | {"row": place, "hc3": not {"text", "label"} <= row.keys()})
        if skipped.total():
            print(f"{source}: skipped {', '.join(f'{count} {what}' for what, count in skipped.items() if count)}")
        if len(examples) == before:
            raise InputError(f"{source} is empty or holds no texts: give rows with text and label (or HC3's fields)")
    return examples, class_names(examples, labels)


def fetch_subset(name, hub):
    """Path of an HC3-Chinese subset, from `hub` or else from the other one. Raises InputError with what both said."""
    file, said = f"{name}.jsonl", []
    for source in sorted(REPOSITORIES, key=lambda source: source != hub):  # the preferred hub first
        try:
            path = snapshot(source, REPOSITORIES[source], [file], "dataset") / file
            if path.is_file():  # neither client minds a pattern that matches nothing
                return path
            said.append(f"{source}: it has no {file}")
        except InputError as error:
            said.append(str(error))
    raise InputError(f"cannot download {file} ({'; '.join(said)}). Get it elsewhere and pass its path as --data")


def class_names(examples, known=None):
    """The class names: HC3's two if there are no other labels, else all labels, sorted. Strips them in `examples`.

    Raises InputError on labels that differ only in case or white space, and on labels that are not `known`.
    """
    spellings = {}
    for label in sorted({example["label"] for example in examples}):
        spellings.setdefault(unicodedata.normalize("NFKC", label).strip().casefold(), []).append(label)
    if twice := next((labels for labels in spellings.values() if len(labels) > 1), None):
        raise InputError(f"the labels {short(twice[0])!r} and {short(twice[1])!r} are nearly the same: use one of them")
    for example in examples:
        example["label"] = example["label"].strip()
    names, texts = ({example[field] for example in examples} for field in ("label", "text"))
    if known is not None and (strange := names - set(known)):
        strange, known = (short(", ".join(sorted(labels)), 80) for labels in (strange, known))
        raise InputError(f"the model does not know the labels {strange}: rename the values of `label` to {known}")
    if known is not None or names <= set(LABELS):
        return tuple(known or LABELS)
    if len(names) > len(texts) or len(names) == 1:
        problem = "are the columns text and label swapped?" if len(names) > 1 else "at least two labels are needed"
        raise InputError(f"{len(names)} labels ({short(min(names))!r}) for {len(texts)} texts: {problem}")
    return tuple(sorted(sorted(names), key=int if all(name.isdecimal() for name in names) else None))


def published_split(indices):
    """{index: part}, in order, of at most 5,000 drawn texts: seeded permutations by the library that was used then."""
    import datasets

    rows = datasets.Dataset.from_dict({"index": indices}).shuffle(seed=SPLIT_SEED)
    rows = rows.select(range(min(5000, len(rows)))).train_test_split(train_size=0.8, seed=SPLIT_SEED)
    rows["validation"], rows["test"] = rows["test"].train_test_split(train_size=0.5, seed=SPLIT_SEED).values()
    return {index: part for part in PARTS for index in rows[part]["index"]}


def split_examples(examples, protocol="seed", labels=LABELS):
    """{"train": examples, "validation": ..., "test": ...}. Raises InputError if a part, or a class in train, is empty.

    seed: for HC3 the published protocol: 5,000 texts (or all there are) drawn with seed 233, then 8:1:1 by texts, so
    that the two answers to a question may end up in different parts. For your own task all texts, 8:1:1 of each class.
    strict: whole questions by their SHA-256 mod 10 (0: test, 1: validation, else train); of a text in several parts
    only the copies in the part furthest from training stay, so that no test text was trained on.
    Files called train, validation (valid, val, dev) and test that are given together are these parts, whatever the
    protocol; a part that is not given is drawn from train.
    """
    if len(examples) < 10:
        raise InputError(f"{len(examples)} texts cannot be split 8:1:1: at least 10 are needed")
    sources = {example["source"].lower() for example in examples}
    named = len(sources) > 1 and sources <= FILE_PARTS.keys()
    if named and "train" not in sources:
        raise InputError(f"the files {', '.join(sorted(sources))} are parts of a task: give its train file as well")
    part = {i: FILE_PARTS[example["source"].lower()] if named else "train" for i, example in enumerate(examples)}
    pool, absent, drawn = [i for i in part if part[i] == "train"], set(PARTS) - set(part.values()), {}
    if protocol == "strict":
        digits = {i: int(hashlib.sha256(examples[i]["question"].encode()).hexdigest(), 16) % 10 for i in pool}
        drawn = {i: {0: "test", 1: "validation"}.get(digit, "train") for i, digit in digits.items()}
    elif all(example["hc3"] for example in examples) and not named:
        part = published_split(pool)
    else:
        rng = np.random.default_rng(SPLIT_SEED)
        for label in labels:
            rows = rng.permutation([i for i in pool if examples[i]["label"] == label])
            drawn |= {int(row): {1: "validation", 2: "test"}.get(k % 10, "train") for k, row in enumerate(rows)}
    part |= {i: name for i, name in drawn.items() if name in absent}
    parts = {name: [examples[i] for i in part if part[i] == name] for name in PARTS}
    if protocol == "strict":
        seen = set()
        for name in reversed(PARTS):
            parts[name] = [example for example in parts[name] if example["text"] not in seen]
            seen |= {example["text"] for example in parts[name]}
    if empty := [name for name in PARTS if not parts[name]]:
        raise InputError(f"the {empty[0]} part of these {len(examples)} texts is empty: give more questions or texts")
    if lacking := sorted(set(labels) - {example["label"] for example in parts["train"]}):
        raise InputError(f"the training part has no text with the label {lacking[0]}: more texts are needed")
    return parts


def leaks(parts):
    """How many test texts answer a question that is in train as well, and how many are copies of a training text."""
    trained = {field: {example[field] for example in parts["train"]} for field in ("question", "text")}
    return tuple(sum(example[field] in trained[field] for example in parts["test"]) for field in trained)


def print_parts(parts, labels, odd=None):
    """Print the texts per class of each part, their `odd` counts from `tokenize`, and what leaks from train to test."""
    for name, examples in parts.items():
        count = Counter(example["label"] for example in examples)
        classes = ", ".join(f"{count[label]} {label}" for label in labels)
        note = note_of((odd or {}).get(name, {}), "; ")
        print(f"【data_{'val' if name == 'validation' else name}】 num_rows: {len(examples)} ({classes}){note}")
        if absent := [label for label in labels if not count[label]]:
            print(f"the {name} part has no text of the class {', '.join(absent)}: it says nothing about that class")
    asked, copied = leaks(parts)
    print(f"of the test texts, {asked} answer a question of the training part, {copied} are copies of a training text")


def hash_examples(examples, labels):
    """SHA-256 (hex) of a part's texts and classes, in order; it is equal if two runs saw the same data."""
    rows = (json.dumps([example["text"], labels.index(example["label"])]) for example in examples)
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def check_model_files(folder):
    """Raise InputError on a model that cannot be loaded, or that would make transformers run or fetch something."""
    names, index = sorted(path.name for path in folder.iterdir()), "model.safetensors.index.json"
    weights, tensors = [name for name in names if name.endswith(".safetensors")], 0
    if "adapter_config.json" in names:
        raise InputError(f"{folder} is an adapter, not a whole model: give the base model that it was trained on")
    if not weights:
        has = short(", ".join(name for name in names if name.endswith((".bin", ".gguf", ".pt"))) or "no weights")
        raise InputError(f"{folder} has no model.safetensors (found: {has}): get the version that has it")
    name = "config.json"
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        layers = config.get("num_hidden_layers", 1)
        if index in names:
            name = index
            weights = {*json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()}
        for name in weights:
            with safe_open(folder / name, "pt") as file:  # reads the header only
                tensors += len(file.keys())
        too_many = layers > tensors
    except Exception as error:
        problem = f"is missing, damaged, cut off or a Git LFS pointer ({short(error, 100)})"
        raise InputError(f"{folder}/{name} {problem}: download it again") from None
    # A stranger's config could make transformers run or fetch code, or build 10**9 layers; GPTQ needs more packages.
    outside = r'"(auto_map|quantization_config|\w*_implementation\w*)": (?!null|"eager"|"sdpa")'
    asks = re.search(outside, json.dumps(config))
    if asks or too_many:
        key = asks[1] if asks else "num_hidden_layers"
        raise InputError(f"{folder}/config.json has a {key} that is not supported: get the original, unquantised model")


def fetch_model(name, hub="huggingface", weights=True):
    """Folder of a model, local or from the hub. `weights=False`: a tokenizer is enough. Raises InputError."""
    folder = Path(name)
    if not name or not folder.is_dir():
        other = next(other for other in REPOSITORIES if other != hub)
        with refusing(f"cannot load {short(name)!r}, not a local folder: give one as --model, or try --hub {other}"):
            folder = snapshot(hub, name, MODEL_FILES)
    if weights:
        check_model_files(folder)
    return folder


def load_tokenizer(folder):
    """The tokenizer of a model; if it has no pad token, eos becomes it, for those who pad. Raises InputError."""
    with refusing(f"cannot load a tokenizer from {folder}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes one without any file
            raise InputError("tokenizer.json is missing")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(auto_class, folder, dtype=torch.float32, new_head=None, **config):
    """A transformers model in `dtype`, from safetensors only; no code from its folder is run. Raises InputError.

    `new_head`: the seed for drawing the weights outside the backbone, if the folder holds a language model; None:
    every weight must be there. `config`: entries of the model's configuration.
    """
    torch.manual_seed(new_head or 0)
    transformers.logging.set_verbosity_error()  # "newly initialized" is meant for those who forgot to train
    transformers.logging.disable_progress_bar()
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    with refusing(f"cannot load a model from {folder}"):
        model, info = auto_class.from_pretrained(folder, ignore_mismatched_sizes=True, **options, **config)
    backbone = f"{model.base_model_prefix}."
    missing = sorted(key for key in info["missing_keys"] if new_head is None or key.startswith(backbone))
    if missing or info["mismatched_keys"]:
        problem = f"lacks {missing[0]}" if missing else f"has another size for {min(info['mismatched_keys'])[0]}"
        raise InputError(f"{folder} is incomplete or mixed up: compared with config.json, model.safetensors {problem}")
    return model


def load_classifier(folder, tokenizer, labels, dtype=torch.float32, new_head=None):
    """A sequence-classification model with a head called `score` and these labels; for the rest see `load_model`."""
    ids = {label: i for i, label in enumerate(labels)}
    names = {"label2id": ids, "id2label": dict(enumerate(labels)), "pad_token_id": tokenizer.pad_token_id}
    model = load_model(transformers.AutoModelForSequenceClassification, folder, dtype, new_head, **names)
    if not hasattr(model, "score"):
        raise InputError(f"{type(model).__name__} has no `score` head on the last token: use a decoder such as Qwen1.5")
    return model


def tokenize(tokenizer, texts, max_length=512):
    """Token ids of each text (list of lists of int), cut at `max_length` tokens (0: not cut), and a Counter.

    The Counter counts the texts shorter than five tokens and those that are cut. Strings such as `<|im_end|>` in a
    text are plain text and give ordinary tokens. A text without any token becomes one eos token, its last token.
    """
    options = {"split_special_tokens": True, "return_attention_mask": False, "verbose": False}
    token_ids = tokenizer(list(texts), **options)["input_ids"] if texts else []
    odd = Counter({"shorter than 5 tokens": sum(len(ids) < 5 for ids in token_ids)})
    odd[f"cut at {max_length} tokens"] = sum(len(ids) > max_length > 0 for ids in token_ids)
    return [ids[: max_length or None] or [tokenizer.eos_token_id] for ids in token_ids], odd


def note_of(odd, before=""):
    """The Counter of `tokenize` in words, with `before` in front of them; "" if no text is odd."""
    note = " and ".join(f"{n} {'is' if n == 1 else 'are'} {what}" for what, n in odd.items() if n)
    return note and before + note


def pack(token_ids, device="cpu"):
    """One row of several texts: the keyword arguments of `PackedClassifier.forward`.

    `token_ids`: n lists of int, T tokens in all. `cu_seqlens`: the texts' boundaries in the row, 0, ..., T. `lengths`
    is a tuple of int and not a tensor, so that cutting the row apart does not wait for the GPU.
    """
    lengths = tuple(map(len, token_ids))
    row = {
        "input_ids": torch.tensor([[token for ids in token_ids for token in ids]]),  # (1, T)
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],  # (1, T)
        "cu_seqlens": torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32),  # (n + 1,)
    }
    return {name: to_device(tensor, device) for name, tensor in row.items()} | {"lengths": lengths}


def to_device(tensor, device):
    """The tensor on the device, without waiting for it: the CPU builds a batch while the GPU has the one before."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def packed_attention(module, query, key, value, attention_mask, lengths, cu_seqlens, scaling, dropout=0.0, **kwargs):
    """Causal attention inside each text of a packed row; a transformers attention function ("packed").

    `query` (1, heads, T, head_dim), `key` and `value` (1, kv_heads, T, head_dim); `lengths` and `cu_seqlens` as from
    `pack`. Returns (1, T, heads, head_dim) and no attention weights.
    """
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise InputError("this model caps its attention or has attention sinks, which is not supported: use another")
    window = kwargs.get("sliding_window")  # a token sees itself and the window - 1 tokens before it
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if kind == "cuda" and dtype != torch.float32 and not dropout and (varlen_attn := varlen_attention()):
        q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # (T, heads, head_dim)
        bounds, size = (cu_seqlens, cu_seqlens, max(lengths), max(lengths)), (window - 1 if window else -1, 0)
        return varlen_attn(q, k, v, *bounds, scale=scaling, window_size=size)[None], None
    # On a CPU in bf16 the gradient of PyTorch's kernel takes two to four times as long as that of matrix products.
    by_products = kind == "cpu" and dtype == torch.bfloat16 and torch.is_grad_enabled() and not dropout
    groups, texts = query.shape[1] // key.shape[1], []  # query heads for each key head
    for q, k, v in zip(*(states.split(lengths, 2) for states in (query, key, value)), strict=True):
        mask, length = None, q.shape[2]
        if by_products or (window and length > window):
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - (window or length))
        if by_products:
            k, v = (states.repeat_interleave(groups, 1) for states in (k, v))
            scores = q * scaling @ k.mT + torch.where(mask, 0.0, -math.inf).to(dtype)  # (1, heads, length, length)
            texts.append(scores.softmax(-1) @ v)
        else:
            options = {"attn_mask": mask, "is_causal": mask is None, "dropout_p": dropout, "scale": scaling}
            texts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=groups > 1, **options))
    return torch.cat(texts, dim=2).transpose(1, 2), None


@functools.cache
def varlen_attention():
    """PyTorch's FlashAttention for all texts of a row in one call; None if this PyTorch or this GPU has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # imported here: it costs more than a second
    except ImportError:
        return None
    options = inspect.signature(varlen_attn).parameters
    usable = {"scale", "window_size"} <= options.keys() and torch.backends.cuda.is_flash_attention_available()
    if not usable or torch.cuda.get_device_capability() < (8, 0):  # PyTorch before 2.11, a build without it, or a T4
        return None
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in options else varlen_attn


def use_packed_attention(model):
    """Make a transformers model attend with `packed_attention`. Raises InputError if it has an attention of its own."""
    transformers.AttentionInterface.register("packed", packed_attention)
    model.set_attn_implementation("packed")
    if model.config._attn_implementation != "packed":
        raise InputError(f"{type(model).__name__} uses a custom attention that cannot be replaced: try Qwen1.5")


class PackedClassifier(torch.nn.Module):
    """A sequence-classification model (a transformers one, or PEFT's around it) that reads a packed batch.

    `forward(**pack(token_ids))` gives the logits of the n texts, float32 (n, classes). One module with one forward, so
    that DDP and autocast wrap it like any other. What is saved is `self.model`, a plain checkpoint.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        use_packed_attention(self.classifier())

    def classifier(self):
        """The transformers model without PEFT's wrapper; it contains the adapter's layers."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, input_ids, position_ids, cu_seqlens, lengths):
        row = {"input_ids": input_ids, "position_ids": position_ids, "cu_seqlens": cu_seqlens, "lengths": lengths}
        hidden = self.classifier().base_model(**row, use_cache=False).last_hidden_state  # (1, T, hidden_size)
        last_tokens = cu_seqlens[1:] - 1  # (n,)
        return self.classifier().score(hidden[0, last_tokens]).float()  # (n, classes)


@torch.no_grad()
def check_packed(model, token_ids, device):
    """Raise InputError if a PackedClassifier on the device cannot read these texts, or if they influence each other."""
    model.eval()
    config, longest = model.classifier().config, max(map(len, token_ids))
    if max(map(max, token_ids)) >= config.vocab_size:
        raise InputError("the tokenizer has more tokens than the model: they do not belong together")
    if longest > getattr(config, "max_position_embeddings", longest):
        raise InputError(f"a text has {longest} tokens, which the model cannot number: lower --max_length")
    with refusing("this model cannot read several texts in one row: use another decoder, such as Qwen1.5"):
        first, second = (model(**pack([[*other, 3, 4], [5, 6]], device))[1] for other in ([1, 2], [2, 7]))
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max())):
            raise InputError("the text in front changes a text's logits")


def save_predictions(path, examples, predictions, scores=()):
    """Write a JSON line per text, for `evaluate.py --compare`. A prediction may be None; `scores` are more fields."""
    lines = []
    for example, prediction, more in zip(examples, predictions, scores or [{}] * len(examples), strict=True):
        line = {"text_sha256": hashlib.sha256(example["text"].encode()).hexdigest(), "prediction": prediction, **more}
        line |= {field: example[field] for field in ("question", "source", "label")}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))


def add_options(parser, model="Qwen/Qwen1.5-0.5B", split=True):
    """The options that the scripts share, each with its default."""
    add = parser.add_argument
    sources = 'HC3 subset names, "all", or .csv, .tsv, .jsonl and .json files (text and label, or HC3 fields)'
    add("--data", nargs="+", default=["baike"], metavar="SOURCE", help=sources)
    add("--model", default=model, help="hub id or local folder of the base model")
    add("--hub", choices=REPOSITORIES, default="huggingface", help="hub of the model; asked first for the data too")
    if split:
        protocols = "seed: the published random split by texts; strict: split by questions, texts normalised"
        add("--protocol", choices=PROTOCOLS, default="seed", help=protocols)
        cut = "truncate texts to N tokens (0: never)"
        add("--max_length", type=number(int, 0, 2**31), default=512, metavar="N", help=cut)


def audit(args):
    """Print, for both protocols, what leaks and what shortcuts alone score on the test part. Needs scikit-learn."""
    with refusing("--audit needs scikit-learn: pip install scikit-learn", ImportError):
        from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler
        from sklearn.tree import DecisionTreeClassifier
    length = FunctionTransformer(lambda texts: [[len(text)] for text in texts])
    counts = CountVectorizer(preprocessor=lambda text: re.sub(r"[^\W_]", "", text), analyzer="char", ngram_range=(1, 2))
    ngrams = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    rules = {  # of several candidates, the one that is best on the validation part is scored
        "length": [make_pipeline(length, DecisionTreeClassifier(max_leaf_nodes=8))],
        "white space and punctuation": [make_pipeline(counts, MaxAbsScaler(), LogisticRegression(max_iter=2000))],
        "character 1-3-grams": [make_pipeline(ngrams, LogisticRegression(C=c, max_iter=1000)) for c in (1, 10, 100)],
    }
    facts = ("texts in train / test", "test texts whose question is in train", "test texts that are copies of train's")
    columns = [["", *facts, "accuracy of the largest class", *(f"accuracy of {rule}" for rule in rules)]]
    files = {}
    for protocol in PROTOCOLS:
        examples, labels = load_examples(args.data, args.hub, protocol)
        parts = split_examples(examples, protocol, labels)
        texts, true = ({part: [e[field] for e in parts[part]] for part in PARTS} for field in ("text", "label"))
        largest = max(map(true["test"].count, labels)) / len(true["test"])
        columns.append([protocol, f"{len(texts['train'])} / {len(texts['test'])}", *leaks(parts), f"{largest:.3f}"])
        for rule, candidates in rules.items():
            with refusing(f"--audit cannot learn from the {rule} of these texts", ValueError):  # such as no punctuation
                fitted = [candidate.fit(texts["train"], true["train"]) for candidate in candidates]
            best = max(fitted, key=lambda model: model.score(texts["validation"], true["validation"]))
            columns[-1].append(f"{best.score(texts['test'], true['test']):.3f}")
            name = f"predictions-{protocol}-{rule.split()[-1]}.jsonl"
            files[name] = parts["test"], best.predict(texts["test"]).tolist()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, predictions in files.items():
        save_predictions(args.output_dir / name, *predictions)
    for row in zip(*columns, strict=True):
        print("{:48}{:>12}{:>12}".format(*row))
    print("These baselines use no language model. Judge a detector by how far it beats them on the strict split.")
    print(f"written to {args.output_dir}, for evaluate.py --compare: {', '.join(files)}")


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--audit", action="store_true", help="show leaks and what shortcuts score; needs scikit-learn")
    parser.add_argument("--output_dir", type=folder, default=Path("out/audit"), help="folder for --audit's predictions")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    if args.audit:
        return audit(args)
    import datasets

    examples, labels = load_examples(args.data, args.hub, args.protocol)
    parts = split_examples(examples, args.protocol, labels)
    print(datasets.Dataset.from_list(examples), json.dumps(examples[0], ensure_ascii=False, indent=1), sep="\n")
    print_parts(parts, labels)
    tokenizer = load_tokenizer(fetch_model(args.model, args.hub, weights=False))
    token_ids, odd = tokenize(tokenizer, [example["text"] for example in examples], args.max_length)
    lengths = np.array([len(ids) for ids in token_ids])
    quantiles = ", ".join(f"{q} %: {np.percentile(lengths, q):.0f}" for q in (0, 25, 50, 75, 95, 100))
    print(f"tokens per text: {quantiles}; mean {lengths.mean():.0f}{note_of(odd, '; ')}")
    if args.max_length:
        padding = 1 - lengths.mean() / args.max_length
        print(f"padded to {args.max_length} tokens, {padding:.1%} of all tokens would be padding; packed, none is")


if __name__ == "__main__":
    main()
