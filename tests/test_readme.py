"""The two READMEs show the same commands, the commands exist, and what is linked is there."""

import re
import shlex

import pytest
from conftest import ROOT, TINY

import data
import evaluate
import prompt_baseline
import train

READMES = [path.name for path in (ROOT / "README.md", ROOT / "README.zh-CN.md")]
SCRIPTS = {"data": data, "train": train, "evaluate": evaluate, "prompt_baseline": prompt_baseline}
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in READMES}
TEXTS |= {name: script.__doc__ for name, script in SCRIPTS.items()}


def blocks(text):
    return re.findall(r"^```(.*?)^```$", text, re.M | re.S)


def commands(text):
    """(script, arguments) of each command of ours in a text: in a block, in `code` or in an indented line."""
    code = [line for block in blocks(text) for line in block.split("\n")]
    code += re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    (.*)$", text, re.M)
    for line in code:
        for command in re.split(r" && |; ", line.split("  #")[0]):
            if found := re.search(
                r"(?:python|launch|torchrun)\b.*?\b(data|train|evaluate|prompt_baseline)\.py( .*)?$", command
            ):
                yield found[1], shlex.split((found[2] or "").replace("$D", "baike").replace("$A", ""))


def test_same_commands_in_both_languages():
    english, chinese = (
        [re.sub(r" +# .*$", "", block, flags=re.M) for block in blocks(TEXTS[name])] for name in READMES
    )
    assert english == chinese and len(english) >= 10  # comments may be translated
    assert sorted(commands(TEXTS[READMES[0]])) == sorted(commands(TEXTS[READMES[1]]))


@pytest.mark.parametrize("name", TEXTS)
def test_commands_have_options_that_exist(name):
    found = list(commands(TEXTS[name]))
    assert len(found) >= 2
    for script, arguments in found:  # parse_args exits where an option is unknown, or its value is none
        SCRIPTS[script].parse_args([word for word in arguments if word != "$OPTIONS"])


@pytest.mark.parametrize("name", READMES)
def test_links_and_pictures_exist(name):
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]) if "://" not in target]
    assert any(target.endswith(".png") for target in targets)
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_snippet_gives_our_labels(lora_checkpoint, tmp_path, capsys):
    """What README tells other programs to pass: the merged model's pipeline, and the adapter on its base."""
    merged, text = tmp_path / "merged", "总之，建议您咨询专业人士。"
    evaluate.main(["--ckpt", str(lora_checkpoint), "--merge", str(merged)])
    [snippet] = re.findall(r"^```python\n(import json.*?)^```$", TEXTS["README.md"], re.M | re.S)
    snippet = snippet.replace('pipeline("text', 'answer = pipeline("text').replace("out/merged", str(merged))
    names = {}
    exec(snippet.replace("out/demo", str(lora_checkpoint)).replace("tests/tiny-qwen", str(TINY)), names)
    run = evaluate.read_run(lora_checkpoint)
    ours, tokenizer = evaluate.load_checkpoint(lora_checkpoint, run)
    expected = evaluate.predict(ours, data.tokenize(tokenizer, [text])[0])
    assert names["answer"][0]["label"] == run["labels"][expected.argmax()]
    assert names["answer"][0]["score"] == pytest.approx(evaluate.softmax(expected).max(), abs=1e-5)
    logits = names["model"].eval()(**names["tokenizer"](text, return_tensors="pt")).logits.detach().numpy()
    assert logits == pytest.approx(expected, abs=1e-5)
    assert names["model"].config.id2label == {0: "human", 1: "chatgpt"}
