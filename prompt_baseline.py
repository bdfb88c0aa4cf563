"""Ask a chat model in words whether a text is a human's or ChatGPT's: the baseline that fine-tuning is compared with.

    python prompt_baseline.py                                     # Qwen1.5-1.8B-Chat, 30 questions x 2 of baike
    python prompt_baseline.py --replay tests/seed_replies.jsonl   # score replies given before, without a model
    python prompt_baseline.py --model tests/tiny-qwen --ckpt out/demo --method logprob   # on a checkpoint's test texts

The first downloads the model once; the second takes seconds, and gives the published 26/60. The third shows the path
offline: the tiny base cannot chat, so its figure (50 of 60 on the synthetic sample) tells nothing of chat models.
Written to --output_dir: replies.jsonl (--replay reads it) and predictions-prompt.jsonl (`evaluate.py --compare` does).
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
from data import InputError

SYSTEM = "你擅长文本分类，能判断一段文字描述来自human还是chatgpt。你只需要回答一个单词，回答human或者chatgpt。"
USER = "这里有一段关于{topic}的文字描述，请判断它来自human还是chatgpt：\n {text}"
BAIKE_OPENING = "我有一个计算机相关的问题，请用中文回答，什么是 "  # every baike question; what follows is its topic
NAMES = {"human": r"human|人类", "chatgpt": r"chat[\s-]*gpt|人工智能|机器"}  # what a reply may call the two
SPELLINGS = {"human": ("human", "Human", "人类"), "chatgpt": ("chatgpt", "ChatGPT", "人工智能", "机器")}


def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__.splitlines()[0])
    data.add_source_option(parser)
    parser.add_argument("--model", default="Qwen/Qwen1.5-1.8B-Chat", help="hub id or local folder of the chat model")
    data.add_hub_option(parser)
    parser.add_argument("--questions", type=data.number(int, 1), default=30, help="how many questions, two texts each")
    parser.add_argument("--ckpt", help="ask about the test texts of this checkpoint instead")
    parser.add_argument(
        "--method",
        choices=["generate", "logprob"],
        default="generate",
        help="read a reply, or compare the probabilities of the replies that name a class",
    )
    parser.add_argument(
        "--prior_correction",
        action="store_true",
        help="divide logprob's probabilities by their mean on "
        "validation texts, which takes out the model's liking for one word",
    )
    parser.add_argument("--max_new_tokens", type=data.number(int, 1), default=32, help="length of a reply at most")
    parser.add_argument("--batch_size", type=data.number(int, 1), default=8, help="prompts at a time")
    parser.add_argument("--replay", metavar="FILE", help="score this replies.jsonl, without a model")
    parser.add_argument("--output_dir", type=data.folder, default=Path("out/prompt"), help="folder for the results")
    args = parser.parse_args(argv)
    if args.prior_correction and args.method != "logprob":
        parser.error("--prior_correction needs --method logprob")
    return args


def question_examples(records, questions):
    """(test, validation) examples, both answers of each question: the published baseline's own split by questions.

    The test examples are those of the first `questions` questions of the 20 % test part (seed 233), the human answer
    before ChatGPT's; as many of the other part serve as validation. Records without both answers are left out.
    """
    import datasets  # its seeded permutation is the protocol

    pairs = [pair for record in records if len(pair := data.make_examples([record])[0]) == 2]
    if len(pairs) < 5:
        raise InputError(f"{len(pairs)} questions with both answers: at least 5 are needed")
    rows = datasets.Dataset.from_dict({"row": range(len(pairs))}).train_test_split(train_size=0.8, seed=data.SPLIT_SEED)
    first = [[pairs[row] for row in rows[part]["row"][:questions]] for part in ("test", "train")]
    return [[example for pair in part for example in pair] for part in first]


def parse_reply(reply):
    """The class that a reply names, or None where it names both or neither. Never raises.

    Case, width, punctuation and the sentence around the name do not matter; a negation is not understood.
    """
    plain = unicodedata.normalize("NFKC", reply).lower()
    named = [label for label, pattern in NAMES.items() if re.search(pattern, plain)]
    return named[0] if len(named) == 1 else None


class Prompt:
    """The chat prompt as token ids, by the tokenizer's own template; `end` is the token that ends a turn."""

    def __init__(self, tokenizer):
        mark = "\x00"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": mark}]
        try:
            chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            before, _, after = chat.partition(mark)
            self.end = tokenizer(after, add_special_tokens=False)["input_ids"][0]
        except Exception as error:  # none at all, or one that refuses these messages: each raises a type of its own
            reason = data.one_line(error)
            raise InputError(f"no usable chat template ({reason}): choose a chat model as --model") from None
        self.tokenizer = tokenizer
        self.before, self.after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))

    def ids(self, example):
        """Token ids of the question about one example. Special-token strings in its text stay text; a text that the
        model could not read is cut at its end."""
        topic = example["question"].removeprefix(BAIKE_OPENING)
        content = USER.format(topic=topic, text=example["text"])
        return [
            *self.before,
            *self.tokenizer(content, add_special_tokens=False, split_special_tokens=True, truncation=True)["input_ids"],
            *self.after,
        ]


@torch.inference_mode()
def generate(model, prompt, examples, batch_size, max_new_tokens):
    """Greedy replies, list of str, to batches of left-padded prompts."""
    tokenizer, replies = prompt.tokenizer, []
    tokenizer.padding_side = "left"
    for first in tqdm(range(0, len(examples), batch_size), "ask", unit=" batches"):
        ids = [prompt.ids(example) for example in examples[first : first + batch_size]]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
        output = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            eos_token_id=[prompt.end, tokenizer.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, batch["input_ids"].shape[1] :]
        replies += [reply.strip() for reply in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return replies


@torch.inference_mode()
def class_log_probabilities(model, prompt, examples):
    """Log-probability that the whole reply is a spelling of each class's name, float64 (n, classes).

    A reply's probability is the product over its tokens and the end of the turn. So long and short names compare
    without any normalisation by length, and the spellings of a class are disjoint events whose probabilities add.
    """
    data.register_packed_attention(model)
    spelled = [(k, word) for k, label in enumerate(data.LABELS) for word in SPELLINGS[label]]
    replies = [[*prompt.tokenizer(word, add_special_tokens=False)["input_ids"], prompt.end] for _, word in spelled]
    result = np.empty((len(examples), len(data.LABELS)))
    for row, example in enumerate(tqdm(examples, "ask", unit=" texts")):
        question = prompt.ids(example)
        batch = data.pack([question + reply[:-1] for reply in replies], model.device)
        ends = np.cumsum(batch["lengths"]) - 1
        hidden = model.base_model(**batch, use_cache=False).last_hidden_state[0]  # (T, hidden)
        scores = []
        for reply, end in zip(replies, ends, strict=True):  # the token at position p predicts the one at p + 1
            log_p = model.lm_head(hidden[end + 1 - len(reply) : end + 1]).float().log_softmax(-1)
            scores.append(log_p[torch.arange(len(reply)), reply].sum().item())
        for k in range(len(data.LABELS)):
            result[row, k] = np.logaddexp.reduce([s for s, (of, _) in zip(scores, spelled, strict=True) if of == k])
    return result


def read_replies(path):
    """(examples with a label, replies) of a replies.jsonl. Raises InputError."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
        label_of = {name: label for label, name in enumerate(data.LABELS)}
        return [{"label": label_of[line["label"]]} for line in lines], [line["reply"] + "" for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no replies.jsonl, with label, human or chatgpt, and reply a line ({data.one_line(error)})"
        ) from None


def report(examples, replies):
    """Print the published baseline's lines and the accuracy; a reply that names both classes or neither is wrong."""
    named = [parse_reply(reply) for reply in replies]
    right = [name == data.LABELS[example["label"]] for example, name in zip(examples, named, strict=True)]
    in_pairs = [example["label"] for example in examples] == [0, 1] * (len(examples) // 2)
    if in_pairs:
        print(f"测试集大小： {len(examples) // 2}*2")
        for i in range(0, len(examples), 2):
            print(f"Test NO.{i // 2}: response=[{replies[i]},{replies[i + 1]}] acc=({sum(right[: i + 2])}/{i + 2})")
    print(f"\nTest准确率：acc={sum(right) / len(right)}")
    print(f"{sum(right)} of {len(right)} right; {named.count(None)} replies name neither class, or both")


@data.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    if args.replay:
        examples, replies = read_replies(args.replay)
        if not examples:
            raise InputError(f"{args.replay} holds no replies")
        report(examples, replies)
        return
    if args.ckpt:
        run = evaluate.read_run(args.ckpt)
        if tuple(run["labels"]) != data.LABELS:
            raise InputError(
                f"{args.ckpt} tells {', '.join(run['labels'])} apart: the prompts ask for human or chatgpt"
            )
        examples, validation = (evaluate.parts_to_score(run, split=part)[0][1] for part in ("test", "validation"))
    else:
        examples, validation = question_examples(data.load_hc3(args.data), args.questions)
    device = PartialState().device
    if device.type == "cuda":
        data.check_gpu()
    folder = data.fetch_model(args.model, args.hub)
    tokenizer = data.load_tokenizer(folder)
    prompt = Prompt(tokenizer)
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    dtype = torch.bfloat16 if bf16 else torch.float16 if device.type == "cuda" else torch.float32
    model = data.load_model(transformers.AutoModelForCausalLM, folder, dtype).to(device).eval()

    log_p = None
    if args.method == "generate":
        replies = generate(model, prompt, examples, args.batch_size, args.max_new_tokens)
    else:
        log_p = class_log_probabilities(model, prompt, examples)
        if args.prior_correction:
            held_out = class_log_probabilities(model, prompt, validation)
            held_out -= np.logaddexp.reduce(held_out, axis=1, keepdims=True)
            log_p -= np.log(np.exp(held_out).mean(0))
        replies = [data.LABELS[k] for k in log_p.argmax(1)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "label": data.LABELS[example["label"]],
            "reply": reply,
            "question": example["question"],
            "text": example["text"],
        }
        for example, reply in zip(examples, replies, strict=True)
    ]
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    data.write_atomically(args.output_dir / "replies.jsonl", text)
    named = [parse_reply(reply) for reply in replies]
    data.save_predictions(args.output_dir / "predictions-prompt.jsonl", examples, data.LABELS, named, log_p)
    report(examples, replies)
    print(f"written to {args.output_dir}: replies.jsonl, predictions-prompt.jsonl")


if __name__ == "__main__":
    main()
