"""What a Hub of our own holds: models, users, and how it is to misbehave. `tests.hub` lets it answer."""

import hashlib
import json
import threading
from dataclasses import dataclass, field

LARGE = (".safetensors", ".bin")  # stored as LFS objects


@dataclass
class Repo:
    """A model on the Hub."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> name -> content
    refs: dict[str, str] = field(default_factory=dict)  # branch, tag or refs/pr/N -> commit
    messages: dict[str, str] = field(default_factory=dict)  # commit -> its message
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS: SHA-256 -> content that has arrived whole
    private: bool = False
    gated: bool = False

    def commit(self, revision: str, files: dict[str, bytes], message: str) -> str:
        """Put `files` at the head of `revision`."""
        parent = self.refs.get(revision, "")
        name = hashlib.sha1(json.dumps([parent, message, {key: sha256(data) for key, data in files.items()}]).encode()).hexdigest()
        self.commits[name], self.messages[name], self.refs[revision] = files, message, name
        return name

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What is at a branch, a tag, a pull request or a commit."""
        return self.commits[self.refs.get(revision, revision)]


@dataclass(frozen=True)
class Request:
    """What somebody asked."""

    method: str
    path: str
    authorization: str
    body: bytes


@dataclass
class Hub:
    """The state of a Hub."""

    repos: dict[str, Repo] = field(default_factory=dict)
    users: dict[str, tuple[str, str]] = field(default_factory=dict)  # token -> (name, role: read or write)
    asked: list[Request] = field(default_factory=list)
    endpoint: str = ""
    fails: bool = False  # every answer is an error of the server
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)  # part of a path -> status and message to answer
    cuts: dict[str, int] = field(default_factory=dict)  # part of a path -> how many more requests to it are cut off in the middle
    stalls_at: int = 0  # which upload of an LFS object stands still in its middle, counted from 1
    stalled: threading.Event = field(default_factory=threading.Event)

    @property
    def uploads(self) -> list[str]:
        """The LFS objects that somebody began to send, in order."""
        return [request.path.rpartition("/")[2] for request in self.asked if request.method == "PUT"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(name: str, data: bytes) -> str:
    """What identifies a file's content: that of an LFS object, or git's hash."""
    return sha256(data) if name.endswith(LARGE) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
