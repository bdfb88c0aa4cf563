"""Evaluate a checkpoint on the test texts of its run, on other data, or on one text; label files; compare runs.

    python evaluate.py --ckpt out/demo                                # the run's own test part: report and files
    python evaluate.py --ckpt out/demo --text "总之，建议您咨询专业人士。"      # label and probability of one text
    python evaluate.py --ckpt out/demo --data law finance             # other subsets or files, each by itself
    python evaluate.py --ckpt out/demo --predict tests/texts.csv --output labelled.csv    # label any file of texts
    python evaluate.py --ckpt out/demo --merge out/merged             # adapter and base as one transformers model
    python evaluate.py --compare out/demo/predictions-test.jsonl out/audit/predictions-seed-1-3-grams.jsonl

With README's demo each takes under ten seconds; the third downloads first, the last needs `data.py --audit`'s files.
`run.json` in the checkpoint says what else is needed: base model, data, split and its hash, max_length, temperature,
threshold. Results go to the checkpoint's folder (or --output_dir): eval-<name>.json, predictions-<name>.jsonl and, if
matplotlib is installed, report-<name>.png.
"""

import argparse
import csv
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

import data
from data import InputError, short

CHUNK = 1024  # rows that --predict labels before it writes them
LENGTH_EDGES = (32, 64, 128, 256, 512)  # tokens, between the groups of "accuracy by length"


def parse_args(argv=None):
    parser = data.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", nargs="?", help=argparse.SUPPRESS)  # people forget to type --ckpt
    add("--ckpt", help="folder that train.py wrote")
    add("--split", choices=[*data.PARTS, "all"], help="part to score (default: test, or all of --data)")
    add("--data", nargs="+", metavar="SOURCE", help="score these subsets or files instead of the run's own data")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--text", help="print label and probability of this text")
    one("--example", type=data.number(int, 0), metavar="N", help="print text N of the part and its prediction")
    one("--predict", metavar="FILE", help="label every row of this file, by its column text; write --output")
    one("--merge", type=data.folder, metavar="FOLDER", help="write adapter and base as one plain transformers model")
    add("--output", type=Path, metavar="FILE", help="the .csv or .jsonl file that --predict writes")
    add("--compare", nargs="+", metavar="FILE", help="compare predictions-*.jsonl files about the same texts")
    add("--model", help="path or id of the adapter's base model, if it has moved since training")
    add("--hub", choices=data.REPOSITORIES, help="hub of the base model (default: as in training)")
    add("--mixed_precision", choices=list(data.DTYPES), default="no", help="dtype of the weights")
    add("--output_dir", type=data.folder, help="folder for the results (default: the checkpoint's)")
    args = parser.parse_args(argv)
    if args.folder or not (args.ckpt or args.compare):
        parser.error(f"type: python evaluate.py --ckpt {args.folder or 'FOLDER'} (a folder that train.py wrote)")
    if args.compare and len(args.compare) < 2:
        parser.error("--compare needs two files or more")
    if bool(args.predict) != bool(args.output) or (args.output and args.output.suffix not in (".jsonl", ".csv")):
        parser.error("--predict FILE and --output FILE go together, and --output ends in .jsonl or .csv")
    return args


def read_run(ckpt):
    """The run.json of a checkpoint. Raises InputError on a value that train.py cannot have written."""
    path = Path(ckpt, "run.json")
    if not path.is_file():
        unfinished = Path(ckpt, "metrics.jsonl").is_file()
        hint = "its run has not finished, --resume continues it" if unfinished else "it was not written by train.py"
        raise InputError(f"{short(ckpt, 80)} holds no finished run (no run.json: {hint})")
    with data.refusing(f"{path} is damaged: take another copy of the checkpoint"):
        run = {"temperature": 1.0, "threshold": None, **json.loads(path.read_text(encoding="utf-8"))}
        arguments, split, targets = run["arguments"], run["split"], run["arguments"].get("lora_targets")
        numbers = [run["max_length"]] + [arguments[name] for name in ("lora_r", "lora_alpha") if run["lora"]]
        strings = [run["model"], *run["labels"], *run["data"], *(targets if run["lora"] else [])]
        sound = {
            "a name": all(isinstance(value, str) and value for value in strings) and not isinstance(targets, str),
            "a number": all(type(value) is int and value >= 0 for value in numbers),
            "labels": isinstance(run["labels"], list) and len(set(run["labels"])) == len(run["labels"]) > 1,
            "data": isinstance(run["data"], list),
            "hub or lora": run["hub"] in data.REPOSITORIES and type(run["lora"]) is bool,
            "split": split["protocol"] in data.PROTOCOLS and split["sha256"].keys() >= set(data.PARTS),
            "temperature": 0.1 <= run["temperature"] <= 10,
            "threshold": run["threshold"] is None or 0 <= run["threshold"] <= 1,
        }
        if wrong := [name for name, fine in sound.items() if not fine]:
            raise InputError(f"wrong: {', '.join(wrong)}")
    return run


def add_lora(model, arguments):
    """The model, wrapped by PEFT, with new LoRA layers and a trainable head. `arguments`: a dict of train.py's.

    Raises InputError on a target that names no layer; PEFT silently ignores one as long as another target does.
    """
    from peft import LoraConfig, get_peft_model

    targets = arguments["lora_targets"]
    layers = [f".{name}" for name, module in model.base_model.named_modules() if isinstance(module, torch.nn.Linear)]
    if missing := [target for target in targets if not any(name.endswith(f".{target}") for name in layers)]:
        has = " ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise InputError(f"--lora_targets {' '.join(missing)}: the model has no such layer; it has {has}")
    options = {"r": arguments["lora_r"], "lora_alpha": arguments["lora_alpha"], "target_modules": targets}
    config = LoraConfig(task_type="SEQ_CLS", lora_dropout=arguments.get("lora_dropout", 0.0), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 uses a name that transformers is giving up
        return get_peft_model(model, config)


def load_checkpoint(ckpt, run, dtype=torch.float32, device="cpu", model=None, hub=None):
    """(model, tokenizer) of a checkpoint that train.py wrote; `run` is its `read_run`. Raises InputError.

    An adapter is merged into its base in float32 before the weights take `dtype`. `model` and `hub` say where the base
    is, if not where run.json says. Only safetensors are read, and no code from the checkpoint runs.
    """
    name = model or run["model"]
    if not run["lora"]:
        tokenizer = data.load_tokenizer(data.fetch_model(ckpt))  # which checks config.json before anything reads it
        classifier = data.load_classifier(ckpt, tokenizer, run["labels"])
    elif Path(ckpt, "config.json").exists():
        raise InputError(f"{ckpt} holds an adapter and a config.json, which train.py never writes together")
    else:
        from peft import set_peft_model_state_dict

        tokenizer = data.load_tokenizer(ckpt)
        with data.refusing(f"{ckpt}/adapter_model.safetensors is incomplete or damaged"):
            weights = safetensors.torch.load_file(Path(ckpt, "adapter_model.safetensors"))
            ranks = {tensor.shape[0] for key, tensor in weights.items() if key.endswith("lora_A.weight")}
            if ranks != {run["arguments"]["lora_r"]}:  # before anything of a stranger's size is allocated
                raise InputError("its rank is not the one in run.json")
        with data.refusing("the adapter's base model cannot be loaded: give it with --model", InputError):
            folder = data.fetch_model(name, hub or run["hub"])
            classifier = data.load_classifier(folder, tokenizer, run["labels"], new_head=0)
        with data.refusing(f"the adapter in {ckpt} does not fit the base {name}"):
            adapted = add_lora(classifier, run["arguments"])
            loaded = set_peft_model_state_dict(adapted, weights)
            trained = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
            if differ := sorted({*loaded.unexpected_keys, *(trained & set(loaded.missing_keys))}):
                raise InputError(f"only one of the two has {differ[0]}")
        classifier = adapted.merge_and_unload()
    for parameter in classifier.parameters():  # but no buffers: bf16 would spoil RoPE's angles at late positions
        parameter.data = parameter.data.to(dtype)
    return data.PackedClassifier(classifier.to(device)).eval(), tokenizer


def save_model(folder, model, tokenizer, max_length):
    """Save a transformers model or a PEFT adapter, with the tokenizer, as those libraries load it."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        # Not PEFT's save_pretrained, which would replace a README.md of the user's. We never read its config.
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        safetensors.torch.save_file(weights, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
        model.peft_config["default"].inference_mode = True
        model.peft_config["default"].save_pretrained(folder)
    else:
        if theta := (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta"):
            model.config.rope_theta = theta  # else transformers 4 takes its default, 10,000
        model.save_pretrained(folder)
    tokenizer.model_max_length = max_length or tokenizer.model_max_length  # for pipeline(..., truncation=True)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def predict(model, token_ids, description=None, process=0, processes=1):
    """Logits of the texts, in order: a numpy array, float32 (n, classes).

    `description`: of the progress bar; None: no bar. Of several processes, number p scores rows p, p + processes, ...;
    all run the model equally often, as DDP requires, and all get the whole result. The rows, and so the logits, do not
    depend on the number of processes.
    """
    device = next(model.parameters()).device
    ends = np.cumsum([len(ids) for ids in token_ids]) // (16384 if device.type == "cuda" else 1024)  # tokens in a row
    rows = [list(row) for _, row in itertools.groupby(range(len(token_ids)), key=lambda index: ends[index])]
    scored, was_training = {}, model.training
    model.eval()
    # position 0: over train.py's bar and not under it, because a notebook ignores the cursor-up code.
    options = {"leave": False, "position": 0, "disable": process > 0 or description is None}
    for first in tqdm(range(0, len(rows), processes), description, **options):
        k = min(first + process, len(rows) - 1)  # without a row of its own a process runs the last one once more
        scored[k] = model(**data.pack([token_ids[index] for index in rows[k]], device))
    model.train(was_training)
    scored = [(k, logits.cpu().numpy()) for k, logits in scored.items()]
    scored = dict(gather_object(scored) if processes > 1 else scored)
    return np.concatenate([scored[k] for k in range(len(rows))])


def softmax(logits):
    """Probabilities, float64 (n, classes), of logits (n, classes)."""
    return torch.tensor(logits, dtype=torch.float64).softmax(1).numpy()


def negative_log_likelihood(classes, logits):
    """Mean cross-entropy in nats of logits (n, classes) at the true `classes`, int (n,)."""
    return torch.nn.functional.cross_entropy(torch.tensor(logits, dtype=torch.float64), torch.tensor(classes)).item()


def bootstrap_interval(values, groups, draws=2000):
    """95 % percentile interval of the mean of `values` (n,), whole groups (questions) resampled with replacement.

    Two answers to one question are not independent, so questions are drawn and not texts (Efron and Tibshirani, 1993).
    If all values are true, or none is, this is the exact binomial interval for that many questions.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    total, size = np.bincount(group, values), np.bincount(group)
    if values.dtype == bool and (values.all() or not values.any()):  # every draw would be the same
        bound = 0.025 ** (1 / len(size))  # Clopper and Pearson, 1934
        return [bound, 1.0] if values.all() else [0.0, 1 - bound]
    rng, share = np.random.default_rng(0), np.full(len(size), 1 / len(size))
    drawn = (rng.multinomial(len(size), share) for _ in range(draws))  # how often each group is drawn
    return [float(bound) for bound in np.percentile([d @ total / (d @ size) for d in drawn], [2.5, 97.5])]


def auroc(positive, scores):
    """Area under the ROC curve: the probability that a positive text scores higher, ties half (Mann-Whitney U)."""
    _, level, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[level]  # the average rank among equal scores
    n = positive.sum()
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def reliability(classes, probabilities, bins=15):
    """(texts, mean confidence, accuracy) in bins of confidence of equal width: arrays (bins,), 0 for an empty bin."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == classes
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    texts = np.bincount(bin_of, minlength=bins)
    return texts, *(np.bincount(bin_of, x, bins) / np.maximum(texts, 1) for x in (confidence, right))


def calibration_error(classes, probabilities):
    """Expected calibration error over 15 bins (Guo et al., 2017)."""
    texts, confidence, accuracy = reliability(classes, probabilities)
    return float((texts * abs(confidence - accuracy)).sum() / texts.sum())


def fit_calibration(classes, logits):
    """Temperature and threshold from the validation part.

    The temperature divides the logits so that the likelihood is highest (Guo et al., 2017), searched from 0.1 to 10 in
    steps of 1 %. The threshold is the probability of the second class that at most 1 % of the first class's texts
    exceed; None with fewer than 100 of them, or with more than two classes.
    """
    grid = np.geomspace(0.1, 10, 463)
    temperature = float(min(grid, key=lambda t: negative_log_likelihood(classes, logits / t)))
    if len(classes) < 100 or temperature in (grid[0], grid[-1]):  # too few texts, or too few errors, to learn it from
        temperature = 1.0
    negative = np.sort(softmax(logits / temperature)[classes == 0, 1])
    enough = len(negative) >= 100 and logits.shape[1] == 2
    return temperature, float(negative[-1 - len(negative) // 100]) if enough else None


def metrics(classes, logits, questions, lengths, names=data.LABELS, temperature=1.0, threshold=None):
    """The figures of eval-<name>.json for n texts; a class without a text has None as precision, recall and F1.

    `classes` int (n,), `logits` (n, classes); the interval resamples `questions` (n,); `lengths` (n,) in tokens;
    `names` of the classes. Of two classes the second is the positive one.
    """
    predicted, calibrated = logits.argmax(1), softmax(logits / temperature)
    right = predicted == classes
    confusion = np.zeros((len(names), len(names)), int)  # (true, predicted)
    np.add.at(confusion, (classes, predicted), 1)
    hits, true, called = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    scores = [hits / np.maximum(called, 1), hits / np.maximum(true, 1), 2 * hits / np.maximum(true + called, 1)]
    per_class = {}
    for name, row, n in zip(names, np.transpose(scores).tolist(), true.tolist(), strict=True):
        per_class[name] = dict(zip(("precision", "recall", "f1"), row if n else [None] * 3, strict=True), n=n)
    result = {
        "n": len(classes),
        "accuracy": float(right.mean()),
        "accuracy_interval": bootstrap_interval(right, questions),
        "largest_class_accuracy": float(true.max() / len(classes)),
        "macro_f1": float(scores[2][true > 0].mean()),
        "loss": negative_log_likelihood(classes, logits),
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "calibration_error": calibration_error(classes, softmax(logits)),
        "calibration_error_calibrated": calibration_error(classes, calibrated),
        "temperature": temperature,
    }
    if len(names) == 2 and true.all():
        result["auroc"] = auroc(classes == 1, logits[:, 1] - logits[:, 0])
        result["false_positive_rate"] = float((predicted[classes == 0] == 1).mean())
        if threshold is not None:
            above, result["threshold"] = calibrated[:, 1] > threshold, threshold
            result["false_positive_rate_above_threshold"] = float(above[classes == 0].mean())
            result["true_positive_rate_above_threshold"] = float(above[classes == 1].mean())
    group = np.digitize(lengths, LENGTH_EDGES)
    groups = [(int((0, *LENGTH_EDGES)[k]), right[group == k]) for k in np.unique(group)]
    result["by_length"] = [{"tokens_from": k, "n": len(some), "accuracy": float(some.mean())} for k, some in groups]
    return result


def mcnemar(wins, losses):
    """McNemar's exact two-sided p; `wins`, `losses`: texts that only the first, or only the second, run gets right."""
    n, ks = wins + losses, range(1, min(wins, losses) + 1)
    binomials = itertools.accumulate(ks, lambda binomial, k: binomial * (n - k + 1) // k, initial=1)
    return min(1.0, 2 * sum(binomials) / 2**n)


def compare(paths):
    """Print, for each pair of prediction files, their accuracies, the difference with its interval, and McNemar's p.

    Raises InputError if the files are not about the same texts.
    """
    runs = []
    for path in paths:
        with data.refusing(f"{path} is not a predictions file", (ValueError, KeyError, TypeError, RecursionError)):
            lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
            right = np.array([line["label"] == line["prediction"] for line in lines])
            texts = [(line["text_sha256"], line["label"], str(line["question"])) for line in lines]
        if not texts or (runs and texts != runs[0][1]):
            raise InputError(f"{paths[0]} and {path} are not predictions about the same texts in the same order")
        runs.append((path, texts, right))
    for (first, texts, right), (second, _, other_right) in itertools.combinations(runs, 2):
        questions = [question for _, _, question in texts]
        wins, losses = int((right & ~other_right).sum()), int((other_right & ~right).sum())
        difference, p = right.mean() - other_right.mean(), mcnemar(wins, losses)
        low, high = bootstrap_interval(right.astype(float) - other_right, questions)
        for path, accuracy, only in ((first, right.mean(), wins), (second, other_right.mean(), losses)):
            print(f"{accuracy:.4f}  {path}  ({len(texts)} texts, {only} of them correct only in this run)")
        print(f"difference {difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}, McNemar p {p:.3g}\n")


def columns_of(text):
    """How many columns of a terminal a text takes: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def print_report(result):
    """The figures of `metrics` as a terminal table."""
    names = list(result["per_class"])
    width = max(12, *map(columns_of, names))
    print(f"\n{'':{width}} {'precision':>9} {'recall':>9} {'F1':>9} {'texts':>7}   predicted {'  '.join(names)}")
    for (name, row), counts in zip(result["per_class"].items(), result["confusion"], strict=True):
        cells = "  ".join(f"{count:{columns_of(other)}}" for count, other in zip(counts, names, strict=True))
        figures = [f"{'-':>9}" if row[key] is None else f"{row[key]:9.4f}" for key in ("precision", "recall", "f1")]
        print(f"{name}{'':{width - columns_of(name)}} {' '.join(figures)} {row['n']:7}{'':13}{cells}")
    low, high = result["accuracy_interval"]
    print(f"accuracy {result['accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f}", end="")
    print(f"; always predicting the largest class: {result['largest_class_accuracy']:.4f}")
    print(f"macro-F1 {result['macro_f1']:.4f}, loss {result['loss']:.4f}", end="")
    print(f", AUROC {result['auroc']:.4f}" if "auroc" in result else "")
    if "auroc" in result:
        print(f"{names[0]} texts called {names[1]} (false positives): {result['false_positive_rate']:.4f}")
    if "threshold" in result:
        false, true = (result[f"{kind}_positive_rate_above_threshold"] for kind in ("false", "true"))
        print(f"at the threshold {result['threshold']:.4f} (chosen on validation for a 1 % false-positive rate): "
              f"false positives {false:.4f}, true positives {true:.4f}")  # fmt: skip
    before, after = result["calibration_error"], result["calibration_error_calibrated"]
    print(f"calibration error {before:.4f}; with temperature {result['temperature']:.2f}: {after:.4f}")
    groups = [f"from {row['tokens_from']}: {row['accuracy']:.3f} ({row['n']})" for row in result["by_length"]]
    print(f"accuracy by tokens (texts): {', '.join(groups)}")
    for error in result["confident_errors"][:3]:
        called = f"{error['label']} called {error['prediction']} with probability {error['probability']:.3f}"
        print(f"{called}: {short(error['text'], 50)}")


def plot_report(path, title, result, classes, logits):
    """One picture: the confusion matrix, reliability, and accuracy by length. Raises ImportError."""
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure  # not pyplot: no global figure, no display, the notebook's backend stays

    names, confusion, rows = list(result["per_class"]), np.array(result["confusion"]), result["by_length"]
    chinese = sorted(filter(re.compile("CJK|Hei|Song|Kai|Ming|PingFang").search, font_manager.get_font_names()))
    look = {"font.family": [*chinese[:3], "DejaVu Sans"], "text.parse_math": False}
    with rc_context(look), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fonts may lack the characters of a class's name
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        matrix, calibration, by_length = figure.subplots(1, 3)
        low, high = result["accuracy_interval"]
        title = f"{title}: accuracy {result['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f})"
        if not chinese and not "".join(names).isascii():
            title += "\nclass names need a Chinese font: apt install fonts-noto-cjk; rm -r ~/.cache/matplotlib"
        figure.suptitle(title, fontsize=10)
        matrix.imshow(confusion, cmap="Blues")
        for (i, j), n in np.ndenumerate(confusion):
            matrix.text(j, i, n, ha="center", va="center", color="white" if n > confusion.max() / 2 else "black")
        matrix.set(xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names)
        matrix.set(xlabel="predicted", ylabel="true", title="number of texts")
        matrix.tick_params(axis="x", rotation=30 if len("".join(names)) > 20 else 0)
        texts, confidence, accuracy = reliability(classes, softmax(logits / result["temperature"]))
        calibration.plot([0, 1], [0, 1], ":", color="grey")
        calibration.plot(confidence[texts > 0], accuracy[texts > 0], "o-", markersize=4)
        for k in np.flatnonzero(texts):
            calibration.text(confidence[k], accuracy[k] - 0.04, texts[k], size=7, ha="center", va="top")
        calibration.set(xlim=(1 / len(names) - 0.03, 1.04), ylim=(-0.1, 1.05), title="reliability (texts per bin)")
        calibration.set(xlabel="confidence, calibrated", ylabel="accuracy")
        bars = by_length.bar([f"{row['tokens_from']}+" for row in rows], [row["accuracy"] for row in rows])
        by_length.bar_label(bars, [f"{row['accuracy']:.3f}\n({row['n']})" for row in rows], fontsize=7, padding=-22)
        lowest = min(row["accuracy"] for row in rows)
        by_length.tick_params(axis="x", labelsize=8)
        by_length.set(ylim=(max(0, lowest - 0.15), 1.005), xlabel="tokens", title="accuracy by length (texts)")
        figure.savefig(path, dpi=110)


def parts_to_score(run, sources=None, split=None):
    """List of (name, examples): the run's own part, checked against the hash in run.json, or each of `sources`."""
    protocol, labels = run["split"]["protocol"], run["labels"]
    if not sources:
        examples, _ = data.load_examples(run["data"], run["hub"], protocol, labels)
        parts = data.split_examples(examples, protocol, labels)
        wanted = data.PARTS if split == "all" else [split or "test"]
        for part in wanted:
            if data.hash_examples(parts[part], labels) != run["split"]["sha256"][part]:
                where = short(" ".join(run["data"]), 80)
                raise InputError(f"{where} does not match the data that this run used: its {part} part differs")
        return [(split or "test", [example for part in wanted for example in parts[part]])]
    if twice := [name for name, n in Counter(Path(source).stem for source in sources).items() if n > 1]:
        raise InputError(f"--data has two sources whose results would be called {twice[0]}: rename one")
    named = []
    for source in sources:
        examples, _ = data.load_examples([source], run["hub"], protocol, labels)
        examples = examples if split in (None, "all") else data.split_examples(examples, protocol, labels)[split]
        named.append((f"data-{Path(source).stem}", examples))
    return named


def score(name, examples, model, tokenizer, run, output_dir):
    """Predict, report and save one part."""
    labels, temperature, started = run["labels"], run["temperature"], time.perf_counter()
    token_ids, odd = data.tokenize(tokenizer, [example["text"] for example in examples], run["max_length"])
    logits = predict(model, token_ids, name)
    seconds, lengths = time.perf_counter() - started, np.array([len(ids) for ids in token_ids])
    speed = f"{seconds:.1f} s, {len(examples) / seconds:.0f} texts/s"
    print(f"\n{name}: {len(examples)} texts, {lengths.sum()} tokens, {speed}{data.note_of(odd, '; of these texts, ')}")
    classes = np.array([labels.index(example["label"]) for example in examples])
    questions = [example["question"] for example in examples]
    result = metrics(classes, logits, questions, lengths, labels, temperature, run["threshold"])
    predictions, rows, errors = [labels[k] for k in logits.argmax(1)], [], []
    for example, prediction, row, p in zip(examples, predictions, logits, softmax(logits / temperature), strict=True):
        rows.append({"logits": row.tolist(), "probabilities": dict(zip(labels, p.tolist(), strict=True))})
        if prediction != example["label"]:
            error = {"label": example["label"], "prediction": prediction, "probability": float(p.max())}
            errors.append(error | {"text": example["text"]})
    result["confident_errors"] = sorted(errors, key=lambda error: -error["probability"])[:10]
    print_report(result)
    output_dir.mkdir(parents=True, exist_ok=True)
    data.save_predictions(output_dir / f"predictions-{name}.jsonl", examples, predictions, rows)
    data.write_atomically(output_dir / f"eval-{name}.json", json.dumps(result, indent=1, ensure_ascii=False))
    picture = f", report-{name}.png"
    try:
        plot_report(output_dir / f"report-{name}.png", f"{Path(run['model']).name} on {name}", result, classes, logits)
    except ImportError:
        picture = " (for pictures: pip install matplotlib)"
    print(f"written to {output_dir}: eval-{name}.json, predictions-{name}.jsonl{picture}")


def label_rows(rows, model, tokenizer, run, prefix=""):
    """Add label and calibrated probability, named after `prefix`, to the rows without an error; returns odd counts."""
    rows = [row for row in rows if "error" not in row]
    texts = [row["text"].encode("utf-8", "replace").decode() for row in rows]
    texts = [data.normalise(text) for text in texts] if run["split"]["protocol"] == "strict" else texts
    token_ids, odd = data.tokenize(tokenizer, texts, run["max_length"])
    probabilities = softmax(predict(model, token_ids) / run["temperature"]) if rows else []
    for row, p in zip(rows, probabilities, strict=True):
        row |= {f"{prefix}label": run["labels"][p.argmax()], f"{prefix}probability": round(float(p.max()), 6)}
    return odd


def rows_to_label(source):
    """The rows of a file, None for an empty one; a row without a text gets the field `error`, which says why."""
    for place, row in data.read_rows(source):
        if isinstance(row, InputError):
            row = {"error": f"{place} {row}"}
        elif row is not None:
            row.pop("error", None)  # which a file that we wrote may have
            if not isinstance(row.get("text"), str) or not row["text"].strip():
                row["error"] = f"{place} has no text"
        yield row


def label_file(args, load):
    """Label each row of a file, in order, into args.output. `load()` gives model, tokenizer and run.

    Finished rows wait in a .partial file, which is named after run and source: the same command continues it.
    """
    source, output, count, prefix = args.predict, args.output, Counter(), ""
    if output.exists():
        raise InputError(f"{output} exists already: choose another --output, or delete it")
    for row in rows_to_label(source):
        count["empty" if row is None else "skipped" if "error" in row else "labelled"] += 1
        while row and not row.keys().isdisjoint((f"{prefix}label", f"{prefix}probability")):  # no column is lost
            prefix += "predicted_"
    if not count["labelled"]:
        raise InputError(f"{source} has no row with a text: a column or field called text is needed")
    model, tokenizer, run = load()
    stat, total = os.stat(source), count["labelled"] + count["skipped"]
    identity = json.dumps([run, args.model, args.hub, args.mixed_precision, stat.st_size, stat.st_mtime_ns])
    partial = Path(f"{output}.{hashlib.sha256(identity.encode()).hexdigest()[:8]}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a+b") as file, tqdm(total=total, desc="predict", unit=" rows") as bar:
        file.seek(0)
        done, odd = sum(line.endswith(b"\n") for line in file) // CHUNK * CHUNK, Counter()  # whole chunks only
        file.seek(0)
        file.truncate(sum(len(line) for line in itertools.islice(file, done)))
        bar.update(done)
        rows = itertools.islice(filter(None, rows_to_label(source)), done, None)
        while chunk := list(itertools.islice(rows, CHUNK)):
            odd += label_rows(chunk, model, tokenizer, run, prefix)
            file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in chunk)
            file.flush()
            bar.update(len(chunk))
    if output.suffix == ".csv":
        with data.replacing(output) as temporary:
            write_csv(partial, temporary)
        partial.unlink()
    else:
        os.replace(partial, output)
    skipped = f"{count['skipped']} skipped (their field `error` says why), {count['empty']} empty rows left out"
    note = data.note_of(odd, "; of these texts, ")
    print(f"{count['labelled']} rows labelled, {skipped}{note}; written to {output}")


def write_csv(source, output):
    """Write the JSON lines of `source` as a .csv that Excel reads."""
    with open(source, encoding="utf-8") as file, open(output, "w", encoding="utf-8-sig", newline="") as table:
        columns = {name: None for line in file for name in json.loads(line)}
        file.seek(0)
        writer = csv.DictWriter(table, sorted(columns, key=lambda name: name == "error"))  # errors come last
        writer.writeheader()
        writer.writerows(map(json.loads, file))


CARD = """---
base_model: {model}
pipeline_tag: text-classification
---
A text classifier for {labels}: {model}, fine-tuned with LoRA on {data} ({split[protocol]} protocol) and merged.
Validation accuracy {accuracy:.4f}{test}. The licences of the base model and the data apply (HC3-Chinese: CC BY-SA 4.0).

```python
from transformers import pipeline

pipeline("text-classification", model="THIS_FOLDER")("...", truncation=True)  # texts are cut at {max_length} tokens
```
"""


def merge(args, run):
    """Write adapter and base as one transformers model with a model card, and check that its logits are the same.

    As in training, run.json comes last: a folder without it is not finished.
    """
    if not run["lora"]:
        raise InputError(f"{args.ckpt} is not an adapter: it is a whole transformers model already")
    if args.merge.exists() and any(args.merge.iterdir()):
        raise InputError(f"--merge {args.merge} is not empty: choose another folder")
    model, tokenizer = load_checkpoint(args.ckpt, run, model=args.model, hub=args.hub)
    probe = np.random.default_rng(0).integers(0, model.classifier().config.vocab_size, (16, 64)).tolist()
    expected, test, merged = predict(model, probe), "", run | {"lora": False}
    try:
        if Path(args.ckpt, "eval-test.json").is_file():
            result = json.loads(Path(args.ckpt, "eval-test.json").read_text(encoding="utf-8"))
            low, high = result["accuracy_interval"]
            test = f", test accuracy {result['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})"
        test += ". Apply data.normalise to your texts first" if run["split"]["protocol"] == "strict" else ""
        facts = {name: ", ".join(run[name]) for name in ("labels", "data")} | {"test": test}
        args.merge.mkdir(parents=True, exist_ok=True)
        save_model(args.merge, model.model, tokenizer, run["max_length"])
        data.write_atomically(args.merge / "README.md", CARD.format(**run | run["validation"] | facts))
        difference = float(abs(predict(load_checkpoint(args.merge, merged)[0], probe) - expected).max())
        if not difference <= 1e-3 * float(abs(expected).max()):
            raise ValueError(f"its logits differ by {difference:.2g}")
        data.write_atomically(args.merge / "run.json", json.dumps(merged, indent=1, ensure_ascii=False))
    except Exception as error:  # on a full disk each library raises a type of its own
        shutil.rmtree(args.merge, ignore_errors=True)
        raise InputError(f"cannot write the merged model to {args.merge} ({short(error, 120)})") from None
    use = f"pipeline('text-classification', model='{args.merge.as_posix()}')(texts, truncation=True)"
    print(f"written to {args.merge}; loaded again, its logits differ by {difference:.1e} at most. Use it as {use}")


@data.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    if args.compare:
        return compare(args.compare)
    run = read_run(args.ckpt)
    data.choose_precision(args.mixed_precision)
    if args.merge:
        return merge(args, run)
    if args.text is not None and not args.text.strip():
        raise InputError("--text is empty")

    def load():
        dtype, device = data.DTYPES[args.mixed_precision], PartialState().device
        return *load_checkpoint(args.ckpt, run, dtype, device, args.model, args.hub), run

    if args.predict:
        return label_file(args, load)
    if args.text is not None:
        row = {"text": args.text}
        note = data.note_of(label_rows([row], *load()), "note: of 1 text, ")
        print(f"{row['label']} {row['probability']:.4f}")
        return print(note, file=sys.stderr) if note else None
    parts = parts_to_score(run, args.data, args.split)
    if args.example is not None:
        examples = parts[0][1]
        if args.example >= len(examples):
            raise InputError(f"--example {args.example}: {parts[0][0]} has the texts 0 to {len(examples) - 1}")
        row = dict(examples[args.example])
        label_rows([row], *load(), "predicted_")
        verdict = "正确" if row["predicted_label"] == row["label"] else "错误"
        print(f"【预测{verdict}!】Label: {row['label']}, Pred_Label: {row['predicted_label']}\nText: {row['text']}")
        return
    model, tokenizer, run = load()
    weights, device = sum(p.numel() for p in model.parameters()), next(model.parameters()).device
    print(f"{type(model.classifier()).__name__} from {run['model']}: {weights:,} parameters on {device}")
    if args.data and args.split in (None, "all") and set(args.data) & set(run["data"]):
        print("note: the run was trained on part of this data; leave out --data to score its own test part")
    output_dir = args.output_dir or Path(args.ckpt if os.access(args.ckpt, os.W_OK) else ".")  # such as /kaggle/input
    for name, examples in parts:
        score(name, examples, model, tokenizer, run, output_dir)


if __name__ == "__main__":
    main()
