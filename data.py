"""HC3-Chinese: from the hub or a file to examples, to a split, to one packed batch, to logits.

    python data.py                                                     # the baike subset: rows, split, token lengths
    python data.py --data tests/sample.jsonl --model tests/tiny-qwen   # any file, any tokenizer, offline
    python data.py --data medicine law --protocol strict               # several subsets, whole questions to one part

The first downloads 4,617 questions and a tokenizer once; the second needs no network and takes about ten seconds.

A batch here is one row: its texts laid end to end, without padding. `position_ids` restart with every text, attention
stays inside a text, and the classifier reads the hidden state of each text's last token. So there is no pad token to
set, no token is wasted, and a text's logits do not depend on its neighbours.
"""

import argparse
import contextlib
import csv
import functools
import gc
import hashlib
import inspect
import json
import math
import os
import re
import sys
import unicodedata
from pathlib import Path

import torch
import transformers  # lazy: what it offers is imported at its first use

SUBSETS = ("baike", "open_qa", "nlpcc_dbqa", "finance", "medicine", "law", "psychology")
ANSWERS = {"human": "human_answers", "chatgpt": "chatgpt_answers"}  # HC3's fields
LABELS = tuple(ANSWERS)  # label 0, label 1; your own task has its own
FIELDS = ("question", *ANSWERS.values())
EXPECTED = f"{', '.join(FIELDS)} (HC3) or text, label (your own)"  # what an error message asks for
PARTS = ("train", "validation", "test")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --mixed_precision
PROTOCOLS = ("seed", "strict")  # see split_examples
SPLIT_SEED = 233  # of the published results; the split never follows --seed, so that runs differ by training alone
SEED_ROWS = 5000  # the published protocol draws this many of its 9,234 texts


# ---- what all four scripts share on the command line ---------------------------------------------


class InputError(ValueError):
    """The user's input cannot be used; the message says in one line what is wrong and what to do."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, less those that say nothing."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage text."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())} (--help lists the options)\n")


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float within [low, high], never NaN or infinite."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not at least {low}{most}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def folder(text):
    """An argparse type: the path of a folder that is there or can be made."""
    if file := next((path for path in (Path(text), *Path(text).parents) if path.is_file()), None):
        raise argparse.ArgumentTypeError(f"{file} is a file: choose a folder")
    return Path(text)


def one_line_errors(main):
    """Decorate `main(argv=None)`: an InputError or an OSError ends as one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
            sys.stdout.reconfigure(errors="backslashreplace")  # a console or pipe may lack some characters
        try:
            return main(argv)
        except torch.OutOfMemoryError:
            code, line = 2, "error: out of GPU memory: lower --max_length, or free some"
        except (InputError, OSError) as error:
            code, line = 2, f"error: {' '.join(str(error).split())}"
        except KeyboardInterrupt:
            code, line = 130, "interrupted"
        except SystemExit as stopped:  # by the parser, or because a run was told to stop
            code, line = stopped.code, None
        finally:
            if torch.cuda.is_initialized():  # a notebook's kernel lives on, and its GPU has other uses
                gc.collect()
                torch.cuda.empty_cache()
        if line:  # out here the exception is gone, whose frames would keep the model in a notebook's memory
            print(line, file=sys.stderr)
        sys.exit(code)

    return wrapped


def check_gpu():
    """Raise InputError where this PyTorch build has no kernels for the GPU, such as a P100 (6.0) under a recent one."""
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    built_for = [int(re.sub(r"\D", "", arch)) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    if built_for and 10 * major + minor < min(built_for):
        raise InputError(f"this PyTorch build has no kernels for {name}: choose another GPU, or an older torch")


def one_line(error):
    """An exception of some library as one short line: its type, and the words of what lies at the bottom of it."""
    root = error
    for _ in range(10):  # the hubs' clients wrap an error several times, each time with a longer message
        root = root.__cause__ or (not root.__suppress_context__ and root.__context__) or root
    return f"{type(error).__name__}: {' '.join(str(root).split())[:300] or type(root).__name__}"


def write_atomically(path, content):
    """Write `content`, bytes or a str as UTF-8, to `path` so that the file appears whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # when the disk was full, say


# ---- records: one question with its human and its ChatGPT answers, or a text with its label ------


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hc3-chinese"


def ask_huggingface(repository, filename=None, repo_type="model"):
    """The file's SHA-256; None where it is not kept as a large file, or where the hub answers with an error.

    Raises within seconds where Hugging Face cannot be reached: its downloads would retry for minutes or wait for ever.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    with contextlib.suppress(HfHubHTTPError):  # it answers: the download itself will say what is wrong
        # One request: huggingface_hub 0.35 and 0.36 repeat that for a single file's metadata for half a minute.
        options = {"files_metadata": True, "timeout": constants.HF_HUB_ETAG_TIMEOUT}
        files = HfApi().repo_info(repository, repo_type=repo_type, **options).siblings
        return next((file.lfs.sha256 for file in files if file.rfilename == filename and file.lfs), None)


def fetch_subset(name):
    """Path of an HC3-Chinese subset: the cached file, else downloaded from ModelScope, else from Hugging Face.

    Raises InputError with what was tried and why it failed. Both clients check the size of what they receive and
    ModelScope's its SHA-256; a download that breaks off leaves no file under its final name.
    """
    folder = cache_folder()
    path = folder / f"{name}.jsonl"
    if path.is_file():  # first, because ModelScope's client asks the hub even for a file it already has
        return path
    failures = []

    def from_modelscope():
        from modelscope import dataset_snapshot_download  # imported here: it costs seconds

        dataset_snapshot_download("AI-ModelScope/HC3-Chinese", allow_patterns=[path.name], local_dir=str(folder))

    def from_huggingface():
        from huggingface_hub import hf_hub_download

        sha256 = ask_huggingface("Hello-SimpleAI/HC3-Chinese", path.name, "dataset")
        hf_hub_download("Hello-SimpleAI/HC3-Chinese", path.name, repo_type="dataset", local_dir=folder)
        if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            path.unlink()
            raise OSError("the file's SHA-256 is not the one that the hub tells")

    for hub, download in (("ModelScope", from_modelscope), ("Hugging Face", from_huggingface)):
        try:
            download()
        except Exception as error:  # the clients raise a dozen types; whichever it is, the next hub is tried
            failures.append(f"{hub}: {one_line(error)}")
        else:
            if path.is_file():
                return path
            failures.append(f"{hub}: has no file {path.name}")  # a pattern that matches nothing is no error there
    raise InputError(
        f"cannot download the subset {name!r} ({'; '.join(failures)}). Offline: get {path.name} elsewhere and pass "
        f"its path, for example --data {path.name}"
    )


def read_rows(path):
    """Yield (line number, row) of a `.jsonl` or `.csv` file, one at a time, so that a file of any size can be read.

    A row is a dict, None for an empty line, or a str that says what is wrong with the line.
    """
    if Path(path).suffix.lower() != ".csv":
        with open(path, "rb") as file:  # as bytes, which end a line at \n alone: U+2028 may stand in a JSON string
            for number, line in enumerate(file, 1):
                yield number, parse_json(line)
        return
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, strict=True)  # else a quote that is never closed swallows the rest of the file
        try:
            for row in rows:
                if None in row or None in row.values():
                    row = f"has not the {len(rows.fieldnames)} fields of the header: quote texts that hold commas"
                elif re.search("[\udc80-\udcff]", "".join(row.values())):
                    row = "is not UTF-8: save the file as UTF-8"
                yield rows.line_num, row
        except csv.Error as error:
            where = f"{path}, the row from line {rows.line_num + 1} on"  # line_num is the end of the row before
            raise InputError(f"{where} is not CSV ({error}): is a quote never closed?") from None


def parse_json(line):
    """The row of a line (bytes), as `read_rows` yields it."""
    try:
        text = line.decode("utf-8-sig")
        row = json.loads(text) if text.strip() else None
    except UnicodeDecodeError as error:
        return f"is not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)  # without JSON's own line number, which is always 1
        return f"is not JSON ({reason}): one object a line is expected"
    return row if row is None or isinstance(row, dict) else f"has {type(row).__name__}, not an object with {EXPECTED}"


def read_records(path):
    """Yield the records of a file: HC3's (`question`, `human_answers`, `chatgpt_answers`) or yours (`text`, `label`).

    Where your own rows have a `question`, those with the same one belong together; else each text stands for itself.
    Raises InputError with the line's number where one is broken.
    """
    for line_number, row in read_rows(path):
        where = f"{path}, line {line_number}"
        if row is None:
            continue
        if isinstance(row, str):
            raise InputError(f"{where} {row}")
        if "text" in row and "label" in row:
            text, label = row["text"], row["label"]
            own = {"text": text, "label": str(label).strip(), "question": row.get("question") or text}
            if not isinstance(label, str | int) or isinstance(label, bool) or not own["label"]:
                raise InputError(f"{where}: label is neither a name nor a whole number")
            if wrong := [name for name, value in own.items() if not isinstance(value, str)]:
                raise InputError(f"{where}: {wrong[0]} is not a string")
            yield {name: valid_unicode(value) for name, value in own.items()}
            continue
        if any(field not in row for field in FIELDS):
            raise InputError(f"{where} has fields {', '.join(map(repr, row)) or 'none'}, not {EXPECTED}")
        if not isinstance(row["question"], str):
            raise InputError(f"{where}: question is not a string")
        for field in FIELDS[1:]:
            answers = [] if row[field] is None else row[field]
            if not isinstance(answers, list) or not all(a is None or isinstance(a, str) for a in answers):
                raise InputError(f"{where}: {field} is not a list of strings")
            row[field] = [None if a is None else valid_unicode(a) for a in answers]
        yield {field: row[field] for field in FIELDS} | {"question": valid_unicode(row["question"])}


def valid_unicode(text):
    """`text` with each lone surrogate (JSON allows one, UTF-8 and the tokenizer do not) as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def load_hc3(sources):
    """Records of one or more sources, in order.

    `sources`: names of HC3-Chinese subsets, "all" for every one of them, or paths of local `.jsonl` or `.csv` files.
    Returns a list of dicts: `id` (the row's number within its source, as a string), `subset` (the subset's or the
    file's name) and what `read_records` yields: `question`, `human_answers`, `chatgpt_answers` (lists of str or None),
    or `text`, `label`, `question`. Raises InputError.
    """
    records = []
    for source in (name for given in sources for name in (SUBSETS if given == "all" else (given,))):
        path = fetch_subset(source) if source in SUBSETS else Path(source)
        if path.is_dir():
            raise InputError(f"{source!r} is a folder: give the .jsonl or .csv files in it")
        if path.suffix.lower() in (".xlsx", ".xls"):
            raise InputError(f"{source!r} is an Excel file: save it as .csv (UTF-8)")
        if not path.is_file():
            raise InputError(f"no file {source!r}, and the subsets are {', '.join(SUBSETS)}, all")
        subset = source if source in SUBSETS else path.stem
        rows = [{"id": str(i), **record, "subset": subset} for i, record in enumerate(read_records(path))]
        if not rows:
            raise InputError(f"{source} is empty: rows with {EXPECTED} are expected")
        records += rows
    return records


# ---- examples: one text with its label -----------------------------------------------------------


def normalise(text):
    """NFC, with each literal backslash-n and each run of white space as one space, ends stripped.

    In HC3 such marks betray the class: a literal backslash-n stands in 91 % of medicine's ChatGPT answers and in no
    human one. The strict protocol applies this to every text in training and afterwards.
    """
    return re.sub(r"(?:\\n|\s)+", " ", unicodedata.normalize("NFC", text)).strip()


def class_names(records):
    """The labels of these records: LABELS where there are no others, else all that occur, sorted."""
    names = {record["label"] for record in records if "label" in record}
    names |= set(LABELS) if any("label" not in record for record in records) else set()
    if names <= set(LABELS):
        return LABELS
    if len(names) == 1:
        raise InputError(f"all texts have the label {names.pop()!r}: two labels at least are needed")
    return tuple(sorted(sorted(names), key=int if all(name.isdecimal() for name in names) else None))


def make_examples(records, protocol="seed", labels=LABELS):
    """The first non-empty answer of each kind as one example, or your own text; returns (examples, number missing).

    An example is a dict of `text`, `label` (index into `labels`), `question`, `subset` and `hc3` (whether it is HC3's).
    HC3's records with both answers give rows 2i (human) and 2i + 1 (ChatGPT). Raises InputError where a label is none
    of `labels`.
    """
    examples, missing, index_of = [], 0, {label: index for index, label in enumerate(labels)}
    for record in records:
        hc3 = "label" not in record
        given = {k: record[field] for k, field in ANSWERS.items()} if hc3 else {record["label"]: [record["text"]]}
        for label, answers in given.items():
            if label not in index_of:
                source, known = record["subset"], ", ".join(labels[:9])
                raise InputError(f"{source} has the label {label!r}, which is none of the model's: {known}")
            answers = (a if protocol == "seed" else normalise(a) for a in answers if a)
            text = next((a for a in answers if a.strip()), None)
            if text is None:
                missing += 1
            else:
                example = {"text": text, "label": index_of[label]}
                examples.append(example | {"question": record["question"], "subset": record["subset"], "hc3": hc3})
    return examples, missing


def part_of(question):
    """The part a question belongs to under the strict protocol: sha256 mod 10 is 0 test, 1 validation, else train."""
    digit = int(hashlib.sha256(question.encode("utf-8")).hexdigest(), 16) % 10
    return {0: "test", 1: "validation"}.get(digit, "train")


def split_examples(examples, protocol="seed", labels=LABELS):
    """Split into {"train", "validation", "test"}, lists of examples.

    Raises InputError where a part stays empty or the training part lacks one of the `labels`.

    seed: the published protocol: 5,000 rows (or all there are; of your own task always all) drawn with seed 233, then
    8:1:1 by rows, so that a question's two answers may stand in different parts.
    strict: whole questions by `part_of`; of exact duplicate texts across parts only the copy in the part further
    from training stays, so that no test text was ever trained on.
    """
    if protocol == "seed":
        import datasets  # its seeded permutations are the protocol

        if len(examples) < 10:
            raise InputError(f"{len(examples)} texts cannot be split 8:1:1: at least 10 are needed")
        rows = datasets.Dataset.from_dict({"row": range(len(examples))}).shuffle(seed=SPLIT_SEED)
        if all(example["hc3"] for example in examples):
            rows = rows.select(range(min(SEED_ROWS, len(examples))))
        train = rows.train_test_split(train_size=0.8, seed=SPLIT_SEED)
        held_out = train["test"].train_test_split(train_size=0.5, seed=SPLIT_SEED)
        drawn = {"train": train["train"], "validation": held_out["train"], "test": held_out["test"]}
        parts = {part: [examples[row] for row in drawn[part]["row"]] for part in PARTS}
    else:
        parts, seen = {part: [] for part in PARTS}, {part: set() for part in PARTS}
        for example in examples:
            seen[part_of(example["question"])].add(example["text"])
        for example in examples:
            part = part_of(example["question"])
            if not any(example["text"] in seen[later] for later in PARTS[PARTS.index(part) + 1 :]):
                parts[part].append(example)
    for part in PARTS:
        if not parts[part]:
            raise InputError(f"the {part} part of these {len(examples)} texts is empty: more questions are needed")
    if lacking := sorted(set(range(len(labels))) - {example["label"] for example in parts["train"]}):
        names = ", ".join(labels[label] for label in lacking[:9])
        raise InputError(f"the training part holds no text with the label {names}: more texts are needed")
    return parts


def hash_examples(examples):
    """SHA-256 (hex) over the texts and labels of a part, in order: tells whether two runs saw the same data."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example["text"], example["label"]]).encode())
    return digest.hexdigest()


# ---- tokens and the packed batch -----------------------------------------------------------------


def fetch_model(name, hub="huggingface"):
    """Folder of a model: `name` itself where it is a folder, else the hub's snapshot of it, from the cache if whole.

    Only JSON, text, chat template and safetensors files are fetched: none of them can carry Python code.
    """
    if name and Path(name).is_dir():
        return name
    if hub == "modelscope":
        from modelscope import snapshot_download  # imported here: it costs seconds
    else:
        from huggingface_hub import snapshot_download
    wanted = {"allow_patterns": ["*.json", "*.jinja", "*.safetensors", "*.txt"]}
    unfinished = cache_folder() / f"{hub}--{name.replace('/', '--')}.unfinished"  # lies there while a download runs
    with contextlib.suppress(Exception):  # not cached: each client says so with exceptions of its own
        folder = snapshot_download(name, local_files_only=True, **wanted)
        weights, config = list(Path(folder).glob("*.safetensors")), Path(folder) / "config.json"
        if weights and config.is_file() and not unfinished.is_file():
            return folder
    try:
        if hub == "huggingface":
            ask_huggingface(name)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()  # ModelScope's client cannot tell, offline, that a cached snapshot lacks a file
        folder = snapshot_download(name, **wanted)
        unfinished.unlink(missing_ok=True)
        return folder
    except Exception as error:
        other = "modelscope" if hub == "huggingface" else "huggingface"
        raise InputError(
            f"no folder {name!r}, and {hub} does not give that model ({one_line(error)}): pass a local folder as "
            f"--model, or try --hub {other}" + (", which China reaches" if other == "modelscope" else "")
        ) from None


def load_tokenizer(folder):
    """The tokenizer of a model folder, its pad token set (to eos, as Qwen1.5 has it) for those who pad.

    Raises InputError.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers 5 makes one without any file
            raise ValueError("it knows no tokens, so its files are missing")
    except Exception as error:  # the loaders raise a dozen types for as many kinds of unusable folder
        raise InputError(f"{folder} holds no tokenizer that can be loaded ({one_line(error)})") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(tokenizer, texts, max_length=512):
    """Token ids of each text (list of lists of int), cut at `max_length` tokens (0: not at all), in one batched call.

    Strings such as `<|im_end|>` inside a text are text: they give ordinary tokens. A text without any token (a
    tokenizer may drop everything) becomes one eos token, so that every text has a last token to classify.
    """
    if not texts:
        return []
    cut = {"truncation": True, "max_length": max_length} if max_length else {}
    ids = tokenizer(list(texts), split_special_tokens=True, return_attention_mask=False, verbose=False, **cut)
    return [row or [tokenizer.eos_token_id] for row in ids["input_ids"]]


def pack(token_ids, device="cpu"):
    """One row of several texts: the keyword arguments of `PackedClassifier.forward`.

    `token_ids`: list of n lists of int, T tokens in all. Returns `input_ids` and `position_ids`, int64 (1, T);
    `cu_seqlens`, int32 (n + 1,), where in the row the texts begin and end: 0, ..., T; `lengths`, a tuple of int
    (n,), not a tensor so that cutting the row apart needs no device synchronisation.
    """
    lengths = tuple(map(len, token_ids))
    row = {
        "input_ids": torch.tensor([[token for ids in token_ids for token in ids]]),  # (1, T)
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],  # (1, T)
        "cu_seqlens": torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32),  # (n + 1,)
    }
    return {name: to_device(tensor, device) for name, tensor in row.items()} | {"lengths": lengths}


def to_device(tensor, device):
    """The tensor on the device, without waiting for it: the host builds a batch while the GPU is at the last."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def packed_attention(module, query, key, value, attention_mask, lengths, cu_seqlens, scaling, dropout=0.0, **kwargs):
    """Causal attention inside each text of a packed row; a transformers attention function ("packed").

    `query` (1, heads, T, head_dim), `key` and `value` (1, kv_heads, T, head_dim), `lengths` and `cu_seqlens` as made by
    `pack`. Returns (1, T, heads, head_dim) and no attention weights.
    """
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise InputError("this model caps its attention, or has attention sinks, which is not supported: use another")
    window = kwargs.get("sliding_window")  # a token sees itself and the window - 1 tokens before it
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and not dropout and (varlen_attn := varlen_attention()):
        q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # (T, heads, head_dim)
        ends = cu_seqlens, cu_seqlens, max(lengths), max(lengths)
        behind = window - 1 if window else -1
        return varlen_attn(q, k, v, *ends, scale=scaling, window_size=(behind, 0), enable_gqa=True)[None], None
    groups = query.shape[1] // key.shape[1]  # grouped-query attention shares one key head among several query heads
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    texts = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        mask, length = None, q.shape[2]
        if window and length > window:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        texts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        )
    return torch.cat(texts, dim=2).transpose(1, 2), None


@functools.cache
def varlen_attention():
    """torch's FlashAttention for all texts of a row in one call, or None where this torch or this GPU has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # imported here: it costs more than a second
    except ImportError:
        return None
    usable = "window_size" in inspect.signature(varlen_attn).parameters
    usable = usable and torch.backends.cuda.is_flash_attention_available()  # some builds lack it
    return varlen_attn if usable and torch.cuda.get_device_capability() >= (8, 0) else None


def register_packed_attention(model):
    """Make a transformers model attend as `packed_attention` does."""
    transformers.AttentionInterface.register("packed", packed_attention)
    model.set_attn_implementation("packed")
    if model.config._attn_implementation != "packed":
        raise InputError(f"{type(model).__name__} has an attention of its own: use a decoder such as Qwen1.5")


class PackedClassifier(torch.nn.Module):
    """A sequence-classification model (a transformers one, or PEFT's around it) that reads a packed batch.

    `forward(**pack(token_ids))` gives the logits of the n texts, float32 (n, classes). One module with one forward, so
    that DDP, FSDP and autocast wrap it like any other; what is saved is `self.model`, a plain checkpoint.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        register_packed_attention(self.classifier())

    @property
    def device(self):
        return next(self.parameters()).device

    def classifier(self):
        """The transformers model itself, without PEFT's wrapper (its adapter layers are inside)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, input_ids, position_ids, cu_seqlens, lengths):
        model = self.classifier()
        row = {"input_ids": input_ids, "position_ids": position_ids, "cu_seqlens": cu_seqlens, "lengths": lengths}
        hidden = model.base_model(**row, use_cache=False).last_hidden_state  # (1, T, hidden); nothing is generated
        last_tokens = cu_seqlens[1:] - 1  # (n,)
        return model.score(hidden[0, last_tokens]).float()  # (n, classes)


def load_model(auto_class, folder, dtype, new_head=False, **options):
    """A transformers model of a local folder in `dtype`: safetensors only, no code from the folder.

    `new_head`: weights outside the backbone may be missing and are then drawn at random (set the seed first);
    otherwise every weight must be there. Raises InputError.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        raise InputError(f"{folder} is an adapter, not a whole model: give the model that it was trained on")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # "newly initialized" is meant for those who forgot to train
    transformers.logging.disable_progress_bar()
    try:
        model, info = auto_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are reported below
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # the loaders raise a dozen types for as many kinds of unusable folder
        raise InputError(f"{folder} is no model that can be loaded ({one_line(error)})") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    missing = [n for n in info["missing_keys"] if not new_head or n.startswith(f"{model.base_model_prefix}.")]
    if missing:
        raise InputError(f"{folder} lacks the weights {', '.join(sorted(missing)[:3])}: the model is incomplete")
    if other := sorted(name for name, *_ in info["mismatched_keys"]):
        raise InputError(f"{folder} has weights of other sizes than its config.json says: {', '.join(other[:3])}")
    saved = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if "rope_parameters" in saved and "rope_theta" not in saved and transformers.__version__.startswith("4."):
        raise InputError(f"{folder} was saved by a newer transformers, which this one misreads: upgrade transformers")
    return model


def load_classifier(folder, tokenizer, dtype=torch.float32, labels=LABELS, new_head=True):
    """The sequence-classification model of a local folder, with named labels, in `dtype`.

    `new_head`: the folder holds a language model and the classification head is drawn at random (set the seed first).
    Raises InputError.
    """
    model = load_model(
        transformers.AutoModelForSequenceClassification,
        folder,
        dtype,
        new_head,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        pad_token_id=tokenizer.pad_token_id,
    )
    if not hasattr(model, "score"):
        raise InputError(f"{type(model).__name__} has no `score` head on the last token: use a decoder such as Qwen1.5")
    return model


def spell_as_before(folder):
    """Let transformers 4 read what 5 saved in a folder under other names; 5 still reads it under the old ones."""
    for path in (Path(folder) / "config.json", Path(folder) / "tokenizer_config.json"):
        if path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            rope = saved.get("rope_parameters") or {}
            if rope.keys() == {"rope_type", "rope_theta"} and rope["rope_type"] == "default":
                saved["rope_theta"] = rope["rope_theta"]  # of any other rope, load_model says that 4 misreads it
            if isinstance(saved.get("extra_special_tokens"), list):
                saved["additional_special_tokens"] = saved.pop("extra_special_tokens")
            write_atomically(path, json.dumps(saved, indent=1, ensure_ascii=False))


# ---- predictions, whoever makes them --------------------------------------------------------------


def save_predictions(path, examples, labels, predictions, logits=None, probabilities=None):
    """One JSON line a text, in order, which `evaluate.py --compare` reads.

    `labels`: the class names. `predictions`: a class name each, or None where none was given. `logits` and
    (calibrated) `probabilities`: arrays (n, classes).
    """
    lines = []
    for i, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        line = {"text_sha256": hashlib.sha256(example["text"].encode()).hexdigest()}
        line |= {"question": example["question"], "subset": example["subset"]}
        line |= {"label": labels[example["label"]], "prediction": prediction}
        if logits is not None:
            line["logits"] = logits[i].tolist()
        if probabilities is not None:
            line["probabilities"] = dict(zip(labels, probabilities[i].tolist(), strict=True))
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))


# ---- python data.py -------------------------------------------------------------------------------


# The options that several scripts share, with their defaults in one place.


def add_source_option(parser):
    help_text = f"{', '.join(SUBSETS)}, all, or .jsonl or .csv files; your own with text, label"
    parser.add_argument("--data", nargs="+", default=["baike"], metavar="SOURCE", help=help_text)


def add_hub_option(parser):
    parser.add_argument("--hub", choices=["huggingface", "modelscope"], default="huggingface", help="where --model is")


def add_data_options(parser):
    add_source_option(parser)
    split_help = "rows as published, or whole questions, text normalised"
    parser.add_argument("--protocol", choices=PROTOCOLS, default="seed", help=f"how to split: {split_help}")
    parser.add_argument("--model", default="Qwen/Qwen1.5-0.5B", help="hub id or local folder of the base model")
    add_hub_option(parser)
    length = number(int, 0, 2**31)
    parser.add_argument("--max_length", type=length, default=512, help="cut texts at so many tokens; 0: never")


def leaks(parts):
    """(test texts whose question is also in train, test texts that are exact copies of a training text)."""
    questions, texts = ({example[field] for example in parts["train"]} for field in ("question", "text"))
    seen = sum(example["question"] in questions for example in parts["test"])
    return seen, sum(example["text"] in texts for example in parts["test"])


def audit(records, labels, output_dir):
    """Print, for both protocols, what leaks and what shortcuts alone score on the test part. Needs scikit-learn."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler
        from sklearn.tree import DecisionTreeClassifier
    except ImportError:
        raise InputError("--audit needs scikit-learn: pip install scikit-learn") from None

    def lengths(texts):
        return [[len(text)] for text in texts]

    def marks(texts):
        return [re.sub(r"[^\W_]", "", text) for text in texts]  # less all letters and digits

    def ngrams(c):
        vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
        return make_pipeline(vectorizer, LogisticRegression(C=c, max_iter=1000))

    mark_counts = make_pipeline(
        FunctionTransformer(marks), CountVectorizer(analyzer="char", ngram_range=(1, 2)), MaxAbsScaler()
    )
    shortcuts = {  # the settings of each; the best on the validation part is scored
        "length": [make_pipeline(FunctionTransformer(lengths), DecisionTreeClassifier(max_leaf_nodes=8))],
        "marks": [make_pipeline(mark_counts, LogisticRegression(max_iter=2000))],
        "ngrams": [ngrams(c) for c in (1, 10, 100)],
    }
    columns, files = {}, []  # written when both protocols went well
    for protocol in PROTOCOLS:
        parts = split_examples(make_examples(records, protocol, labels)[0], protocol, labels)
        texts = {part: [example["text"] for example in parts[part]] for part in PARTS}
        true = {part: [example["label"] for example in parts[part]] for part in PARTS}
        largest = max(map(true["test"].count, range(len(labels)))) / len(true["test"])
        column = [f"{len(texts['train'])} / {len(texts['test'])}", *leaks(parts), f"{largest:.3f}"]
        for name, candidates in shortcuts.items():
            try:
                fitted = [candidate.fit(texts["train"], true["train"]) for candidate in candidates]
            except ValueError as error:  # such as no punctuation anywhere
                raise InputError(f"--audit cannot learn from the {name} of these texts ({error})") from None
            model = max(fitted, key=lambda model: model.score(texts["validation"], true["validation"]))
            column.append(f"{model.score(texts['test'], true['test']):.3f}")
            predicted = [labels[k] for k in model.predict(texts["test"])]
            contents = parts["test"], labels, predicted, None, model.predict_proba(texts["test"])
            files.append((f"predictions-{protocol}-{name}.jsonl", *contents))
        columns[protocol] = column
    rows = (
        "texts in train / test",
        "test texts whose question is in train",
        "test texts that are copies of a training text",
        "accuracy of the largest class",
        "accuracy of length alone",
        "accuracy of white space and punctuation alone",
        "accuracy of character 1-3-grams",
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, *contents in files:
        save_predictions(output_dir / name, *contents)
    print(f"\n{'':48}{'seed':>12}{'strict':>12}")
    for row, seed, strict in zip(rows, columns["seed"], columns["strict"], strict=True):
        print(f"{row:48}{seed:>12}{strict:>12}")
    print("What these rules score takes no language model: a detector is worth what it scores above them, on strict.")
    print(f"written to {output_dir}: predictions-<protocol>-<rule>.jsonl")


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_data_options(parser)
    parser.add_argument("--audit", action="store_true", help="show what leaks and what shortcuts score (scikit-learn)")
    parser.add_argument("--output_dir", type=folder, default=Path("out/audit"), help="folder for --audit's predictions")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    import datasets

    records = load_hc3(args.data)
    labels = class_names(records)
    if args.audit:
        audit(records, labels, args.output_dir)
        return
    examples, missing = make_examples(records, args.protocol, labels)
    parts = split_examples(examples, args.protocol, labels)
    print(datasets.Dataset.from_list(records))
    print(json.dumps(records[0], ensure_ascii=False, indent=1))
    print(f"\n{len(examples)} texts, {missing} missing or empty; {args.protocol} protocol:")
    for part in PARTS:
        true = [example["label"] for example in parts[part]]
        counts = ", ".join(f"{true.count(k)} {label}" for k, label in enumerate(labels))
        print(f"【data_{'val' if part == 'validation' else part}】 num_rows: {len(true)} ({counts})")
    seen, copies = leaks(parts)
    print(f"test texts whose question is also in train: {seen}; exact copies of a training text: {copies}")

    tokenizer = load_tokenizer(fetch_model(args.model, args.hub))
    lengths = sorted(len(ids) for ids in tokenize(tokenizer, [example["text"] for example in examples], 0))
    quantiles = ", ".join(f"{q} %: {lengths[(len(lengths) - 1) * q // 100]}" for q in (0, 25, 50, 75, 95, 100))
    print(f"\ntokens a text: {quantiles}; mean {sum(lengths) / len(lengths):.0f}")
    if args.max_length:
        kept = sum(min(length, args.max_length) for length in lengths)
        cut, wasted = sum(length > args.max_length for length in lengths), 1 - kept / (args.max_length * len(lengths))
        print(f"longer than {args.max_length}: {cut} texts ({cut / len(lengths):.2%}), which are cut there")
        print(f"padded to {args.max_length}, {wasted:.1%} of all tokens would be padding; packed, none is")


if __name__ == "__main__":
    main()
