"""A local substitute for the Hub, with the part of the protocol that huggingface_hub needs to upload a model.

    with FakeHub() as hub:
        subprocess.run(..., env=os.environ | hub.environment)
    hub.files["me/model"]["config.json"]  # bytes

`talk_to(url, monkeypatch)` connects the client of this process to the server.

The server creates repositories and separates large files from small files. It accepts large files by the LFS protocol,
with a check of their SHA-256, and small files in commits. It serves all uploaded files.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub

TOKEN = "hf_" + "x" * 20


def talk_to(url: str, monkeypatch) -> None:
    """Connects huggingface_hub's client in this process to a server; FakeHub.environment is for a new process."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)  # used by the library's functions
    monkeypatch.setenv("HF_TOKEN", TOKEN)


class FakeHub:
    """A server in this process.

    Attributes:
        files: {repository: {path: bytes}}.
        private: {repository: bool}.
        requests: all requests, in order.
    """

    def __enter__(self) -> "FakeHub":
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that connect a process's client to this server."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict | bytes, dict]:
        """Returns status, content and headers of the answer."""
        self.requests.append(f"{method} {path}")
        for pattern, reply in (
            (r"GET /api/whoami-v2", self._who_am_i),
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", lambda body: (200, {"errors": [], "warnings": []}, {})),
            (r"POST /api/models/([\w./-]+)/preupload/main", self._preupload),
            (r"POST /([\w./-]+)\.git/info/lfs/objects/batch", self._large_file_batch),
            (r"PUT /large/(\w+)", self._take_large_file),
            (r"POST /api/models/([\w./-]+)/commit/main", self._commit),
            (r"GET /api/models/([\w./-]+)/tree/main", self._list),
            (r"(?:GET|HEAD) /([\w-]+/[\w-]+)/resolve/main/(.+)", self._serve),
        ):
            if match := re.fullmatch(pattern, f"{method} {path}"):
                return reply(*match.groups(), body=body)
        return 404, {"error": f"{method} {path} is not part of this stand-in"}, {}

    def _who_am_i(self, body):
        return 200, {"type": "user", "name": "me", "orgs": []}, {}

    def _create(self, body):
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.files:
            return 409, {"error": "it exists", "url": f"{self.url}/{repo}"}, {}
        self.files[repo], self.private[repo] = {}, asked.get("visibility") == "private"
        return 200, {"url": f"{self.url}/{repo}", "id": repo}, {}

    def _preupload(self, repo, body):
        def mode(file):
            return "lfs" if file["path"].endswith((".safetensors", ".png", ".bin")) else "regular"

        files = json.loads(body)["files"]
        return 200, {"files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in files]}, {}

    def _large_file_batch(self, repo, body):
        objects = []
        for file in json.loads(body)["objects"]:
            upload = {"href": f"{self.url}/large/{file['oid']}", "header": {}}
            objects.append(file | {"authenticated": True, "actions": {"upload": upload}})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _take_large_file(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the content has another SHA-256"}, {}
        self.large_files[oid] = body
        return 200, {}, {}

    def _commit(self, repo, body):
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.large_files[value["oid"]]
            elif item["key"] == "deletedFile":
                del self.files[repo][value["path"]]
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}"}, {}

    def _list(self, repo, body):
        files = self.files[repo].items()
        return 200, [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files], {}

    def _serve(self, repo, path, body):
        if path not in self.files.get(repo, {}):
            return 404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"}
        content = self.files[repo][path]
        tag = hashlib.sha256(content).hexdigest()
        return 200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": "0" * 40}


def _handler_for(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self):
            status, content, headers = hub.answer(self.command, self.path.partition("?")[0], self._body())
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (
                headers | {"Content-Length": str(len(data)), "Content-Type": "application/json"}
            ).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_HEAD = do_POST = do_PUT = _reply

        def log_message(self, *_):
            pass

    return Handler
