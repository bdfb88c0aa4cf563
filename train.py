"""Fine-tune Qwen1.5 as a text classifier, fully or with LoRA, in one explicit Accelerate loop.

    accelerate launch train.py --lora                    # Qwen1.5-0.5B on HC3-Chinese baike, on one GPU
    accelerate launch train.py --output_dir out/full     # the same, training every weight
    python train.py --lora --model tests/tiny-qwen --data tests/sample.jsonl --learning_rate 2e-3 --output_dir out/tiny

The first two download model and data once; the third is offline and took 14 to 21 seconds on two CPU cores. Each leaves
a checkpoint for `python evaluate.py --ckpt OUTPUT_DIR`. A run that was killed continues with --resume.

The texts and the random numbers of a step follow from the seed, the step and the process's rank alone. So a resumed run
equals an uninterrupted one. Without dropout, whose masks differ, accumulated micro-batches equal one large batch and
two processes equal one, up to rounding.
"""

import contextlib
import datetime
import functools
import json
import math
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from tqdm import tqdm

import data
import evaluate
from data import InputError, short

LOG_EVERY = 10  # steps between two lines of metrics.jsonl; note: reading the loss waits for the GPU
MAX_SKIPPED = 30  # steps in a row that the fp16 scaler may skip: it has halved its scale 30 times by then
OUR_FILES = ("run.json", "state.pt*", "metrics.jsonl", "curves.png", "adapter_model.safetensors", "adapter_config.json",
             "model*.safetensors*", "config.json", "tokenizer*.json", "chat_template.jinja", "eval-*.json",
             "predictions-*.jsonl", "report-*.png")  # fmt: skip
FREE_TO_CHANGE = ("output_dir", "save_steps", "resume", "overwrite", "gradient_checkpointing", "hub")  # on --resume


def parse_args(argv=None):
    parser = data.ArgumentParser(description=__doc__.splitlines()[0])
    data.add_options(parser)
    positive = data.number(int, 1, 2**31)
    add = parser.add_argument_group("model").add_argument
    add("--lora", action="store_true", help="train a LoRA adapter instead of every weight")
    add("--lora_r", type=data.number(int, 1, 4096), default=8, help="rank of the adapter")
    add("--lora_alpha", type=positive, default=16, help="LoRA scaling numerator: the update is scaled by alpha / r")
    add("--lora_dropout", type=data.number(float, 0, 0.99), default=0.1, help="dropout in front of the adapter")
    add("--lora_targets", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"], help="linear layers to adapt")
    add("--freeze_embedding", action="store_true", help="full fine-tuning only: do not train the token embedding")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive, default=2, help="passes over the training part")
    add("--batch_size", type=positive, default=4, help="micro-batch size, total across all processes")
    add("--gradient_accumulation_steps", type=positive, default=1, help="micro-batches per step")
    add("--learning_rate", type=data.number(float, 0, above=True), default=5e-5, help="peak rate; falls linearly to 0")
    add("--warmup_ratio", type=data.number(float, 0, 1), default=0.0, help="share of the steps in which the rate rises")
    add("--weight_decay", type=data.number(float, 0), default=0.0, help="weight decay of AdamW")
    add("--max_grad_norm", type=data.number(float, 0, above=True), default=1.0, help="clip gradients to this norm")
    add("--mixed_precision", choices=["auto", *data.DTYPES], default="auto", help="dtype of the computation")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--seed", type=data.number(int, 0, 2**31), default=233, help="seed for new weights, data order and dropout")
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", type=data.folder, default=Path("out"), help="folder of the checkpoint")
    add("--save_steps", type=data.number(int, 0), default=500, help="also save state every N steps (0: never save it)")
    add("--resume", action="store_true", help="continue the run in output_dir from its last saved state")
    add("--overwrite", action="store_true", help="delete the run in output_dir and start anew")
    return parser.parse_args(argv)


@functools.lru_cache(maxsize=2)  # every step of an epoch asks for the same order
def order_of(seed, epoch, n_texts):
    """The order in which an epoch visits range(n_texts), an int array."""
    return np.random.default_rng([seed, epoch]).permutation(n_texts)


def texts_of(step, n_texts, step_size, seed):
    """Indices of a step's texts over all processes (list of int); an epoch's last step takes what is left."""
    epoch, position = divmod(step, math.ceil(n_texts / step_size))
    return order_of(seed, epoch, n_texts)[position * step_size : (position + 1) * step_size].tolist()


def learning_rate_of(step, total_steps, peak, warmup_ratio):
    """Linear from 0 to the peak during the warm-up, then linear to 0 (as get_linear_schedule_with_warmup)."""
    warmup = math.ceil(warmup_ratio * total_steps)
    return peak * (step / warmup if step < warmup else (total_steps - step) / max(1, total_steps - warmup))


def build_model(args, folder, tokenizer, precision, labels=data.LABELS):
    """The classifier to train. LoRA holds its frozen base in the compute dtype; every trainable tensor is float32."""
    dtype = data.DTYPES[precision] if args.lora else torch.float32  # bf16 would round most small updates away
    model = data.load_classifier(folder, tokenizer, labels, dtype, new_head=args.seed)
    model.name_or_path = model.config.name_or_path = args.model  # not the hub's cache folder, which differs elsewhere
    model.get_input_embeddings().requires_grad_(not args.freeze_embedding)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # else an input must require a gradient
    if args.lora:
        model = evaluate.add_lora(model, vars(args))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT leaves the head in the base's dtype
    return data.PackedClassifier(model)


def unfinished_run(args):
    """Whether output_dir holds an unfinished run to --resume; None if that run has finished already.

    run.json is written last: a folder without it holds no finished run, whatever else lies in it. Raises InputError if
    there is a run and the arguments do not say what to do with it, or if there are files that are not ours.
    """
    files = sorted(path.name for path in args.output_dir.glob("*") if path.is_file())
    inputs = [Path(args.model), *(Path(source).parent for source in args.data if Path(source).is_file())]
    if args.output_dir.resolve() in [path.resolve() for path in inputs]:
        raise InputError(f"--output_dir {args.output_dir} holds the base model or the training data: choose another")
    if not {"run.json", "state.pt", "metrics.jsonl"} & set(files):
        if files:
            raise InputError(f"{args.output_dir} holds other files ({short(files[0])}): choose another --output_dir")
        return False
    finished = "run.json" in files
    if args.resume and finished:
        check_same(evaluate.read_run(args.output_dir)["arguments"], vars(args))
        return None
    if not args.resume and not args.overwrite:
        kind, how = ("a finished run", "") if finished else ("an unfinished run", "--resume continues it, ")
        raise InputError(f"{args.output_dir} holds {kind}: {how}--overwrite deletes it, or choose another --output_dir")
    return args.resume


def check_same(before, now):
    """Raise InputError if arguments that decide what is learned differ from those of the run to be resumed."""
    changed = [name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]]
    if changed:
        changes = ", ".join(f"{name} (was {short(before.get(name))}, now {short(now[name])})" for name in changed[:3])
        raise InputError(f"--resume needs the same arguments as the original run; changed: {changes}")


def save_state(path, accelerator, model, optimizer, values):
    """Save for --resume what (seed, step) do not determine: trainable tensors, AdamW, the scaler, `values`."""
    if accelerator.is_main_process:
        tensors = {n: p.detach() for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
        scaler = accelerator.scaler and accelerator.scaler.state_dict()
        state = values | {"model": tensors, "optimizer": optimizer.state_dict(), "scaler": scaler}
        problem = f"cannot save to {path.parent}: make room, then use --resume"
        with data.refusing(problem), data.replacing(path) as temporary:
            torch.save(state, temporary)


def load_state(path, accelerator, model, optimizer, arguments):
    """Load what `save_state` saved, and return its `values`. Raises InputError if the run had other arguments."""
    with data.refusing(f"{path} cannot be read: start again with --overwrite"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["arguments"]
    check_same(before, arguments)
    accelerator.unwrap_model(model).load_state_dict(state.pop("model"), strict=False)  # only the trainable tensors
    optimizer.load_state_dict(state.pop("optimizer"))
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state


def check_checkpoint(folder, run, accelerator, token_ids, classes, trained):
    """Load the checkpoint as evaluate.py will, score the validation part, and add score and calibration to `run`.

    `trained`: the validation logits (n, classes) of the model in training. Raises InputError if those of the loaded
    model differ by more than the rounding of the precision explains.
    """
    if not np.isfinite(trained).all():
        raise InputError("the trained model's logits are not finite: use --overwrite and a lower --learning_rate")
    loaded = evaluate.predict(evaluate.load_checkpoint(folder, run, device=accelerator.device)[0], token_ids, "check")
    tolerance = {"no": 1e-3, "bf16": 0.2, "fp16": 0.1}[accelerator.mixed_precision] * np.abs(trained).mean()
    if not np.abs(trained - loaded).mean() <= tolerance:
        raise InputError(f"the checkpoint in {folder}, loaded again, gives different logits from the trained model")
    run["validation"] = {"accuracy": float((loaded.argmax(1) == classes).mean())}
    run["validation"]["loss"] = evaluate.negative_log_likelihood(classes, loaded)
    run["temperature"], run["threshold"] = evaluate.fit_calibration(classes, loaded)


def plot_curves(folder, lines):
    """curves.png from the lines of metrics.jsonl: training and validation loss, accuracy. Raises ImportError."""
    from matplotlib.figure import Figure  # not pyplot: no global figure, no display, the notebook's backend stays

    figure, epochs = Figure(figsize=(8, 3.2), layout="constrained"), [line for line in lines if "epoch" in line]
    losses, accuracies = figure.subplots(1, 2)
    for field, style, label in (("loss", "-", "training loss"), ("validation_loss", "o-", "validation loss")):
        points = np.reshape([(line["step"], line[field]) for line in lines if field in line], (-1, 2))
        losses.plot(*points.T, style, label=label)
    accuracies.plot([line["epoch"] for line in epochs], [line["accuracy"] for line in epochs], "o-")
    for line in epochs:
        losses.axvline(line["step"], color="lightgrey", linewidth=1, zorder=0)
        accuracies.text(line["epoch"], line["accuracy"], f"{line['accuracy']:.3f}\n", ha="center")
    losses.set(xlabel="step (grey: end of an epoch)", ylabel="loss", ylim=(0, None))
    losses.legend()
    accuracies.set(xlabel="epoch", ylabel="validation accuracy", xticks=[line["epoch"] for line in epochs])
    accuracies.margins(0.15, 0.2)
    figure.savefig(folder / "curves.png", dpi=110)


def peak_memory_gib(device):
    """Peak memory so far: what torch allocated on a GPU, else the process's resident memory; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def make_accelerator(args, precision):
    """The Accelerator, after a check that the launched processes see each other. Raises InputError."""
    AcceleratorState._reset_state()  # a second main() in one notebook kernel may want another precision
    # While the main process downloads, or checks its checkpoint, the others wait; NCCL would give up in ten minutes.
    patience, options = datetime.timedelta(hours=6), DistributedDataParallelKwargs(broadcast_buffers=False)
    handlers = [InitProcessGroupKwargs(timeout=patience), options]
    # No compilation, whatever `accelerate config` says: new row lengths would compile anew, and weights be renamed.
    accelerator = Accelerator(mixed_precision=precision, dynamo_backend="no", kwargs_handlers=handlers)
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise InputError(f"{kind.value} is not supported: launch with one or several plain GPUs")
    if int(os.environ.get("WORLD_SIZE", 1)) != processes:
        raise InputError("the launched processes do not see each other: see 'If something goes wrong' in README")
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        print(
            "warning: one process runs; if you launched more, see 'If something goes wrong' in README", file=sys.stderr
        )
    if args.batch_size < processes:
        raise InputError(f"--batch_size {args.batch_size} counts over all processes: use {processes} or more")
    return accelerator


def read_steps(accelerator, pending, steps, text_of):
    """Move `pending`, a tensor [loss, gradient norm] for each step, to the list `steps`, merged over all processes.

    The fp16 scaler skips steps that are not finite. Many in a row raise InputError; without it, one does.
    """
    for loss, norm in accelerator.reduce(torch.stack(pending), "sum").tolist():  # note: this waits for the GPU
        steps.append([loss, norm / accelerator.num_processes])  # the norm is the same in all processes
    pending.clear()
    bad = next((i for i, pair in enumerate(reversed(steps)) if np.isfinite(pair).all()), len(steps))  # in a row
    if bad > (MAX_SKIPPED if accelerator.scaler else 0):
        step, [loss, norm] = len(steps) - bad, steps[-bad]
        where = f"step {step + 1} gave loss {loss} and gradient norm {norm} (its first text: {short(text_of(step))!r})"
        advice = "--mixed_precision bf16 or no" if accelerator.scaler else "a lower --learning_rate"
        raise InputError(f"{where}: start again with --overwrite and {advice}")


@data.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    precision, why = data.choose_precision(args.mixed_precision)
    resuming = unfinished_run(args)
    if resuming is None:
        return print(f"the run in {args.output_dir} has finished: there is nothing to resume")
    accelerator = make_accelerator(args, precision)
    device, is_main, output_dir = accelerator.device, accelerator.is_main_process, args.output_dir
    rank, processes = accelerator.process_index, accelerator.num_processes

    # ---- data, model, optimizer
    with accelerator.main_process_first():  # it downloads, and the others find the files
        examples, labels = data.load_examples(args.data, args.hub, args.protocol)
        parts = data.split_examples(examples, args.protocol, labels)
        folder = data.fetch_model(args.model, args.hub)
        tokenizer = data.load_tokenizer(folder)
        model = build_model(args, folder, tokenizer, precision, labels)
    token_ids, classes, odd = {}, {}, {}
    for part in ("train", "validation"):
        token_ids[part], odd[part] = data.tokenize(tokenizer, [e["text"] for e in parts[part]], args.max_length)
        classes[part] = np.array([labels.index(example["label"]) for example in parts[part]])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    n_trained, n_all = (sum(parameter.numel() for parameter in some) for some in (trainable, model.parameters()))
    step_size = args.batch_size * args.gradient_accumulation_steps
    schedule = {"n_texts": len(parts["train"]), "step_size": step_size, "seed": args.seed}
    steps_per_epoch = math.ceil(len(parts["train"]) / step_size)
    total_steps = args.epochs * steps_per_epoch
    if is_main:
        print(f"【model】\n{model.model}\n【model.config】\n{model.classifier().config}")
        print(f"trainable params: {n_trained:,} || all params: {n_all:,} || trainable%: {100 * n_trained / n_all:.4f}")
        data.print_parts(parts, labels, odd)
        print(f"{total_steps} steps of {step_size} texts on {processes} x {device.type}, precision {precision} ({why})")
    optimizer = torch.optim.AdamW(trainable, args.learning_rate, weight_decay=args.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    data.check_packed(accelerator.unwrap_model(model), token_ids["train"] + token_ids["validation"], device)

    # ---- resume
    arguments = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    arguments["mixed_precision"] = precision
    arguments["data_sha256"] = data.hash_examples(parts["train"] + parts["validation"], labels)
    steps, lines, seconds_before = [], [], 0.0  # [loss, gradient norm] of each step; the lines of metrics.jsonl
    if resuming and (output_dir / "state.pt").is_file():
        state = load_state(output_dir / "state.pt", accelerator, model, optimizer, arguments)
        steps, lines, seconds_before = state["steps"], state["lines"], state["seconds"]
    first_step = len(steps)
    if is_main:  # nothing was written up to here: a command that is refused leaves everything as it was
        if not resuming:
            for path in {path for name in OUR_FILES for path in output_dir.glob(name)}:
                path.unlink()
        output_dir.mkdir(parents=True, exist_ok=True)
        data.write_atomically(output_dir / "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
        if resuming:
            print(f"continuing after step {first_step}" if first_step else "no saved state: starting at the beginning")

    # ---- train
    model.train()
    started, pending, logits = time.perf_counter(), [], None
    look = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # a notebook gives a command 80 columns
    options = {"total": total_steps, "initial": first_step, "disable": not is_main, "bar_format": look}
    bar = tqdm(range(first_step, total_steps), "train", **options)
    for step in bar:
        # ---- forward and backward, one micro-batch after another; each process takes its share of the texts
        torch.manual_seed(int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0]))  # for dropout
        texts = texts_of(step, **schedule)
        loss = torch.zeros((), device=device)
        for first in range(0, len(texts), args.batch_size):
            micro_batch = texts[first : first + args.batch_size]
            mine = micro_batch[rank::processes]
            rows = mine or micro_batch[:1]  # without a text of its own a process runs one with weight 0
            batch = data.pack([token_ids["train"][i] for i in rows], device)
            targets = data.to_device(torch.tensor(classes["train"][rows]), device)  # (rows,)
            last = first + args.batch_size >= len(texts)  # only then do the processes exchange gradients
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                micro_loss = torch.nn.functional.cross_entropy(model(**batch), targets, reduction="sum")
                micro_loss = micro_loss * bool(mine) / len(texts)  # this share of the mean over all texts of the step
                accelerator.backward(micro_loss * processes)  # DDP averages over the processes: undo that
            loss += micro_loss.detach_()  # detached for good: its graph would keep the parameters alive

        # ---- step
        optimizer.param_groups[0]["lr"] = learning_rate_of(step, total_steps, args.learning_rate, args.warmup_ratio)
        norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        pending.append(torch.stack([loss, norm.to(loss)]))  # read later: a step does not wait for its own loss

        # ---- log
        done = step + 1
        at_epoch_end = done % steps_per_epoch == 0
        saving = args.save_steps > 0 and (at_epoch_end or done % args.save_steps == 0)
        new_lines, rate = [], learning_rate_of(done, total_steps, args.learning_rate, args.warmup_ratio)
        if done % LOG_EVERY == 0 or at_epoch_end or saving:
            read_steps(accelerator, pending, steps, lambda i: parts["train"][texts_of(i, **schedule)[0]]["text"])
            speed = (done - first_step) * step_size / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {steps[-1][0]:.4f}, lr {rate:.2e}, {speed:.0f} texts/s")
        if done % LOG_EVERY == 0:
            finite = [pair for pair in steps[-LOG_EVERY:] if np.isfinite(pair).all()]  # fp16 skips the other steps
            line = {"step": done, "learning_rate": rate, "skipped_steps": LOG_EVERY - len(finite)}
            line |= {"loss": float(np.mean(finite, 0)[0]), "grad_norm": finite[-1][1]} if finite else {}
            new_lines.append(line)

        # ---- validate at an epoch's end
        if at_epoch_end:
            logits = evaluate.predict(model, token_ids["validation"], "validation", rank, processes)
            losses = np.array([loss for loss, _ in steps[-steps_per_epoch:]])
            weights = [len(texts_of(i, **schedule)) for i in range(steps_per_epoch)] * np.isfinite(losses)
            mean = np.nansum(losses * weights) / max(1, weights.sum())  # per text, without the steps that fp16 skipped
            row = {"epoch": done // steps_per_epoch, "training_loss": float(mean)}
            row["validation_loss"] = evaluate.negative_log_likelihood(classes["validation"], logits)
            row["accuracy"] = float((logits.argmax(1) == classes["validation"]).mean())
            new_lines.append({"step": done, **row})
            if is_main:
                with bar.external_write_mode():  # flushed before the bar is drawn anew: a notebook has two streams
                    if done <= first_step + steps_per_epoch:
                        print("Epoch  Training Loss  Validation Loss  Accuracy")
                    columns = "{epoch:5d}  {training_loss:13.4f}  {validation_loss:15.4f}  {accuracy:8.4f}"
                    print(columns.format(**row), flush=True)

        # ---- save
        lines += new_lines
        if saving:
            values = {"steps": steps, "lines": lines, "arguments": arguments}
            values["seconds"] = seconds_before + time.perf_counter() - started
            save_state(output_dir / "state.pt", accelerator, model, optimizer, values)
        if is_main and new_lines:
            with (output_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in new_lines)

    # ---- save the checkpoint, check it, and only then write run.json
    seconds, peak = seconds_before + time.perf_counter() - started, peak_memory_gib(device)
    if logits is None:  # resumed after the last step
        logits = evaluate.predict(model, token_ids["validation"], "validation", rank, processes)
    if is_main:
        with data.refusing(f"cannot save to {output_dir}: make room, then use --resume"):
            evaluate.save_model(output_dir, accelerator.unwrap_model(model).model, tokenizer, args.max_length)
    del model, optimizer, trainable  # room for the copy that is loaded
    accelerator.free_memory()
    accelerator.free_memory()  # twice: it collects garbage before it drops its own references
    if is_main:
        epochs, split = [line for line in lines if "epoch" in line], {"protocol": args.protocol}
        split["sizes"] = {part: len(parts[part]) for part in data.PARTS}
        split["sha256"] = {part: data.hash_examples(parts[part], labels) for part in data.PARTS}
        run = {
            **{name: getattr(args, name) for name in ("model", "hub", "data", "max_length", "lora")},
            "labels": list(labels),
            "split": split,
            "arguments": vars(args) | {"output_dir": str(output_dir)},
            "parameters": {"trainable": n_trained, "all": n_all},
            "epochs": epochs,
            "mixed_precision": f"{precision} ({why})",
            "processes": processes,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "seconds": seconds,
            "peak_memory_gib": peak,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "numpy")},
        }
        check_checkpoint(output_dir, run, accelerator, token_ids["validation"], classes["validation"], logits)
        with contextlib.suppress(ImportError):  # matplotlib is optional
            plot_curves(output_dir, lines)
        data.write_atomically(output_dir / "run.json", json.dumps(run, indent=1, ensure_ascii=False))
        (output_dir / "state.pt").unlink(missing_ok=True)
        memory = f"peak memory {peak:.2f} GiB, " if peak else ""
        print(f"{seconds:.1f} s of training, {memory}validation accuracy {run['validation']['accuracy']:.4f}")
        best = min(epochs, key=lambda row: row["validation_loss"])
        if best is not epochs[-1]:
            print(f"note: epoch {best['epoch']} had the lowest validation loss; what is saved is the last epoch")
        print(f"saved to {output_dir}; next: python evaluate.py --ckpt {output_dir}")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
