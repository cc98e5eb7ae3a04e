"""Uploads that the Hub refuses or that break, against a local substitute for the Hub."""

import json
import threading

import huggingface_hub
import pytest
from bad_inputs import Case, judge
from fake_hub import FakeHub, talk_to

from moe_hf import hub_errors

LOGIN = "hf auth login"
COMMIT, CREATE, WHO = "POST /api/models/me/model/commit/main", "POST /api/repos/create", "GET /api/whoami-v2"
LFS, PUT = "POST /me/model.git/info/lfs/objects/batch", "PUT /large/"


class RefusingHub(FakeHub):
    """Answers requests that start with a key of `refusals` by its value: a status, or None for no answer at all."""

    def __init__(self, refusals: dict, user: dict):
        self.refusals, self.user = refusals, user

    def __enter__(self):
        super().__enter__()
        self.server.handle_error = lambda *request: None  # a client whose time limit has passed is gone
        return self

    def answer(self, method, path, body):
        self.requests = [*getattr(self, "requests", []), f"{method} {path}"]
        for begin, status in self.refusals.items():
            if f"{method} {path}".startswith(begin):
                if status is None:
                    threading.Event().wait(3)
                return status or 500, {"error": "told to refuse"}, {}
        if method == "GET" and path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": [{"name": "team"}]} | self.user, {}
        return super().answer(method, path, body)


def push(repo="me/model", **options):
    """The arguments of a push of a whole model; `damaged`: of one that cannot be loaded."""

    def command(place):
        return ["push", place.lm("trained"), repo, *(word for pair in options.items() for word in pair)]

    return command


def train(**changes):
    return lambda place: ["train-lm", place.lm_config(push_to_hub=True, **changes)]


def nothing_made(hub):
    return None if not hub.files else f"repositories were made: {sorted(hub.files)}"


def not_loaded(hub):
    """The refusal comes before the export, and before anything is made."""
    late = [request for request in hub.requests if not request.startswith("GET ")]
    return f"asked: {late}" if late else nothing_made(hub)


# Name, command, refusals of the Hub, expected words, and further arguments of the case.
REFUSALS = [
    ("nobody is logged in", push(), {}, ("repo='me/model'", "nobody is logged in", LOGIN), {"token": None}),
    ("an unknown token", push(), {WHO: 401}, ("repo='me/model'", LOGIN), {}),
    ("a token without the right to ask", push(), {WHO: 403}, ("repo='me/model'", "may not"), {}),
    ("no such namespace", push("nobody/model"), {}, ("repo='nobody/model'", "'nobody'", "me", "team"), {}),
    (
        "a token that may only read",
        push(),
        {},
        ("repo='me/model'", "role 'write'"),
        {"user": {"auth": {"accessToken": {"role": "read"}}}},
    ),
    ("too many requests", push(), {WHO: 429}, ("repo='me/model'", "try again"), {}),
    ("an error of the server", push(), {WHO: 500}, ("repo='me/model'", "500", "try again later"), {}),
    ("a server in maintenance", push(), {WHO: 503}, ("repo='me/model'", "503", "try again later"), {}),
    ("no answer", push(), {WHO: None}, ("repo='me/model'", "does not answer"), {"patience": 0.5}),
    ("no server", push(), {}, ("repo='me/model'", "does not answer", "network"), {"url": "http://127.0.0.1:9"}),
    ("no permission to make it", push(), {CREATE: 403}, ("repo='me/model'", "may not"), {"is_early": False}),
    ("no namespace to make it in", push(), {CREATE: 404}, ("repo='me/model'", "does not exist"), {"is_early": False}),
    ("the server breaks when it is made", push(), {CREATE: 500}, ("repo='me/model'", "500"), {"is_early": False}),
    ("large files refused", push(), {LFS: 403}, ("repo='me/model'", "may not"), {"is_early": False}),
    ("an upload that breaks", push(), {PUT: 400}, ("repo='me/model'", "400"), {"is_early": False}),
    ("an upload too large", push(), {PUT: 413}, ("repo='me/model'", "max_shard_size"), {"is_early": False}),
    ("a commit refused", push(), {COMMIT: 403}, ("repo='me/model'", "may not"), {"is_early": False}),
    ("a commit that breaks", push(), {COMMIT: 500}, ("repo='me/model'", "500"), {"is_early": False}),
    ("training: nobody is logged in", train(hub_model_id="me/model"), {}, ("hub_model_id", LOGIN), {"token": None}),
    ("training: an unknown token", train(hub_model_id="me/model"), {WHO: 401}, ("hub_model_id", LOGIN), {}),
    ("training: another's namespace", train(hub_model_id="you/model"), {}, ("hub_model_id='you/model'", "me"), {}),
    ("training: no name", train(hub_model_id="a/b/c"), {}, ("hub_model_id='a/b/c'",), {}),
    ("training: no server", train(), {}, ("hub_model_id='run'", "answer"), {"url": "http://127.0.0.1:9"}),
]
BAD_NAMES = ("a/b/c", "", "a b", "x-", "a..b", "me/", "/model", "me/x.git", "me/" + "n" * 97, "me/mödel")
NAMES = [
    Case(f"{name!r}{' dry' if options else ''}", push(name, **options), (f"repo={name!r}",))
    for name in BAD_NAMES
    for options in ({}, {"--dry-run": "/nowhere/out"})
]
NAMES += [
    Case(
        f"offline: {what}",
        lambda place, what=what, more=more: [what, "someone/model", *more],
        ("someone/model",),
    )
    for what, more in {
        "evaluate": ["text.txt"],
        "evaluate-lm": ["text.txt"],
        "evaluate-translation": ["text.txt", "text.txt"],
        "report": ["text.txt"],
        "translate": ["text.txt"],
        "upcycle": ["out", "--num_experts", 4],
        "prune": ["text.txt", "out", "--keep", 2],
    }.items()
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case[0])
def test_a_refusal_is_one_line(case, tmp_path, monkeypatch):
    name, command, refusals, words, more = case
    with RefusingHub(refusals, more.get("user", {})) as hub:
        url = more.get("url", hub.url)
        talk_to(url, monkeypatch)
        if "token" in more:
            monkeypatch.setattr(huggingface_hub.hf_api, "get_token", lambda: None)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(hub_errors, "PATIENCE", more.get("patience", 30))
        verdict = judge(Case(name, command, words), tmp_path)
        assert not verdict.fault, f"{verdict.fault}: {verdict.why}"
        problem = not_loaded(hub) if more.get("is_early", True) else None
        assert problem is None, problem
        assert not any("config.json" in files for files in hub.files.values()), json.dumps(hub.requests)


@pytest.mark.parametrize("case", NAMES, ids=lambda case: case.name)
def test_a_name_is_refused_without_the_hub(case, tmp_path):
    verdict = judge(case, tmp_path)
    assert not verdict.fault, f"{verdict.fault}: {verdict.why}"
