"""`transformers serve` on a folder, started as docs/ecosystem.md says: it loads the model and completes a prompt."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
PROMPT = "one , two , three ,"


@pytest.fixture
def server(folders, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "examples" / "serve.py", "serve", folders["saved"], "--port", port]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([*map(str, command), "--device", "cpu"], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.time() + 300
        while not is_up(port):
            assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def is_up(port) -> bool:
    try:
        return urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def post(port, path, **body) -> dict:
    request = urllib.request.Request(
        f"http://localhost:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=120).read())


def test_a_prompt_is_completed(server, folders):
    answer = post(server, "/v1/completions", model=str(folders["saved"]), prompt=PROMPT, max_tokens=5, temperature=0)
    tokenizer = AutoTokenizer.from_pretrained(folders["saved"])
    model = AutoModelForCausalLM.from_pretrained(folders["saved"]).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer["choices"][0]["text"].split() == tokenizer.decode(tokens, skip_special_tokens=True).split()
