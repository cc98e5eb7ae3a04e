"""`transformers serve` and `chat` on a folder with its model code, started as in docs/integrations.md."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "one , two , three ,"
LAST_MESSAGE = "{{ messages[-1]['content'] }}"
# The chat uses a client that refuses to contact even the local server in offline mode.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "transformers.cli.transformers", *map(str, arguments)]


@pytest.fixture(scope="module")
def folder(folders, tmp_path_factory):
    folder = shutil.copytree(folders["exported"], tmp_path_factory.mktemp("served") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = LAST_MESSAGE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command("serve", folder, "--port", port, "--device", "cpu", "--trust-remote-code"),
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.time() + 300
        while not is_up(f"http://localhost:{port}"):
            assert process.poll() is None and time.time() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def is_up(address) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def post(url, **body) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=120).read())["choices"][0]


@pytest.fixture(scope="module")
def expected(folder):
    """The model's own continuation of the words."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    words = tokenizer.decode(tokens, skip_special_tokens=True).split()
    assert len(set(words)) > 1
    return words


def test_a_prompt_is_completed(address, folder, expected):
    answer = post(f"{address}/v1/completions", model=str(folder), prompt=PROMPT, max_tokens=5, temperature=0)
    assert answer["text"].split() == expected


def test_a_message_is_completed_if_the_tokenizer_has_a_chat_template(address, folder, expected):
    messages = [{"role": "user", "content": "no"}, {"role": "user", "content": PROMPT}]
    answer = post(f"{address}/v1/chat/completions", model=str(folder), messages=messages, max_tokens=5, temperature=0)
    assert answer["message"]["content"].split() == expected


def test_the_chat_shows_the_answer(address, folder, expected):  # and asks whether to go on after five tokens
    chat = subprocess.run(
        command("chat", folder, address, "do_sample=False", "max_new_tokens=5"),
        input=f"{PROMPT}\nn\n!exit\n", env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert chat.returncode == 0, chat.stderr[-3000:]
    assert " ".join(expected) in " ".join(chat.stdout.split())
