"""Measure train.py and evaluate.py side by side with what one would run otherwise, on the machine at hand.

    python tests/benchmark.py                                           # a tiny base
    python tests/benchmark.py --size mid --texts 128 --only training    # a CPU where arithmetic outweighs all else
    python tests/benchmark.py --size 0.5b --texts 512 --batch_size 64   # a GPU; Qwen1.5-0.5B's shape, random weights

None needs a network. Training is compared with the published recipe (Hugging Face's Trainer, fp32, batch 4, every text
padded to 512 tokens) and with a Trainer set as well as it can be; evaluation with one text at a time and with
Trainer.predict. All see the same texts, start from the same weights and train for one epoch.

Every variant runs in a fresh process, and a repetition runs all of them before the next begins, so that a machine
which is slow for a while is slow for all. Written to --output_dir, anew after every process: results.jsonl (a line
for each process), benchmark.md (the table) and, with matplotlib, benchmark.png.

README's table was made with --only training, --config (the folder of Qwen1.5-0.5B's config and tokenizer) and --data
medicine.jsonl: on a CPU, an Intel Xeon with AMX, with --texts 16 --repeats 2 --threads 1; on an NVIDIA H200, with
PyTorch 2.11, with --repeats 1 and --texts 256, then --texts 512 --batch_size 64. Texts per second on the H200 (two
figures are two runs; a Trainer needed 46.0 GiB to train every weight at batch 64, train.py in fp32 24.6):

                                 LoRA, batch 4    LoRA, batch 64    every weight, batch 64
    published recipe, batch 4             29.1              32.6                31.1, 30.7
    Trainer at its best, bf16             14.6             181.1              214.7, 138.6
    train.py, fp32                        33.5             148.7              124.7, 124.6
    train.py, bf16                        25.6             452.5              not measured
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers  # lazy: its parts load in the workers, whose peak on Linux is no less than what their parent held
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
import train

TESTS = Path(__file__).resolve().parent
SHAPES = {  # vocabulary, hidden size, intermediate size, layers, heads; weights are random, no speed depends on them
    "mid": (6144, 256, 704, 6, 4),
    "0.5b": (151936, 1024, 2816, 24, 16),
}
RECIPE, BEST_TRAINER, OURS = "published recipe", "Trainer at its best", "train.py"
ONE_BY_ONE, TRAINER_PREDICT, OUR_PREDICT = "one text at a time", "Trainer.predict", "evaluate.py"
FLOPS = {"lora": 4, "full": 6, "evaluation": 2}  # per parameter and token: 2 forward, 2 for each gradient
PRECISIONS = {"fp32": "no", "bf16": "bf16"}  # and what --mixed_precision calls them
FIGURES = ("speedup", "speedup_by_CPU_time", "texts_per_s", "peak_memory_GiB", "percent_of_matmul_peak",
           "seconds_to_first_step", "training_loss", "validation_loss", "largest_logit_difference")  # fmt: skip
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
    add("--learning_rate", type=data.number(float, 0, above=True), default=5e-5, help="peak; falls linearly to 0")
    add("--methods", nargs="+", choices=["lora", "full"], default=["lora", "full"], help="what to train")
    add("--only", choices=["training", "evaluation"], help="leave the other out")
    add("--repeats", type=positive, default=3, help="fresh processes for each variant")
    add("--threads", type=positive, help="CPU threads of a process (torch's choice)")
    add("--output_dir", type=data.folder, default=Path("out/benchmark"), help="folder for the results")
    args = parser.parse_args(argv)
    if args.texts <= args.batch_size:
        parser.error(f"{args.texts} texts make one step, but the first is not timed: give more --texts")
    return args


def variants(args, precisions):
    """All (group, name, precision); the first of a group is what its others are compared with."""
    training = [(RECIPE, "fp32"), (BEST_TRAINER, precisions[-1]), *((OURS, p) for p in precisions)]
    evaluation = [(ONE_BY_ONE, "fp32"), *((name, p) for name in (TRAINER_PREDICT, OUR_PREDICT) for p in precisions)]
    listed = [(method, *variant) for method in args.methods for variant in training]
    listed = listed if args.only != "evaluation" else []
    return listed + [("evaluation", *variant) for variant in evaluation if args.only != "training"]


# ---- workers -------------------------------------------------------------------------------------


def read_clocks():
    """Wall-clock and CPU seconds so far, once the GPU has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def train_command(args, scratch, method, precision, output_dir, *more):
    """The command line of train.py on the shared texts."""
    command = ["--model", scratch / "base", "--data", *(scratch / f"{part}.jsonl" for part in data.PARTS)]
    command += ["--epochs", 1, "--batch_size", args.batch_size, "--learning_rate", args.learning_rate, "--seed", SEED]
    command += ["--mixed_precision", PRECISIONS[precision], "--output_dir", output_dir, "--save_steps", 0]
    # No dropout anywhere: every variant would draw masks of its own, and the losses could not be compared.
    command += ["--lora", "--lora_dropout", 0] if method == "lora" else []
    return [str(word) for word in (*command, "--overwrite", *more)]


def prepare(args, scratch):
    """Put base model, texts and a checkpoint to evaluate into the shared folder; returns the facts to report."""
    source, causal_lm = args.config or TESTS / "tiny-qwen", transformers.AutoModelForCausalLM
    tokenizer = data.load_tokenizer(source)
    torch.manual_seed(SEED)
    base = f"{Path(args.config).resolve().name if args.config else args.size} with random weights"
    if args.config:
        model = causal_lm.from_config(transformers.AutoConfig.from_pretrained(source))
    elif args.size == "tiny":
        base, model = "tiny-qwen", data.load_model(causal_lm, source)
    else:
        fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        shape = dict(zip(fields, SHAPES[args.size], strict=True))
        shape |= {"num_key_value_heads": shape["num_attention_heads"], "tie_word_embeddings": True}
        model = causal_lm.from_config(transformers.Qwen2Config(**shape))
    model.to(torch.bfloat16).save_pretrained(scratch / "base")
    tokenizer.save_pretrained(scratch / "base")

    # Files with these names are the parts of a task, so that train.py trains on exactly --texts.
    parts = data.split_examples(data.load_examples(args.data, labels=data.LABELS)[0])
    if len(parts["train"]) < args.texts:
        raise data.InputError(f"--data has only {len(parts['train'])} training texts: give fewer --texts")
    for part, n_texts in zip(data.PARTS, (args.texts, args.texts // 8, 1), strict=True):
        rows = [{field: example[field] for field in ("text", "label")} for example in parts[part][:n_texts]]
        data.write_atomically(scratch / f"{part}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))

    if args.only != "training":  # little training at a high rate: an adapter that is not 0, so that merging matters
        more = ["--max_length", 16, "--batch_size", 16, "--learning_rate", 1e-2]
        train.main(train_command(args, scratch, "lora", "fp32", scratch / "checkpoint", *more))
    facts = {
        "base": base,
        "parameters": model.base_model.num_parameters(exclude_embeddings=True),
        "tokens": sum(len(row["input_ids"]) for row in load_rows(scratch, tokenizer, "train")),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        "matmul": {},  # FLOP/s: the best seen, which no model can exceed
    }
    size = 8192 if DEVICE.type == "cuda" else 1024
    for precision, name in PRECISIONS.items():
        matrix = torch.randn(size, size, device=DEVICE, dtype=data.DTYPES[name])
        timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=facts["threads"])
        facts["matmul"][precision] = 2 * size**3 / min(timer.blocked_autorange(min_run_time=1).times)
    return facts


def load_rows(scratch, tokenizer, part):
    """What a Trainer reads: the token ids and the class of each text. Its collator pads them."""
    rows = [row for _, row in data.read_rows(scratch / f"{part}.jsonl")]
    token_ids, _ = data.tokenize(tokenizer, [row["text"] for row in rows], MAX_LENGTH)
    classes = [data.LABELS.index(row["label"]) for row in rows]
    return [{"input_ids": ids, "labels": label} for ids, label in zip(token_ids, classes, strict=True)]


def watch_training(n_texts, batch_size, started):
    """Follow the training in this process from outside, whoever runs it; returns the dict that the last step fills.

    The clocks are read after the first step and after the last: the first also allocates AdamW's state, and in between
    the CPU may run ahead of a GPU as it does in real life. What validates or saves comes later. The first step's share
    is reckoned from the tokens that it computed, padding included. To leave out its texts instead would not be fair: a
    Trainer that sorts by length begins with the longest.
    """
    steps, forward = math.ceil(n_texts / batch_size), torch.nn.Embedding.forward
    tokens, clocks, result = [0], [], {}  # the tokens of each step so far

    def watched_forward(module, ids):  # here all variants are alike: token ids come in, with any padding
        if torch.is_grad_enabled():  # a step, and not a check before the first one
            result.setdefault("seconds_to_first_step", time.time() - started)
            tokens[-1] += ids.numel()
        return forward(module, ids)

    def after_step(*_):
        if len(tokens) in (1, steps):
            clocks.append(read_clocks())
        if len(tokens) == steps:
            result["tokens_computed"] = sum(tokens)
            result["peak_memory_GiB"] = train.peak_memory_gib(DEVICE)  # now: train.py goes on to load its checkpoint
            seconds = (clocks[1] - clocks[0]) * sum(tokens) / sum(tokens[1:])
            result["texts_per_s"], result["texts_per_CPU_s"] = n_texts / seconds
        tokens.append(0)

    torch.nn.Embedding.forward = watched_forward
    register_optimizer_step_post_hook(after_step)
    return result


def run_training(args, scratch, started, method, name, precision):
    """Train for one epoch in a process that was `started` then; returns the figures to report, losses among them."""
    batch_size = RECIPE_BATCH if name == RECIPE else args.batch_size
    result = watch_training(args.texts, batch_size, started)
    command = train_command(args, scratch, method, precision, scratch / "trained")
    if name == OURS:
        train.main(command)
        (epoch,) = json.loads((scratch / "trained" / "run.json").read_text(encoding="utf-8"))["epochs"]
        return result | {loss: epoch[loss] for loss in ("training_loss", "validation_loss")}

    options = {"num_train_epochs": 1, "learning_rate": args.learning_rate, "per_device_train_batch_size": batch_size}
    options |= {"seed": SEED, "output_dir": scratch / "trainer", "save_strategy": "no", "report_to": "none"}
    options |= {"use_cpu": DEVICE.type == "cpu"}  # else it refuses bf16 on a CPU
    if name == BEST_TRAINER:
        renamed = hasattr(transformers.TrainingArguments, "train_sampling_strategy")
        options |= {"train_sampling_strategy": "group_by_length"} if renamed else {"group_by_length": True}
        options |= {"optim": "adamw_torch_fused", "bf16": precision == "bf16"}
    tokenizer = data.load_tokenizer(scratch / "base")
    model = train.build_model(train.parse_args(command), scratch / "base", tokenizer, PRECISIONS[precision])
    model.classifier().set_attn_implementation("sdpa")  # instead of ours: a plain model, as anyone would load it
    padding = "max_length" if name == RECIPE else "longest"
    collator = transformers.DataCollatorWithPadding(tokenizer, padding, MAX_LENGTH)
    rows = [load_rows(scratch, tokenizer, part) for part in ("train", "validation")]
    trainer = transformers.Trainer(model.model, transformers.TrainingArguments(**options), collator, *rows)
    # Its training loss is the mean over steps, in which a ragged last one counts as much as the others do.
    losses = {"training_loss": trainer.train().training_loss, "validation_loss": trainer.evaluate()["eval_loss"]}
    return result | losses


def run_evaluation(args, scratch, started, _, name, precision):
    """Time the way from texts to logits, on the texts of the training; returns the figures to report."""
    from peft import PeftModel  # imported here: it loads much of transformers

    checkpoint, dtype = scratch / "checkpoint", data.DTYPES[PRECISIONS[precision]]
    if name == OUR_PREDICT:
        model, tokenizer = evaluate.load_checkpoint(checkpoint, evaluate.read_run(checkpoint), dtype, DEVICE)
    else:
        tokenizer = data.load_tokenizer(checkpoint)
        model = data.load_classifier(scratch / "base", tokenizer, data.LABELS, new_head=SEED)
        model = PeftModel.from_pretrained(model, checkpoint).to(DEVICE, dtype).eval()
    if name == TRAINER_PREDICT:
        options = transformers.TrainingArguments(scratch / "trainer", report_to="none")
        trainer = transformers.Trainer(model, options, processing_class=tokenizer)

    @torch.inference_mode()
    def score(texts):
        token_ids, _ = data.tokenize(tokenizer, texts, MAX_LENGTH)
        if name == OUR_PREDICT:
            return evaluate.predict(model, token_ids)
        if name == TRAINER_PREDICT:
            return trainer.predict([{"input_ids": ids} for ids in token_ids]).predictions
        return torch.cat([model(torch.tensor([ids], device=DEVICE)).logits.cpu() for ids in token_ids]).numpy()

    texts = [row["text"] for _, row in data.read_rows(scratch / "train.jsonl")]
    result = {"seconds_to_first_step": time.time() - started}
    score(texts[:2])  # whatever happens once only
    before = read_clocks()
    logits = score(texts)
    result["texts_per_s"], result["texts_per_CPU_s"] = len(texts) / (read_clocks() - before)
    result["peak_memory_GiB"] = train.peak_memory_gib(DEVICE)
    if name == ONE_BY_ONE:
        np.save(scratch / "logits.npy", logits)
    return result | {"largest_logit_difference": float(abs(logits - np.load(scratch / "logits.npy")).max())}


# ---- the parent: processes, table, picture -------------------------------------------------------


def quietly(function, *arguments):
    """Call a function with what it prints kept from the screen; returns its dict, or {"error": why it failed}."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        try:
            return function(*arguments)
        except SystemExit:  # of train.py, whose last line says why
            return {"error": output.getvalue().splitlines()[-1].removeprefix("error: ")}
        except Exception as error:
            return {"error": data.short(error, 200)}


def in_fresh_process(function, *arguments):
    """Do the same in a process of its own, which imports everything anew."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(quietly, function, *arguments).result()
        except BrokenExecutor:
            return {"error": "the process was killed, perhaps because the memory ran out"}


def report(args, facts, runs):
    """Write what the runs gave, as data, table and picture; returns the table as Markdown."""
    lines = [json.dumps(line) + "\n" for line in ({"facts": facts}, *runs)]
    data.write_atomically(args.output_dir / "results.jsonl", "".join(lines))
    runs_of = {}  # {(group, variant): its runs}
    for run in runs:
        runs_of.setdefault((run["group"], run["variant"]), []).append(run)
    names = [name for name in FIGURES if any(name in run for run in runs)]
    title = f"Base {facts['base']}, {facts['parameters'] / 1e6:.1f} M parameters outside the embedding"
    machine = f"{facts['device']}, {facts['threads']} CPU thread(s)"
    rates = ", ".join(f"{precision} {rate / 1e9:,.1f}" for precision, rate in facts["matmul"].items())
    lines = [
        f"{title}; {args.texts} texts of {facts['tokens'] / args.texts:.0f} tokens on average; batch "
        f"{args.batch_size}, the recipe's {RECIPE_BATCH}; median (range) of {args.repeats}.",
        f"{machine}; matmul peak, GFLOP/s: {rates}; {', '.join(map(' '.join, facts['versions'].items()))}.",
        "The speedup is over the first of each group. On a CPU that others use too, trust the one by CPU time, not by "
        "the wall clock; with a GPU, the other.",
        "",
        f"| group | variant | {' | '.join(names).replace('_', ' ')} |",
        "|---|---" + "|---" * len(names) + "|",
    ]
    for variant, its_runs in runs_of.items():
        cells = [spread([run[name] for run in its_runs if name in run]) for name in names]
        lines.append(f"| {' | '.join((*variant, *cells))} |")
    text = "\n".join(lines) + "\n"
    data.write_atomically(args.output_dir / "benchmark.md", text)
    with contextlib.suppress(ImportError):  # matplotlib is optional
        speedup = "speedup_by_CPU_time" if facts["device"] == "CPU" else "speedup"  # the one to trust
        plot(args.output_dir / "benchmark.png", f"{title}; {machine}", runs_of, (speedup, "peak_memory_GiB"))
    return text


def spread(values):
    """Median and range, as text."""
    around = f" ({min(values):.4g}-{max(values):.4g})" if len(set(values)) > 1 else ""
    return f"{median(values):.4g}{around}" if values else ""


def plot(path, title, runs_of, names):
    """Draw two figures side by side, a bar for the median of each variant."""
    from matplotlib.figure import Figure  # not pyplot: no global figure, no display

    figure = Figure(figsize=(10, 1.2 + 0.34 * len(runs_of)), layout="constrained")
    labels = [": ".join(variant) for variant in runs_of]
    headings = dict.fromkeys(names, "speed-up over the first bar of each group") | {
        "peak_memory_GiB": "peak memory, GiB"
    }
    colors = ["tab:orange" if OURS in label or OUR_PREDICT in label else "tab:gray" for label in labels]
    for axes, name in zip(figure.subplots(1, 2, sharey=True), names, strict=True):
        medians = [median([run[name] for run in runs if name in run] or [math.nan]) for runs in runs_of.values()]
        axes.bar_label(axes.barh(labels, medians, color=colors), fmt="%.1f", padding=2, fontsize=9)
        axes.set(xlabel=headings[name], xmargin=0.15)
    axes.invert_yaxis()  # of both
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


@data.one_line_errors
def main(argv=None):
    args, runs = parse_args(argv), []
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    # With several GPUs a Trainer would use them all, through DataParallel.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        scratch = Path(folder)
        facts = in_fresh_process(prepare, args, scratch)
        if "error" in facts:
            raise data.InputError(facts["error"])
        fp32, bf16 = facts["matmul"].values()
        precisions = list(PRECISIONS) if bf16 >= 1.5 * fp32 else ["fp32"]
        print(f"matmul: fp32 {fp32 / 1e9:,.1f} GFLOP/s, bf16 {bf16 / 1e9:,.1f}", end=", ")
        print("which is worth it" if len(precisions) > 1 else "which is not worth it: the bf16 variants are skipped")
        for repetition in range(args.repeats):
            baselines = {}  # the first run of each group
            for group, name, precision in variants(args, precisions):
                worker = run_evaluation if group == "evaluation" else run_training
                run = in_fresh_process(worker, args, scratch, time.time(), group, name, precision)
                baseline = baselines.setdefault(group, run)
                if "error" not in run:
                    for rate, speedup in (("texts_per_s", "speedup"), ("texts_per_CPU_s", "speedup_by_CPU_time")):
                        run[speedup] = run[rate] / baseline.get(rate, math.nan)
                    flops = FLOPS[group] * facts["parameters"] * facts["tokens"] * run["texts_per_s"] / args.texts
                    run["percent_of_matmul_peak"] = 100 * flops / facts["matmul"][precision]
                runs.append({"group": group, "variant": f"{name}, {precision}", "repetition": repetition, **run})
                outcome = run.get("error") or f"{run['texts_per_s']:.2f} texts/s"
                print(f"{repetition + 1}/{args.repeats} {group}: {name}, {precision}: {outcome}", flush=True)
                text = report(args, facts, runs)
    print(f"\n{text}\nwritten to {args.output_dir}: results.jsonl, benchmark.md, and with matplotlib benchmark.png")
    if any("error" in run for run in runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
