"""The command line: what it says, where it says it, and what it does not import."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import click
import pytest
from click.testing import Result

import effconvert
from effconvert import steps
from effconvert.__main__ import CHOICES, SPINS
from effconvert.__main__ import main as module_main
from effconvert.cli import main
from effconvert.console import Terminal
from effconvert.convert.run import convert
from effconvert.errors import BROKEN_PIPE, INTERRUPTED, STOPPED, OptionError
from effconvert.options import RunOptions
from effconvert.quantities import count
from effconvert.surgery.attention.gqa import Gqa

Command = Callable[..., Result]
SLOW = {"asyncio", "torch", "transformers", "pydantic", "numpy", "rich", "huggingface_hub"}
EASY = ("--tokens", "60", "--context", "20")


def names() -> list[str]:
    return main.list_commands(click.Context(main))


def imported(python: str, environment: dict[str, str], *arguments: str) -> set[str]:
    """Return which of the slow libraries a command imports."""
    program = "import contextlib, sys\nfrom effconvert.__main__ import main\nwith contextlib.suppress(SystemExit):\n    main()\nprint('|', *sys.modules)"
    done = subprocess.run([python, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return SLOW & set(done.stdout.rpartition("|")[2].split())


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",), ("--version",)])
def test_help_and_version_import_nothing_slow(python: str, environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    assert imported(python, environment, *arguments) == set()


def test_help_of_a_technique_does_not_import_transformers(python: str, environment: dict[str, str]) -> None:
    found = imported(python, environment, "gqa", "--help")
    assert "pydantic" in found, "nothing was seen of what it imports"
    assert "transformers" not in found


def test_a_conversion_that_only_copies_and_pools_does_not_import_transformers(python: str, environment: dict[str, str], llama: Path, tmp_path: Path) -> None:
    found = imported(python, environment, "gqa", "--groups", "1", "--pool", "mean", str(llama), "-o", str(tmp_path / "out"), "--no-verify")
    assert (tmp_path / "out" / "config.json").exists()
    assert "torch" in found, "nothing was seen of what it imports"
    assert "transformers" not in found


def test_version_is_told(command: Command) -> None:
    result = command("--version")
    assert result.exit_code == 0
    assert effconvert.__version__ in result.stdout


def test_effconvert_runs_as_a_module(python: str, environment: dict[str, str]) -> None:
    done = subprocess.run([python, "-m", "effconvert", "--version"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("effconvert, version ")


def test_a_character_that_the_output_has_no_place_for_is_a_question_mark(python: str, environment: dict[str, str], model: Path) -> None:
    code = "import sys; from effconvert.__main__ import replace_unprintable; replace_unprintable(); print('0.44 \u00b1 0.01')"
    done = subprocess.run([python, "-c", code], env={**environment, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0.44 ? 0.01\n", "")


def test_a_list_may_be_given_in_several_parts(command: Command, model: Path) -> None:
    sizes = command("bench", model, *("--context", "8", "--context", "16", "--batch", "1", "--rounds", "1", "--new-tokens", "1", "-o", "b.json"))
    assert sizes.exit_code == 0, sizes.output
    assert [cell["context"] for cell in json.loads(Path("b.json").read_text())["cells"]] == [8, 16]


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_wait_for_each_other_briefly_unless_the_user_says_how(own: dict[str, str], python: str, environment: dict[str, str]) -> None:
    """libgomp reads the variables when torch loads it, so they have to be there before."""
    program = """
        import os, sys
        from effconvert.__main__ import main

        def find_spec(name, *_):
            if name in ("click", "torch"):
                print(name, os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
            if name == "torch":
                sys.exit()

        sys.meta_path.insert(0, type("Watch", (), {"find_spec": staticmethod(find_spec)}))
        sys.argv = ["effconvert", "gqa", "--groups", "1", "nowhere"]
        main()
    """
    plain = {name: value for name, value in environment.items() if name not in CHOICES}
    done = subprocess.run([python, "-c", dedent(program)], env={**plain, **own}, capture_output=True, text=True, timeout=60)
    held = f"{own.get('GOMP_SPINCOUNT', None if own else SPINS)} {own.get('OMP_WAIT_POLICY')}"
    assert done.stdout.splitlines() == [f"click {held}", f"torch {held}"], done.stderr


def test_every_command_is_listed_with_a_whole_sentence_of_at_most_70_characters() -> None:
    assert {"gqa", "mqa", "expand-kv", "inspect", "demo"} <= set(names())
    context = click.Context(main)
    wrong = []
    for name in names():
        command = main.get_command(context, name)
        assert command is not None
        summary = command.get_short_help_str(limit=80)
        if not summary or len(summary) > 70 or not summary.endswith(".") or summary.endswith("..."):
            wrong.append(f"{name}: {summary} ({len(summary)})")
    assert not wrong


def test_the_first_page_lists_every_command_with_its_whole_summary(command: Command) -> None:
    told = command("--help").stdout
    context = click.Context(main)
    for name in names():
        found = main.get_command(context, name)
        assert found is not None
        assert re.search(rf"^  {name} +{re.escape(found.get_short_help_str(limit=80))}$", told, re.MULTILINE), name


def test_the_first_page_is_the_same_by_every_way_to_it(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [command("--help").stdout, command("-h").stdout]
    for arguments in ([], ["-h"], ["--help"]):
        monkeypatch.setattr("sys.argv", ["effconvert", *arguments])
        module_main()
        pages.append(capsys.readouterr().out)
    assert pages[0].startswith("Usage: effconvert ")
    assert [page.strip() for page in pages] == [pages[0].strip()] * 5


def test_help_of_gqa_shows_examples_defaults_and_what_is_required(command: Command) -> None:
    told = command("gqa", "--help").stdout
    assert "effconvert gqa --groups 8 " in told
    flat = " ".join(told.split())
    assert re.search(r"--groups G [^[]*\[required\]", flat)
    assert "[pca|aligned|mean|first]" in flat
    assert "[default: pca]" in flat
    assert "[default: 4096]" in flat
    assert flat.count("[required]") == 1


def test_every_option_of_every_command_is_described(command: Command) -> None:
    context = click.Context(main)
    for name in names():
        found = main.get_command(context, name)
        assert found is not None
        options = [option for option in found.get_params(click.Context(found)) if isinstance(option, click.Option)]
        assert options
        for option in options:
            assert option.help, f"{name} {option.name}"
        told = command(name, "--help")
        assert told.exit_code == 0
        assert "\\b" not in told.stdout, name  # what keeps lines apart, spelt wrongly


def test_the_examples_in_every_help_are_commands_that_exist(command: Command) -> None:
    for name in ["", *names()]:
        told = command(*[name] if name else [], "--help").stdout
        for example in re.findall(r"^ +effconvert ([a-z-]+)", told, re.MULTILINE):
            assert example in names(), told


def test_a_dry_run_prints_the_plan_and_writes_nothing(command: Command, contents: Callable[[Path], dict[str, str]], model: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    result = command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    told = " ".join(result.stdout.split())
    assert re.search(r"parameters \d\d\.\d+ k \d\d\.\d+ k 0\.\d+ x", told)
    assert "KV cache a token 384 B 192 B 0.5 x" in told  # 3 layers, k and v, 4 then 2 heads of 8, 2 bytes
    assert re.search(r"needs about [\d.]+ [MG]B of memory to write and [\d.]+ kB of disk, [\d.]+ [kMG]B of memory to verify", told)
    assert "loads as LlamaForCausalLM in stock transformers" in told
    assert "4 query and 4 KV heads of 8 becomes 3 layers, 4 query and 2 KV heads of 8" in told
    assert "NOT VERIFIED" not in told


def test_a_dry_run_finds_the_same_errors_as_a_run(command: Command, model: Path) -> None:
    results = [command("gqa", "--groups", "3", "--pool", "mean", model, "-o", "out", *more) for more in ((), ("--dry-run",))]
    assert [result.exit_code for result in results] == [2, 2]
    assert results[0].stderr == results[1].stderr


def test_a_run_without_verification_says_so(command: Command, model: Path) -> None:
    result = command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", "--no-verify")
    assert result.exit_code == 0
    assert "NOT VERIFIED" in result.stdout
    assert "verified, and written" not in result.stdout


def test_without_verification_only_a_dry_run_asks_transformers_whether_it_opens_the_model(command: Command, model: Path) -> None:
    """As the help says: the import of transformers takes longer than many conversions."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForTalking"]}))
    arguments = ("gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", "--no-verify")
    refused = command(*arguments, "--dry-run")
    assert (refused.exit_code, "LlamaForTalking, which transformers" in refused.stderr) == (1, True), refused.output
    assert not Path("out").exists()
    assert command(*arguments).exit_code == 0
    assert "do not even ask transformers whether it opens source and result" in " ".join(command("gqa", "--help").stdout.split())


def test_a_run_with_verification_shows_what_was_won_and_lost(command: Command, model: Path) -> None:
    result = command("gqa", "--groups", "2", "--pool", "mean", model, *EASY)
    assert result.exit_code == 0, result.output
    assert Path("model-gqa-2/config.json").is_file()  # the default name
    told = " ".join(result.stdout.split())
    assert "NOT VERIFIED" not in told
    assert "KV cache a token 384 B 192 B" in told
    assert re.search(r"perplexity [\d.]+ [\d.]+", told)
    assert re.search(r"KL from the original [\d.]+ nats a token", told)
    assert re.search(r"same top token [\d.]+%", told)
    assert "57 tokens in windows of 20, bfloat16, cpu" in told
    assert "verified, and written to model-gqa-2" in told
    Path("text.txt").write_text("There and back again, many times. " * 8)
    healed = command("refit", "model-gqa-2", "--teacher", model, "--calibrate", "text.txt", "--calibration-tokens", "64", "-o", "healed", *EASY)
    assert healed.exit_code == 0, healed.output
    told = " ".join(healed.stdout.split())
    assert re.search(r"verification MODEL converted .* KL from MODEL [\d.]+ nats a token .* MODEL writes: ", told)  # and not from the original
    assert "original" not in told.partition("verification")[2]


def test_a_conversion_that_may_change_nothing_shows_that_nothing_changed(command: Command, model: Path) -> None:
    result = command("gqa", "--groups", "4", "--pool", "mean", model, "-o", "out", *EASY)
    assert result.exit_code == 0, result.output
    assert "no logit may change" in result.stdout
    assert "largest change of a logit: 0, on up to 60 tokens (nothing may change)" in result.stdout


def test_a_model_without_a_tokenizer_is_not_measured_and_that_is_said(command: Command, model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    result = command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", *EASY)
    assert result.exit_code == 0, result.output
    assert "no quality was measured: the model has no tokenizer" in result.stdout


def test_nothing_about_progress_is_said_to_a_pipe(model: Path, python: str, environment: dict[str, str]) -> None:
    arguments = [python, "-m", "effconvert", "gqa", "--groups", "2", "--pool", "mean", str(model), "-o", "out", *EASY]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "perplexity" in done.stdout


def test_progress_is_told_to_a_terminal_on_stderr_alone(model: Path, python: str, environment: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    arguments = [python, "-m", "effconvert", "gqa", "--groups", "2", "--pool", "mean", str(model), "-o", "out", *EASY]
    with subprocess.Popen(arguments, env={**environment, "TERM": "xterm"}, stdout=subprocess.PIPE, stderr=theirs, text=True) as run:
        os.close(theirs)
        told = b""
        while True:
            try:
                told += (piece := os.read(ours, 4096))
            except OSError:  # Linux ends a pseudo-terminal so
                break
            if not piece:
                break
        assert run.stdout is not None
        results = run.stdout.read()
    os.close(ours)
    assert run.returncode == 0
    assert b"measuring the original" in told
    assert b"checking every number" in told
    assert "measuring the original" not in results
    assert "\x1b" not in results
    assert b"perplexity" not in told


@pytest.mark.parametrize("width", ["40", "200"])
def test_results_are_the_same_in_a_pipe_whatever_the_terminal(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    result = command("gqa", "--groups", "2", "--pool", "mean", model, "--dry-run")
    assert "loads as LlamaForCausalLM in stock transformers" in result.stdout


def test_brackets_in_a_path_are_printed_as_they_are(command: Command, model: Path) -> None:
    model.rename("model[bold]")
    result = command("gqa", "--groups", "2", "--pool", "mean", "model[bold]", "-o", "out[red]x", "--no-verify")
    assert result.exit_code == 0, result.output
    assert Path("out[red]x/config.json").is_file()
    assert "model[bold]" in result.stdout
    assert "NOT VERIFIED: out[red]x" in result.stdout


def completions(python: str, environment: dict[str, str], *words: str) -> list[str]:
    """Return what a shell is told to complete the last of `words` with."""
    typed = {"_EFFCONVERT_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([python, "-m", "effconvert"], env={**environment, **typed}, capture_output=True, text=True, timeout=60)
    return done.stdout.split()


def test_a_shell_completes_commands_options_their_words_and_files(python: str, environment: dict[str, str]) -> None:
    script = subprocess.run(
        [python, "-m", "effconvert"], env={**environment, "_EFFCONVERT_COMPLETE": "bash_source"}, capture_output=True, text=True, timeout=60
    )
    assert "_effconvert_completion()" in script.stdout
    assert completions(python, environment, "effconvert", "pru") == ["plain,prune-layers"]
    assert completions(python, environment, "effconvert", "gqa", "--po") == ["plain,--pool"]
    assert completions(python, environment, "effconvert", "gqa", "--pool", "me") == ["plain,mean"]
    assert completions(python, environment, "effconvert", "gqa", "mod") == ["file,mod"]
    assert completions(python, environment, "effconvert", "gqa", "--calibrate", "my") == ["file,my"]
    assert completions(python, environment, "effconvert", "distill", "small", "--teacher", "my") == ["file,my"]


def test_steps_that_nothing_follows_offer_nothing_and_say_why(command: Command, model: Path) -> None:
    assert "--transfer " in command("gqa", "--help").stdout
    for name, options, told in [
        ("distill", ["--teacher", model], "distill trains the finished model, so it comes last"),
        ("transplant", ["--base", model, "--instruct", model], "so it is a conversion of its own"),
    ]:
        assert "--transfer " not in command(name, "--help").stdout
        result = command(name, model, *options, "--refit", "--dry-run")
        assert result.exit_code == 2
        assert told in " ".join(result.stderr.split())


def test_the_demo_says_first_what_it_is_about_to_show(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise OptionError("stopped")

    monkeypatch.setattr("effconvert.demo.demo", stop)
    assert command("demo").stdout.startswith("This converts a small model that comes with effconvert")


def test_the_demo_names_the_text_that_it_calibrated_on(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.txt").write_text("one two three four five six " * 60)
    options = RunOptions(output=Path("out"), calibrate="mine.txt", calibration_tokens=128, calibration_window=16, tokens=60, context=20)
    Terminal("model").demo({"--pool pca": convert("model", (Gqa(groups=2),), options)}, kept=False)
    assert "aligned and pca calibrated on mine.txt: 128 tokens\n" in capsys.readouterr().out


def test_an_unknown_option_leads_to_all_of_them_and_teacher_to_refit(command: Command) -> None:
    assert "--help shows all" in command("gqa", "--sizes", "2", "model").stderr
    assert "effconvert refit MODEL --teacher ORIGINAL" in command("gqa", "--teacher", "original", "model").stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--train-tokens", "1000"), "--train-tokens is an option of `effconvert distill`: run that on the result, or write a recipe with `distill: {train-"),
        (("--distill", "--lora", "8"), "--lora is an option of `effconvert distill`"),
        (("--refit", "--epochs", "3"), "--epochs is an option of `effconvert transfer`"),
        (("--rate", "3"), "--rate is an option of `effconvert distill` or `effconvert transfer`"),
    ],
)
def test_an_option_of_healing_leads_to_its_command(command: Command, options: tuple[str, ...], told: str) -> None:
    assert told in command("gqa", "--groups", "2", "model", *options).stderr


def test_a_technique_with_a_reason_of_its_own_says_that_first(command: Command) -> None:
    assert "the width of the stream stays" in command("narrow", "--hidden", "32", "model").stderr  # which distill has as an option, too


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("eval", "small", "--samples", "no.json", "--tasks", "piqa"), 'Error: --samples is neither JSON like {"piqa": [0, 2]} nor a JSON file'),
        (("report", "small", "-o", "page.htm"), "Error: --output is 'page.htm', and it should end in .html, such as report.html"),
    ],
    ids=lambda value: value[0],
)
def test_what_our_own_rules_refuse_is_said_in_our_own_words(command: Command, arguments: tuple[str, ...], told: str) -> None:
    assert command(*arguments).stderr.startswith(told)


def test_ctrl_c_while_libraries_load_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Loading(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "effconvert.cli", Loading("effconvert.cli"))
    monkeypatch.setattr("effconvert.__main__.remember_interrupts", lambda: None)  # in this process it is pytest's
    monkeypatch.setattr(sys, "argv", ["effconvert", "list"])
    monkeypatch.setenv(CHOICES[0], SPINS)
    with pytest.raises(SystemExit) as stopped:
        module_main()
    assert (stopped.value.code, capsys.readouterr().err) == (INTERRUPTED, f"{STOPPED}\n")


def test_ctrl_c_that_a_library_turned_into_another_error_is_still_that(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'GenerationConfig'") from error

    monkeypatch.setattr("effconvert.convert.run.convert", load)
    result = command("gqa", "--groups", "2", model)
    assert (result.exit_code, result.stderr) == (INTERRUPTED, f"{STOPPED}\n")


def test_ctrl_c_that_a_library_lost_is_remembered(python: str, environment: dict[str, str]) -> None:
    lost = """
        import os, signal, sys
        from effconvert import __main__, cli, errors

        def load(*_, **__):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass
            raise errors.ModelError("the tokenizer cannot be loaded")

        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell turns off for what runs in the background
        cli.Commands.get_command = lambda *_: cli.click.Command("gqa", callback=load)
        sys.argv = ["effconvert", "gqa"]
        __main__.main()
    """
    done = subprocess.run([python, "-c", dedent(lost)], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (INTERRUPTED, f"{STOPPED}\n")


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ("0,,1", "should be numbers and ranges with a comma between them: 0,2,-1, or 0-11, or 1-29/2 for every second layer"),
        ("0,3-1", "--layers 3-1 runs backwards; write the lower number first: 1-3"),
        ("2-0/2", "--layers 2-0/2 runs backwards; write the lower number first: 0-2/2"),
    ],
)
def test_layers_that_no_model_could_have_are_refused_in_a_sentence(command: Command, model: Path, layers: str, told: str) -> None:
    result = command("streaming", "--window", "8", "--layers", layers, str(model))
    assert (result.exit_code, told in result.stderr) == (2, True), result.stderr


def test_an_output_without_a_name_is_named_after_what_was_typed(command: Command, model: Path) -> None:
    Path("latest").symlink_to(model)
    for typed in ("latest", "./latest/"):
        assert "-> latest-gqa-2" in command("gqa", "--groups", "2", "--pool", "mean", typed, "--dry-run").stdout


def test_a_warning_is_one_line_in_a_pipe(command: Command, model: Path) -> None:
    folder = f"{'long' * 30}"
    told = command("gqa", "--groups", "2", "--pool", "mean", str(model), "-o", folder, "--no-verify").stdout.splitlines()
    assert f"NOT VERIFIED: {folder} was written and never loaded; leave --no-verify out to have it run and measured" in told


def test_numbers_below_ten_thousand_are_written_out() -> None:
    assert [count(number) for number in (0, 256, 9999, 10_000, 524_288, 3_672_320)] == ["0", "256", "9999", "10 k", "524.3 k", "3.67 M"]


def test_all_techniques_are_listed_by_kind_and_without_torch(python, environment):
    text = "import sys\nfrom effconvert.cli import main\nmain(['list'], standalone_mode=False)\nassert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([python, "-c", text], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name, summary in steps.techniques().items():
        assert f"{name} " in done.stdout
        assert summary in done.stdout
    assert done.stdout.index("attention\n") < done.stdout.index("gqa") < done.stdout.index("depth\n") < done.stdout.index("prune-layers")
    assert "saves KV cache" in done.stdout


@pytest.mark.parametrize("name", ["list", "kernels"])
def test_lists_fit_a_narrow_terminal_and_are_whole_lines_in_a_pipe(command: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert max(map(len, command(name).stdout.splitlines())) > 100
    monkeypatch.setattr(f"effconvert.commands.{name}.columns", lambda: 60)
    assert max(map(len, command(name).stdout.splitlines())) <= 60


@pytest.mark.parametrize(
    "arguments", [["list"], pytest.param(["gqa", "--groups", "2", "--pool", "mean", "model", "--dry-run"], marks=pytest.mark.slow)], ids=lambda a: a[0]
)
def test_a_reader_that_stops_reading_is_no_error(arguments: list[str], model: Path, python: str, environment: dict[str, str]) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    done = subprocess.run([python, "-m", "effconvert", *arguments], env=environment, stdout=ours, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(ours)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, "")


def test_a_plan_that_changes_nothing_says_so(command: Command, model: Path) -> None:
    for options in (["gqa", "--groups", "4"], ["gqa", "--groups", "4", "--pool", "mean"]):
        assert "note  gqa: the model has 4 KV heads already, so nothing changes" in command(*options, model, "--dry-run").stdout
    assert "nothing changes" not in command("gqa", "--groups", "2", "--pool", "mean", model, "--dry-run").stdout
