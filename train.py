"""Fine-tune Qwen1.5 as a text classifier, fully or with LoRA, in one explicit Accelerate loop.

    accelerate launch train.py --lora                    # Qwen1.5-0.5B on HC3-Chinese baike, on one GPU
    accelerate launch train.py --output_dir out/full     # the same, training every weight
    python train.py --lora --model tests/tiny-qwen --data tests/sample.jsonl --learning_rate 2e-3 --output_dir out/demo

The first two download the model and the data once; the third is offline and takes half a minute on two CPU cores.
Each leaves a checkpoint that tells `python evaluate.py --ckpt <output_dir>` where base model and data come from.

A step is a pure function of (seed, step): which texts it sees and its random numbers follow from these two alone. So a
resumed run equals an uninterrupted one; and without dropout, whose masks differ, accumulated micro-batches equal one
large batch and two processes equal one, up to rounding.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import filelock
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm

import data
import evaluate
from data import InputError

TRACKERS = ("tensorboard", "wandb", "swanlab")
LOG_EVERY = 10  # steps between two lines of metrics.jsonl; reading the loss waits for the GPU


def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__.splitlines()[0])
    data.add_data_options(parser)
    positive = data.number(int, 1)
    add = parser.add_argument
    add("--output_dir", type=data.folder, default="out", help="folder of the checkpoint")
    add("--lora", action="store_true", help="train a LoRA adapter instead of every weight")
    add("--lora_r", type=positive, default=8, help="rank of the adapter")
    add("--lora_alpha", type=positive, default=16, help="the adapter counts lora_alpha / lora_r times")
    add("--lora_dropout", type=data.number(float, 0, 0.99), default=0.1, help="dropout in front of the adapter")
    add("--lora_targets", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"], help="layers that get one")
    add("--freeze_embedding", action="store_true", help="with every weight trained, leave the token embedding as it is")
    add("--epochs", type=positive, default=2, help="passes over the training part")
    add("--batch_size", type=positive, default=4, help="texts in a micro-batch, counted over all processes")
    add("--gradient_accumulation_steps", type=positive, default=1, help="micro-batches in a step")
    add("--auto_batch_size", action="store_true", help="when out of memory, halve the micro-batch and keep the step")
    add("--learning_rate", type=data.number(float, 1e-12), default=5e-5, help="peak; falls linearly to 0")
    add("--warmup_ratio", type=data.number(float, 0, 1), default=0.0, help="share of the steps in which the rate rises")
    add("--weight_decay", type=data.number(float, 0), default=0.0, help="weight decay of AdamW")
    add("--max_grad_norm", type=data.number(float, 1e-12), default=1.0, help="gradients are clipped to this norm")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--mixed_precision", choices=["auto", "no", "bf16", "fp16"], default="auto", help="compute dtype")
    add("--seed", type=data.number(int, 0, 2**31), default=233, help="of head, order and dropout; not of the split")
    add(
        "--save_steps",
        type=data.number(int, 0),
        help="save state every so many steps too, and not just every epoch; 0: never",
    )
    trackers = "wandb and swanlab: offline unless WANDB_API_KEY or SWANLAB_API_KEY is set"
    add("--report_to", choices=TRACKERS, help=f"log to a tracker too; {trackers}")
    add("--resume", action="store_true", help="go on with the unfinished run in output_dir")
    add("--overwrite", action="store_true", help="discard an unfinished run in output_dir")
    return parser.parse_args(argv)


# ---- what a step is: pure functions of (seed, step) ----------------------------------------------


@functools.lru_cache(maxsize=2)  # so that a step need not shuffle a whole epoch anew
def order_of(seed, epoch, texts):
    """The order (list of int) in which an epoch sees range(texts)."""
    return np.random.default_rng([seed, epoch]).permutation(texts).tolist()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which texts each step sees, and at what learning rate: `texts` texts in steps of `step_size`."""

    texts: int
    step_size: int
    epochs: int
    seed: int
    learning_rate: float
    warmup_ratio: float

    @property
    def steps_per_epoch(self):
        return math.ceil(self.texts / self.step_size)

    @property
    def total_steps(self):
        return self.epochs * self.steps_per_epoch

    def texts_of(self, step):
        """Indices of a step's texts over all processes (list of int); an epoch's last step takes what is left."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = order_of(self.seed, epoch, self.texts)
        return order[position * self.step_size : (position + 1) * self.step_size]

    def rate_of(self, step):
        """Linear from 0 to the peak while warming up, then to 0: transformers' get_linear_schedule_with_warmup."""
        warmup = math.ceil(self.warmup_ratio * self.total_steps)
        if step < warmup:
            return self.learning_rate * step / warmup
        return self.learning_rate * (self.total_steps - step) / max(1, self.total_steps - warmup)

    def seed_of(self, step, process):
        """Seed of a step's random numbers: dropout, which every process draws for texts of its own."""
        return int(np.random.SeedSequence([self.seed, step, process]).generate_state(1)[0])


class History:
    """What happened in a run: `steps`, a [loss, gradient norm] each; `epochs`, the table's rows.

    Steps wait on the device in `pending` until `read` fetches them, so that a step need not wait for its result.
    """

    def __init__(self, schedule, steps=(), epochs=()):
        self.schedule, self.steps, self.epochs, self.pending = schedule, list(steps), list(epochs), []

    def read(self, accelerator, stop=False):
        """Fetch the pending steps (waits for the device); whether any process was told to stop.

        Raises InputError on a loss or a gradient that is not finite, naming the step and its texts.
        """
        if not self.pending:
            return stop
        table = torch.stack([*self.pending, torch.full_like(self.pending[0], float(stop))])
        *rows, stops = accelerator.reduce(table, "sum").tolist()
        self.pending.clear()
        for loss, norm in rows:
            norm /= accelerator.num_processes  # a process has its share of the loss, but the same norm as the others
            skipped = accelerator.scaler and not math.isfinite(norm)  # as the fp16 scaler does with such a step
            if not math.isfinite(loss) or not (skipped or math.isfinite(norm)):
                step = len(self.steps)
                raise InputError(
                    f"step {step + 1} gave loss {loss} and gradient norm {norm} on the training texts "
                    f"{self.schedule.texts_of(step)}: lower --learning_rate, or use --mixed_precision no; state that "
                    "was saved before is kept for --resume"
                )
            self.steps.append([loss, norm])
        return stops[0] > 0

    def log_lines(self, done):
        """What metrics.jsonl gets after `done` steps: no, one or two dicts."""
        lines = []
        if done % LOG_EVERY == 0:
            recent = self.steps[done - LOG_EVERY : done]
            lines.append(
                {
                    "step": done,
                    "loss": sum(loss for loss, _ in recent) / LOG_EVERY,
                    "grad_norm": recent[-1][1] if math.isfinite(recent[-1][1]) else None,
                    "learning_rate": self.schedule.rate_of(done),
                    "skipped_steps": sum(not math.isfinite(norm) for _, norm in recent),
                }
            )
        if done % self.schedule.steps_per_epoch == 0:
            lines.append({"step": done, **self.epochs[done // self.schedule.steps_per_epoch - 1]})
        return lines

    def add_epoch(self, labels, logits):
        """Add the row of the epoch that ends here: validation `labels` (n,) and `logits` (n, classes)."""
        per_epoch = self.schedule.steps_per_epoch
        losses = [loss for loss, _ in self.steps[-per_epoch:]]
        sizes = [len(self.schedule.texts_of(step)) for step in range(per_epoch)]
        row = {
            "epoch": len(self.epochs) + 1,
            "training_loss": float(np.average(losses, weights=sizes)),
            "validation_loss": evaluate.negative_log_likelihood(labels, logits),
            "accuracy": float((logits.argmax(1) == labels).mean()),
        }
        self.epochs.append(row)


# ---- precision and model -------------------------------------------------------------------------


def choose_precision(asked):
    """(mixed precision, why): the explicit choice, else the launcher's bf16 or fp16, else what the hardware is good at.

    Raises InputError where two explicit choices differ, or where the hardware cannot do it.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # a bare launch exports "no", which says nothing
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if launched not in ("no", "bf16", "fp16"):
        raise InputError(f"accelerate launch asks for {launched} precision: use no, bf16 or fp16")
    if launched != "no" and asked not in ("auto", launched):
        raise InputError(f"--mixed_precision {asked}, but accelerate launch asks for {launched}: give one of the two")
    if not cpu:
        data.check_gpu()
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if asked != "auto":
        chosen, why = asked, "asked for"
    elif launched != "no":
        chosen, why = launched, "asked for by accelerate launch"
    elif cpu:
        chosen, why = "no", "no CUDA device"
    else:  # by capability and not is_bf16_supported, which is true on a T4, where bf16 is emulated
        chosen = "bf16" if major >= 8 else "fp16" if major >= 7 else "no"
        why = f"{name}, compute capability {major}.{minor}"
    if chosen == "fp16" and cpu:
        raise InputError("fp16 needs a GPU (on a CPU it would silently be fp32): use --mixed_precision no or bf16")
    return chosen, why


class UsedRows(torch.nn.Embedding):
    """The rows of a token embedding that a run's texts use, as a smaller embedding in its place.

    The embedding is a third of Qwen1.5-0.5B, and 4,000 texts use a tenth of its rows. The others get no gradient, and
    without weight decay AdamW leaves such rows alone: the result is the same without them, and without their gradient
    and AdamW's two moments in memory.
    """

    def __init__(self, embedding, used, keep_whole):
        """`used`: int64 (rows,), sorted token ids. `keep_whole`: keep the other rows too, on the CPU, to be saved."""
        slots = torch.full((embedding.num_embeddings,), -1, dtype=torch.int32)  # -1: looking it up fails
        slots[used] = torch.arange(len(used), dtype=torch.int32)
        padding = embedding.padding_idx  # the row that never gets a gradient
        padding = int(slots[padding]) if padding is not None and padding in used else None
        whole = embedding.weight.detach()
        super().__init__(len(used), embedding.embedding_dim, padding_idx=padding, _weight=whole[used])
        self.register_buffer("slots", slots, persistent=False)
        self.used, self.whole = used, whole if keep_whole else None

    def forward(self, input_ids):
        return super().forward(self.slots[input_ids])


def build_model(args, folder, tokenizer, precision, labels=data.LABELS):
    """The classifier to train. LoRA holds its frozen base in the compute dtype; every trainable tensor is float32."""
    # Full fine-tuning keeps float32 weights: in bf16 most of its small updates would round away.
    model = data.load_classifier(folder, tokenizer, data.DTYPES[precision] if args.lora else torch.float32, labels)
    model.name_or_path = model.config.name_or_path = args.model  # not the hub's cache folder, which differs elsewhere
    model.get_input_embeddings().requires_grad_(not args.freeze_embedding)
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # the reentrant kind needs an input that requires a gradient
    if args.lora:
        from peft import LoraConfig, get_peft_model

        # PEFT skips a target that matches nothing, without a word, as long as another one matches.
        layers = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
        missing = [t for t in args.lora_targets if not any(f".{name}".endswith(f".{t}") for name in layers)]
        if missing:
            has = " ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise InputError(f"--lora_targets {' '.join(missing)}: no such layer; the model has {has}")
        config = LoraConfig(
            task_type="SEQ_CLS",  # this also trains and saves the classification head
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.lora_targets,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 uses a name that transformers is giving up
            model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT leaves the head in the base's dtype
    return data.PackedClassifier(model)


def keep_used_rows(args, model, token_ids):
    """Give a transformers model an embedding of only those rows that `token_ids` (list of lists of int) use.

    Where that would change the result, as with weight decay, which moves every row, the embedding stays as it is.
    """
    embedding = model.get_input_embeddings()
    trained = embedding.weight.requires_grad
    if type(embedding) is torch.nn.Embedding and not (trained and args.weight_decay):  # another type may do more
        used = torch.tensor(sorted({token for ids in token_ids for token in ids}))
        model.set_input_embeddings(UsedRows(embedding, used, keep_whole=not args.lora).requires_grad_(trained))


# ---- one step ------------------------------------------------------------------------------------


def accumulate(accelerator, model, token_ids, labels, texts, micro_size):
    """Add the gradient of the mean loss over `texts`, the step's texts over all processes, in micro-batches.

    Returns this process's share of that mean, a 0-dim tensor on the device. Exact for any division of the work: each
    loss is a sum x processes / texts in the step (DDP averages over processes); gradients are exchanged with the last
    micro-batch alone; and every process runs as many micro-batches, if need be for an empty share.
    """
    total = torch.zeros((), device=accelerator.device)
    micro_batches = [texts[i : i + micro_size] for i in range(0, len(texts), micro_size)]
    for micro_batch in micro_batches:
        mine = micro_batch[accelerator.process_index :: accelerator.num_processes]
        rows = mine or micro_batch[:1]  # an empty share runs one text with weight 0
        batch = data.pack([token_ids[i] for i in rows], accelerator.device)
        targets = data.to_device(torch.tensor([labels[i] for i in rows]), accelerator.device)  # (rows,)
        last = micro_batch is micro_batches[-1]
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            losses = torch.nn.functional.cross_entropy(model(**batch), targets, reduction="sum")
            loss = losses / len(texts) * bool(mine)
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    return total


def forward_backward(accelerator, model, token_ids, labels, texts, seed, micro_size, may_halve):
    """`accumulate`, with the step's random numbers; returns (loss, micro-batch size).

    The size is halved as often as memory runs out, if it `may_halve`; otherwise that raises InputError.
    """
    while True:
        torch.manual_seed(seed)
        try:
            return accumulate(accelerator, model, token_ids, labels, texts, micro_size), micro_size
        except torch.OutOfMemoryError:
            if not may_halve or micro_size == 1:
                raise InputError(
                    f"out of memory with {micro_size} texts at once: lower --batch_size and raise "
                    "--gradient_accumulation_steps, or try --auto_batch_size, --gradient_checkpointing or --lora"
                ) from None
        model.zero_grad()  # out here, where the tensors of the failed attempt are free
        micro_size = math.ceil(micro_size / 2)
        tqdm.write(f"out of memory: going on with micro-batches of {micro_size}, still {len(texts)} texts a step")


# ---- the output folder ---------------------------------------------------------------------------
# A run works in <output_dir>/unfinished and moves its files up when all of them are there, run.json last. So an earlier
# finished run stays whole until then, and at any moment the folder holds one finished run or says that it holds none.


@contextlib.contextmanager
def prepared_output(args, accelerator):
    """Refuse what is in the way in output_dir, and lock it while the run works in the folder that this yields.

    Yields None where --resume finds that the run has finished. Raises InputError where another run is at work, or an
    earlier one left what --resume or --overwrite must decide on.
    """
    output_dir, made = args.output_dir, not args.output_dir.exists()
    unfinished, lock = output_dir / "unfinished", filelock.FileLock(output_dir / ".lock", blocking=False)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()  # the system releases it however the process ends
        except filelock.Timeout:
            raise InputError(f"another run is writing to {output_dir}: choose another --output_dir, or wait") from None
    try:
        if accelerator.is_main_process:
            if (unfinished / "complete").is_file():  # a run that was stopped while it moved its files up
                move_up(unfinished)
            if unfinished.exists() and not args.resume and not args.overwrite:
                hint = "--resume continues, --overwrite discards it"
                raise InputError(f"an unfinished run is in {unfinished}: {hint}")
            ours = unfinished.exists() or (output_dir / "run.json").exists()
            if not ours and any((output_dir / name).exists() for name in ("config.json", "adapter_config.json")):
                raise InputError(f"--output_dir {output_dir} holds a model of other origin: choose another folder")
            if (output_dir / "run.json").exists() and not args.resume:
                print(f"{output_dir} holds a finished run, which this one will replace when it has finished too")
        accelerator.wait_for_everyone()
        finished = args.resume and not unfinished.exists() and (output_dir / "run.json").exists()
        if finished:
            was = evaluate.read_run(output_dir)["arguments"]
            finished = deciding(was) == deciding(vars(args))
        accelerator.wait_for_everyone()
        yield None if finished else unfinished
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows does not remove an open file
                (output_dir / ".lock").unlink()
            lock.release()
            if made and not any(output_dir.iterdir()):  # the run was refused before it wrote anything
                output_dir.rmdir()


def deciding(arguments):
    """Of a run's arguments (dict) those that decide what is learned."""
    others = ("output_dir", "save_steps", "resume", "overwrite", "auto_batch_size", "gradient_checkpointing", "hub")
    return {name: value for name, value in arguments.items() if name not in (*others, "report_to")}


def move_up(unfinished):
    """Put the complete run in `unfinished` in place of the one in the folder above. Interrupted, it can be repeated."""
    output_dir, run, replaced = unfinished.parent, unfinished / "run.json", unfinished / "replaced.json"
    (unfinished / "complete").touch()
    (unfinished / "state.pt").unlink(missing_ok=True)
    if run.exists():
        if (output_dir / "run.json").exists():
            os.replace(output_dir / "run.json", replaced)  # from here on the folder holds no finished run ...
        if replaced.exists():  # the old files go before any new one comes, so that a repetition takes none for old
            weights, results = ("adapter_*", "model*.safetensors*", "config.json"), ("eval-*", "predictions-*")
            for pattern in (*weights, *results, "report-*", "curves.png"):
                for old in output_dir.glob(pattern):
                    old.unlink()
            replaced.unlink()
        for new in unfinished.iterdir():
            if new.name not in ("run.json", "complete"):
                os.replace(new, output_dir / new.name)
        os.replace(run, output_dir / "run.json")  # ... until here
    shutil.rmtree(unfinished)


def check_room(folder, trainable):
    """Raise InputError where the state would not fit twice, as it must while a new one replaces the old."""
    needed = 2 * 3 * sum(parameter.nbytes for parameter in trainable)  # the weights and AdamW's two moments
    there = sum(file.stat().st_size for file in folder.glob("state.pt*"))
    if shutil.disk_usage(folder).free + there < needed:
        raise InputError(f"no room in {folder} for {needed / 2**20:.0f} MiB of state: free some, or use --save_steps 0")


@contextlib.contextmanager
def saving_to(folder):
    """Make an InputError of whatever a library raises where the disk is full, as each has a type of its own."""
    try:
        yield
    except Exception as error:
        (folder / "state.pt.tmp").unlink(missing_ok=True)
        raise InputError(
            f"cannot save to {folder} ({data.one_line(error)}): make room, then go on with --resume"
        ) from None


def save_state(path, accelerator, model, optimizer, values):
    """Save for --resume what (seed, step) does not give: trainable tensors, AdamW's moments, the scaler, `values`."""
    if accelerator.is_main_process:
        weights = {n: p.detach() for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
        state = {"model": weights, "optimizer": optimizer.state_dict(), "scaler": scaler, **values}
        with saving_to(path.parent):
            torch.save(state, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
    accelerator.wait_for_everyone()


def load_state(path, accelerator, model, optimizer, arguments):
    """Load what `save_state` saved and return its `values`. Raises InputError if the run had other arguments."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        was = state["arguments"]
    except Exception as error:  # a damaged file makes torch.load raise whatever its parts raise
        raise InputError(f"{path} cannot be read ({type(error).__name__}): start again with --overwrite") from None
    different = [name for name in arguments if was.get(name) != arguments[name]]
    if different:
        changes = ", ".join(f"{name} was {was.get(name)} and is {arguments[name]}" for name in different)
        raise InputError(f"--resume goes on with the arguments of before, but {changes}")
    accelerator.unwrap_model(model).load_state_dict(state.pop("model"), strict=False)  # it has the trainable ones alone
    optimizer.load_state_dict(state.pop("optimizer"))
    scaler = state.pop("scaler")
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(scaler)
    return state


def save_checkpoint(folder, accelerator, model, tokenizer):
    """Save the adapter or the full model, and the tokenizer, as plain PEFT and transformers files."""
    weights = accelerator.get_state_dict(model)  # on every process: under FSDP this gathers the shards
    if accelerator.is_main_process:
        inner = accelerator.unwrap_model(model).model
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        for name, module in inner.named_modules():
            if isinstance(module, UsedRows) and module.whole is not None:
                rows = weights[f"{name}.weight"].to(module.whole)
                weights[f"{name}.weight"] = module.whole.index_copy(0, module.used, rows)
        options = {"save_embedding_layers": False} if hasattr(inner, "peft_config") else {}  # else PEFT may ask the hub
        with saving_to(folder):
            inner.save_pretrained(folder, state_dict=weights, **options)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card would replace the user's own
            tokenizer.save_pretrained(folder)
            data.spell_as_before(folder)


def finish(folder, run, accelerator, trained, token_ids, labels):
    """Write run.json, load the checkpoint as evaluate.py will, score it, and complete run.json.

    `trained`: the validation logits (n, classes) of the model in training. Raises InputError if the loaded model's
    differ by more than the rounding of the precision explains.
    """
    data.write_atomically(folder / "run.json", json.dumps(run, indent=1, ensure_ascii=False))
    device, precision = accelerator.device, accelerator.mixed_precision
    loaded = evaluate.predict(evaluate.load_checkpoint(folder, device=device)[0], token_ids, device, "check")
    tolerance = {"no": 1e-3, "bf16": 0.2, "fp16": 0.1}[precision] * np.abs(trained).mean()
    if not np.abs(trained - loaded).mean() <= tolerance:
        raise InputError(f"the checkpoint in {folder} does not give the trained model's logits when it is loaded")
    accuracy, loss = float((loaded.argmax(1) == labels).mean()), evaluate.negative_log_likelihood(labels, loaded)
    temperature, threshold = evaluate.fit_calibration(labels, loaded)
    run |= {"validation": {"accuracy": accuracy, "loss": loss}, "temperature": temperature, "threshold": threshold}
    data.write_atomically(folder / "run.json", json.dumps(run, indent=1, ensure_ascii=False))


def plot_curves(folder):
    """curves.png of metrics.jsonl: training loss by step, validation loss and accuracy by epoch. Needs matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no global figure, no display, the notebook's backend stays

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for field, style in (("loss", "-"), ("validation_loss", "o-"), ("accuracy", "s--")):
        points = [(line["step"], line[field]) for line in lines if field in line]
        axes.plot(*zip(*points, strict=True) if points else ([], []), style, label=field.replace("_", " "))
    axes.set(xlabel="step", ylim=(0, None))
    axes.legend()
    figure.savefig(folder / "curves.png", dpi=110)


# ---- main ----------------------------------------------------------------------------------------


def peak_memory_gib(device):
    """The most memory held so far: what torch allocated on a GPU, else the process's resident memory; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


@contextlib.contextmanager
def deferred_signals():
    """Collect SIGINT, SIGTERM and SIGHUP in the list that it yields, so that a step can be finished before the end."""
    received, before = [], {}
    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        signals = [signal.SIGINT, signal.SIGTERM]
        # Stopping a notebook's `!` cell closes its terminal. Windows has no SIGHUP, and nohup's ignoring it stays.
        if getattr(signal, "SIGHUP", None) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        for which in signals:
            before[which] = signal.signal(which, lambda which, frame: received.append(which))
    try:
        yield received
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def check_processes(accelerator, args):
    """Tell a launch that lost its processes (accelerate on CPUs does so silently). Raises InputError."""
    processes = accelerator.num_processes
    if int(os.environ.get("WORLD_SIZE", 1)) != processes:
        raise InputError("the launched processes do not see each other: README says under 'Two processes' how to")
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        print("warning: one process alone; if more were launched, see 'Two processes' in README", file=sys.stderr)
    if args.batch_size < processes:
        raise InputError(f"--batch_size {args.batch_size} is counted over all processes: give at least {processes}")
    if args.auto_batch_size and processes > 1:
        raise InputError("--auto_batch_size works with one process only: lower --batch_size instead")


def start_tracker(accelerator, args):
    """Begin the run of --report_to: metrics.jsonl's lines will go there too. No tracker asks for a login."""
    for name in ("WANDB", "SWANLAB"):
        if f"{name}_API_KEY" not in os.environ:
            os.environ.setdefault(f"{name}_MODE", "offline")
    config = {name: value if isinstance(value, int | float | str) else str(value) for name, value in vars(args).items()}
    accelerator.init_trackers("qwen-classifier", config)


@data.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    precision, why = choose_precision(args.mixed_precision)
    if args.report_to and (args.report_to not in LOGGER_TYPE_TO_CLASS or not find_spec(args.report_to)):
        raise InputError(f"--report_to {args.report_to} needs: pip install -U accelerate {args.report_to}")
    AcceleratorState._reset_state()  # a second main() in one notebook kernel may want another precision
    accelerator = Accelerator(mixed_precision=precision, log_with=args.report_to, project_dir=args.output_dir)
    check_processes(accelerator, args)
    with accelerator.main_process_first():  # which downloads, so that the others find the files
        folder, records = data.fetch_model(args.model, args.hub), data.load_hc3(args.data)
    if args.output_dir.resolve() == Path(folder).resolve():
        raise InputError(f"--output_dir {args.output_dir} is the base model's folder: choose another")
    with prepared_output(args, accelerator) as unfinished:
        if unfinished:
            try:
                train(args, accelerator, f"{precision} ({why})", folder, records, unfinished)
            finally:
                for tracker in accelerator.trackers:
                    tracker.finish()
        elif accelerator.is_main_process:
            print(f"the run in {args.output_dir} has finished: there is nothing to resume")


def train(args, accelerator, precision, folder, records, unfinished):
    """The run: everything from records to a checkpoint in the folder above `unfinished`."""
    device, is_main = accelerator.device, accelerator.is_main_process
    shared = {"process": accelerator.process_index, "processes": accelerator.num_processes}

    # ---- data
    class_names = data.class_names(records)
    examples, missing = data.make_examples(records, args.protocol, class_names)
    parts = data.split_examples(examples, args.protocol, class_names)
    tokenizer = data.load_tokenizer(folder)
    texts = {part: [example["text"] for example in parts[part]] for part in data.PARTS[:2]}
    token_ids = {part: data.tokenize(tokenizer, texts[part], args.max_length) for part in texts}
    labels = {part: np.array([example["label"] for example in parts[part]]) for part in texts}
    step_size = args.batch_size * args.gradient_accumulation_steps
    schedule = Schedule(len(parts["train"]), step_size, args.epochs, args.seed, args.learning_rate, args.warmup_ratio)

    # ---- model, optimizer
    torch.manual_seed(args.seed)  # of the new head and the adapter
    model = build_model(args, folder, tokenizer, accelerator.mixed_precision, class_names)
    counts = {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "all": sum(p.numel() for p in model.parameters()),
    }
    if is_main:
        config, share = model.classifier().config, 100 * counts["trainable"] / counts["all"]
        sizes = ", ".join(f"{len(parts[part])} {part}" for part in data.PARTS)
        seen, copies = data.leaks(parts)
        print(f"【model】\n{model.model}\n【model.config】\n{config}")
        print(f"trainable params: {counts['trainable']:,} || all params: {counts['all']:,} || trainable%: {share:.4f}")
        print(f"{sizes} texts by the {args.protocol} protocol; {missing} were missing or empty")
        print(f"of the test texts, {seen} answer a question that is also in train, {copies} are copies of a train text")
        print(f"{schedule.total_steps} steps of {step_size} texts on {accelerator.num_processes} x {device.type}")
        print(f"mixed precision {precision}", flush=True)  # before the bar, in a notebook too
    keep_used_rows(args, model.classifier(), [ids for part in token_ids.values() for ids in part])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, args.learning_rate, weight_decay=args.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)

    # ---- resume
    history, micro_size, seconds_before = History(schedule), args.batch_size, 0.0
    state_path = unfinished / "state.pt"
    decided = {
        "mixed_precision": accelerator.mixed_precision,
        "data_sha256": data.hash_examples(parts["train"] + parts["validation"]),
    }
    arguments = deciding(vars(args)) | decided
    if args.resume and state_path.is_file():
        state = load_state(state_path, accelerator, model, optimizer, arguments)
        history = History(schedule, state["steps"], state["epochs"])
        micro_size, seconds_before = state["micro_size"], state["seconds"]
    first_step = len(history.steps)
    if is_main:  # nothing was written up to here: a command that is refused leaves everything as it was
        if not args.resume:
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(exist_ok=True)
        if args.resume:
            print(f"going on after step {first_step}" if first_step else "nothing saved yet: starting at the beginning")
        before = [line for done in range(1, first_step + 1) for line in history.log_lines(done)]
        data.write_atomically(unfinished / "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in before))

    if args.report_to:
        start_tracker(accelerator, args)

    # ---- train
    saves = args.save_steps != 0
    if saves and is_main:
        check_room(unfinished, trainable)
    model.train()
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    logits = None  # of the validation part, at the last epoch's end
    steps = range(first_step, schedule.total_steps)
    look = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # 80 columns, as a notebook's `!` has
    bar = tqdm(steps, "train", schedule.total_steps, initial=first_step, disable=not is_main, bar_format=look)
    with deferred_signals() as signals:
        for step in bar:
            # ---- forward, backward
            seed = schedule.seed_of(step, accelerator.process_index)
            batch = token_ids["train"], labels["train"], schedule.texts_of(step), seed
            loss, micro_size = forward_backward(accelerator, model, *batch, micro_size, args.auto_batch_size)

            # ---- step
            optimizer.param_groups[0]["lr"] = schedule.rate_of(step)
            norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            history.pending.append(torch.stack([loss, norm.to(loss)]))

            # ---- log
            done = step + 1
            at_epoch_end = done % schedule.steps_per_epoch == 0
            stop = bool(signals) and accelerator.num_processes == 1  # several agree when they log
            if done % LOG_EVERY == 0 or at_epoch_end:
                stop = history.read(accelerator, bool(signals))
                rate = (done - first_step) * step_size / (time.perf_counter() - started)
                loss, lr = history.steps[-1][0], schedule.rate_of(done)
                bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {rate:.0f} texts/s")

            # ---- evaluate
            if at_epoch_end:
                logits = evaluate.predict(model, token_ids["validation"], device, "validation", **shared)
                history.add_epoch(labels["validation"], logits)

            # ---- save
            if saves and (stop or at_epoch_end or (args.save_steps and done % args.save_steps == 0)):
                history.read(accelerator)
                seconds = seconds_before + time.perf_counter() - started
                values = {"steps": history.steps, "epochs": history.epochs, "micro_size": micro_size}
                values |= {"seconds": seconds, "arguments": arguments}
                save_state(state_path, accelerator, model, optimizer, values)

            # ---- show, stop (after saving, because the terminal may be gone)
            for line in history.log_lines(done) if is_main else ():
                with (unfinished / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps(line)}\n")
                accelerator.log({name: value for name, value in line.items() if value is not None}, step=done)
            if at_epoch_end and is_main:
                columns = "{epoch:5d}  {training_loss:13.4f}  {validation_loss:15.4f}  {accuracy:8.4f}"
                with bar.external_write_mode():  # flushed before the bar is drawn anew, as a notebook has two streams
                    if len(history.epochs) == 1 or done == first_step + schedule.steps_per_epoch:
                        print("Epoch  Training Loss  Validation Loss  Accuracy")
                    print(columns.format(**history.epochs[-1]), flush=True)
            if stop:
                bar.close()
                how = "the same command with --resume goes on" if saves else "nothing is saved with --save_steps 0"
                print(f"stopped after step {done} of {schedule.total_steps}: {how}", file=sys.stderr)
                sys.exit(128 + (signals[0] if signals else signal.SIGTERM))
    seconds, peak = seconds_before + time.perf_counter() - started, peak_memory_gib(device)

    # ---- save the checkpoint
    save_checkpoint(unfinished, accelerator, model, tokenizer)
    if logits is None:  # resumed after the last step
        logits = evaluate.predict(model, token_ids["validation"], device, "validation", **shared)
    del model, optimizer, trainable  # room for the copy that is loaded
    accelerator.free_memory()
    accelerator.free_memory()  # the first collects garbage before it drops its own references, the second after
    if is_main:
        run = {
            "model": args.model,
            "hub": args.hub,
            "data": args.data,
            "labels": list(class_names),
            "max_length": args.max_length,
            "lora": args.lora,
            "split": {
                "protocol": args.protocol,
                "seed": data.SPLIT_SEED,
                "sizes": {part: len(parts[part]) for part in data.PARTS},
                "sha256": {part: data.hash_examples(parts[part]) for part in data.PARTS},
            },
            "arguments": vars(args) | {"output_dir": str(args.output_dir)},
            "parameters": counts,
            "epochs": history.epochs,
            "mixed_precision": precision,
            "processes": accelerator.num_processes,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "seconds": seconds,
            "peak_memory_gib": peak,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "numpy")},
        }
        finish(unfinished, run, accelerator, logits, token_ids["validation"], labels["validation"])
        hint = ""
        try:
            plot_curves(unfinished)
        except ImportError:
            hint = " (for pictures: pip install matplotlib)"
        move_up(unfinished)
        memory = f"peak memory {peak:.2f} GiB, " if peak else ""
        print(f"{seconds:.1f} s of training, {memory}validation accuracy {run['validation']['accuracy']:.4f}")
        print(f"saved to {args.output_dir}{hint}; next: python evaluate.py --ckpt {args.output_dir}")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
