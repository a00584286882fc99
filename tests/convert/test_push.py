"""Pushing to the Hub, as far as a server of our own can play it: what is sent, what is refused, and what comes back."""

import json
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
from click.testing import Result
from huggingface_hub import ModelCard

from effconvert.convert.run import convert
from effconvert.eval.results import Evaluation, Row, Value, save
from effconvert.eval.subject import open_model
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from tests.convert.conftest import one_line
from tests.hub import answering, serve, variables
from tests.hub_state import Hub, Repo

Command = Callable[..., Result]
Refused = Callable[..., str]
Push = Callable[..., Result]
Shell = Callable[..., subprocess.CompletedProcess[str]]
WRITE, READ, OTHER = (f"hf_{name}" + "t0psecret" * 4 for name in ("write", "read", "other"))
SHARDS = 5  # of the tiny model, at least
FOREIGN = "diary.txt"
LOAD = """
import re, sys
from pathlib import Path
from safetensors.torch import save_file
(snippet,) = re.findall("```python\\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL)
exec(snippet)
ids = tokenizer("abc def", return_tensors="pt").input_ids
save_file({"ids": ids, "logits": model(ids).logits, **{name: tensor.clone() for name, tensor in model.state_dict().items()}}, sys.argv[2])
assert "effconvert" not in sys.modules
"""


@pytest.fixture(scope="module")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two KV heads, verified. Nobody may change it: copy it."""
    source = Path(shutil.copytree(llama, tmp_path_factory.mktemp("secret-folder") / "tiny"))
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: 'no'\n---\nof the original\n")
    output = source.with_name("converted")
    convert(str(source), (Gqa(groups=2, pool="mean"),), RunOptions(output=output, tokens=60, context=20))
    return output


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(converted, tmp_path / "out"))


@pytest.fixture
def server() -> Iterator[Hub]:
    """A Hub that knows three tokens: one of `lab` that writes, one of `lab` that reads, and one of somebody else that writes."""
    with serve(Hub(users={WRITE: ("lab", "write"), READ: ("lab", "read"), OTHER: ("stranger", "write")})) as hub:
        yield hub


@pytest.fixture
def shell(server: Hub, python: str, environment: dict[str, str], tmp_path: Path) -> Shell:
    """Run a program as somebody who has never used that Hub before."""

    def run(*arguments: str, token: str = "") -> subprocess.CompletedProcess[str]:
        logged_in = {"HF_TOKEN": token} if token else {}
        env = {**variables(server, environment, tmp_path), **logged_in}
        return subprocess.run([python, *arguments], env=env, capture_output=True, text=True, timeout=100)

    return run


@pytest.fixture
def push(server: Hub, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Push]:
    """Run `effconvert push` in this process; hold that no token is told to anybody."""
    told = []

    def run(folder: Path, *more: str, token: str = WRITE) -> Result:
        monkeypatch.setenv("HF_TOKEN", token)
        result = command("push", folder, *(more if more and not more[0].startswith("-") else ("lab/pushed", *more)))
        told.append(result.output)
        return result

    with answering(server.endpoint, tmp_path):
        yield run
    published = [data for repo in server.repos.values() for files in repo.commits.values() for data in files.values()]
    for token in (WRITE, READ, OTHER):
        assert not any(token in text for text in told)
        assert not any(token.encode() in data for data in [*published, *(request.body for request in server.asked)])
    assert not any(request.authorization for request in server.asked if request.method == "PUT")  # storage is not the Hub


def gives_up(result: Result, code: int) -> str:
    """Return the one line that a command gave up with."""
    told = one_line(result)
    assert result.exit_code == code, told
    return told


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def sent_as_it_is(held: dict[str, bytes]) -> dict[str, bytes]:
    """Leave out what is written anew for the Hub, and what the Hub writes."""
    return {name: data for name, data in held.items() if name not in ("README.md", "effconvert.json", "effconvert.yaml", ".gitattributes")}


@pytest.mark.slow
def test_a_pushed_model_is_loaded_as_its_card_says_and_is_the_same_to_the_last_bit(server: Hub, push: Push, shell: Shell, folder: Path) -> None:
    before = files(folder)
    (folder / FOREIGN).write_text("dear diary")
    done = shell("-m", "effconvert", "push", "out", "lab/pushed", token=WRITE)
    assert done.returncode == 0, done.stderr
    assert WRITE not in done.stdout
    assert done.stderr == ""  # no bar of progress: this is no terminal
    repo = server.repos["lab/pushed"]
    assert f"{server.endpoint}/lab/pushed/commit/{repo.refs['main']}" in done.stdout
    assert FOREIGN in done.stdout
    assert not repo.private

    sent = repo.files()
    assert set(sent) == {*before, ".gitattributes"}  # every file of the checkpoint, and nothing else
    assert sent_as_it_is(sent) == sent_as_it_is(before)
    assert len(repo.objects) >= SHARDS
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    assert all(b"secret-folder" not in data and b"dear diary" not in data for data in sent.values())
    assert b"secret-folder" in before["effconvert.yaml"]  # as somebody else could not tell
    assert json.loads(sent["effconvert.json"])["files"] == {name: len(sent[name]) for name in before if name != "effconvert.json"}
    assert files(folder) == {**before, FOREIGN: b"dear diary"}

    Path("card.md").write_bytes(sent["README.md"])
    loaded = shell("-c", LOAD, "card.md", "card")
    assert loaded.returncode == 0, loaded.stderr
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    theirs, model = load_file("card"), AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    assert model(theirs.pop("ids")).logits.equal(theirs.pop("logits"))
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    asked = len(server.uploads)

    again = push(folder)
    assert again.exit_code == 0, again.output
    assert "had all of this already" in again.stdout
    assert len(repo.commits) == 2
    assert len(server.uploads) == asked


def test_a_dry_run_lists_files_and_sizes_and_asks_nothing(server: Hub, push: Push, folder: Path) -> None:
    (folder / FOREIGN).write_text("dear diary")
    done = push(folder, "--dry-run", token="")
    assert done.exit_code == 0, done.output
    assert server.asked == []
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines() if line}
    assert set(lines) >= {"README.md", "effconvert.json", "config.json", "tokenizer.json"}
    assert lines["config.json"] == f"{(folder / 'config.json').stat().st_size} B"
    assert FOREIGN not in lines
    assert f"left alone: {FOREIGN}" in done.stdout
    assert "nothing was sent to lab/pushed" in done.stdout


def test_an_upload_that_was_cut_off_goes_on_without_what_has_arrived(
    server: Hub, push: Push, folder: Path, python: str, environment: dict[str, str], tmp_path: Path
) -> None:
    server.stalls_at = 3
    env = {**variables(server, environment, tmp_path), "HF_TOKEN": WRITE}
    with subprocess.Popen([python, "-m", "effconvert", "push", str(folder), "lab/pushed"], env=env, stdout=subprocess.DEVNULL) as run:
        assert server.stalled.wait(100)
        os.kill(run.pid, signal.SIGKILL)
    repo = server.repos["lab/pushed"]
    arrived = dict(repo.objects)
    assert len(arrived) == 2
    assert len(repo.commits) == 1  # nothing half-published
    assert set(repo.files()) == {".gitattributes"}

    server.stalls_at, begun = 0, len(server.uploads)
    done = push(folder)
    assert done.exit_code == 0, done.output
    assert not arrived.keys() & set(server.uploads[begun:])
    assert len(set(server.uploads)) == len(repo.objects) == len(server.uploads) - 1  # the third one twice
    assert len(repo.commits) == 2

    assert sent_as_it_is(repo.files()) == sent_as_it_is(files(folder))


def test_a_line_that_is_cut_once_is_mended_unseen_and_a_commit_that_is_cut_is_made_by_the_same_command(
    server: Hub, push: Push, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = BufferingHandler(1000)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [said])
    server.cuts = {"/storage/": 1, "/commit/": 1}
    told = gives_up(push(folder), 1)
    assert "failed (" in told
    assert "run the same command again" in told
    assert not said.buffer
    repo = server.repos["lab/pushed"]
    assert len(repo.commits) == 1
    assert len(server.uploads) == len(repo.objects) + 1
    begun = len(server.uploads)
    done = push(folder)
    assert done.exit_code == 0, done.output
    assert len(server.uploads) == begun
    assert len(repo.commits) == 2


def test_a_repository_that_is_there_gets_a_commit_on_a_branch_and_keeps_its_own(server: Hub, push: Push, folder: Path) -> None:
    repo = server.repos["lab/pushed"] = Repo()
    first = repo.commit("main", {"NOTES.md": b"mine", "config.json": b"{}"}, "first")
    done = push(folder, "--revision", "pooled", "--message", "Fewer heads\n\nand why")
    assert done.exit_code == 0, done.output
    assert repo.refs["main"] == first
    assert repo.messages[repo.refs["pooled"]] == "Fewer heads"
    assert repo.files("pooled")["config.json"] == (folder / "config.json").read_bytes()
    assert repo.files("pooled")["NOTES.md"] == b"mine"
    assert "in the repository before, left alone: NOTES.md" in done.stdout

    told = gives_up(push(folder, "--private"), 2)
    assert "lab/pushed is public" in told
    assert repo.refs["main"] == first

    repo.commit("main", {"adapter_model.safetensors": b"of another model"}, "second")
    told = gives_up(push(folder), 2)
    assert "adapter_model.safetensors" in told

    repo.commit("main", {".gitignore": b"tokenizer.json"}, "third")
    told = gives_up(push(folder), 1)
    assert "lacks tokenizer.json" in told
    assert ".gitignore" in told


def test_a_private_repository_is_made_private(server: Hub, push: Push, folder: Path) -> None:
    done = push(folder, "pushed", "--private")  # of whoever the token is
    assert done.exit_code == 0, done.output
    assert server.repos["lab/pushed"].private
    assert "pushed to lab/pushed" in done.stdout


def test_a_pull_request_needs_no_write_access(server: Hub, push: Push, folder: Path) -> None:
    repo = server.repos["lab/pushed"] = Repo()
    first = repo.commit("main", {"NOTES.md": b"mine"}, "first")
    told = gives_up(push(folder, "--pr", "--revision", "gone", token=OTHER), 2)
    assert "lab/pushed has no revision 'gone'" in told
    done = push(folder, "--pr", token=OTHER)
    assert done.exit_code == 0, done.output
    assert repo.refs["main"] == first
    assert repo.files("refs/pr/1")["config.json"] == (folder / "config.json").read_bytes()
    assert f"{server.endpoint}/lab/pushed/discussions/1" in done.stdout
    assert "refs/pr/1" in done.stdout
    told = gives_up(push(folder, "lab/nothing", "--pr", token=OTHER), 2)
    assert "shows no repository lab/nothing" in told
    assert "leave --pr out" in told


def test_a_token_without_write_access_is_refused_with_what_is_needed(server: Hub, push: Push, folder: Path) -> None:
    told = gives_up(push(folder, token=READ), 2)
    assert "no write access to lab/pushed: the token of lab may only read" in told
    assert "hf auth login" in told
    server.repos["lab/pushed"] = Repo()
    server.repos["lab/pushed"].commit("main", {}, "first")
    told = gives_up(push(folder, token=OTHER), 2)
    assert "no write access to lab/pushed: stranger" in told
    assert "--pr" in told
    assert server.uploads == []
    assert len(server.repos["lab/pushed"].commits) == 1


def test_a_token_that_is_wrong_or_missing_is_said(server: Hub, push: Push, folder: Path) -> None:
    told = gives_up(push(folder, token=""), 2)
    assert server.asked == []
    assert "hf auth login" in told
    told = gives_up(push(folder, token="hf_nonsense"), 2)
    assert "does not accept this machine's token" in told
    assert "hf_nonsense" not in told


def test_what_the_hub_says_is_passed_on_without_the_token(server: Hub, push: Push, folder: Path) -> None:
    server.refuses = {"/batch": (403, "Private repository storage limit reached, please upgrade your plan")}
    told = gives_up(push(folder), 1)
    assert "the Hub has no space for lab/pushed (Private repository storage limit reached" in told
    server.refuses = {"/storage/": (400, f"RequestTimeout: {WRITE}")}
    told = gives_up(push(folder), 1)
    assert "RequestTimeout: (the token)" in told
    assert "run the same command again" in told
    server.refuses = {"/branch/": (400, "Invalid reference name")}
    told = gives_up(push(folder, "--revision", "a..b"), 2)
    assert "Invalid reference name" in told
    begun = len(server.uploads)
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    told = gives_up(push(folder), 1)
    assert len(server.uploads) == begun  # not after gigabytes
    assert '"license" must be one of a list' in told
    assert "README.md" in told
    assert set(server.repos["lab/pushed"].files()) == {".gitattributes"}


# Results of measurements


def evaluation(*models: Path) -> Evaluation:
    """What `effconvert eval` would say of models, with numbers of our own."""
    subjects = tuple(open_model(str(model)).subject for model in models)
    values = tuple(Value(0.5 + at / 8, 0.01) for at in range(len(models)))
    row = Row("piqa", "acc", "higher", 0.5, 1838, "1.0", values)
    return Evaluation(subjects, (row,), (), "", ("few documents",), {}, {"torch": "2.13.0"}, "some machine", "2026-11-22T12:00:00+00:00")


def test_results_of_this_model_come_onto_the_card_and_those_of_others_do_not(server: Hub, push: Push, llama: Path, folder: Path) -> None:
    third = Path(shutil.copytree(llama, "third"))
    (third / "generation_config.json").write_text("{}")
    save(evaluation(llama, third, folder), Path("eval.json"))
    done = push(folder, "--results", "eval.json")
    assert done.exit_code == 0, done.output
    card = ModelCard(server.repos["lab/pushed"].files()["README.md"].decode())
    assert [result.metric_value for result in card.data.eval_results if result.dataset_name == "piqa"] == [0.75]
    assert "| 0.5 ± 0.01 | 0.75 ± 0.01 |" in card.text
    assert "few documents" in card.text
    assert "third" not in card.text

    save(evaluation(llama, third), Path("eval.json"))
    told = gives_up(push(folder, "--results", "eval.json"), 2)
    assert "eval.json is about tiny, third" in told


# Refused before the Hub is asked


def test_the_picture_of_a_training_is_sent_and_shown(server: Hub, push: Push, folder: Path) -> None:
    curve = [{"tokens": 0, "seconds": 2.5, "held_out": 0.4}, {"tokens": 20480, "seconds": 60.0, "held_out": 0.1, "loss": 0.15}]
    rewrite(folder, distillation={"text": "n.txt", "sha256": "", "measure": "kl", "before": 0.4, "after": 0.1, "curve": curve, "held_out_windows": 3})
    assert push(folder).exit_code == 0
    sent = server.repos["lab/pushed"].files()
    assert sent["training.png"].startswith(b"\x89PNG")
    assert b"(training.png)" in sent["README.md"]
    assert json.loads(sent["effconvert.json"])["files"]["training.png"] == len(sent["training.png"])
    assert "had all of this already" in push(folder).stdout  # the picture has the same bytes again


def unverify(folder: Path) -> None:
    rewrite(folder, verified=False, report=None)


def rewrite(folder: Path, **changes: object) -> None:
    """Change the manifest, and let it stay the newest file."""
    manifest = json.loads((folder / "effconvert.json").read_text())
    (folder / "effconvert.json").write_text(json.dumps({**manifest, **changes}))


def name_more(folder: Path, name: str) -> None:
    held = json.loads((folder / "effconvert.json").read_text())["files"]
    rewrite(folder, files={**held, name: (folder / name).stat().st_size})


def pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    name_more(folder, "pytorch_model.bin")


def climb(folder: Path) -> None:
    (folder.parent / "passwords").write_text("1234")
    name_more(folder, "../passwords")


def link(folder: Path) -> None:
    (folder.parent / "passwords").write_text("1234")
    (folder / "notes.json").symlink_to(folder.parent / "passwords")
    name_more(folder, "notes.json")


def train(folder: Path) -> None:
    """Leave other numbers in a file of the same size."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8] + bytes(8))


def disguise(folder: Path) -> None:
    """Change a byte of the weights, and nothing that a listing shows."""
    path = next(folder.glob("*.safetensors"))
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_copy_with_other_times_is_the_same_model(folder: Path, command: Command) -> None:
    copied = shutil.copytree(folder, "copied", copy_function=shutil.copy)
    result = command("push", copied, "lab/pushed", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "changed by hand" not in result.stdout


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (unverify, "was never verified"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json changed since effconvert wrote"),
        (train, ".safetensors changed since effconvert wrote"),
        (disguise, ".safetensors changed since effconvert wrote"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is part of the model and missing"),
        (pickle, "names pytorch_model.bin, which no conversion writes"),
        (climb, "names ../passwords, which no conversion writes"),
        (link, "notes.json is a link"),
        (lambda folder: rewrite(folder, report={"before": 1}), "its report cannot be read"),
        (lambda folder: rewrite(folder, source=[]), "it does not say what was converted"),
    ],
    ids=["unverified", "changed", "trained further", "changed with its size and time kept", "lost", "pickle", "outside", "link", "report", "source"],
)
def test_what_nothing_vouches_for_is_not_pushed(folder: Path, refused: Refused, damage: Callable[[Path], object], said: str) -> None:
    damage(folder)
    told = refused(1, "push", folder, "lab/pushed", "--dry-run")
    assert said in told
    assert "convert again" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("out", "a/b/c"), "'a/b/c' is no name for a repository"),
        (("out", "lab/-x"), "owner/out"),
        (("gone", "lab/pushed"), "there is no folder gone"),
        (("out/none", "lab/pushed"), "effconvert did not write it"),
        (("out", "lab/pushed", "--private", "--pr"), "--private"),
        (("out", "lab/pushed", "--results", "none.json"), "none.json"),
        (("out", "lab/pushed", "--revision", ""), "--revision"),
        (("out", "lab/pushed", "--message", " "), "--message"),
    ],
)
def test_what_cannot_be_asked_is_the_askers_mistake(folder: Path, refused: Refused, arguments: tuple[str, ...], said: str) -> None:
    (folder / "none").mkdir()
    assert said in refused(2, "push", *arguments)


def test_a_readme_that_was_changed_by_hand_is_not_sent_and_that_is_said(folder: Path, command: Command) -> None:
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "my own words\n")
    result = command("push", folder, "lab/pushed", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "README.md was changed by hand" in result.stdout
