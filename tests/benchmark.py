"""Measure train.py and evaluate.py side by side with what one would run otherwise, on the machine at hand.

    python tests/benchmark.py                                           # a tiny base: ten minutes on two CPU cores
    python tests/benchmark.py --size mid --texts 128 --only training    # a CPU where arithmetic outweighs all else
    python tests/benchmark.py --size 0.5b --texts 384 --batch_size 64   # a GPU; Qwen1.5-0.5B's shape, random weights

None needs a network. Training is compared with the published recipe (Hugging Face's Trainer, fp32, batch 4, every text
padded to 512 tokens) and with a Trainer set as well as it can be; evaluation with one text at a time and with
Trainer.predict. All see the same texts, start from the same weights and train for one epoch.

Every variant runs in a fresh process, and a repetition runs all of them before the next begins, so that a machine
which is slow for a while is slow for all. Written to --output_dir, anew after every repetition: results.jsonl (a line
for each process), benchmark.md (the tables) and, with matplotlib, benchmark.png.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data

# Whatever else is large is imported in the workers alone: on Linux the peak memory of a process counts from what its
# parent held when it started.

TESTS = Path(__file__).resolve().parent
SHAPES = {  # vocabulary, hidden size, layers, heads, intermediate size; weights are random, no speed depends on them
    "mid": (6144, 256, 6, 4, 704),
    "0.5b": (151936, 1024, 24, 16, 2816),
}
RECIPE, BEST_TRAINER, OURS = "published recipe", "Trainer at its best", "train.py"
ONE_BY_ONE, TRAINER_PREDICT, OUR_PREDICT = "one text at a time", "Trainer.predict", "evaluate.py"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_LENGTH, RECIPE_BATCH, SEED = 512, 4, 233
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_args(argv=None):
    parser = data.ArgumentParser(description=__doc__.splitlines()[0])
    add, positive = parser.add_argument, data.number(int, 1)
    base = parser.add_mutually_exclusive_group().add_argument
    base("--size", choices=["tiny", *SHAPES], default="tiny", help="base: tests/tiny-qwen, or a shape")
    base("--config", help="base: the shape in a folder's config.json, and its tokenizer")
    add("--data", nargs="+", default=[str(TESTS / "sample.jsonl")], metavar="SOURCE", help="subsets or files")
    # A Trainer sorts by length within a quarter of the texts, at most 50 batches: with few texts it does so less well.
    add("--texts", type=data.number(int, 8, 4000), default=128, help="texts to train on and to evaluate")
    add("--batch_size", type=positive, default=4, help="texts in a training step; the recipe's is 4 whatever this is")
    add("--learning_rate", type=data.number(float, 1e-12), default=5e-5, help="peak; falls linearly to 0")
    add("--methods", nargs="+", choices=["lora", "full"], default=["lora", "full"], help="what to train")
    add("--only", choices=["training", "evaluation"], help="leave the other out")
    add("--repeats", type=positive, default=3, help="fresh processes for each variant")
    add("--threads", type=positive, help="CPU threads of a process (torch's choice)")
    add("--output_dir", type=data.folder, default=Path("out/benchmark"), help="folder for the results")
    add("--worker", nargs=4, help=argparse.SUPPRESS)  # a variant, to run in this process
    add("--scratch", type=Path, help=argparse.SUPPRESS)  # the folder that the workers share
    add("--started", type=float, help=argparse.SUPPRESS)  # time.time() before this process started
    return parser.parse_args(argv)


def variants(args, bf16):
    """All (task, method, name, precision); in each group comes first what the others are compared with."""
    listed, precisions = [], list(DTYPES) if bf16 else ["fp32"]
    for method in args.methods if args.only != "evaluation" else []:
        listed += [("training", method, RECIPE, "fp32"), ("training", method, BEST_TRAINER, precisions[-1])]
        listed += [("training", method, OURS, precision) for precision in precisions]
    if args.only != "training":
        listed += [("evaluation", "lora", ONE_BY_ONE, "fp32")]
        for name in (TRAINER_PREDICT, OUR_PREDICT):
            listed += [("evaluation", "lora", name, precision) for precision in precisions]
    return listed


# ---- workers: what they share --------------------------------------------------------------------


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(dtype, seconds=0.3):
    """FLOP/s of a product of two square matrices in `dtype`: the best seen, which no model can exceed."""
    size, best, end = 256, 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        matrix = torch.randn(size, size, device=DEVICE).to(dtype)
        synchronize()
        start = time.perf_counter()
        matrix @ matrix
        synchronize()
        took = time.perf_counter() - start
        best = max(best, 2 * size**3 / took)
        if took < 0.02 and size < 8192:  # too small for many cores or a GPU
            size *= 2
    return best


def load_texts(scratch):
    """The tokenizer, and of each part the examples and the token ids, as train.py gets them."""
    tokenizer = data.load_tokenizer(scratch / "base")
    parts = data.split_examples(data.load_examples([str(scratch / "texts.jsonl")])[0])
    ids = {part: data.tokenize(tokenizer, [e["text"] for e in parts[part]], MAX_LENGTH)[0] for part in data.PARTS}
    return tokenizer, parts, ids


def trainer_rows(examples, token_ids, pad, width=0):
    """What a Trainer reads: a dict for each text, padded to `width` tokens or, with 0, left to the collator."""
    rows = []
    for example, ids in zip(examples, token_ids, strict=True):
        padding = [pad] * (width - len(ids))
        mask = [1] * len(ids) + [0] * len(padding)
        rows.append({"input_ids": ids + padding, "attention_mask": mask, "labels": data.LABELS.index(example["label"])})
    return rows


def train_ours(args, method, precision, output_dir, *more):
    """train.py on the shared texts, through its command line."""
    import train

    command = ["--model", args.scratch / "base", "--data", args.scratch / "texts.jsonl", "--output_dir", output_dir]
    command += ["--epochs", 1, "--batch_size", args.batch_size, "--learning_rate", args.learning_rate, "--seed", SEED]
    command += ["--mixed_precision", "no" if precision == "fp32" else precision, "--save_steps", 0]
    # No dropout anywhere: every variant would draw masks of its own, and the losses could not be compared.
    command += ["--lora", "--lora_dropout", 0] if method == "lora" else []
    train.main([str(word) for word in (*command, *more)])


# ---- the first worker: what the others start from ------------------------------------------------


def prepare(args):
    """Put base model, texts and a checkpoint to evaluate into the shared folder; returns the facts to report."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

    # ---- base
    source = args.config or TESTS / "tiny-qwen"
    data.load_tokenizer(source).save_pretrained(args.scratch / "base")
    torch.manual_seed(0)
    if args.config:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    elif args.size == "tiny":
        model = data.load_model(AutoModelForCausalLM, source, torch.bfloat16)
    else:
        fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        shape = dict(zip(fields, SHAPES[args.size], strict=True))
        shape |= {"num_key_value_heads": shape["num_attention_heads"], "tie_word_embeddings": True, "rope_theta": 1e6}
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape))
    model.to(torch.bfloat16).save_pretrained(args.scratch / "base")
    outside_embedding = [p for name, p in model.base_model.named_parameters() if not name.startswith("embed_tokens.")]

    # ---- texts: a record for each, so many that train.py's own split, 8:1:1 by rows, leaves --texts for training
    examples = data.split_examples(data.load_examples(args.data)[0])["train"]
    with (args.scratch / "texts.jsonl").open("w", encoding="utf-8") as file:
        for example in examples[: math.ceil(args.texts / 0.8)]:
            record = {"question": example["question"], **{field: [] for field in data.FIELDS[1:]}}
            record[f"{example['label']}_answers"].append(example["text"])
            file.write(json.dumps(record) + "\n")
    lengths = [len(ids) for ids in load_texts(args.scratch)[2]["train"]]
    if len(lengths) <= max(args.batch_size, RECIPE_BATCH):
        raise data.InputError(f"{len(lengths)} texts make one step, but the first is not timed: give more --texts")

    facts = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        "parameters": sum(p.numel() for p in outside_embedding),
        "texts": len(lengths),
        "tokens": sum(lengths),
        "matmul": {precision: matmul_rate(dtype) for precision, dtype in DTYPES.items()},
    }
    (args.scratch / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    if args.only != "training":  # little training at a high rate: an adapter that is not 0, so that merging matters
        more = ["--max_length", 16, "--batch_size", 16, "--learning_rate", 1e-2]
        train_ours(args, "lora", "fp32", args.scratch / "checkpoint", *more)
    return facts


# ---- workers: training ---------------------------------------------------------------------------


class Watch:
    """Follows the training in this process from outside, whoever runs it.

    The clocks are read after the first step and after the last: the first also allocates AdamW's state, and in between
    the CPU may run ahead of a GPU as it does in real life. Reading at the steps leaves out whatever validates or saves.
    """

    def __init__(self, steps):
        self.steps, self.batches, self.readings, self.first_forward, self.memory = steps, [[]], [], None, None
        register_optimizer_step_post_hook(self.after_step)
        forward = torch.nn.Embedding.forward

        def watched(module, ids):
            self.first_forward = self.first_forward or time.time()
            self.batches[-1].append(ids)
            return forward(module, ids)

        torch.nn.Embedding.forward = watched  # there all variants are alike: token ids come in, with any padding

    def after_step(self, *_):
        if len(self.batches) in (1, self.steps):
            synchronize()
            self.readings.append({"wall_s": time.perf_counter(), "cpu_s": time.process_time(), "time": time.time()})
        if len(self.batches) == self.steps:  # not later: train.py goes on to load its checkpoint, Trainer to validate
            from train import peak_memory_gib

            self.memory = peak_memory_gib(DEVICE)
        self.batches.append([])

    def result(self, started):
        """What an epoch takes by either clock, what memory, and when the first step came, in seconds from `started`.

        The first step's share is reckoned from the tokens that it computed, padding included. To leave out its texts
        instead would not be fair: a Trainer that sorts by length begins with the longest.
        """
        first, last = self.readings
        tokens = [sum(ids.numel() for ids in batches) for batches in self.batches[: self.steps]]
        return {
            **{clock: (last[clock] - first[clock]) * sum(tokens) / sum(tokens[1:]) for clock in ("wall_s", "cpu_s")},
            "tokens_computed": sum(tokens),
            "memory_gib": self.memory,
            "first_step_from_s": self.first_forward - started,
            "first_step_to_s": first["time"] - started,
        }


def train_with_trainer(args, method, precision, best):
    """transformers' Trainer on the shared texts, as published or at its `best`; returns its losses."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    options = {"num_train_epochs": 1, "learning_rate": args.learning_rate, "seed": SEED}
    options |= {"per_device_train_batch_size": RECIPE_BATCH, "save_strategy": "no", "report_to": "none"}
    options |= {"use_cpu": DEVICE.type == "cpu"}  # else it refuses bf16 on a CPU
    if best:
        renamed = "train_sampling_strategy" in {field.name for field in dataclasses.fields(TrainingArguments)}
        options |= {"train_sampling_strategy": "group_by_length"} if renamed else {"group_by_length": True}
        options |= {"optim": "adamw_torch_fused", "bf16": precision == "bf16"}
        options |= {"per_device_train_batch_size": args.batch_size}
    tokenizer, parts, token_ids = load_texts(args.scratch)
    pad, width = tokenizer.pad_token_id, 0 if best else MAX_LENGTH
    rows = {part: trainer_rows(parts[part], token_ids[part], pad, width) for part in parts}
    dtype = DTYPES[precision] if method == "lora" else torch.float32  # as train.py: what is trained stays float32
    model = data.load_classifier(args.scratch / "base", tokenizer, data.LABELS, dtype, new_head=SEED)
    if method == "lora":
        layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=layers))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(args.scratch / "trainer", **options),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
    )
    # Its training loss is the mean over steps, in which a ragged last one counts as much as the others do.
    return {"training_loss": trainer.train().training_loss, "validation_loss": trainer.evaluate()["eval_loss"]}


def run_training(args, method, name, precision):
    texts = json.loads((args.scratch / "facts.json").read_text(encoding="utf-8"))["texts"]
    watch = Watch(math.ceil(texts / (RECIPE_BATCH if name == RECIPE else args.batch_size)))
    if name == OURS:
        folder = args.scratch / "trained"
        train_ours(args, method, precision, folder)
        (epoch,) = json.loads((folder / "run.json").read_text(encoding="utf-8"))["epochs"]
        losses = {loss: epoch[loss] for loss in ("training_loss", "validation_loss")}
        shutil.rmtree(folder)  # a full 0.5B model takes 1.9 GB
    else:
        losses = train_with_trainer(args, method, precision, best=name == BEST_TRAINER)
    return watch.result(args.started) | losses


# ---- workers: evaluation -------------------------------------------------------------------------


def run_evaluation(args, name, precision):
    """Time the way from texts to logits, on as many texts as the training has."""
    from peft import PeftModel
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    import evaluate
    from train import peak_memory_gib

    tokenizer, parts, _ = load_texts(args.scratch)
    if name == OUR_PREDICT:
        checkpoint = args.scratch / "checkpoint"
        model, _ = evaluate.load_checkpoint(checkpoint, evaluate.read_run(checkpoint), DTYPES[precision], DEVICE)
    else:
        model = data.load_classifier(args.scratch / "base", tokenizer, data.LABELS, new_head=SEED)
        model = PeftModel.from_pretrained(model, args.scratch / "checkpoint").to(DEVICE, DTYPES[precision]).eval()
    if name == TRAINER_PREDICT:
        options = TrainingArguments(args.scratch / "trainer", per_device_eval_batch_size=8, report_to="none")
        trainer = Trainer(model=model, args=options, data_collator=DataCollatorWithPadding(tokenizer))

    @torch.inference_mode()
    def score(examples):
        texts = [example["text"] for example in examples]
        if name == ONE_BY_ONE:
            rows = [torch.tensor(data.tokenize(tokenizer, [text], MAX_LENGTH)[0]).to(DEVICE) for text in texts]
            return torch.cat([model(input_ids=row).logits.cpu() for row in rows]).numpy()
        token_ids, _ = data.tokenize(tokenizer, texts, MAX_LENGTH)
        if name == TRAINER_PREDICT:
            return trainer.predict(trainer_rows(examples, token_ids, tokenizer.pad_token_id)).predictions
        return evaluate.predict(model, token_ids)

    score(parts["train"][:2])  # whatever happens once only
    wall, cpu = time.perf_counter(), time.process_time()
    logits = score(parts["train"])
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    reference = args.scratch / "logits.npy"
    if name == ONE_BY_ONE:
        np.save(reference, logits)
    difference = float(np.abs(logits - np.load(reference)).max())
    return seconds | {"memory_gib": peak_memory_gib(DEVICE), "logit_difference": difference}


def work(args, task, method, name, precision):
    """A worker: prints its result as one line of JSON, after whatever train.py prints."""
    if task == "prepare":
        result = prepare(args)
    elif task == "training":
        result = run_training(args, method, name, precision)
    else:
        result = run_evaluation(args, name, precision)
    if task != "prepare":
        result["matmul"] = matmul_rate(DTYPES[precision])
    print(json.dumps(result))


# ---- the parent: processes, tables, picture ------------------------------------------------------


def start(argv, threads, scratch, worker):
    """Run a worker in a fresh process; the dict that it printed, or {"error": why it failed}."""
    environment = dict(os.environ)
    # With several GPUs a Trainer would use them all, through DataParallel.
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, __file__, *argv, "--worker", *worker]
    command += ["--scratch", scratch, "--started", str(time.time())]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if "rror" in line]  # and not a progress bar
        return {"error": (words or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def spread(values):
    """Median and range."""
    return f"{median(values):.2f}" + (f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else "")


def summarise(facts, results):
    """Of each variant's good runs the table's cells, as (task, {heading: cell}); and the bars of the picture."""
    runs_of, rows, bars = {}, [], []
    for run in results:
        if "error" not in run:
            runs_of.setdefault(tuple(run["variant"]), []).append(run)
    for (task, method, name, precision), runs in runs_of.items():
        middle = {field: median(run[field] for run in runs) for field in runs[0].keys() - {"variant"}}
        first = RECIPE if task == "training" else ONE_BY_ONE
        pairs = [(a, b) for a in runs_of.get((task, method, first, "fp32"), []) for b in runs]
        pairs = [(a, b) for a, b in pairs if a["repetition"] == b["repetition"]]
        ratios = {clock: [a[clock] / b[clock] for a, b in pairs] or [math.nan] for clock in ("wall_s", "cpu_s")}
        cells = {
            "variant": f"{name}, {precision}",
            "texts/s": spread([facts["texts"] / run["wall_s"] for run in runs]),
            f"x {first}": spread(ratios["wall_s"]),
            "by CPU time": spread(ratios["cpu_s"]),
            "peak GiB": f"{middle['memory_gib']:.2f}",
        }
        if task == "training":
            cells = {"trained": {"lora": "LoRA", "full": "full"}[method], **cells}
            tokens_per_s = facts["tokens"] / middle["wall_s"]
            useful = (4 if method == "lora" else 6) * facts["parameters"] * tokens_per_s  # 2 forward, 2 a gradient
            cells |= {
                "tokens/s": f"{tokens_per_s:.0f}",
                "of matmul peak": f"{useful / facts['matmul'][precision]:.1%}",
                "first step, s": f"{middle['first_step_from_s']:.1f} to {middle['first_step_to_s']:.1f}",
                "training loss": f"{middle['training_loss']:.4f}",
                "validation loss": f"{middle['validation_loss']:.4f}",
            }
        else:
            cells["largest logit difference"] = f"{middle['logit_difference']:.1e}"
        rows.append((task, cells))
        # Others may use a CPU too, and what they take is no part of a process's CPU time. Beside a GPU the CPU time
        # tells little. So the table has both ratios, and the picture the one to believe.
        ratio = median(ratios["cpu_s" if facts["device"] == "CPU" else "wall_s"])
        bars.append((f"{cells.get('trained', task)}: {cells['variant']}", ratio, middle["memory_gib"]))
    return rows, bars


def report(args, facts, results):
    """Write tables and picture of what there is so far; returns the tables as Markdown."""
    for run in results:  # the peak is the best that any of the processes saw
        if "error" not in run:
            facts["matmul"][run["variant"][3]] = max(facts["matmul"][run["variant"][3]], run["matmul"])
    rows, bars = summarise(facts, results)
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    rates = ", ".join(f"{precision} {rate / 1e9:,.1f}" for precision, rate in facts["matmul"].items())
    lines = [
        f"Base {Path(args.config).resolve().name if args.config else args.size}, {facts['parameters'] / 1e6:.1f} M "
        f"parameters outside the embedding; {facts['texts']} texts of {facts['tokens'] / facts['texts']:.0f} tokens on "
        f"average; batch {args.batch_size}, the recipe's {RECIPE_BATCH}; median (range) of {args.repeats}.",
        f"{facts['device']}, {facts['threads']} CPU threads; matmul peak, GFLOP/s: {rates}; {versions}.",
        "texts/s by the wall clock. On a CPU that others use too, trust the ratio by CPU time; with a GPU, the other.",
    ]
    for wanted in ("training", "evaluation"):
        table = [cells for task, cells in rows if task == wanted]
        lines += ["", f"| {' | '.join(table[0])} |", f"|{'---|' * len(table[0])}"] if table else []
        lines += [f"| {' | '.join(cells.values())} |" for cells in table]
    if failed := sorted({", ".join(run["variant"]) for run in results if "error" in run}):
        lines += ["", f"Failed, see results.jsonl: {'; '.join(failed)}."]
    text = "\n".join(lines) + "\n"
    data.write_atomically(args.output_dir / "benchmark.md", text)
    with contextlib.suppress(ImportError):  # matplotlib is optional
        from matplotlib.figure import Figure  # not pyplot: no global figure, no display

        figure = Figure(figsize=(10, 1.2 + 0.34 * len(bars)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        axes[0].invert_yaxis()
        colors = ["tab:orange" if f": {OURS}" in bar[0] or f": {OUR_PREDICT}" in bar[0] else "tab:gray" for bar in bars]
        task = {"training": RECIPE, "evaluation": ONE_BY_ONE}.get(args.only, "the first of each group")
        for column, heading, unit in ((1, f"speed-up over {task}", "x"), (2, "peak memory, GiB", "")):
            shown = axes[column - 1].barh([bar[0] for bar in bars], [bar[column] for bar in bars], color=colors)
            axes[column - 1].bar_label(shown, [f"{bar[column]:.1f}{unit}" for bar in bars], padding=2, fontsize=9)
            axes[column - 1].set_xlabel(heading)
            axes[column - 1].margins(x=0.15)
        figure.suptitle(f"{lines[0].partition(';')[0]}; {facts['device']}, {facts['threads']} threads", fontsize=10)
        figure.savefig(args.output_dir / "benchmark.png", dpi=110)
    return text


@data.one_line_errors
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.worker:
        return work(args, *args.worker)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    raw, results = args.output_dir / "results.jsonl", []
    with tempfile.TemporaryDirectory(dir=args.output_dir) as scratch:
        facts = start(argv, args.threads, scratch, ["prepare", "", "", ""])
        if "error" in facts:
            raise data.InputError(facts["error"].removeprefix("error: "))
        raw.write_text(json.dumps({"facts": facts}) + "\n", encoding="utf-8")
        fp32, bf16 = facts["matmul"].values()
        worth_it = bf16 >= 1.5 * fp32
        print(f"matmul: fp32 {fp32 / 1e9:,.1f} GFLOP/s, bf16 {bf16 / 1e9:,.1f}", end=", ")
        print("which is worth it" if worth_it else "which is not worth it here: the bf16 variants are skipped")
        for repetition in range(args.repeats):
            for variant in variants(args, worth_it):
                result = start(argv, args.threads, scratch, variant)
                results.append({"variant": variant, "repetition": repetition, **result})
                with raw.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(results[-1]) + "\n")
                outcome = result["error"] if "error" in result else f"{facts['texts'] / result['wall_s']:.2f} texts/s"
                print(f"{repetition + 1}/{args.repeats} {', '.join(variant)}: {outcome}", flush=True)
            text = report(args, facts, results)
    print(f"\n{text}\nwritten to {args.output_dir}: results.jsonl, benchmark.md, and with matplotlib benchmark.png")
    if any("error" in run for run in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
