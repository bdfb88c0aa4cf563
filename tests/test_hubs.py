"""Downloads through the real hub clients, from two small servers on this machine that misbehave on demand.

Whatever a hub does, `fetch_subset` and `fetch_model` must end, in bounded time, with the right file or with one line
that says what to do; nothing half-received may be taken for the file by a later run; what is cached needs no hub.
"""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import ROOT, SAMPLE, TINY
from safetensors.torch import load_file, save

import data

ALWAYS = 1000
BOUND = 20  # seconds a call may take, with the patience below
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATIENCE = {  # a test waits one second where a user waits ten or sixty, and ModelScope's client retries less often
    "MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS": "1",
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "1",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1",
    "HF_HUB_ETAG_TIMEOUT": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "1",
}

# The clients read their endpoints and timeouts when they are imported, and importing takes seconds: so one fresh
# process serves all calls. A line of JSON in, a line out: what the call returned or raised, printed, and its seconds.
CALLER = """
import contextlib, io, json, os, sys, threading, time
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
sys.path.insert(0, sys.argv[1])
import data

def load(name, hub):
    folder = data.fetch_model(name, hub)
    data.load_classifier(folder, data.load_tokenizer(folder), data.LABELS, new_head=0)
    return folder

def call(function, arguments, answer):
    printed, errors, start = io.StringIO(), io.StringIO(), time.monotonic()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            answer["returned"] = {**vars(data), "load": load}[function](*arguments)
    except BaseException as error:
        answer |= {"raised": type(error).__name__, "message": str(error)}
    answer |= {"printed": printed.getvalue(), "errors": errors.getvalue(), "seconds": time.monotonic() - start}

for line in sys.stdin:
    request, answer = json.loads(line), {}
    thread = threading.Thread(target=call, args=(request["function"], request["arguments"], answer), daemon=True)
    thread.start()
    thread.join(request["bound"])
    print(json.dumps({} if thread.is_alive() else answer, default=str), file=answers, flush=True)
os._exit(0)  # a call that hangs must not keep the process
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """What the two clients ask: a listing of a repository, or one file of it."""

    def do_GET(self):
        hub, url = self.server.hub, urlsplit(self.path)
        query = parse_qs(url.query)
        hub.requests.append(f"{self.command} {self.path}")
        if url.path.endswith(("/internalAccelerationInfo", "/agent-harnesses")):  # before the first real request
            return self.reply(b"{}")
        name = url.path.split("/resolve/")[-1].partition("/")[2] if "/resolve/" in url.path else ""
        name = query.get("FilePath", [name])[0]
        fault = hub.fault_at(name or "listing")
        if fault == "silent":
            time.sleep(2 * BOUND)
        elif fault == "login page":
            self.reply(b"<html>Please log in to this network</html>")
        elif fault == "500":
            self.reply(b'{"Code": 1, "Message": "overloaded", "Success": false}', 500)
        elif fault == "404":
            code = "EntryNotFound" if hub.fault[1] != "all" else "RepoNotFound"
            self.reply(b'{"Code": 1, "Message": "not found", "Success": false}', 404, X_Error_Code=code)
        elif name:
            self.reply_file(name, fault)
        else:
            listing = {n: b for n, b in hub.files.items() if fault != "unlisted"}
            self.reply(json.dumps(hub.list(url.path, listing)).encode())

    do_HEAD = do_GET

    def reply_file(self, name, fault):
        body = self.server.hub.files.get(name)
        if body is None:
            return self.reply(b"no such file", 404, X_Error_Code="EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
        if fault == "wrong bytes":
            body = bytes([body[0] ^ 1]) + body[1:]
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        sent = body[start : (start + len(body)) // 2] if fault == "truncated" else body[start:]
        self.reply(sent, 206 if start else 200, length=len(body) - start, **headers)

    def reply(self, body, status=200, length=None, **headers):
        self.send_response(status)
        for name, value in {"Content_Length": str(length or len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(OSError):  # a client may hang up
                self.wfile.write(body)

    def log_message(self, *args):
        pass


class Hub:
    """A hub on a port of its own. `fault`: None, "down", or (what, where, how often) with where a file's name,
    "listing", "file" for any file, or "all"."""

    def __init__(self):
        self.port, self.server, self.files = 0, None, {}
        self.set()

    def set(self, fault=None):
        self.fault, self.left, self.requests = fault, fault[2] if isinstance(fault, tuple) else 0, []
        if fault == "down" and self.server:
            self.server.shutdown()
            self.server.server_close()  # nothing listens: connections are refused
            self.server = None
        elif fault != "down" and not self.server:
            self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
            self.server.hub, self.port = self, self.server.server_port
            threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def fault_at(self, place):
        what, where, _ = self.fault or (None, None, 0)
        hit = where in ("all", place) or (where == "file" and place != "listing")
        if not (hit and self.left) or (what == "truncated" and place == "listing"):
            return None
        self.left -= 1
        return what


class ModelScope(Hub):
    def list(self, path, files):
        rows = [
            {"Path": n, "Name": n, "Type": "blob", "Size": len(b), "Sha256": hashlib.sha256(b).hexdigest()}
            for n, b in files.items()
        ]
        return {"Code": 200, "Success": True, "Data": {"Files": rows}}


class HuggingFace(Hub):
    def list(self, path, files):
        if "/tree/" in path:
            return [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files.items()]
        lfs = {n: {"size": len(b), "sha256": hashlib.sha256(b).hexdigest(), "pointerSize": 1} for n, b in files.items()}
        siblings = [{"rfilename": n, "size": len(b), "lfs": lfs[n]} for n, b in files.items()]
        return {"id": "o/n", "sha": COMMIT, "tags": [], "siblings": siblings}


class Hubs:
    """Both hubs, and the process that calls our functions with the real clients pointed at them."""

    def __init__(self, folder):
        self.modelscope, self.huggingface, self.folder = ModelScope(), HuggingFace(), folder
        foreign = ("HF_", "HUGGINGFACE_", "MODELSCOPE_", "TRANSFORMERS_")  # settings of whoever runs the tests
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        env |= {
            "MODELSCOPE_ENDPOINT": f"http://127.0.0.1:{self.modelscope.port}",
            "HF_ENDPOINT": f"http://127.0.0.1:{self.huggingface.port}",
            "NO_PROXY": "127.0.0.1",
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder),
            "HF_HOME": str(folder / "huggingface"),
            "MODELSCOPE_CACHE": str(folder / "modelscope"),
            "MODELSCOPE_HOME": str(folder / "modelscope-home"),
        }
        self.table = []  # of each call, by the case that made it: written when the tests are through
        self.environment = env | PATIENCE
        self.process = subprocess.Popen(
            [sys.executable, "-c", CALLER, str(ROOT)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(folder / "stderr.txt", "wb"),
            text=True,
            encoding="utf-8",
        )

    def set(self, modelscope=None, huggingface=None):
        self.modelscope.set(modelscope)
        self.huggingface.set(huggingface)

    def clear(self):
        """Empty both clients' caches."""
        for name in ("huggingface", "modelscope"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def call(self, function, *arguments):
        request = {"function": function, "arguments": arguments, "bound": BOUND}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, (self.folder / "stderr.txt").read_text(encoding="utf-8")
        answer = json.loads(line)
        print(function, *arguments, answer)  # pytest shows it where a test fails
        assert "seconds" in answer, f"no result after {BOUND} s"
        case = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].removesuffix(" (call)")
        outcome = answer.get("message") or Path(answer.get("returned") or "printed").name
        self.table.append(f"| {case} | {' '.join(outcome.split())} | {answer['seconds']:.2f} |")
        return answer

    def requests(self):
        return self.modelscope.requests + self.huggingface.requests


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    hubs = Hubs(tmp_path_factory.mktemp("hubs"))
    yield hubs
    text = "\n".join(["| case | outcome | seconds |", "|---|---|---|", *hubs.table, ""])
    (tmp_path_factory.getbasetemp() / "hub_faults.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    hubs.process.stdin.close()
    hubs.process.wait(10)
    hubs.set("down", "down")


# ---- the data file -------------------------------------------------------------------------------

# The same records, but one byte more on Hugging Face: the file tells where it came from.
MODELSCOPE = SAMPLE.read_bytes()
HUGGINGFACE = MODELSCOPE + b"\n"

DATA_CASES = {  # what ModelScope does, what Hugging Face does, the file that must arrive (None: the one line)
    "ModelScope gives it": (None, None, MODELSCOPE),
    "ModelScope is down": ("down", None, HUGGINGFACE),
    "ModelScope lacks the repository": (("404", "all", ALWAYS), None, HUGGINGFACE),
    "ModelScope does not list the file": (("unlisted", "listing", ALWAYS), None, HUGGINGFACE),
    "ModelScope lists the file but lacks it": (("404", "file", ALWAYS), None, HUGGINGFACE),
    "ModelScope fails once": (("500", "file", 1), "down", MODELSCOPE),
    "ModelScope fails always": (("500", "all", ALWAYS), None, HUGGINGFACE),
    "ModelScope fails at the file": (("500", "file", ALWAYS), None, HUGGINGFACE),
    "ModelScope breaks off once": (("truncated", "file", 1), "down", MODELSCOPE),
    "ModelScope breaks off always": (("truncated", "file", ALWAYS), None, HUGGINGFACE),
    "ModelScope sends wrong bytes once": (("wrong bytes", "file", 1), "down", MODELSCOPE),
    "ModelScope sends wrong bytes always": (("wrong bytes", "file", ALWAYS), None, HUGGINGFACE),
    "ModelScope does not answer": (("silent", "all", ALWAYS), None, HUGGINGFACE),
    "ModelScope's file does not come": (("silent", "file", ALWAYS), None, HUGGINGFACE),
    "a login page instead of ModelScope": (("login page", "all", ALWAYS), None, HUGGINGFACE),
    "Hugging Face fails once": ("down", ("500", "all", 1), HUGGINGFACE),
    "Hugging Face breaks off once": ("down", ("truncated", "file", 1), HUGGINGFACE),
    "both are down": ("down", "down", None),
    "both lack the repository": (("404", "all", ALWAYS), ("404", "all", ALWAYS), None),
    "both lack the file": (("unlisted", "listing", ALWAYS), ("404", "file", ALWAYS), None),
    "neither answers": (("silent", "all", ALWAYS), ("silent", "all", ALWAYS), None),
    "both break off always": (("truncated", "file", ALWAYS), ("truncated", "file", ALWAYS), None),
    "login pages instead of both": (("login page", "all", ALWAYS), ("login page", "all", ALWAYS), None),
}


@pytest.mark.parametrize("case", DATA_CASES)
def test_data_file(case, hubs):
    hubs.clear()
    modelscope, huggingface, expected = DATA_CASES[case]
    hubs.modelscope.files, hubs.huggingface.files = {"baike.jsonl": MODELSCOPE}, {"baike.jsonl": HUGGINGFACE}
    hubs.set(modelscope, huggingface)
    answer = hubs.call("fetch_subset", "baike", "modelscope")
    if expected is None:
        assert answer["raised"] == "InputError"
        for words in ("baike.jsonl", "modelscope: ", "huggingface: ", "pass its path as --data"):
            assert words in answer["message"]
        assert "\n" not in answer["message"] and len(answer["message"]) < 330
        hubs.set()  # the next run, with both hubs well again, is not held up by what the first one left
        answer, expected = hubs.call("fetch_subset", "baike", "modelscope"), MODELSCOPE
    path = Path(answer["returned"])
    assert hubs.folder in path.parents and path.name == "baike.jsonl"
    assert path.read_bytes() == expected

    hubs.set("down", "down")  # what is cached needs no hub
    assert hubs.call("fetch_subset", "baike", "modelscope")["returned"] == answer["returned"]


def test_data_script(hubs):
    """What the user of the script sees, with no hub and with one."""
    hubs.clear()
    arguments = ["--data", "baike", "--model", str(TINY)]
    hubs.modelscope.files = {"baike.jsonl": MODELSCOPE}
    hubs.set("down", "down")
    answer = hubs.call("main", arguments)
    assert (answer["raised"], answer["message"], answer["printed"]) == ("SystemExit", "2", "")
    assert answer["errors"].splitlines()[-1].startswith("error: cannot download")  # the clients show progress above it
    hubs.set(None, "down")
    answer = hubs.call("main", arguments)
    assert f"num_rows: {2 * len(MODELSCOPE.splitlines())}" in answer["printed"]


# ---- a model -------------------------------------------------------------------------------------

MODEL = {path.name: path.read_bytes() for path in TINY.iterdir() if path.suffix in (".json", ".safetensors")}
MODEL |= {"chat_template.jinja": b"{{ messages }}"}  # the only place where transformers 5 saves a chat template
UNWANTED = {"modeling_tiny.py": b"raise SystemExit", "pytorch_model.bin": b"pickled", "README.md": b"read me"}
OTHER = {"huggingface": "modelscope", "modelscope": "huggingface"}


def call_model(hubs, hub, repository, fault=None, function="fetch_model"):
    """Call a function while `hub` has `fault` and the other one, which must not be asked, is down."""
    for each in OTHER:
        getattr(hubs, each).files = MODEL | UNWANTED
        getattr(hubs, each).set(fault if each == hub else "down")
    return hubs.call(function, f"somebody/{repository}", hub)


def assert_whole(answer, folder):
    """`answer` is a folder below `folder` with every file of the model as the hub has it, and none with code."""
    assert folder in Path(answer["returned"]).parents
    assert {path.name: path.read_bytes() for path in Path(answer["returned"]).iterdir() if path.is_file()} == MODEL


def assert_one_line(answer, hub):
    assert answer["raised"] == "HubError" or answer["raised"] == "InputError"
    assert f"--hub {OTHER[hub]}" in answer["message"] and "\n" not in answer["message"]


@pytest.mark.parametrize("hub", OTHER)
def test_model_is_fetched_once(hub, hubs):
    answer = call_model(hubs, hub, "whole")
    assert_whole(answer, hubs.folder)
    again = call_model(hubs, hub, "whole")
    assert again["returned"] == answer["returned"]
    assert not [request for request in hubs.requests() if "model.safetensors" in request and "GET" in request]
    assert call_model(hubs, hub, "whole", "down")["returned"] == answer["returned"]
    data.load_tokenizer(answer["returned"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("hub", OTHER)
def test_interrupted_model_is_completed(hub, name, hubs):
    """One file did not come: without a network a line names it, and with one the next call fetches what is missing."""
    repository = f"without-{name}"
    assert_one_line(call_model(hubs, hub, repository, ("404", name, ALWAYS)), hub)
    offline = call_model(hubs, hub, repository, "down", function="load")
    assert offline["raised"] in ("InputError", "HubError") and name in offline["message"]
    assert_whole(call_model(hubs, hub, repository), hubs.folder)


@pytest.mark.parametrize("lacks", ["tokenizer.json", "model-00002-of-00002.safetensors"])
def test_cache_of_another_program_is_completed(lacks, hubs):
    """Hugging Face's cache with config and weights but no tokenizer, or with one shard of two, as others leave it."""
    repository, shards = f"other-program-{len(lacks)}", split_weights()
    hubs.huggingface.files, hubs.modelscope.files = shards, {}
    hubs.set(None, None)
    program = "import sys, huggingface_hub as h\nfor f in sys.argv[2:]: h.hf_hub_download(sys.argv[1], f)"
    files = [name for name in shards if name != lacks and not (lacks == "tokenizer.json" and "token" in name)]
    command = [sys.executable, "-c", program, f"somebody/{repository}", *files]
    subprocess.run(command, env=hubs.environment, check=True, capture_output=True)
    hubs.set("down", "down")
    offline = hubs.call("load", f"somebody/{repository}", "huggingface")
    assert offline["raised"] in ("InputError", "HubError") and lacks in offline["message"]
    hubs.set()
    folder = Path(hubs.call("load", f"somebody/{repository}", "huggingface")["returned"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == shards


def split_weights():
    """The model's files with its weights in two shards."""
    tensors = load_file(TINY / "model.safetensors")
    names = sorted(tensors)
    halves = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    files = {name: content for name, content in MODEL.items() if name != "model.safetensors"}
    files |= {name: save({key: tensors[key] for key in keys}, {"format": "pt"}) for name, keys in halves.items()}
    weight_map = {key: name for name, keys in halves.items() for key in keys}
    return files | {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


MODEL_FAULTS = {
    "is down": "down",
    "lacks it": ("404", "all", ALWAYS),
    "fails always": ("500", "all", ALWAYS),
    "breaks off": ("truncated", "model.safetensors", ALWAYS),
    "does not answer": ("silent", "all", ALWAYS),
    "is a login page": ("login page", "all", ALWAYS),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
@pytest.mark.parametrize("hub", OTHER)
def test_model_cannot_be_fetched(hub, fault, hubs):
    repository = fault.replace(" ", "-")
    assert_one_line(call_model(hubs, hub, repository, MODEL_FAULTS[fault]), hub)
    assert_whole(call_model(hubs, hub, repository), hubs.folder)
