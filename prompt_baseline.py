"""Ask a chat model whether a text is a human's or ChatGPT's: the baseline that fine-tuning is compared with.

    python prompt_baseline.py                                     # Qwen1.5-1.8B-Chat, 30 questions x 2 of baike
    python prompt_baseline.py --replay tests/seed_replies.jsonl   # score saved replies, without a model
    python prompt_baseline.py --model tests/tiny-qwen --ckpt out/demo --method logprob   # on a checkpoint's test texts

The first downloads the model once. The second gives the published 26 of 60. The third needs README's demo, and only
shows that the code runs: the tiny base was not trained to chat. --output_dir gets replies.jsonl (for --replay) and
predictions-prompt.jsonl (for --compare).
"""

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm

import data
import evaluate
from data import InputError, short

SYSTEM = "你擅长文本分类，能判断一段文字描述来自human还是chatgpt。你只需要回答一个单词，回答human或者chatgpt。"
USER = "这里有一段关于{topic}的文字描述，请判断它来自human还是chatgpt：\n {text}"
BAIKE_OPENING = "我有一个计算机相关的问题，请用中文回答，什么是 "  # how each baike question begins; its topic follows
SPELLINGS = {"human": ("human", "Human", "人类"), "chatgpt": ("chatgpt", "ChatGPT", "人工智能", "机器")}


def parse_args(argv=None):
    parser = data.ArgumentParser(description=__doc__.splitlines()[0])
    data.add_options(parser, model="Qwen/Qwen1.5-1.8B-Chat", split=False)
    add, positive = parser.add_argument, data.number(int, 1)
    add("--questions", type=positive, default=30, help="number of questions, with two texts each")
    add("--ckpt", help="ask about the test texts of this checkpoint instead")
    methods = "read the model's reply, or compare the probabilities of the replies that name a class"
    add("--method", choices=["generate", "logprob"], default="generate", help=methods)
    add("--prior_correction", action="store_true", help="logprob: divide by the mean probability on validation texts")
    add("--max_new_tokens", type=positive, default=32, help="longest reply")
    add("--batch_size", type=positive, default=8, help="prompts per batch")
    add("--replay", metavar="FILE", help="score the replies in this replies.jsonl, without a model")
    add("--output_dir", type=data.folder, default=Path("out/prompt"), help="folder for the results")
    args = parser.parse_args(argv)
    if args.prior_correction and args.method != "logprob":
        parser.error("--prior_correction needs --method logprob")
    return args


def question_examples(examples, questions):
    """(test, validation) examples, both answers to each question: the published baseline's own split by questions.

    The first `questions` questions of the 20 % test part (seed 233), and as many of the other part; the human answer
    comes first. Questions without both answers are left out.
    """
    import datasets  # its seeded permutation is the protocol

    answers = {}
    for example in examples:
        answers.setdefault((example["source"], example["row"]), []).append(example)
    pairs = [pair for pair in answers.values() if len(pair) == 2]
    if len(pairs) < 5:
        raise InputError(f"{len(pairs)} questions have both answers: at least 5 are needed")
    rows = datasets.Dataset.from_dict({"row": range(len(pairs))}).train_test_split(train_size=0.8, seed=data.SPLIT_SEED)
    return [[text for row in rows[part]["row"][:questions] for text in pairs[row]] for part in ("test", "train")]


def parse_reply(reply):
    """The class that a reply names in any case, width or sentence; None if it names both or neither. Never raises."""
    plain = re.sub(r"[\s-]", "", unicodedata.normalize("NFKC", reply).lower())
    named = [label for label, words in SPELLINGS.items() if any(word.lower() in plain for word in words)]
    return named[0] if len(named) == 1 else None


class Prompt:
    """The chat prompt as token ids, by the tokenizer's own template; `end` is the token that ends a turn."""

    def __init__(self, tokenizer):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\x00"}]
        with data.refusing("no usable chat template: give a chat model as --model"):  # none, or one that refuses these
            chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            before, _, after = chat.partition("\x00")
            self.end = tokenizer(after, add_special_tokens=False)["input_ids"][0]
        self.tokenizer = tokenizer
        self.before, self.after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))

    def ids(self, example):
        """Token ids of the question about an example; its text cannot end the turn, and is cut at the model's limit."""
        content = USER.format(topic=example["question"].removeprefix(BAIKE_OPENING), text=example["text"])
        options = {"add_special_tokens": False, "split_special_tokens": True, "truncation": True}
        return [*self.before, *self.tokenizer(content, **options)["input_ids"], *self.after]


@torch.inference_mode()
def generate(model, prompt, examples, batch_size, max_new_tokens):
    """Greedy replies, a list of str, to batches of prompts padded on the left."""
    tokenizer, replies = prompt.tokenizer, []
    tokenizer.padding_side = "left"
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}
    options |= {"eos_token_id": [prompt.end, tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}
    for first in tqdm(range(0, len(examples), batch_size), "ask", unit=" batches"):
        ids = [prompt.ids(example) for example in examples[first : first + batch_size]]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
        output = model.generate(**batch, max_new_tokens=max_new_tokens, **options)
        new = output[:, batch["input_ids"].shape[1] :]
        replies += [reply.strip() for reply in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return replies


@torch.inference_mode()
def class_log_probabilities(model, prompt, examples):
    """Log-probability that the whole reply is a spelling of each class's name, float64 (n, classes).

    A reply's probability is the product over its tokens and the end of the turn. So long and short names compare
    without normalisation by length, and the spellings of a class are disjoint events whose probabilities add.
    """
    data.use_packed_attention(model)
    spelled = [(k, word) for k, label in enumerate(data.LABELS) for word in SPELLINGS[label]]
    replies = [[*prompt.tokenizer(word, add_special_tokens=False)["input_ids"], prompt.end] for _, word in spelled]
    result = np.full((len(examples), len(data.LABELS)), -np.inf)
    for row, example in enumerate(tqdm(examples, "ask", unit=" texts")):
        question = prompt.ids(example)
        batch = data.pack([question + reply[:-1] for reply in replies], model.device)
        hidden = model.base_model(**batch, use_cache=False).last_hidden_state[0]  # (T, hidden_size)
        for (k, _), reply, end in zip(spelled, replies, np.cumsum(batch["lengths"]), strict=True):
            # The token at position p predicts the one at p + 1.
            log_p = model.lm_head(hidden[end - len(reply) : end]).float().log_softmax(-1)
            result[row, k] = np.logaddexp(result[row, k], log_p[torch.arange(len(reply)), reply].sum().item())
    return result


def read_replies(path):
    """(true labels, replies) of a replies.jsonl. Raises InputError."""
    problem = f"{path} is not a replies.jsonl: each line needs a label (human or chatgpt) and a reply"
    with data.refusing(problem, (ValueError, KeyError, TypeError, RecursionError)):
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
        if not lines or not all(line["label"] in data.LABELS and isinstance(line["reply"], str) for line in lines):
            raise ValueError("no replies, another label, or a reply that is not a string")
    return [line["label"] for line in lines], [line["reply"] for line in lines]


def report(labels, replies):
    """Print the published baseline's lines and the accuracy; return the classes named. Both, or neither, is wrong."""
    named = [parse_reply(reply) for reply in replies]
    right = [name == label for label, name in zip(labels, named, strict=True)]
    if labels == [*data.LABELS] * (len(labels) // 2):  # in pairs, as published
        print(f"测试集大小： {len(labels) // 2}*2")
        for i in range(0, len(labels), 2):
            print(f"Test NO.{i // 2}: response=[{replies[i]},{replies[i + 1]}] acc=({sum(right[: i + 2])}/{i + 2})")
    print(f"\nTest准确率：acc={sum(right) / len(right)}")
    print(f"{sum(right)} of {len(right)} correct; {named.count(None)} replies name both classes or neither")
    return named


@data.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    if args.replay:
        report(*read_replies(args.replay))
        return
    precision, _ = data.choose_precision()
    if args.ckpt:
        run = evaluate.read_run(args.ckpt)
        if tuple(run["labels"]) != data.LABELS:
            labels = short(", ".join(run["labels"]), 80)
            raise InputError(f"{args.ckpt} has the classes {labels}, but the prompt asks for human or chatgpt")
        examples, validation = (evaluate.parts_to_score(run, split=part)[0][1] for part in ("test", "validation"))
    else:
        examples, validation = question_examples(data.load_examples(args.data, args.hub)[0], args.questions)
    folder = data.fetch_model(args.model, args.hub)
    prompt = Prompt(data.load_tokenizer(folder))
    model = data.load_model(transformers.AutoModelForCausalLM, folder, data.DTYPES[precision])
    model.to(PartialState().device).eval()

    scores = ()
    if args.method == "generate":
        replies = generate(model, prompt, examples, args.batch_size, args.max_new_tokens)
    else:
        log_p = class_log_probabilities(model, prompt, examples)
        if args.prior_correction:
            held_out = class_log_probabilities(model, prompt, validation)
            log_p -= np.log(evaluate.softmax(held_out).mean(0))
        replies, scores = [data.LABELS[k] for k in log_p.argmax(1)], [{"logits": row.tolist()} for row in log_p]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    fields = ("label", "question", "text")
    rows = [{"reply": r} | {name: e[name] for name in fields} for e, r in zip(examples, replies, strict=True)]
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    data.write_atomically(args.output_dir / "replies.jsonl", text)
    named = report([example["label"] for example in examples], replies)
    data.save_predictions(args.output_dir / "predictions-prompt.jsonl", examples, named, scores)
    print(f"written to {args.output_dir}: replies.jsonl, predictions-prompt.jsonl")


if __name__ == "__main__":
    main()
