"""A checkpoint from a stranger: whatever its files say, no code of it runs, nothing is written, no network is asked.

Each row of the table is a booby trap: a field that can name a path, a module, a repository or a size. `evaluate.py`
either refuses the checkpoint in one line or ignores the field.
"""

import json
import shutil
import socket
import struct
import sys
import time

import huggingface_hub.constants
import pytest
from conftest import SAMPLE, TINY

import evaluate
import train

HUGE = 10**9
PAYLOAD = "open({!r}, 'w').close()"
TEMPLATE = "{{% for c in ().__class__.__base__.__subclasses__() %}}{{{{ c.__init__.__globals__ }}}}{{% endfor %}}{}"


def fields(**changes):
    """A change of a JSON file: these fields are set."""
    return lambda old, sprung: json.dumps(json.loads(old) | changes).encode()


def arguments(**changes):
    """A change of run.json's arguments."""
    return lambda old, sprung: json.dumps((run := json.loads(old)) | {"arguments": run["arguments"] | changes}).encode()


def header(change):
    """A change of the header of a safetensors file."""

    def changed(old, sprung):
        length = struct.unpack("<Q", old[:8])[0]
        text = json.dumps(change(json.loads(old[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(text)) + text + old[8 + length :]

    return changed


def giant(tensors):
    name = next(name for name in tensors if name != "__metadata__")
    return tensors | {name: tensors[name] | {"shape": [HUGE, HUGE]}}


MEGATRON = {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "payload"}
NOT_OURS = "that is not supported"  # our own words: without the package `kernels`, transformers would refuse as well
TRAPS = {  # kind of checkpoint, file, change, whether it must be refused (a str: with these words; None: it may be)
    "hub is a path": ("lora", "run.json", fields(hub="../../x"), True),
    "model is a folder without a model": ("lora", "run.json", fields(model="/"), True),
    "a huge rank": ("lora", "run.json", arguments(lora_r=HUGE), True),
    "a rank of another type": ("lora", "run.json", arguments(lora_r="payload"), True),
    "a target that is a pattern": ("lora", "run.json", arguments(lora_targets="(a+)+$"), True),
    "a target that names a module": ("lora", "run.json", arguments(lora_targets=["payload.x"]), True),
    "a huge max_length": ("lora", "run.json", fields(max_length=HUGE**4), False),
    "a protocol that is a path": ("lora", "run.json", fields(split={"protocol": "../x", "sha256": {}}), True),
    "more labels than the head has": ("lora", "run.json", fields(labels=[f"{i}" for i in range(9)]), True),
    "temperature that is a string": ("lora", "run.json", fields(temperature="payload"), True),
    "deeply nested": ("lora", "run.json", lambda old, sprung: b"[" * 100_000, True),
    "a module for Megatron": ("lora", "adapter_config.json", fields(**MEGATRON), False),
    "an adapter of another base": ("lora", "adapter_config.json", fields(base_model_name_or_path="evil/base"), False),
    "an adapter of another kind": ("lora", "adapter_config.json", fields(peft_type="payload"), False),
    "an adapter's code": ("lora", "adapter_config.json", fields(auto_mapping={"parent_library": "payload"}), False),
    "an adapter with a huge tensor": ("lora", "adapter_model.safetensors", header(giant), True),
    "an adapter's header size": ("lora", "adapter_model.safetensors", lambda old, _: b"\xff" * 7 + b"\x7f" + old, True),
    "a tokenizer's code": ("lora", "tokenizer_config.json",
     fields(auto_map={"AutoTokenizer": ["payload.X", None]}), False),
    "a tokenizer's class": ("lora", "tokenizer_config.json", fields(tokenizer_class="../payload"), None),
    "a tokenizer's file": ("lora", "tokenizer_config.json", fields(tokenizer_file="/etc/passwd"), None),
    "a tokenizer's name": ("lora", "tokenizer_config.json", fields(name_or_path="evil/tokenizer"), None),
    "a chat template": ("lora", "tokenizer_config.json", fields(chat_template=TEMPLATE.format("")), False),
    "a chat template's file": ("lora", "chat_template.jinja", lambda old, _: TEMPLATE.format("").encode(), False),
    "a model's code": ("full", "config.json", fields(auto_map={"AutoModel": "payload.X"}), NOT_OURS),
    "a kernel": ("full", "config.json", fields(attn_implementation="evil/kernel"), NOT_OURS),
    "a kernel, private": ("full", "config.json", fields(_attn_implementation="evil/kernel"), NOT_OURS),
    "a kernel, internal": ("full", "config.json", fields(_attn_implementation_internal="evil/kernel"), NOT_OURS),
    "a kernel for experts": ("full", "config.json", fields(_experts_implementation="evil/kernel"), NOT_OURS),
    "a nested kernel": ("full", "config.json", fields(text_config={"_attn_implementation": "evil/kernel"}), NOT_OURS),
    "a quantisation": ("full", "config.json", fields(quantization_config={"quant_method": "payload"}), NOT_OURS),
    "a module as model_type": ("full", "config.json", fields(model_type="payload"), True),
    "a module as architecture": ("full", "config.json", fields(architectures=["payload"]), False),
    "a huge hidden size": ("full", "config.json", fields(hidden_size=HUGE), True),
    "a huge vocabulary": ("full", "config.json", fields(vocab_size=HUGE), True),
    "a huge intermediate size": ("full", "config.json", fields(intermediate_size=HUGE), True),
    "very many layers": ("full", "config.json", fields(num_hidden_layers=HUGE, layer_types=None), NOT_OURS),
    "very many heads": ("full", "config.json", fields(num_attention_heads=HUGE), True),
    "another model's name": ("full", "config.json", fields(_name_or_path="evil/model"), False),
    "a model with a huge tensor": ("full", "model.safetensors", header(giant), True),
    "a config beside the adapter": ("lora", "config.json",
     lambda old, _: json.dumps({"model_type": "qwen2", "num_hidden_layers": HUGE}).encode(), True),
    "an adapter beside the model": ("full", "adapter_config.json",
     lambda old, _: json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil/base"}).encode(), True),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(lora_checkpoint, tmp_path_factory):
    full = tmp_path_factory.mktemp("trust") / "full"
    train.main(["--model", str(TINY), "--data", str(SAMPLE), "--output_dir", str(full), "--epochs", "1",
                "--batch_size", "60", "--max_length", "16"])  # fmt: skip
    return {"lora": lora_checkpoint, "full": full}


@pytest.mark.parametrize("trap", TRAPS)
def test_booby_trap_is_refused_or_ignored(trap, checkpoints, tmp_path, monkeypatch, capsys):
    kind, name, change, refused = TRAPS[trap]
    copy, sprung, asked = tmp_path / "work" / "ckpt", tmp_path / "sprung", []
    shutil.copytree(checkpoints[kind], copy)
    path = copy / name
    path.write_bytes(change(path.read_bytes() if path.exists() else b"{}", sprung))
    for module in ("payload.py", "modeling_payload.py", "X.py"):
        (copy / module).write_text(PAYLOAD.format(str(sprung)), encoding="utf-8")

    def connect(*arguments):
        asked.append(arguments)
        raise OSError("no network in this test")

    for function in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, function, connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # so that a request would be made
    monkeypatch.setattr(sys, "path", [str(copy), *sys.path])  # even so nothing imports it
    monkeypatch.chdir(copy)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    capsys.readouterr()
    started, code = time.monotonic(), 0
    try:
        evaluate.main(["--ckpt", str(copy), "--text", "一"])
    except SystemExit as stopped:
        code = stopped.code
    assert time.monotonic() - started < 60, "a thousand million layers would take hours"
    printed = capsys.readouterr()
    assert code in ((2,) if refused else (0, 2) if refused is None else (0,)), printed.err
    assert not isinstance(refused, str) or refused in printed.err
    assert "Traceback" not in printed.err and (not code or printed.err.startswith("error: "))
    assert not sprung.exists() and "payload" not in sys.modules
    assert asked == []
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
