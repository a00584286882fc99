"""A conversion that is killed at any moment: the same command again ends where an unbroken one does, and nothing is lost."""

import inspect
import json
import multiprocessing
import multiprocessing.context
import os
import pkgutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from filelock import FileLock

from effconvert.cli import main
from effconvert.errors import STOPPED, ModelError

MANIFEST = "effconvert.convert.write.save_manifest"  # once a shard
FINAL = "effconvert.convert.output.save_manifest"  # once before the first shard, once before the move, once after it
Command = Callable[..., Result]
Contents = Callable[[Path], dict[str, str]]
Kill = Callable[..., None]


def watch(where: str, moment: str, nth: int, fate: str, arguments: tuple[str, ...]) -> None:
    """Run the command line, and die or halt before or after the `nth` call of the function `where`."""
    owner, _, function = where.rpartition(".")
    place = pkgutil.resolve_name(owner)
    real, left = getattr(place, function), [nth]

    def stop() -> None:
        if fate == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        print("halted", flush=True)
        time.sleep(60)

    def watched(*args: object, **keywords: object) -> object:
        left[0] -= 1
        if left[0] == 0 and moment == "before":
            stop()
        result = real(*args, **keywords)
        if left[0] == 0 and moment == "after":
            stop()
        return result

    setattr(place, function, watched)
    main(arguments, prog_name="effconvert")


def halting(python: str, where: str, nth: int, *arguments: str) -> list[str]:
    """Spell a process of its own that says so and halts after the `nth` call of the function `where`."""
    imports = "import os, pkgutil, signal, time\nfrom effconvert.cli import main\n"
    imports += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a run in the background would have it ignore
    return [python, "-c", f"{imports}{inspect.getsource(watch)}\nwatch({where!r}, 'after', {nth}, 'halt', {arguments!r})"]


def gqa(*more: object, model: object = "model", groups: int = 2) -> tuple[str, ...]:
    return ("gqa", "--groups", str(groups), "--pool", "mean", str(model), "-o", "out", "--no-verify", *map(str, more))


@pytest.fixture
def unbroken(model: Path, command: Command, contents: Contents) -> dict[str, str]:
    """What a run that nobody kills leaves of the model at ./model."""
    result = command("gqa", "--groups", "2", "--pool", "mean", "model", "-o", "unbroken", "--no-verify")
    assert result.exit_code == 0, result.output
    assert "from an interrupted run" not in result.stdout
    return contents(Path("unbroken"))


@pytest.fixture(scope="session")
def nursery() -> multiprocessing.context.ForkServerContext:
    """A server that has imported what takes long, once, and gives birth to processes that may be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.convert.test_resume", "torch._refs", "effconvert.console", "effconvert.surgery.attention.gqa"])
    return context


@pytest.fixture
def killed(nursery: multiprocessing.context.ForkServerContext) -> Kill:
    """Run a command in a process of its own, killed at a call of a function."""

    def run(where: str, moment: str, nth: int, arguments: tuple[str, ...]) -> None:
        process = nursery.Process(target=watch, args=(where, moment, nth, "kill", arguments))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, f"it lived, and ended with {process.exitcode}"

    return run


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("where", "moment", "nth", "finished"),
    [
        (FINAL, "after", 1, 0),  # it only says what is to be done
        (MANIFEST, "after", 2, 2),
        ("os.fsync", "before", 6, 2),  # the third shard is written whole, and not yet named; a manifest is flushed for each, and before them
        ("effconvert.convert.write.copy_run", "after", 4, None),  # in the middle of a shard
        (MANIFEST, "before", 3, 2),  # a shard is named, and not yet recorded
        ("effconvert.convert.write.write_others", "before", 1, 5),
        ("effconvert.convert.output.publish", "before", 1, 5),
        (FINAL, "before", 2, 5),
        (FINAL, "after", 2, 5),  # between the manifest and the move
    ],
)
def test_a_killed_run_goes_on_to_what_an_unbroken_one_leaves(
    unbroken: dict[str, str], killed: Kill, command: Command, contents: Contents, where: str, moment: str, nth: int, finished: int | None
) -> None:
    killed(where, moment, nth, gqa())
    assert not Path("out").exists()
    result = command(*gqa())
    assert result.exit_code == 0, result.output
    if finished is not None:
        assert (f"{finished} shards were there from an interrupted run" in result.stdout) == (finished > 0)
    assert contents(Path("out")) == unbroken
    assert sorted(path.name for path in Path().iterdir()) == ["model", "out", "unbroken"]


def test_a_finished_shard_is_not_written_again(unbroken: dict[str, str], killed: Kill, command: Command) -> None:
    killed(MANIFEST, "after", 2, gqa())
    before = {file.name: file.stat().st_ino for file in Path("out.partial").glob("*.safetensors")}
    assert len(before) == 2
    assert command(*gqa()).exit_code == 0
    assert {name: Path("out", name).stat().st_ino for name in before} == before


@pytest.mark.parametrize("nth", [1, 2])
def test_a_run_killed_while_it_replaces_an_output_loses_nothing(unbroken: dict[str, str], killed: Kill, command: Command, contents: Contents, nth: int) -> None:
    assert command(*gqa(groups=1)).exit_code == 0
    old = contents(Path("out"))
    killed("pathlib.Path.rename", "after", nth, gqa("--overwrite"))
    assert contents(Path("out.replaced")) == old  # moved away, and not deleted before the new one stands
    assert Path("out").exists() == (nth == 2)
    result = command(*gqa("--overwrite"))
    assert result.exit_code == 0, result.output
    assert contents(Path("out")) == unbroken
    assert sorted(path.name for path in Path().iterdir()) == ["model", "out", "unbroken"]


@pytest.mark.parametrize(("where", "moment"), [("effconvert.convert.output.remove", "before"), ("effconvert.convert.output.empty", "after")])
def test_a_run_killed_while_it_removes_the_old_output_is_finished_by_the_same_command(
    unbroken: dict[str, str], killed: Kill, command: Command, contents: Contents, where: str, moment: str
) -> None:
    assert command(*gqa(groups=1)).exit_code == 0
    killed(where, moment, 2, gqa("--overwrite"))
    assert Path("out.replaced/effconvert.json").is_file()
    result = command(*gqa())
    assert result.exit_code == 0, result.output
    assert contents(Path("out")) == unbroken
    assert sorted(path.name for path in Path().iterdir()) == ["model", "out", "unbroken"]


def test_a_run_killed_while_it_removes_what_another_left_is_no_strangers(unbroken: dict[str, str], killed: Kill, command: Command, contents: Contents) -> None:
    killed(MANIFEST, "after", 3, gqa("--pool", "first"))
    killed("effconvert.convert.output.empty", "after", 1, gqa())
    assert [path.name for path in Path("out.partial").iterdir()] == ["effconvert.json"]
    result = command(*gqa())
    assert result.exit_code == 0, result.output
    assert contents(Path("out")) == unbroken


@pytest.mark.parametrize("own", [True, False])
def test_checkpoints_of_a_training_that_was_killed_at_its_end_are_removed(unbroken: dict[str, str], killed: Kill, command: Command, own: bool) -> None:
    killed(FINAL, "before", 3, gqa())
    Path("out.training/checkpoints").mkdir(parents=True)
    mark = {"fingerprint": json.loads(Path("out/effconvert.json").read_text())["fingerprint"] if own else "another"}
    Path("out.training/effconvert-training.json").write_text(json.dumps(mark))
    result = command(*gqa())
    assert "was there already" in result.stdout
    assert Path("out.training").exists() != own


def test_what_cannot_be_removed_is_named_and_the_output_is_whole(unbroken: dict[str, str], killed: Kill, command: Command, contents: Contents) -> None:
    assert command(*gqa(groups=1)).exit_code == 0
    killed("effconvert.convert.output.remove", "before", 2, gqa("--overwrite"))
    Path("out.replaced").rename("elsewhere")
    Path("out.replaced").symlink_to("elsewhere")
    result = command(*gqa())
    assert "out.replaced is of no more use, and could not be removed" in " ".join(result.stderr.split())
    assert contents(Path("out")) == unbroken
    assert Path("elsewhere/model.safetensors.index.json").exists() or Path("elsewhere/model.safetensors").exists()


def test_an_old_output_that_waits_after_a_kill_comes_to_no_harm_from_a_command_that_fails(model: Path, command: Command, contents: Contents) -> None:
    assert command(*gqa(groups=1)).exit_code == 0
    old = contents(Path("out"))
    Path("out").rename("out.replaced")
    assert command(*gqa(groups=3)).exit_code == 2
    assert contents(Path("out.replaced")) == old


@pytest.mark.parametrize("damage", ["size", "time", "gone"])
def test_a_finished_shard_that_somebody_damaged_is_written_again(
    unbroken: dict[str, str], killed: Kill, command: Command, contents: Contents, damage: str
) -> None:
    killed(MANIFEST, "after", 3, gqa())
    shard = sorted(Path("out.partial").glob("*.safetensors"))[1]
    before = shard.stat()
    if damage == "size":
        with shard.open("ab") as file:
            file.write(b"x")
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif damage == "time":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    else:
        shard.unlink()
    result = command(*gqa())
    assert result.exit_code == 0, result.output
    assert "2 shards were there" in result.stdout
    assert contents(Path("out")) == unbroken


def test_what_another_recipe_left_is_not_used(unbroken: dict[str, str], killed: Kill, command: Command, contents: Contents) -> None:
    killed(MANIFEST, "after", 3, gqa("--pool", "first"))
    result = command(*gqa())
    assert result.exit_code == 0, result.output
    assert "from an interrupted run" not in result.stdout
    assert contents(Path("out")) == unbroken


def test_what_was_made_of_a_source_that_changed_since_is_not_used(model: Path, killed: Kill, command: Command, contents: Contents) -> None:
    killed(MANIFEST, "after", 3, gqa())
    shard = sorted(model.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    result = command(*gqa())
    assert result.exit_code == 0, result.output
    assert "from an interrupted run" not in result.stdout
    assert command("gqa", "--groups", "2", "--pool", "mean", "model", "-o", "fresh", "--no-verify").exit_code == 0
    assert contents(Path("out")) == contents(Path("fresh"))


def test_a_tokenizer_that_changed_since_is_copied_again(model: Path, killed: Kill, command: Command) -> None:
    killed("effconvert.convert.output.publish", "before", 1, gqa())
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (model / "tokenizer_config.json").write_text("{}")
    assert command(*gqa()).exit_code == 0
    assert Path("out/tokenizer_config.json").read_text() == "{}"
    assert "license: mit" in Path("out/README.md").read_text()


def test_a_file_that_the_source_lost_since_is_not_left_in_the_output(model: Path, killed: Kill, command: Command) -> None:
    (model / "LICENSE").write_text("old")
    killed("effconvert.convert.output.publish", "before", 1, gqa())
    assert Path("out.partial/LICENSE").is_file()
    (model / "LICENSE").unlink()
    assert command(*gqa()).exit_code == 0
    assert not Path("out/LICENSE").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fingerprint": 1}', '{"effconvert": "0", "fingerprint": "x", "files": 3}'])
def test_a_partial_folder_with_a_damaged_manifest_is_left_alone(model: Path, command: Command, contents: Contents, content: str) -> None:
    place = Path("out.partial")
    place.mkdir()
    (place / "effconvert.json").write_text(content)
    (place / "thesis.txt").write_text("the only copy")
    before = contents(place)
    result = command(*gqa())
    assert result.exit_code == 2
    assert "out.partial is in the way" in result.stderr
    assert contents(place) == before
    assert not Path("out").exists()


def test_what_somebody_put_into_a_partial_folder_stops_the_next_run(unbroken: dict[str, str], killed: Kill, command: Command) -> None:
    killed(MANIFEST, "after", 2, gqa())
    Path("out.partial/thesis.txt").write_text("the only copy")
    assert command(*gqa()).exit_code == 2
    assert command(*gqa("--pool", "first")).exit_code == 2
    assert Path("out.partial/thesis.txt").read_text() == "the only copy"


def test_what_somebody_put_at_the_output_meanwhile_stays(model: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from effconvert.convert import run

    real = run.write

    def write(*given: object) -> int:
        Path("out").mkdir()
        Path("out/thesis.txt").write_text("the only copy")
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "write", write)
    result = command(*gqa())
    assert result.exit_code == 2
    assert "out exists" in result.stderr
    assert Path("out/thesis.txt").read_text() == "the only copy"


@pytest.mark.parametrize("place", ["out.partial", "out.replaced"])
def test_a_source_where_the_output_is_built_is_not_touched(model: Path, command: Command, contents: Contents, place: str) -> None:
    source = model.rename(place)
    before = contents(source)
    for more in ((), ("--overwrite",)):
        assert command(*gqa(*more, model=place)).exit_code == 2
        assert contents(source) == before


def test_a_second_run_into_the_same_output_refuses(model: Path, python: str, environment: dict[str, str], command: Command) -> None:
    first = subprocess.Popen(halting(python, MANIFEST, 2, *gqa()), env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        while "halted" not in first.stdout.readline():
            assert first.poll() is None
        waiting = {file.name for file in Path("out.partial").iterdir()}
        second = command(*gqa())
        assert second.exit_code == 2
        assert "another effconvert is writing out" in second.stderr
        assert "Traceback" not in second.output
        assert {file.name for file in Path("out.partial").iterdir()} == waiting
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    assert command(*gqa()).exit_code == 0  # the lock ends with the process that held it


def test_a_lock_file_without_a_run_does_not_stop_anybody(model: Path, command: Command) -> None:
    Path(".out.lock").touch()
    assert command(*gqa()).exit_code == 0
    assert not Path(".out.lock").exists()


def test_the_lock_is_held_until_the_output_stands(model: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from effconvert.convert import output

    taken = []
    real = output.save_manifest

    def save(folder: Path, manifest: dict[str, object]) -> None:
        real(folder, manifest)
        try:
            with FileLock(".out.lock", timeout=0):
                taken.append(folder.name)
        except TimeoutError:
            taken.append(None)

    monkeypatch.setattr(output, "save_manifest", save)
    assert command(*gqa()).exit_code == 0
    assert taken == [None, None, None]  # begun, about to move, moved


@pytest.mark.parametrize(("where", "nth", "finished"), [(MANIFEST, 2, 2), ("effconvert.steps.load", 1, 0)], ids=["writing", "importing"])
def test_ctrl_c_ends_with_130_and_a_line_and_the_same_command_goes_on(
    unbroken: dict[str, str], python: str, environment: dict[str, str], command: Command, contents: Contents, where: str, nth: int, finished: int
) -> None:
    run = subprocess.Popen(halting(python, where, nth, *gqa()), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    while "halted" not in run.stdout.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, told = run.communicate(timeout=20)
    assert run.returncode == 130
    assert told.strip().splitlines() == [STOPPED.strip()]
    assert not Path("out").exists()
    result = command(*gqa())
    assert (f"{finished} shards were there" in result.stdout) == (finished > 0)
    assert contents(Path("out")) == unbroken


LIBRARY = (
    RuntimeError("strides should be multiple of 16 bytes\nand more"),
    "test_resume.py cannot run it (RuntimeError: strides should be multiple of 16 bytes)",
)


@pytest.mark.parametrize(("error", "told"), [(ModelError("it computes nonsense"), "it computes nonsense"), LIBRARY], ids=["model", "library"])
def test_verification_that_fails_leaves_what_was_written_and_no_output(
    error: Exception, told: str, model: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effconvert.convert import run

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(run, "verify", failing)
    result = command("gqa", "--groups", "2", "--pool", "mean", "model", "-o", "out")
    assert result.exit_code == 1
    assert f"{told}; out was not written" in result.stderr
    assert not Path("out").exists()
    monkeypatch.undo()
    os.chdir(model.parent)
    again = command(*gqa())
    assert again.exit_code == 0, again.output
    assert "shards were there" not in again.stdout  # what was condemned is not used again


def test_a_fault_of_effconvert_is_no_fault_of_the_model(model: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from effconvert.eval.quality import perplexity

    monkeypatch.setattr(perplexity, "nll_loss", None)  # which its own line calls then
    assert isinstance(command("gqa", "--groups", "2", "--pool", "mean", "model", "-o", "out").exception, TypeError)


def test_the_record_in_the_output_names_every_file_and_what_was_done(model: Path, command: Command) -> None:
    assert command(*gqa()).exit_code == 0
    record = json.loads(Path("out/effconvert.json").read_text())
    present = sorted(path.name for path in Path("out").iterdir())
    assert sorted([*record["files"], "effconvert.json"]) == present
    assert record["recipe"] == [{"gqa": {"groups": 2, "pool": "mean", "grouping": "adjacent"}}]
    assert record["source"]["model"] == "model"
    assert record["verified"] is False
