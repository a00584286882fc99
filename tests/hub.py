"""A Hub of our own: as much of its HTTP API as downloads, uploads and pull requests need, over a state that tests can read and break."""

import base64
import fnmatch
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest

from tests.hub_state import LARGE, Hub, Repo, Request, blob, sha256


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Let `hub` answer on a port of this machine."""
    listener = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def variables(hub: Hub, environment: dict[str, str], home: Path) -> dict[str, str]:
    """Return `environment` of somebody whose Hub is `hub` and who has never used one before."""
    clean = {key: value for key, value in environment.items() if not key.startswith(("HF_", "HUGGING")) and not key.lower().endswith("_proxy")}
    return {**clean, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def answering(endpoint: str, home: Path) -> Iterator[None]:
    """Tell huggingface_hub in this process, after its import, that the Hub is at `endpoint`, and that nobody has used it before."""
    told = {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}", "HF_HUB_DISABLE_XET": True}
    told |= {"HF_HUB_CACHE": str(home / "hf" / "hub"), "HF_TOKEN_PATH": str(home / "token"), "HF_HUB_ETAG_TIMEOUT": 2}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in told.items():
            patched.setattr(huggingface_hub.constants, name, value)
        for name in [name for name in os.environ if name.lower().endswith("_proxy") or name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]:
            patched.delenv(name)
        huggingface_hub.close_session()
        try:
            yield
        finally:
            huggingface_hub.close_session()


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status = status
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.headers = {key: value for key, value in headers.items() if value}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.respond()

        def do_HEAD(self) -> None:
            self.respond()

        def do_POST(self) -> None:
            self.respond()

        def do_PUT(self) -> None:
            self.respond()

        def log_message(self, *_: object) -> None: ...

        def respond(self) -> None:
            address = urlsplit(self.path)
            self.parts, self.query = [unquote(part) for part in address.path.strip("/").split("/")], parse_qs(address.query)
            path = "/" + "/".join(self.parts)
            self.token = self.headers.get("Authorization", "")
            try:
                self.read(path)
                if hub.fails:
                    raise RefusalError(500)
                for part, (status, message) in hub.refuses.items():
                    if part in path:
                        raise RefusalError(status, message=message)
                self.answer()
            except RefusalError as refusal:
                self.reply(refusal.status, b"", refusal.headers)
            except ConnectionError:
                self.close_connection = True

        def read(self, path: str) -> None:
            """Take the request's body, or the half of it that arrives before the line is cut."""
            length = int(self.headers.get("Content-Length", 0))
            request = Request(self.command, path, self.token, self.rfile.read(length // 2))
            hub.asked.append(request)
            if self.command == "PUT" and len(hub.uploads) == hub.stalls_at:
                hub.stalled.set()
                self.rfile.read(1 << 30)  # until somebody gives up
                raise ConnectionError
            for part in hub.cuts:
                if part in path and hub.cuts[part]:
                    hub.cuts[part] -= 1
                    self.connection.shutdown(socket.SHUT_RDWR)
                    raise ConnectionError
            rest = self.rfile.read(length - length // 2)
            if len(request.body) + len(rest) < length:
                raise ConnectionError
            self.body = request.body + rest
            hub.asked[hub.asked.index(request)] = Request(request.method, path, request.authorization, self.body)

        def answer(self) -> None:
            match self.parts:
                case ["api", "whoami-v2"]:
                    name, role = self.user()
                    self.json({"type": "user", "name": name, "auth": {"type": "access_token", "accessToken": {"role": role}}})
                case ["api", "repos", "create"]:
                    self.create()
                case ["api", "validate-yaml"]:
                    self.validate()
                case ["api", "models", *rest]:
                    self.about("/".join(rest[:2]), rest[2:])
                case ["storage", _, _, oid]:
                    self.store("/".join(self.parts[1:3]), oid)
                case [owner, name, *rest] if name.endswith(".git") and rest == ["info", "lfs", "objects", "batch"]:
                    self.batch(f"{owner}/{name.removesuffix('.git')}")
                case [owner, name, "verify"]:
                    self.verify(f"{owner}/{name}")
                case [owner, name, "resolve", commit, *path]:
                    self.file(self.repo(f"{owner}/{name}"), commit, "/".join(path))
                case _:
                    raise RefusalError(404)

        def user(self) -> tuple[str, str]:
            if self.token.removeprefix("Bearer ") not in hub.users:
                raise RefusalError(401, message="Invalid credentials in Authorization header")
            return hub.users[self.token.removeprefix("Bearer ")]

        def writer(self, repo: str) -> None:
            """Hold that whoever asks may write to `repo`."""
            name, role = self.user()
            if role != "write" or repo.split("/")[0] != name:
                raise RefusalError(403, message=f"{name} has no write access to {repo} by {self.token}")  # nobody may repeat that

        def repo(self, name: str) -> Repo:
            found = hub.repos.get(name)
            who = self.user()[0] if self.token else ""
            if found is None or (found.private and name.split("/")[0] != who):
                raise RefusalError(404 if who else 401, "RepoNotFound", "Repository not found")
            if found.gated:
                raise RefusalError(403, "GatedRepo", "ask for access")
            return found

        def create(self) -> None:
            wanted = json.loads(self.body)
            name = f"{wanted.get('organization') or self.user()[0]}/{wanted['name']}"
            self.writer(name)
            if name in hub.repos:
                self.json({"error": "You already created this model repo", "url": f"{hub.endpoint}/{name}"}, 409)
                return
            hub.repos[name] = Repo(private=bool(wanted.get("private")) or wanted.get("visibility") == "private")
            hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self.json({"url": f"{hub.endpoint}/{name}"})

        def validate(self) -> None:
            errors = ['"license" must be one of a list'] if "license: nonsense" in json.loads(self.body)["content"] else []
            if self.headers.get("Accept") == "text/plain":
                self.reply(400 if errors else 200, "\n".join(errors).encode(), {"Content-Type": "text/plain"})
            else:
                self.json({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

        def about(self, name: str, parts: list[str]) -> None:
            repo = self.repo(name)
            match parts:
                case [] | ["revision", _]:
                    commit = self.commit_of(repo, parts[1] if parts else "main")
                    siblings = [{"rfilename": path} for path in repo.commits[commit]]
                    self.json({"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings})
                case ["tree", revision, *_]:
                    files = repo.commits[self.commit_of(repo, revision)]
                    self.json([{"type": "file", "path": path, "size": len(data), "oid": blob(path, data)} for path, data in files.items()])
                case ["branch", branch]:
                    self.writer(name)
                    if branch in repo.refs:
                        raise RefusalError(409, message="Reference already exists")
                    repo.refs[branch] = repo.refs["main"]
                    self.json({})
                case ["preupload", revision]:
                    self.may_change(name)
                    self.preupload(repo.commits[self.commit_of(repo, revision)])
                case ["commit", revision]:
                    self.may_change(name)
                    self.commit(name, repo, revision)
                case _:
                    raise RefusalError(404)

        def may_change(self, name: str) -> None:
            """Anybody with a token that writes may open a pull request."""
            if "create_pr" not in self.query:
                self.writer(name)
            elif self.user()[1] != "write":
                raise RefusalError(403, message="this token cannot open pull requests")

        def commit_of(self, repo: Repo, revision: str) -> str:
            commit = repo.refs.get(revision, revision)
            if commit not in repo.commits:
                raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return commit

        def preupload(self, files: dict[str, bytes]) -> None:
            ignored = files.get(".gitignore", b"").decode().split()
            answers = [
                {
                    "path": name,
                    "uploadMode": "lfs" if name.endswith(LARGE) else "regular",
                    "shouldIgnore": any(fnmatch.fnmatch(name, pattern) for pattern in ignored),
                    "oid": blob(name, files[name]) if name in files else None,
                }
                for name in (wanted["path"] for wanted in json.loads(self.body)["files"])
            ]
            self.json({"files": answers})

        def batch(self, name: str) -> None:
            repo, answers = self.repo(name), []
            for wanted in json.loads(self.body)["objects"]:
                actions = {"upload": {"href": f"{hub.endpoint}/storage/{name}/{wanted['oid']}"}, "verify": {"href": f"{hub.endpoint}/{name}/verify"}}
                answers.append({**wanted, **({} if wanted["oid"] in repo.objects else {"actions": actions})})
            self.json({"transfer": "basic", "objects": answers})

        def store(self, name: str, oid: str) -> None:
            if sha256(self.body) != oid:
                raise RefusalError(400, message="not the content that was announced")
            hub.repos[name].objects[oid] = self.body
            self.reply(200, b"")

        def verify(self, name: str) -> None:
            wanted = json.loads(self.body)
            if len(self.repo(name).objects.get(wanted["oid"], b"")) != wanted["size"]:
                raise RefusalError(404)
            self.json({})

        def commit(self, name: str, repo: Repo, revision: str) -> None:
            files, message = dict(repo.commits[self.commit_of(repo, revision)]), ""
            for line in self.body.splitlines():
                item = json.loads(line)
                value: dict[str, Any] = item["value"]
                match item["key"]:
                    case "header":
                        message = value["summary"]
                    case "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        if value["oid"] not in repo.objects:
                            raise RefusalError(400, message=f"{value['path']} was never sent")
                        files[value["path"]] = repo.objects[value["oid"]]
                    case key:
                        raise RefusalError(400, message=f"what is {key}?")
            pull = "create_pr" in self.query
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            if pull:
                repo.refs[f"refs/pr/{number}"] = self.commit_of(repo, revision)
            made = repo.commit(f"refs/pr/{number}" if pull else revision, files, message)
            self.json(
                {
                    "commitUrl": f"{hub.endpoint}/{name}/commit/{made}",
                    "commitOid": made,
                    "pullRequestUrl": f"{hub.endpoint}/{name}/discussions/{number}" if pull else None,
                }
            )

        def file(self, repo: Repo, revision: str, name: str) -> None:
            commit = self.commit_of(repo, revision)
            data = repo.commits[commit].get(name)
            if data is None:
                raise RefusalError(404, "EntryNotFound")
            headers = {"ETag": f'"{blob(name, data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.reply(206 if start else 200, data[start:], headers)

        def json(self, answer: object, status: int = 200) -> None:
            self.reply(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler
