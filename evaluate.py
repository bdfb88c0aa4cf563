"""Evaluate a checkpoint on the very test texts of its run, on other data, or on one text.

    python evaluate.py --ckpt out/demo                               # the run's own test part: report and files
    python evaluate.py --ckpt out/demo --text "总之，建议您咨询专业人士。"     # label and probability of one text
    python evaluate.py --ckpt out/demo --data law finance            # other subsets or files, one by one

The first two take seconds with the tiny base of the demo; the third downloads two subsets once. `run.json` in the
checkpoint says what else is needed: base model, data, split and its hash, max_length, temperature and threshold.
Written to the checkpoint's folder (or --output_dir): eval-<name>.json, predictions-<name>.jsonl, and with matplotlib
report-<name>.png.

    python evaluate.py --ckpt out/demo --predict tests/texts.csv --output out/labelled.jsonl      # any number of texts
    python evaluate.py --ckpt out/demo --merge out/merged            # adapter and base as one plain transformers model
    python evaluate.py --compare out/a/predictions-test.jsonl out/b/predictions-test.jsonl        # are they different?
"""

import io
import itertools
import json
import math
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

import data
from data import InputError

CHUNK = 1024  # rows that --predict reads and writes at a time
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC")
LENGTH_EDGES = (32, 64, 128, 256, 512)  # tokens, between the buckets of "accuracy by length"


def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__.splitlines()[0])
    add, count = parser.add_argument, data.number(int, 0, 2**31)
    add("--ckpt", help="folder that train.py wrote")
    add("--split", choices=["train", "validation", "test", "all"], help="part to score (test, or with --data all)")
    add("--data", nargs="+", metavar="SOURCE", help="other subsets or files to score than the run's own")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--text", help="print label and probability of this text")
    one("--example", type=count, metavar="N", help="print example N of the part, with its prediction")
    one("--predict", metavar="FILE", help="label every `text` of this .jsonl or .csv, of any size, into --output")
    one("--merge", type=data.folder, metavar="FOLDER", help="write adapter and base as one transformers model")
    add("--output", type=Path, metavar="FILE", help=".jsonl of --predict: a line a row; goes on with what is there")
    add("--compare", nargs="+", metavar="FILE", help="compare predictions-*.jsonl on the same texts")
    add("--model", help="base model of an adapter, where it is no longer what run.json says")
    add("--hub", choices=["huggingface", "modelscope"], help="where a base model comes from (as in the run)")
    add("--max_length", type=count, help="cut texts at so many tokens; 0: never (as in the run)")
    add("--mixed_precision", choices=["no", "bf16", "fp16"], default="no", help="dtype of the weights")
    add("--output_dir", type=data.folder, help="folder for the results (the checkpoint's)")
    args = parser.parse_args(argv)
    if not args.ckpt and not args.compare:
        parser.error("--ckpt FOLDER (written by train.py) is needed, or --compare FILE FILE")
    if args.compare and len(args.compare) < 2:
        parser.error("--compare needs two files or more")
    if bool(args.predict) != bool(args.output):
        parser.error("--predict FILE and --output FILE go together")
    return args


# ---- checkpoint -> model -------------------------------------------------------------------------


RUN_FIELDS = {"model": str, "hub": str, "data": list, "labels": list, "max_length": int, "lora": bool, "split": dict}
RUN_FIELDS |= {"arguments": dict, "temperature": (int, float), "threshold": (int, float, type(None))}


def read_run(ckpt):
    """The run.json of a checkpoint, with what the scripts rely on checked. Raises InputError."""
    path = Path(ckpt) / "run.json"
    if not path.is_file():
        stopped = (Path(ckpt) / "unfinished").is_dir()
        hint = "train.py did not finish there, --resume goes on" if stopped else "not written by train.py"
        raise InputError(f"{ckpt} holds no finished run (no run.json: {hint})")
    try:
        run = {"temperature": 1.0, "threshold": None} | json.loads(path.read_text(encoding="utf-8"))
        wrong = [name for name, kind in RUN_FIELDS.items() if not isinstance(run[name], kind)]
        if not wrong:
            split = run["split"]
            sound = {
                "labels": len(run["labels"]) >= 2 and all(isinstance(label, str) for label in run["labels"]),
                "data": all(isinstance(source, str) for source in run["data"]),
                "max_length": run["max_length"] >= 0,
                "split": split.get("protocol") in data.PROTOCOLS and set(data.PARTS) <= set(split.get("sha256", ())),
                "arguments": not run["lora"] or {"lora_r", "lora_targets"} <= set(run["arguments"]),
                "temperature": 0 < run["temperature"] < math.inf,
                "threshold": run["threshold"] is None or 0 <= run["threshold"] <= 1,
            }
            wrong = [name for name, fine in sound.items() if not fine]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({data.one_line(error)}): take another copy of the checkpoint") from None
    if wrong:
        raise InputError(f"{path} is damaged (unusable: {', '.join(wrong)}): take another copy of the checkpoint")
    return run


def load_checkpoint(ckpt, dtype=torch.float32, device="cpu", model=None, hub=None, merge=True):
    """The model, the tokenizer and run.json of a checkpoint written by train.py.

    If `merge`, an adapter is merged into its base in float32 before the weights take `dtype`. `model` and `hub` say
    where the base comes from, instead of run.json. Only safetensors are read and no code from the checkpoint runs.
    Raises InputError.
    """
    run = read_run(ckpt)
    weights = "adapter_model.safetensors" if run["lora"] else "model*.safetensors"
    if not list(Path(ckpt).glob(weights)):
        raise InputError(f"{ckpt} holds no {weights}: the checkpoint is incomplete")
    tokenizer = data.load_tokenizer(ckpt)
    if not run["lora"]:
        classifier = data.load_classifier(ckpt, tokenizer, torch.float32, run["labels"], new_head=False)
    else:
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors.torch import load_file

        base = model or run["model"]
        try:
            folder = data.fetch_model(base, hub or run["hub"])
        except InputError as error:
            raise InputError(f"the adapter's base model cannot be had: {error}. Give it with --model") from None
        classifier = data.load_classifier(folder, tokenizer, torch.float32, run["labels"])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT only warns of missing weights and is silent about others
                adapted = PeftModel.from_pretrained(classifier, str(ckpt))
            wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
            if differ := sorted(wanted ^ load_file(Path(ckpt) / weights).keys()):
                raise ValueError(f"one of the two lacks {', '.join(differ[:3])}")
            classifier = adapted.merge_and_unload() if merge else adapted
        except Exception as error:
            raise InputError(f"the adapter in {ckpt} does not fit the base {base} ({data.one_line(error)})") from None
    return data.PackedClassifier(classifier.to(device, dtype)).eval(), tokenizer, run


# ---- model -> predictions ------------------------------------------------------------------------


def rows_of(token_ids, tokens_per_row):
    """Cut range(len(token_ids)) into consecutive packed rows of at most `tokens_per_row` tokens (or one long text)."""
    row, size = [], 0
    for index, ids in enumerate(token_ids):
        if row and size + len(ids) > tokens_per_row:
            yield row
            row, size = [], 0
        row.append(index)
        size += len(ids)
    if row:
        yield row


@torch.inference_mode()
def predict(model, token_ids, device, description=None, process=0, processes=1):
    """Logits of each text, float32 (n, classes) in numpy, in order; each text is scored exactly once.

    `description`: of the progress bar; without one there is none.

    Of several processes each scores every so-many-th row, all run the model equally often (DDP and FSDP want that), and
    all get the whole result. The rows, and so the logits, do not depend on the number of processes.
    """
    rows = list(rows_of(token_ids, 16384 if device.type == "cuda" else 1024))
    scored = []
    was_training = model.training
    model.eval()
    # position 0: over train.py's bar and not under it, as a notebook does not understand "one line up".
    options = {"disable": process > 0 or description is None, "leave": False, "position": 0}
    with tqdm(total=len(token_ids), desc=description, unit=" texts", **options) as bar:
        for first in range(0, len(rows), processes):
            mine = first + process
            row = rows[min(mine, len(rows) - 1)]
            logits = model(**data.pack([token_ids[index] for index in row], device))
            if mine < len(rows):
                scored.append((row, logits))
            bar.update(sum(map(len, rows[first : first + processes])))
    model.train(was_training)
    scored = [(row, logits.cpu().numpy()) for row, logits in scored]
    if processes > 1:
        scored = gather_object(scored)
    order = [index for row, _ in scored for index in row]
    assert sorted(order) == list(range(len(token_ids))), "every text must be scored exactly once"
    return np.concatenate([logits for _, logits in scored])[np.argsort(order)]


# ---- predictions -> numbers ----------------------------------------------------------------------


def softmax(logits):
    """Probabilities, float64 (n, classes), of logits (n, classes)."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def negative_log_likelihood(labels, logits):
    """Mean cross-entropy in nats."""
    probability = softmax(logits)[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(probability, 1e-300)).mean())


def bootstrap_interval(values, groups, draws=2000):
    """95 % percentile interval of the mean of `values` (n,), whole groups (questions) resampled with replacement.

    Two answers to one question are not independent, so questions are drawn and not texts (Efron and Tibshirani, 1993).
    Where all of `values` are right, or none, the exact binomial interval for so many questions.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    total, size = np.bincount(group, values), np.bincount(group)
    if values.dtype == bool and (values.all() or not values.any()):  # then nothing that is drawn differs
        bound = 0.025 ** (1 / len(size))  # Clopper and Pearson, 1934
        return [bound, 1.0] if values.all() else [0.0, 1 - bound]
    drawn = np.random.default_rng(0).multinomial(len(size), np.full(len(size), 1 / len(size)), draws)  # (draws, groups)
    return [float(bound) for bound in np.percentile(drawn @ total / (drawn @ size), [2.5, 97.5])]


def auroc(positive, scores):
    """Area under the ROC curve: the probability that a positive text scores higher, ties half (Mann-Whitney U)."""
    _, level, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[level]  # average rank among equal scores
    n_positive = positive.sum()
    wins = rank[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(wins / (n_positive * (len(scores) - n_positive)))


def reliability(labels, probabilities, bins=15):
    """Per bin of confidence, equal widths: (texts, mean confidence, accuracy), arrays (bins,) with 0 where empty."""
    confidence = probabilities.max(1)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    texts = np.bincount(bin_of, minlength=bins)
    mean = [
        np.bincount(bin_of, x, bins) / np.maximum(texts, 1) for x in (confidence, probabilities.argmax(1) == labels)
    ]
    return texts, *mean


def calibration_error(labels, probabilities):
    """Expected calibration error over 15 bins (Guo et al., 2017)."""
    texts, confidence, accuracy = reliability(labels, probabilities)
    return float((texts * abs(confidence - accuracy)).sum() / texts.sum())


def fit_calibration(labels, logits):
    """Temperature and threshold from the validation part.

    The temperature divides the logits so that the likelihood is highest (Guo et al., 2017), searched in steps of 1 %
    from 0.1 to 10. The threshold is the probability of the second class that at most 1 % of the first class's texts
    exceed; None with fewer than 100 of them, or with more than two classes.
    """
    grid = np.geomspace(0.1, 10, 463)
    temperature = float(min(grid, key=lambda t: negative_log_likelihood(labels, logits / t)))
    if len(labels) < 100 or temperature in (grid[0], grid[-1]):  # few texts, or all of them right, tell nothing
        temperature = 1.0
    negative = np.sort(softmax(logits / temperature)[labels == 0, 1])
    enough = len(negative) >= 100 and logits.shape[1] == 2
    threshold = float(negative[-1 - len(negative) // 100]) if enough else None
    return temperature, threshold


def metrics(labels, logits, questions, subsets, lengths, names=data.LABELS, temperature=1.0, threshold=None):
    """Everything that eval-<name>.json says about n texts, under plain names.

    `labels` int (n,), `logits` (n, classes); `questions`, `subsets` and `lengths` (tokens) (n,) are what the interval
    and the breakdowns group by; `names` of the classes. Of two classes the second is the positive one.
    """
    predicted, calibrated = logits.argmax(1), softmax(logits / temperature)
    right = predicted == labels
    confusion = np.zeros((len(names), len(names)), int)  # (true, predicted)
    np.add.at(confusion, (labels, predicted), 1)
    hits, true, called = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    scores = np.stack(
        [hits / np.maximum(called, 1), hits / np.maximum(true, 1), 2 * hits / np.maximum(true + called, 1)]
    )
    result = {
        "n": len(labels),
        "accuracy": float(right.mean()),
        "accuracy_interval": bootstrap_interval(right, questions),
        "loss": negative_log_likelihood(labels, logits),
        "per_class": {
            name: {"precision": precision, "recall": recall, "f1": f1, "n": n}
            for name, (precision, recall, f1), n in zip(names, scores.T.tolist(), true.tolist(), strict=True)
        },
        "confusion": confusion.tolist(),
        "calibration_error": calibration_error(labels, softmax(logits)),
        "calibration_error_calibrated": calibration_error(labels, calibrated),
        "temperature": temperature,
    }
    if len(names) == 2 and 0 < labels.sum() < len(labels):
        result["auroc"] = auroc(labels == 1, logits[:, 1] - logits[:, 0])
        result["false_positive_rate"] = float((predicted[labels == 0] == 1).mean())
        if threshold is not None:
            above = calibrated[:, 1] > threshold
            result["threshold"] = threshold
            result["false_positive_rate_above_threshold"] = float(above[labels == 0].mean())
            result["true_positive_rate_above_threshold"] = float(above[labels == 1].mean())

    def accuracy_of(chosen):
        return {"n": int(chosen.sum()), "accuracy": float(right[chosen].mean())}

    result["by_subset"] = {str(name): accuracy_of(subsets == name) for name in np.unique(subsets)}
    bucket = np.digitize(lengths, LENGTH_EDGES)
    result["by_length"] = [
        {"tokens_from": ([0, *LENGTH_EDGES])[k], **accuracy_of(bucket == k)} for k in np.unique(bucket)
    ]
    return result


def compare(paths):
    """A dict for each pair of prediction files: accuracies, their difference with interval, discordant counts, p.

    p is McNemar's exact two-sided test: of the texts that just one of the two gets right, is the share that the first
    gets right compatible with one half? Raises InputError where the files are not about the same texts.
    """
    runs = []
    for path in paths:
        try:
            lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
            if not lines:
                raise ValueError("it is empty")
            texts = [(line["text_sha256"], line["label"]) for line in lines]
            right = np.array([line["label"] == line["prediction"] for line in lines])
            questions = [line["question"] for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a predictions file ({data.one_line(error)})") from None
        runs.append((path, texts, right, questions))
    table = []
    for position, (first, texts, right, questions) in enumerate(runs):
        for second, other_texts, other_right, _ in runs[position + 1 :]:
            if texts != other_texts:
                raise InputError(f"{first} and {second} are not about the same texts in the same order: not comparable")
            wins, losses = int((right & ~other_right).sum()), int((other_right & ~right).sum())
            tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
            table.append(
                {
                    "first": first,
                    "second": second,
                    "n": len(texts),
                    "accuracies": [float(right.mean()), float(other_right.mean())],
                    "difference": float(right.mean() - other_right.mean()),
                    "interval": bootstrap_interval(right.astype(float) - other_right, questions),
                    "only_first_right": wins,
                    "only_second_right": losses,
                    "p": min(1.0, 2 * tail / 2 ** (wins + losses)),
                }
            )
    return table


def print_comparison(table):
    for row in table:
        low, high = row["interval"]
        for side, accuracy in zip(("first", "second"), row["accuracies"], strict=True):
            print(f"{accuracy:.4f}  {row[side]}  ({row['n']} texts, {row[f'only_{side}_right']} right alone)")
        print(
            f"difference {row['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}, McNemar p {row['p']:.3g}\n"
        )


# ---- the report -----------------------------------------------------------------------------------


def describe(model, run):
    """The model's name and configuration in one line."""
    config, weight = model.classifier().config, next(model.parameters())
    kind = "full fine-tuning"
    if run["arguments"].get("lora"):
        kind = f"LoRA r {run['arguments']['lora_r']} on {' '.join(run['arguments']['lora_targets'])}, merged"
    return (
        f"{type(model.classifier()).__name__} from {run['model']}: {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, {config.num_hidden_layers} layers, hidden size {config.hidden_size}; {kind}; "
        f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    )


def print_report(result):
    """The figures of `metrics` as a terminal table."""
    names = list(result["per_class"])
    print(f"\n{'':12} {'precision':>9} {'recall':>9} {'F1':>9} {'texts':>7}   predicted {'  '.join(names)}")
    for (name, row), counts in zip(result["per_class"].items(), result["confusion"], strict=True):
        cells = "  ".join(f"{count:{len(other)}}" for count, other in zip(counts, names, strict=True))
        print(f"{name:12} {row['precision']:9.4f} {row['recall']:9.4f} {row['f1']:9.4f} {row['n']:7}{'':13}{cells}")
    low, high = result["accuracy_interval"]
    print(f"accuracy {result['accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f}; loss {result['loss']:.4f}")
    if "auroc" in result:
        called = f"{names[0]} texts called {names[1]}: {result['false_positive_rate']:.4f}"
        print(f"AUROC {result['auroc']:.4f}; {called}")
    if "threshold" in result:
        false, true = (result[f"{kind}_positive_rate_above_threshold"] for kind in ("false", "true"))
        print(
            f"above {result['threshold']:.4f}, the threshold for 1 % of {names[0]} validation texts: {false:.4f} of "
            f"{names[0]}, {true:.4f} of {names[1]} texts"
        )
    before, after = result["calibration_error"], result["calibration_error_calibrated"]
    print(f"calibration error {before:.4f}, {after:.4f} at temperature {result['temperature']:.2f}")
    by_length = {f">= {row['tokens_from']}": row for row in result["by_length"]}
    for what, rows in (("tokens", by_length), ("subset", result["by_subset"])):
        if len(rows) > 1:
            print(f"by {what}:", ", ".join(f"{key} {row['accuracy']:.3f} ({row['n']})" for key, row in rows.items()))
    for error in result["confident_errors"][:3]:
        start = error["text"][:50]
        print(f"wrong at {error['probability']:.3f}: {error['label']} called {error['prediction']}: {start!r}")


def plot_report(path, result, labels, logits):
    """One picture: confusion, reliability, ROC (two classes) and accuracy by length. Needs matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no global figure, no display, the notebook's backend stays

    names, confusion = list(result["per_class"]), np.array(result["confusion"])
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    matrix, calibration, roc, by_length = figure.subplots(1, 4)
    matrix.imshow(confusion, cmap="Blues")
    for (i, j), count in np.ndenumerate(confusion):
        matrix.text(j, i, count, ha="center", va="center", color="white" if count > confusion.max() / 2 else "black")
    matrix.set(xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names)
    low, high = result["accuracy_interval"]
    matrix.set(xlabel="predicted", ylabel="true", title=f"accuracy {result['accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    for name, temperature in (("raw", 1.0), ("calibrated", result["temperature"])):
        texts, confidence, accuracy = reliability(labels, softmax(logits / temperature))
        calibration.plot(confidence[texts > 0], accuracy[texts > 0], "o-", markersize=3, label=name)
    calibration.plot([0, 1], [0, 1], color="grey", linestyle=":")
    calibration.set(xlim=(1 / len(names), 1.01), xlabel="confidence", ylabel="accuracy", title="reliability")
    calibration.legend()
    if "auroc" in result:
        order = np.argsort(logits[:, 0] - logits[:, 1])
        found = [np.cumsum(labels[order] == k) / (labels == k).sum() for k in (0, 1)]
        roc.plot([0, *found[0]], [0, *found[1]])
        roc.set(xlabel=f"share of {names[0]} called {names[1]}", ylabel=f"share of {names[1]} found")
        roc.set(title=f"AUROC {result['auroc']:.4f}")
    else:
        roc.set_axis_off()
    rows = result["by_length"]
    by_length.bar([f"{row['tokens_from']}+" for row in rows], [row["accuracy"] for row in rows])
    by_length.set(ylim=(0, 1), xlabel="tokens", title="accuracy by length")
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font may lack the characters of a class's name
        figure.savefig(picture, dpi=110, format="png")
    data.write_atomically(path, picture.getvalue())


# ---- main -----------------------------------------------------------------------------------------


def parts_to_score(run, sources=None, split=None):
    """List of (name, examples): the run's own part, checked against the hash in run.json, or each of `sources`."""
    protocol, labels = run["split"]["protocol"], run["labels"]
    if not sources:
        try:
            records = data.load_hc3(run["data"])
        except InputError as error:
            raise InputError(f"{error} (run.json names its data as seen from where train.py ran)") from None
        examples, _ = data.make_examples(records, protocol, labels)
        parts = data.split_examples(examples, protocol, labels)
        wanted = parts if split == "all" else [split or "test"]
        for part in wanted:
            if data.hash_examples(parts[part]) != run["split"]["sha256"][part]:
                raise InputError(f"{' '.join(run['data'])} is not the data of this run: its {part} part is another")
        return [(split or "test", [example for part in wanted for example in parts[part]])]
    named = {}
    for source in sources:
        examples, _ = data.make_examples(data.load_hc3([source]), protocol, labels)
        if not examples:
            raise InputError(f"{source} holds no answers: there is nothing to score")
        if split not in (None, "all"):
            examples = data.split_examples(examples, protocol, labels)[split]
        if named.setdefault(Path(source).stem, examples) is not examples:
            raise InputError(f"--data has two sources named {Path(source).stem}, as the results would be: rename one")
    return list(named.items())


def score(name, examples, model, tokenizer, run, max_length, output_dir):
    """Predict, report and save one part."""
    labels, temperature = run["labels"], run["temperature"]
    token_ids = data.tokenize(tokenizer, [example["text"] for example in examples], max_length)
    started = time.perf_counter()
    logits = predict(model, token_ids, model.device, name)
    seconds = time.perf_counter() - started
    true, lengths = np.array([example["label"] for example in examples]), np.array([len(ids) for ids in token_ids])
    questions, subsets = (np.array([example[field] for example in examples]) for field in ("question", "subset"))
    result = metrics(true, logits, questions, subsets, lengths, labels, temperature, run["threshold"])
    predictions = [labels[k] for k in logits.argmax(1)]
    probabilities = softmax(logits / temperature)
    confidence = probabilities.max(1)
    wrong = np.flatnonzero(logits.argmax(1) != true)
    result["confident_errors"] = [
        {
            "label": labels[true[i]],
            "prediction": predictions[i],
            "probability": float(confidence[i]),
            "text": examples[i]["text"],
        }
        for i in wrong[np.argsort(-confidence[wrong])][:10]
    ]
    speed = f"{seconds:.1f} s, {len(examples) / seconds:.0f} texts/s"
    print(f"\n{name}: {len(examples)} texts, {lengths.sum()} tokens, {speed}")
    print_report(result)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"predictions-{name}.jsonl"
    data.save_predictions(path, examples, labels, predictions, logits, probabilities)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    data.write_atomically(output_dir / f"eval-{name}.json", text)
    try:
        from matplotlib import font_manager, rc_context

        fonts = [font for font in CHINESE_FONTS if font in font_manager.get_font_names()]  # for Chinese class names
        with rc_context({"font.family": [*fonts, "DejaVu Sans"]}):
            plot_report(output_dir / f"report-{name}.png", result, true, logits)
        picture = f", report-{name}.png"
    except ImportError:
        picture = " (for pictures: pip install matplotlib)"
    print(f"written to {output_dir}: eval-{name}.json, predictions-{name}.jsonl{picture}")


def label_rows(rows, model, tokenizer, run, max_length):
    """A dict for each of `rows`, as `data.read_rows` yields them: label and calibrated probability, or the error."""
    texts, results = {}, []
    for position, (number, row) in enumerate(rows):
        text = row.get("text") if isinstance(row, dict) else None
        text = data.valid_unicode(text) if isinstance(text, str) else ""
        text = data.normalise(text) if run["split"]["protocol"] == "strict" else text
        if text.strip():
            texts[position] = text
        results.append({"error": f"line {number} {row if isinstance(row, str) else 'has no text'}"})
    if texts:
        logits = predict(model, data.tokenize(tokenizer, texts.values(), max_length), model.device)
        for position, p in zip(texts, softmax(logits / run["temperature"]), strict=True):
            results[position] = {"label": run["labels"][p.argmax()], "probability": round(float(p.max()), 6)}
    return results


def same_result(line, result):
    """Whether a line (bytes) of an --output says the same as `result`; a torn one, whether it begins like it."""
    if not line.endswith(b"\n"):
        return json.dumps(result).encode().startswith(line[:10])
    try:
        written = json.loads(line)
        near = abs(written.get("probability", 0) - result.get("probability", 0)) < 0.01  # another machine rounds anew
        tie = result.get("probability", 1) < 0.51  # of two labels that are as likely, either may come first
        return near and written.keys() == result.keys() and (tie or written.get("label") == result.get("label"))
    except (ValueError, AttributeError, TypeError):
        return False


def label_file(source, output, model, tokenizer, run, max_length):
    """Label each row of a `.jsonl` or `.csv` file that has a `text`: `output` gets a JSON line a row, in order.

    Memory is constant. What `output` holds already is kept; only its last lines are made again, to see that they are
    this checkpoint's about this file. Raises InputError where they are not, and where no row has a text.
    """
    if not any(isinstance(row, dict) and "text" in row for _, row in itertools.islice(data.read_rows(source), CHUNK)):
        raise InputError(f"{source} has no rows with a text in its beginning: a column or field `text` is needed")
    if output.exists() and output.samefile(source):
        raise InputError("--output is the file that is read: choose another")
    other = f"{output} holds other lines than this checkpoint's about {source}: choose another"
    total = sum(1 for _ in data.read_rows(source))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch()
    with output.open("r+b") as file, tqdm(total=total, desc="predict", unit=" texts") as bar:
        done = sum(line.endswith(b"\n") for line in file)
        if done > total:
            raise InputError(other)
        first = max(0, done - 1) // CHUNK * CHUNK  # where the chunk with the last of them begins
        rows = itertools.islice(data.read_rows(source), first, None)
        file.seek(0)
        if done:
            bar.write(f"{done} of {total} rows are in {output} already")
        errors = sum(line.startswith(b'{"error"') for line in itertools.islice(file, first))
        bar.initial = bar.n = first
        while chunk := list(itertools.islice(rows, CHUNK)):
            results, start = label_rows(chunk, model, tokenizer, run, max_length), file.tell()
            lines = list(itertools.islice(file, CHUNK))
            if len(lines) > len(chunk) or not all(map(same_result, lines, results)):
                raise InputError(other)
            file.seek(start)
            file.truncate()
            file.writelines(json.dumps(result, ensure_ascii=False).encode() + b"\n" for result in results)
            file.flush()
            errors += sum("error" in result for result in results)
            bar.update(len(chunk))
    print(f"{total} rows, {errors} of them without a label (their `error` says why); written to {output}")


def merge(args, run, device):
    """Write adapter and base as one transformers model with its tokenizer and run.json, and see that it says the same.

    The merge is done in float32. Raises InputError where the logits differ by more than float32 rounding explains.
    """
    if not run["lora"]:
        raise InputError(f"{args.ckpt} is no adapter: it is a whole transformers model already")
    if args.merge.exists() and any(args.merge.iterdir()):
        raise InputError(f"--merge {args.merge} is not empty: choose another folder")
    adapted, tokenizer, _ = load_checkpoint(args.ckpt, device=device, model=args.model, hub=args.hub, merge=False)
    probe = np.random.default_rng(0).integers(0, adapted.classifier().config.vocab_size, (16, 64)).tolist()
    expected = predict(adapted, probe, device)
    folder = Path(f"{args.merge}.unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        adapted.model.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        data.spell_as_before(folder)
        text = json.dumps(run | {"lora": False}, indent=1, ensure_ascii=False)
        data.write_atomically(folder / "run.json", text)
        loaded, _, _ = load_checkpoint(folder, device=device)
        difference = float(abs(predict(loaded, probe, device) - expected).max())
        del loaded  # Windows moves no file that is in use
        if not difference <= 1e-3 * float(abs(expected).max()):
            raise ValueError(f"its logits differ from the adapter's by {difference:.2g}")
        if args.merge.exists():
            args.merge.rmdir()  # it is empty
        os.replace(folder, args.merge)
    except Exception as error:  # of a full disk each library has a type of its own
        raise InputError(f"the merged model could not be written to {args.merge} ({data.one_line(error)})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"largest difference of a logit to the adapter's: {difference:.1e}")
    use = f"pipeline('text-classification', model='{args.merge.as_posix()}')"
    print(f"written to {args.merge}, for {use} or either hub's upload")


@data.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    if args.compare:
        print_comparison(compare(args.compare))
        return
    run = read_run(args.ckpt)
    device = PartialState().device
    if device.type == "cuda":
        data.check_gpu()
    if args.merge:
        merge(args, run, device)
        return
    parts = parts_to_score(run, args.data, args.split) if args.text is None and not args.predict else []
    if args.text is not None and not args.text.strip():
        raise InputError("--text is empty")
    if args.example is not None and args.example >= len(parts[0][1]):
        raise InputError(f"--example {args.example}: {parts[0][0]} has the examples 0 to {len(parts[0][1]) - 1}")
    dtype = data.DTYPES[args.mixed_precision]
    model, tokenizer, run = load_checkpoint(args.ckpt, dtype, device, args.model, args.hub)
    max_length = run["max_length"] if args.max_length is None else args.max_length
    if args.predict:
        label_file(args.predict, args.output, model, tokenizer, run, max_length)
        return
    if args.text is not None:
        [result] = label_rows([(1, {"text": args.text})], model, tokenizer, run, max_length)
        print(f"{result['label']} {result['probability']:.4f}" if "label" in result else result["error"])
        return
    if args.example is not None:
        example = parts[0][1][args.example]
        label = run["labels"][example["label"]]
        predicted = label_rows([(1, example)], model, tokenizer, run, max_length)[0]["label"]
        verdict = "正确" if predicted == label else "错误"
        print(f"【预测{verdict}!】Label: {label}, Pred_Label: {predicted}\nText: {example['text']}")
        return
    print(describe(model, run))
    if args.data and args.split in (None, "all") and set(args.data) & set(run["data"]):
        print("note: this data is what the run was trained on: --split test scores what it was not trained on")
    output_dir = args.output_dir or Path(args.ckpt)
    if not args.output_dir and not os.access(output_dir, os.W_OK):  # such as /kaggle/input
        output_dir = Path(".")
    for name, examples in parts:
        score(name, examples, model, tokenizer, run, max_length, output_dir)


if __name__ == "__main__":
    main()
