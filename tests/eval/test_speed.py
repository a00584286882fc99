"""`bench`: what is run and in which order, what is counted, and what happens when something does not fit."""

import statistics
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager, nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.commands._bench_terminal import BenchTerminal
from effconvert.errors import EffconvertError, OptionError
from effconvert.eval import results
from effconvert.eval.speed import bench as benching
from effconvert.eval.speed import memory, passes
from effconvert.eval.speed.bench import bench
from effconvert.eval.speed.bench_options import BenchOptions
from effconvert.eval.speed.passes import Loaded
from effconvert.eval.subject import load_measured, open_model
from effconvert.modeling.caches import kv_bytes
from effconvert.progress import NoProgress
from tests.heal.healing import put
from tests.mixers.mixing import cache_of, pair
from tests.models import save, tiny

EMBEDDING = 128 * 32 * 4  # bytes of the tiny models' table
QUICK = {"batch": (1,), "context": (12,), "new_tokens": 2, "rounds": 1, "warmup": 0}
SHORT = ("--context", "12", "--new-tokens", "2", "--warmup", "0")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Measure the bandwidth of memory on little of it: its value plays no part here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "BUFFER", 2**20)
        yield


def of_kv_heads(module):
    """How many KV heads `module` has if it is a whole model: what tells the two models apart."""
    return module.config.num_key_value_heads if isinstance(module, PreTrainedModel) and type(module).__name__.endswith("ForCausalLM") else None


@contextmanager
def seen():
    """Collect what models are run on: KV heads, token ids, tokens in the cache afterwards."""
    calls = []

    def record(module, args, output):
        if heads := of_kv_heads(module):
            calls.append((heads, args[0].clone(), int(cache_of(output).get_seq_length())))

    handle = register_module_forward_hook(record)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def before_forward(hook):
    """Call `hook` with the KV heads, the token ids and the model before any whole model is run."""

    def call(module, args):
        if heads := of_kv_heads(module):
            hook(heads, args[0], module)

    handle = register_module_forward_pre_hook(call)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A model with a KV head for each of its 4 query heads."""
    return str(save(tiny("llama"), tmp_path_factory.mktemp("many") / "many"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same with one KV head."""
    return str(save(tiny("llama", num_key_value_heads=1), tmp_path_factory.mktemp("one") / "one"))


@pytest.fixture(scope="module")
def run(many, one, tmp_path_factory):
    """Both measured beside each other: what was found, and what they were run on."""
    with pytest.MonkeyPatch.context() as patch, seen() as calls:
        patch.setenv("EFFCONVERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return bench([many, one], BenchOptions(batch=(1, 2), context=(12, 20), new_tokens=3, rounds=3, warmup=1)), calls


def test_every_model_has_a_cell_at_every_batch_and_context(run):
    found, _ = run
    assert [(cell.batch, cell.context, cell.subject) for cell in found.cells] == [(b, t, i) for b in (1, 2) for t in (12, 20) for i in (0, 1)]
    assert [subject.name for subject in found.subjects] == ["many", "one"]
    for cell in found.cells:
        assert cell.failure == ""
        for timing in (cell.prefill, cell.first, cell.decode):
            assert len(timing.rounds) == 3
            assert (timing.low, timing.median, timing.high) == (min(timing.rounds), statistics.median(timing.rounds), max(timing.rounds))
        assert all(first > prefill for first, prefill in zip(cell.first.rounds, cell.prefill.rounds, strict=True))
        assert cell.prefill_rate == cell.batch * cell.context / cell.prefill.median
        assert cell.decode_rate == cell.batch / cell.decode.median


def test_models_take_turns_in_alternating_order(run):
    _, calls = run
    order = [heads for heads, ids, _ in calls if ids.shape == (1, 12)]
    assert order == [1, 4, 4, 1, 1, 4, 4, 1, 4, 1]  # warm-up, three rounds, and the passes in which memory is counted


def test_every_pass_begins_with_an_empty_cache_and_the_same_tokens(run):
    _, calls = run
    assert len(calls) == 8 * 5 * 4  # cells, passes, a prompt and three tokens
    for start in range(0, len(calls), 4):
        (heads, prompt, _), *steps = calls[start : start + 4]
        assert [(later, ids.shape, held) for later, ids, held in steps] == [(heads, (len(prompt), 1), prompt.shape[1] + n) for n in (1, 2, 3)]
        assert calls[start][2] == prompt.shape[1]
    prompts = [ids for _, ids, _ in calls if ids.shape == (2, 20)]
    assert len(prompts) == 10
    assert all(torch.equal(ids, prompts[0]) for ids in prompts)


def test_the_cache_is_as_large_as_the_config_says(run):
    found, _ = run
    for cell in found.cells:
        assert cell.cache_bytes == found.subjects[cell.subject].kv_bytes * cell.batch * cell.context
        assert cell.ratios["cache"] == (1, 0.25)[cell.subject]  # 4 KV heads and 1


@pytest.mark.parametrize("kind", ["gemma2", "gpt_bigcode"])
def test_the_cache_of_other_families_is_as_large_as_their_config_says(tmp_path, kind):
    folder = save(tiny(kind), tmp_path / kind)
    (cell,) = bench([str(folder)], BenchOptions(**QUICK)).cells
    assert cell.cache_bytes == kv_bytes(open_checkpoint(folder).config, 4, 12)


def test_ratios_are_to_the_first_model_in_the_same_cell(run):
    found, _ = run
    for first, second in zip(found.cells[::2], found.cells[1::2], strict=True):
        assert set(first.ratios.values()) == {1.0}
        for name in ("prefill", "first", "decode"):
            assert second.ratios[name] == getattr(second, name).median / getattr(first, name).median
        if second.peak_bytes is not None:
            assert second.ratios["peak"] == second.peak_bytes / first.peak_bytes


def test_each_model_is_measured_by_each_way_to_decode(command, many, one, monkeypatch):
    asked = []
    monkeypatch.setattr(benching, "load_measured", lambda opened, *given: asked.append((opened.subject.name, given[-1])) or load_measured(opened, *given))
    benchmark = bench([str(many), str(one)], BenchOptions(**QUICK, kernels="reference,auto,reference"))
    assert [subject.name for subject in benchmark.subjects] == [f"{way}: {folder}" for folder in ("many", "one") for way in ("reference", "auto")]
    assert [(cell.subject, cell.failure) for cell in benchmark.cells] == [(index, "") for index in range(4)]
    assert [name.partition(": ")[0] for name, _ in asked] == [kernels for _, kernels in asked] == ["reference", "auto"] * 2
    assert benchmark.settings["kernels"] == ["reference", "auto"]
    shown = command("bench", many, "--batch", "1", *SHORT, "--rounds", "1", "--kernels", "auto,reference").output
    assert "1 auto: " in shown
    assert "kernels: auto, reference;" in shown
    with pytest.raises(OptionError, match="kernels is triton, and kernels run on CUDA devices"):
        bench([str(many)], BenchOptions(**QUICK, device="cpu", kernels="auto,triton"))


def test_what_is_predicted_is_the_time_to_read_weights_and_cache(run):
    found, _ = run
    for cell in found.cells:
        assert cell.weight_bytes == found.subjects[cell.subject].parameters * 4 - EMBEDDING  # a few rows of the table are read, and all of the head
        assert cell.predicted == pytest.approx((cell.weight_bytes + cell.cache_bytes) / found.bandwidth)


def test_a_table_that_is_also_the_head_is_read_whole(tmp_path):
    folder = save(tiny("llama", tie_word_embeddings=True), tmp_path / "tied")
    found = bench([str(folder)], BenchOptions(**QUICK))
    assert found.cells[0].weight_bytes == found.subjects[0].parameters * 4


def bytes_of(model, *parts):
    """Bytes of the parameters whose names hold one of these."""
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if any(part in name for part in parts))


MOE = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("kind", "count"), [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts"), ("olmoe", "num_experts"), ("gpt_oss", "num_local_experts")]
)
def test_of_experts_those_are_read_that_tokens_are_sent_to(kind, count):
    """Two of eight for one sequence; for more as many as are reached by chance. Routers and what is shared are read whole."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MOE, **{count: 8}))
    experts = bytes_of(model, ".experts.")
    assert experts
    rest = bytes_of(model, "") - experts - bytes_of(model, "embed_tokens")
    reads = {batch: Loaded(0, None, model).read(batch) for batch in (1, 2, 1000)}
    assert reads[1] == rest + experts / 4
    assert reads[2] == rest + experts * 7 / 16  # 1 - (3/4)^2
    assert reads[1000] == rest + experts


def test_experts_of_which_nobody_says_how_many_are_chosen_are_read_whole():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **MOE, num_local_experts=8))
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    assert Loaded(0, None, model).read(1) == bytes_of(model, "") - bytes_of(model, "embed_tokens")


def test_weights_that_layers_share_are_read_once():
    """Be it as one parameter or as two that lie in the same place."""
    model = tiny("llama")
    first, second = model.model.layers
    whole, shared = Loaded(0, None, model).read(1), bytes_of(model, "layers.1.mlp.up_proj.weight", "layers.1.mlp.down_proj.weight")
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.mlp.down_proj.weight = torch.nn.Parameter(first.mlp.down_proj.weight.data)
    assert Loaded(0, None, model).read(1) == whole - shared


def test_a_mixer_with_as_many_heads_as_experts_is_no_expert():
    _, model = pair("llama", ("linear", {"window": 6}))
    model.config.num_experts_per_tok = 2
    assert Loaded(0, None, model).read(1) == bytes_of(model, "") - bytes_of(model, "embed_tokens")


def test_seconds_are_those_of_the_models_and_a_step_is_one_step(many, monkeypatch):
    now = 0.0

    def clock():
        nonlocal now
        now += 2**-30  # as a clock does, it goes on
        return now

    def work(heads, ids, module):
        nonlocal now
        now += 1 if ids.shape[1] == 1 else 10

    monkeypatch.setattr(time, "perf_counter", clock)
    with before_forward(work):
        (cell,) = bench([many], BenchOptions(**{**QUICK, "new_tokens": 4})).cells
    assert [round(timing.median, 6) for timing in (cell.prefill, cell.first, cell.decode)] == [10, 10, 1]


def test_a_static_cache_has_the_models_write_the_same_tokens(many):
    written = {}
    for cache in ("dynamic", "static"):
        with seen() as calls:
            (cell,) = bench([many], BenchOptions(batch=(2,), context=(12,), new_tokens=8, rounds=2, warmup=0, cache=cache)).cells
        written[cache] = torch.cat([ids for _, ids, _ in calls if ids.shape[1] == 1], 1)
        assert cell.failure == ""
        kv_bytes = 2 * 2 * 4 * 8 * 4  # layers, k and v, heads, width, float32
        assert cell.cache_bytes == 2 * kv_bytes * (12 if cache == "dynamic" else 12 + 8)  # a static one has room for what will be written
    assert len(written["static"][0].unique()) > 1
    assert torch.equal(written["static"], written["dynamic"])


def test_memory_is_counted_beyond_what_was_held_and_anew_each_time():
    size = 64 * 2**20
    held = torch.ones(2 * size // 4)
    torch.ones(4 * size // 4).sum()  # more than ever after, and freed
    counts = [memory.peak("cpu", lambda: torch.ones(size // 4).sum()) for _ in range(2)]
    assert held[0] == 1
    if not sys.platform.startswith("linux"):
        assert counts == [None, None]
    else:
        assert [round(count / size) for count in counts] == [1, 1]  # Linux counts pages on each processor, and adds up now and then


def test_peak_memory_holds_weights_and_cache(tmp_path):
    wide = tiny("llama", vocab_size=400_000)  # 51 MB for each of the two tables
    (cell,) = bench([str(save(wide, tmp_path / "wide"))], BenchOptions(**QUICK)).cells
    if sys.platform.startswith("linux"):
        weights = sum(parameter.nbytes for parameter in wide.parameters())
        assert weights <= cell.peak_bytes < 2 * weights


def allocate():
    return torch.empty(1 << 50)  # a petabyte: the allocator of the CPU refuses


def no_room():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_python_memory():
    raise MemoryError


@pytest.mark.parametrize("fail", [allocate, no_room, no_python_memory])
def test_a_cell_that_runs_out_of_memory_says_so_and_the_rest_goes_on(many, one, fail):
    progress, held = Counting(), []

    def run_out(heads, ids, module):
        assert not any(reference() is not None for reference in held), "what the failed pass held is still in memory"
        if heads == 1 and len(ids) == 2:
            activations = torch.ones(1000)
            held.append(weakref.ref(activations))
            fail()

    with before_forward(run_out):
        found = bench([many, one], BenchOptions(**{**QUICK, "batch": (1, 2, 3), "rounds": 2}), progress)
    assert len(held) == 1, "a model is not asked again after it ran out of memory"
    failed = [cell for cell in found.cells if cell.failure]
    assert [(cell.batch, cell.subject) for cell in failed] == [(2, 1)]
    assert failed[0].failure == "out of memory; give a smaller --batch or --context"
    assert (failed[0].prefill, failed[0].decode, failed[0].cache_bytes, failed[0].peak_bytes, failed[0].ratios) == (None, None, None, None, {})
    assert all(cell.decode and len(cell.decode.rounds) == 2 and cell.ratios for cell in found.cells if not cell.failure)
    assert progress.done == progress.total == 2 * 3 * 3


def test_nothing_is_compared_with_a_first_model_that_failed(many, one):
    def fail_first(heads, ids, module):
        if heads == 4:
            raise ValueError("strange\ncache")

    with before_forward(fail_first):
        first, second = bench([many, one], BenchOptions(**QUICK)).cells
    assert first.failure == "transformers or torch refused (ValueError: strange)"
    assert second.decode is not None
    assert second.ratios == {}


def test_a_cell_that_needs_more_memory_than_is_free_is_not_begun(many):
    with seen() as calls:
        small, large = bench([many], BenchOptions(**{**QUICK, "batch": (1, 10**9)})).cells
    assert small.failure == ""
    assert large.failure.startswith("needs about ")
    assert large.failure.endswith(" GB are free; give a smaller --batch or --context")
    assert {len(ids) for _, ids, _ in calls} == {1}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # gemma2 has its scores in memory, as scaled_dot_product_attention has no soft cap
def test_an_estimate_of_memory_is_no_less_than_what_a_pass_takes(tmp_path, kind):
    model = tiny(kind, hidden_size=64, max_position_embeddings=2048)
    folder = str(save(model, tmp_path / "long"))
    (cell,) = bench([folder], BenchOptions(batch=(2,), context=(1024,), new_tokens=1, rounds=1)).cells
    if sys.platform.startswith("linux"):
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        # (What a pass took can be as little as nothing where malloc still had it from the test before.)
        assert memory.needed(open_model(folder).known, model, 2, 1024, 1) >= cell.peak_bytes - weights
        assert memory.needed(open_model(folder).known, model, 2, 1024, 1) > cell.cache_bytes


def test_models_that_do_not_fit_together_are_measured_one_after_the_other(many, one, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=200_000, total=200_000))  # either takes about 100,000
    first = []

    def gone(heads, ids, module):
        if heads == 4 and not first:
            first.append(weakref.ref(module))
        assert heads == 4 or first[0]() is None, "the first model is still in memory"

    with seen() as calls, before_forward(gone):
        found = bench([many, one], BenchOptions(**{**QUICK, "context": (12, 14), "rounds": 2}))
    assert not any(cell.failure for cell in found.cells)
    assert [(cell.context, cell.subject) for cell in found.cells] == [(12, 0), (12, 1), (14, 0), (14, 1)]
    assert [heads for heads, _, _ in calls] == [4] * (len(calls) // 2) + [1] * (len(calls) // 2)
    assert all("decode" in cell.ratios for cell in found.cells)
    assert "do not alternate" in found.notes[0]


def test_a_model_that_does_not_fit_is_refused_with_both_sizes(many, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=50_000, total=50_000))
    with pytest.raises(EffconvertError, match=r"many takes [\d.]+ GB of memory and [\d.]+ GB are free on cpu; measure it on a larger machine"):
        bench([many], BenchOptions(**QUICK))


def test_an_encoder_is_measured_in_reading_alone(tmp_path):
    folder = str(save(tiny("bert"), tmp_path / "encoder"))
    found = bench([folder, folder], BenchOptions(**{**QUICK, "context": (64,)}))  # all that it reads: nothing is written after it
    assert found.notes == ("encoder is an encoder and writes no tokens: prefill only",)
    for cell in found.cells:
        assert cell.failure == ""
        assert cell.prefill is not None
        assert (cell.first, cell.decode, cell.predicted, cell.weight_bytes, cell.cache_bytes) == (None,) * 5
        assert set(cell.ratios) - {"peak"} == {"prefill"}


def test_an_encoder_decoder_is_measured_in_reading_alone(tmp_path):
    found = bench([str(save(tiny("bart"), tmp_path / "pair"))], BenchOptions(**QUICK))
    assert found.notes == ("pair is an encoder-decoder, whose writing is not measured: prefill only, of a text as source and target",)


def test_a_decoder_without_a_head_is_measured_in_reading_alone(tmp_path):
    found = bench([str(save(tiny("llama").model, tmp_path / "body"))], BenchOptions(**QUICK))
    assert found.notes == ("body has no language-model head and writes no tokens: prefill only",)
    assert (found.cells[0].prefill is None, found.cells[0].decode) == (False, None)


def test_contexts_that_a_model_does_not_read_are_left_out_unless_they_are_asked_for(tmp_path, many):
    medium = str(save(tiny("llama", max_position_embeddings=600), tmp_path / "medium"))
    found = bench([medium], BenchOptions(batch=(1,), rounds=1, warmup=0))
    assert [cell.context for cell in found.cells] == [128, 512]
    assert found.notes == ("no context of 2048: not every model reads that many tokens and 16 new ones",)
    assert [cell.context for cell in bench([many], BenchOptions(batch=(1,), rounds=1, warmup=0)).cells] == [48]  # 64, and 16 of them new
    with pytest.raises(OptionError, match=r"--context 49 is too long: many reads 64 tokens, .*; give at most 48"):
        bench([medium, many], BenchOptions(context=(20, 49)))
    with pytest.raises(OptionError, match=r"many reads 64 tokens, and --new-tokens 64 are among them; give fewer"):
        bench([many], BenchOptions(new_tokens=64))


def test_types_that_differ_are_told(tmp_path, many):
    half = str(save(tiny("llama").bfloat16(), tmp_path / "half"))
    assert any("different types" in note for note in bench([many, half], BenchOptions(**QUICK)).notes)
    assert not bench([many, half], BenchOptions(**QUICK, dtype="float32")).notes


def test_results_can_be_read_again(run, tmp_path):
    found, _ = run
    results.save(found, tmp_path / "bench.json")
    assert results.read(tmp_path / "bench.json") == found


def test_the_command_shows_and_writes_what_was_found(command, many, one):
    result = command("bench", many, one, *SHORT, "--batch", "1,1000000000", "--rounds", "2", "-o", "bench.json")
    assert result.exit_code == 0, result.output
    found = results.read(results.Path("bench.json"))
    assert [(cell.batch, bool(cell.failure)) for cell in found.cells] == [(1, False), (1, False), (10**9, True), (10**9, True)]
    lines = result.stdout.splitlines()
    assert max(map(len, lines[: lines.index("")])) <= 110
    at = next(number for number, line in enumerate(lines) if "2 one" in line)
    assert "  1.536 kB  " in lines[at]  # 2 layers, k and v, one head of 8, 4 bytes, 12 tokens
    assert "  0.250 x  " in lines[at + 1]
    assert sum("needs about" in line and "give a smaller --batch" in line for line in lines) == 2
    assert "medians of 2 rounds, each of 2 steps; float32, dynamic cache" in result.stdout
    assert "written to bench.json" in result.stdout


def test_the_command_fails_where_nothing_could_be_measured(command, many):
    result = command("bench", many, *SHORT, "--batch", "1000000000")
    assert result.exit_code == 1
    assert "Error: nothing could be measured: needs about" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--batch", "0"), "--batch is '0', and it should be greater than or equal to 1"),
        (("--batch", "two"), "--batch is 'two', and it should be a whole number"),
        (("--batch", ","), "--batch, --context and --kernels need at least one value each"),
        (("--kernels", "auto,fast"), "--kernels is 'fast', and it should be 'auto', 'triton' or 'reference'"),
        (("--context", "-5"), "--context is '-5', and it should be greater than or equal to 1"),
        (("--context", "65"), "--context 65 is too long: many reads 64 tokens"),
        (("--rounds", "0"), "--rounds is '0', and it should be greater than or equal to 1"),
        (("--warmup", "-1"), "--warmup is '-1', and it should be greater than or equal to 0"),
        (("--cache", "paged"), "--cache is 'paged', and it should be 'dynamic' or 'static'"),
        (("--device", "abacus"), "--device abacus cannot be used here"),
        (("--graphs",), "--graphs needs --cache static"),
        (("--graphs", "--cache", "static", "--device", "cpu"), "--graphs replays CUDA graphs, and the device is cpu; leave it out"),
        (("--output", "."), "--output . is a folder"),
        (("/nowhere/at/all",), "/nowhere/at/all does not exist"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_a_line(command, many, arguments, told):
    result = command("bench", many, *arguments)
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("kind", "surgery", "told"),
    [
        ("llama", ("linear", "--window", "6"), "cannot keep the states of the mixers of out"),
        ("gpt2", ("gqa", "--groups", "2", "--pool", "mean"), "would store the shared KV heads of out once for each query head"),
    ],
)
def test_a_static_cache_for_what_is_ours_is_told_of_in_the_table(command, kind, surgery, told):
    put(Path("source"), kind)
    assert command(*surgery, "source", "-o", "out", "--no-verify").exit_code == 0
    result = command("bench", "source", "out", "--cache", "static", "--context", "8", "--new-tokens", "2", "--rounds", "1", "--batch", "1")
    assert told in result.stdout
    assert "1 source" in result.stdout  # is measured all the same


def test_help_does_not_import_torch(python, environment):
    program = "import sys\nfrom effconvert.cli import main\nmain(['bench', '--help'], standalone_mode=False)\nprint('|', *sys.modules)"
    done = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    told, _, modules = done.stdout.rpartition("|")
    assert "--new-tokens" in told
    assert "pydantic" in modules.split(), "nothing was seen of what it imports"
    assert not {"torch", "transformers", "numpy", "rich"} & set(modules.split())


def test_the_bar_is_not_drawn_while_something_is_timed(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    terminal = BenchTerminal("model")
    terminal.err = Console(file=StringIO(), force_terminal=True, width=100)
    threads = threading.active_count()
    with terminal.bar("measuring", 4, "steps") as advance:
        assert threading.active_count() == threads, "rich draws from a thread of its own"
        drawn = terminal.err.file.getvalue()
        assert "0/4" in drawn
        advance(1)
        assert terminal.err.file.getvalue() == drawn, "a second has not passed"
        now = 2.0
        advance(1)
        assert "2/4" in terminal.err.file.getvalue()


class Counting(NoProgress):
    """Counts what it is told of."""

    total = done = 0

    def bar(self, what, total, unit):
        self.total = total
        return nullcontext(self.count)

    def count(self, more):
        self.done += more
