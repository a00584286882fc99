"""Training towards a teacher's predictions on disk: what is kept of them, the loss, the files, and whom the folder belongs to."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.manifest import DRAFT
from effconvert.convert.plan import plan
from effconvert.convert.teacher_cache import _locked
from effconvert.errors import OptionError
from effconvert.heal import _teacher_cache
from effconvert.heal._in_pieces import ROWS
from effconvert.heal._kept import KINDS, KeptObjective, Samples, TopK
from effconvert.heal._objective import Head, Objective, head_of
from effconvert.heal._teacher_cache import HELD_OUT, CachedWindows, HeldOutWindows, TeacherCache
from effconvert.heal._windows import next_tokens
from effconvert.heal.distill import Distill
from effconvert.heal.refit import Refit
from effconvert.kernels._divergences import sparse_divergence_reference
from effconvert.kernels._kinds import KINDS as DIVERGENCES
from effconvert.modeling import loading
from effconvert.progress import NoProgress
from effconvert.recipe import read
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.embedding.factor_embed import FactorEmbed
from tests.heal.healing import prose, put, run, tensors
from tests.models import DECODERS, heed_caps, tiny

SHORT = {"data": "text.txt", "window": 32, "batch_tokens": 128, "train_tokens": 2560, "rate": 3e-3, "cache_teacher": "kept"}
V, WIDTH = 50, 12


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def matrix(weights):
    return Head(lambda part: part @ weights.T, lambda: [weights])


def rows(count=ROWS + 40):
    """Hidden states, a head and labels of a student, and a teacher's logits [N, V]."""
    draw = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(count, WIDTH, generator=draw).double(), torch.randn(V, WIDTH, generator=draw).double() / 2
    return hidden, weights, torch.randint(V, (count,), generator=draw), 2 * torch.randn(count, V, generator=draw).double()


def outcomes(probabilities, ids):
    """Probabilities of some ids, and of all others together, by their definition."""
    kept = probabilities.gather(-1, ids)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)


def by_definition(objective, own, theirs):
    """The mean divergence of distributions."""
    mean = (own + theirs) / 2
    return {
        "kl": (theirs * (theirs / own).log()).sum(-1),
        "reverse-kl": (own * (own / theirs).log()).sum(-1),
        "jsd": ((theirs * (theirs / mean).log()).sum(-1) + (own * (own / mean).log()).sum(-1)) / 2,
    }[objective.kind]


def gradients(loss, hidden, weights):
    given = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    value = loss(*given)
    value.backward()
    return value.detach().double(), *(tensor.grad.double() for tensor in given)


@pytest.mark.parametrize(("kind", "divergence"), [("samples", "kl"), *(("topk", kind) for kind in DIVERGENCES)])
@pytest.mark.parametrize(("temperature", "ce"), [(1.0, 0.0), (2.0, 0.3), (1.0, 1.0)])
def test_loss_and_gradients_are_those_of_the_definition(kind, divergence, temperature, ce):
    hidden, weights, labels, teacher = rows()
    kept, objective = KINDS[kind](8, V), Objective(divergence, temperature, ce)
    ids, numbers = kept.unpack(kept.pack(*kept.keep((teacher / temperature).log_softmax(-1).float(), torch.Generator().manual_seed(1))))

    def expected(h, w):
        logits = h @ w.T
        own = (logits / temperature).softmax(-1)
        if kind == "samples":
            apart = -(numbers.double() * own.gather(-1, ids).log()).sum(-1)
        else:
            apart = by_definition(objective, outcomes(own, ids), outcomes((teacher / temperature).softmax(-1), ids))
        return ((1 - ce) * temperature**2 * apart - ce * logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]).mean()

    found = gradients(lambda h, w: KeptObjective(objective, kept)(h, matrix(w), ids, numbers, labels), hidden, weights)
    for ours, theirs in zip(found, gradients(expected, hidden, weights), strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()  # log-probabilities are float32


def test_samples_are_the_distribution_on_average_and_so_is_their_gradient():
    hidden, weights, labels, teacher = rows(6)
    kept, theirs = Samples(8, V), teacher.softmax(-1)
    draw, found, slopes = torch.Generator().manual_seed(2), [], []
    for _ in range(4000):
        ids, ones = kept.keep(theirs.log(), draw)
        found.append(torch.zeros(6, V).double().scatter_add(-1, ids, ones.double()) / 8)
    counts = 8 * torch.stack(found)
    assert ((counts - 8 * theirs).abs() < 1 + 1e-9).all()  # as often as expected, or once more or less
    error = counts.std(0) / len(found) ** 0.5
    assert ((counts.mean(0) - 8 * theirs).abs() <= 5 * error + 1e-3).all()

    full = gradients(lambda h, w: by_definition(Objective(), (h @ w.T).softmax(-1), theirs).mean(), hidden, weights)[1]
    for _ in range(400):
        ids, numbers = kept.unpack(kept.pack(*kept.keep(theirs.log(), draw)))
        slopes.append(gradients(lambda h, w, i=ids, n=numbers: KeptObjective(Objective(), kept)(h, matrix(w), i, n, labels), hidden, weights)[1])
    slopes = torch.stack(slopes)
    away = (slopes.mean(0) - full).abs() / (slopes.std(0) / len(slopes) ** 0.5)
    assert away.max() < 5
    assert slopes.std() > 1e-3  # single ones are not the mean


def test_samples_of_a_sharp_distribution_are_not_of_ids_without_probability(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, dtype: torch.zeros(shape, dtype=dtype))  # an offset of 0 is drawn now and then
    log_probs = torch.full((3, V), -torch.inf)
    log_probs[:, 7], log_probs[:, 9] = torch.tensor(0.7).log(), torch.tensor(0.3).log()
    ids, _ = Samples(16, V).keep(log_probs, torch.Generator())
    assert [(row == 7).sum().item() for row in ids] == [12, 12, 12]
    assert [(row == 9).sum().item() for row in ids] == [4, 4, 4]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_of_the_likeliest_ids_are_the_whole_prediction(divergence):
    hidden, weights, labels, teacher = rows()
    kept, objective = TopK(V, V), Objective(divergence, 1.5, 0.1)
    ids, numbers = kept.keep((teacher.float() / 1.5).log_softmax(-1), torch.Generator())
    found = gradients(lambda h, w: KeptObjective(objective, kept)(h, matrix(w), ids, numbers, labels), hidden, weights)
    whole = gradients(lambda h, w: objective(h, matrix(w), teacher, lambda part: part, labels), hidden, weights)
    for ours, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_tail_of_almost_nothing_has_a_value_and_a_gradient():
    own = torch.tensor([[30.0, 0.0, 0.0, -3.0]], requires_grad=True)  # 1 - p(first) is 0 in float32
    ids, numbers = TopK(1, 4).keep(torch.tensor([[20.0, 1.0, 0.0, 0.0]]).log_softmax(-1), torch.Generator())
    exact = (torch.tensor([1.0, 0.0, 0.0]).double() - torch.tensor([20.0, 1.0, 0.0, 0.0]).double().logsumexp(0)).logsumexp(0)
    assert numbers[0, 1].item() == pytest.approx(exact.item(), rel=1e-6)
    sparse_divergence_reference(own, ids, numbers, torch.tensor([-100]), "reverse-kl").sum().backward()
    assert own.grad.isfinite().all()
    assert own.grad.abs().max() > 0


@pytest.mark.parametrize("vocabulary", [V, 70_000])
@pytest.mark.parametrize(("kind", "size"), [("samples", 3), ("samples", 300), ("topk", 5)])
def test_what_is_packed_is_read_back_and_takes_no_more_than_is_said(kind, size, vocabulary):
    kept = KINDS[kind](size, vocabulary)
    ids, numbers = kept.keep(torch.randn(7, vocabulary).log_softmax(-1), torch.Generator().manual_seed(0))
    packed = kept.pack(ids, numbers)
    read_ids, read_numbers = kept.unpack(packed)
    before, after = (torch.zeros(7, vocabulary + 1) for _ in range(2))
    weights = numbers / size if kind == "samples" else numbers[:, :-1]
    before.scatter_add_(-1, ids, weights.float())
    after.scatter_add_(-1, read_ids, read_numbers[:, : read_ids.shape[1]])
    torch.testing.assert_close(before, after)
    assert sum(tensor.nbytes for tensor in packed.values()) <= 7 * kept.bytes_per_token


def cache(folder="kept", kind="samples", needed=None, width=16, **more):
    ids = torch.randint(3, 128, (20, width), generator=torch.Generator().manual_seed(1))
    return TeacherCache(Path(folder), KINDS[kind](8, 128), 1.0, next_tokens(ids[:16]), needed or 16, next_tokens(ids[16:]), **more)


def made(kind="samples", folder="kept", needed=None):
    result = cache(folder, kind, needed)
    result.folder.mkdir(exist_ok=True)
    result.fill(tiny("llama").eval(), lambda _: None)
    return result


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def _small_shards(monkeypatch):
    monkeypatch.setattr(_teacher_cache, "SHARD", 64)  # four windows of 16
    monkeypatch.setattr(_teacher_cache, "BATCH", 32)


@pytest.mark.usefixtures("_small_shards")
@pytest.mark.parametrize("kind", KINDS)
def test_each_window_has_the_predictions_of_its_own_tokens(kind):
    kept = made(kind)
    assert len(contents("kept")) == 5
    model, windows = tiny("llama").eval(), CachedWindows(kept)
    for index in (0, 5, 15):
        found = windows[index]
        assert torch.equal(found["input_ids"], kept.train[index]["input_ids"])
        assert found["counts"].tolist() == [True] * 15 + [False]
        assert not found["numbers"][-1].any()
        with torch.no_grad():
            expected = model(found["input_ids"][None]).logits[0, :-1].log_softmax(-1)
        if kind == "topk":
            torch.testing.assert_close(found["numbers"][:-1, :-1], expected.gather(-1, found["ids"][:-1]), atol=1e-5, rtol=1e-5)
        else:
            counts = 8 * torch.zeros(15, 128).scatter_add(-1, found["ids"][:-1], found["numbers"][:-1])
            assert ((counts - 8 * expected.exp()).abs() < 1.001).all()
    kept.check()


@pytest.mark.usefixtures("_small_shards")
def test_windows_that_come_twice_get_samples_of_their_own():
    twice = [*cache().train]
    twice[15] = twice[3]  # the last of the last shard, and of the first
    Path("kept").mkdir()
    kept = TeacherCache(Path("kept"), KINDS["samples"](8, 128), 1.0, twice, 16, cache().held_out)
    kept.fill(tiny("llama").eval(), lambda _: None)
    windows = CachedWindows(kept)
    assert not torch.equal(windows[3]["ids"], windows[15]["ids"])


@pytest.mark.usefixtures("_small_shards")
def test_a_longer_run_adds_shards_and_a_shorter_one_reads_the_first():
    first = made(needed=3)
    assert sorted(contents("kept")) == [HELD_OUT, "windows-000000.safetensors"]
    before = contents("kept")
    longer = made(needed=9)
    assert len(contents("kept")) == 4
    assert before.items() <= contents("kept").items()
    assert len(CachedWindows(longer)) == 9
    assert len(CachedWindows(first)) == 3


@pytest.mark.usefixtures("_small_shards")
def test_a_run_that_was_killed_while_it_wrote_goes_on_to_the_same_bytes(monkeypatch):
    Path("kept").mkdir()
    written = []

    def dying(path):
        written.append(path)
        if len(written) == 5:  # each file and then its folder: this is the draft of the third file
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(_teacher_cache, "to_disk", dying)
        process = multiprocessing.get_context("fork").Process(target=made)
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    left = contents("kept")
    assert sorted(left) == [HELD_OUT, "windows-000000.safetensors", f"windows-000001.safetensors{DRAFT}"]
    made()
    made(folder="whole")
    after = {name: data for name, data in contents("kept").items() if name.endswith(".safetensors")}
    assert after == contents("whole")
    assert all(after[name] == data for name, data in left.items() if name.endswith(".safetensors"))


@pytest.mark.parametrize("damage", ["byte", "cut"])
@pytest.mark.parametrize("name", [HELD_OUT, "windows-000000.safetensors"])
def test_a_damaged_file_is_found(damage, name):
    kept = made()
    file = Path("kept", name)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data if damage == "byte" else data[:-3])
    with pytest.raises(OptionError, match=rf"kept/{name} is damaged; remove that file, and the same command computes it again"):
        kept.check()


def test_predictions_for_other_windows_are_found():
    made()
    other = TeacherCache(Path("kept"), KINDS["samples"](8, 128), 1.0, cache().train[::-1], 16, cache().held_out)
    with pytest.raises(OptionError, match="has predictions for other windows of text"):
        other.check()


@pytest.mark.parametrize("kind", DECODERS)
def test_the_head_beside_held_out_windows_gives_the_teachers_logits(kind):
    Path("kept").mkdir()
    model, kept = heed_caps(tiny(kind).eval()), cache()
    kept.fill(model, lambda _: None)
    held_out = HeldOutWindows(kept)
    window = held_out[2]
    with torch.no_grad():
        expected = head_of(model)(model.base_model(input_ids=window["input_ids"][None], use_cache=False).last_hidden_state)[0]
        torch.testing.assert_close(held_out.head(model.device)(window["hidden"]), expected, atol=1e-5, rtol=1e-5)


def told(place="out"):
    return json.loads(Path(place, "effconvert.json").read_text())["distillation"]


@pytest.mark.few(4)
@pytest.mark.parametrize("more", [{}, {"cache_kind": "topk", "cache_size": 16, "objective": "reverse-kl"}, {"temperature": 2.0, "ce": 0.1}])
def test_a_second_run_reads_what_the_first_one_kept(more, monkeypatch):
    put(Path("model"), noise=1.0, only="weight")
    run("model", Gqa(groups=1), Distill(**{**SHORT, "cache_teacher": None, "train_tokens": 1024}), place="without")
    run("model", Gqa(groups=1), Distill(**SHORT, **more), place="first")
    before, real = contents("kept"), loading.load

    def load(folder, *rest):
        assert Path(folder).name != "model"  # the teacher
        return real(folder, *rest)

    monkeypatch.setattr(loading, "load", load)
    run("model", Gqa(groups=1), Distill(**SHORT, **more), place="second")
    assert contents("kept") == before
    curves = [[(point["tokens"], point["held_out"]) for point in told(place)["curve"]] for place in ("first", "second")]
    assert curves[0] == curves[1]
    assert told("first")["before"] == pytest.approx(told("without")["before"], rel=1e-6)  # exact, though predictions are not whole
    assert told("first")["after"] < 0.97 * told("first")["before"]
    assert told("first")["cache"]["kind"] == more.get("cache_kind", "samples")
    first, second, without = (tensors(Path(place)) for place in ("first", "second", "without"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name: tensor.shape for name, tensor in first.items()} == {name: tensor.shape for name, tensor in without.items()}


def test_a_teacher_with_a_factorised_embedding():
    put(Path("model"), noise=1.0, only="weight")
    run("model", FactorEmbed(rank=16), place="factored")
    run("factored", Gqa(groups=1), Distill(**SHORT), place="first")
    run("factored", Gqa(groups=1), Distill(**{**SHORT, "cache_teacher": None}), place="without")
    assert told("first")["before"] == pytest.approx(told("without")["before"], rel=1e-4)


def test_the_recipe_beside_it_finds_the_folder():
    put(Path("model"))
    run("model", Gqa(groups=1), Distill(**SHORT))
    assert "cache-teacher: ../kept" in Path("out/effconvert.yaml").read_text()
    (recipe,) = read(Path("out/effconvert.yaml"), output="again")
    assert recipe.steps[-1].cache_teacher == Path("kept")


@pytest.mark.parametrize("tokens", [2560, 1024])  # a shard has more than the second
def test_the_plan_says_what_it_takes_on_disk(tokens):
    put(Path("model"))
    options = {**SHORT, "train_tokens": tokens}
    outcome = run("model", Gqa(groups=1), Distill(**options), dry_run=True)
    assert "take up to" in " ".join(outcome.plan.notes)
    assert not Path("kept").exists()
    real = run("model", Gqa(groups=1), Distill(**options))
    told = next(note for note in real.plan.notes if "take up to" in note)
    on_disk = sum(path.stat().st_size for path in Path("kept").iterdir()) / 1000
    assert on_disk <= float(told.partition("take up to ")[2].split()[0]) * 1.2


OTHERS = [
    ({"temperature": 2.0}, "--temperature was 1.0 for them and is 2.0 now"),
    ({"window": 48}, "they are of another text, --window was 32 for them and is 48 now"),
    ({"cache_kind": "topk"}, "--cache-kind was samples for them and is topk now"),
    ({"cache_size": 8}, "--cache-size was 64 for them and is 8 now"),
]


@pytest.mark.parametrize(("more", "message"), OTHERS)
def test_predictions_of_something_else_are_refused(more, message):
    put(Path("model"))
    run("model", Gqa(groups=1), Distill(**SHORT))
    before = contents("kept")
    with pytest.raises(OptionError, match=f"--cache-teacher kept has other predictions: {message}; give another folder, or remove this one"):
        run("model", Gqa(groups=1), Distill(**{**SHORT, **more}), place="other")
    assert contents("kept") == before
    assert not any(path.name.startswith("other") for path in Path().iterdir())


def test_another_teacher_text_or_tokenizer_is_refused():
    put(Path("model"))
    put(Path("noisy"), noise=1.0)
    run("model", Gqa(groups=1), Distill(**SHORT))
    with pytest.raises(OptionError, match="they are another teacher's"):
        run("noisy", Gqa(groups=1), Distill(**SHORT), place="other")
    Path("text.txt").write_text(prose(seed=5))
    with pytest.raises(OptionError, match="they are of another text"):
        run("model", Gqa(groups=1), Distill(**SHORT), place="other")


def test_folders_that_are_not_ours_or_lie_in_a_model_are_refused():
    put(Path("model"))
    Path("kept").mkdir()
    Path("kept/mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="kept holds files that effconvert did not write"):
        run("model", Gqa(groups=1), Distill(**SHORT))
    assert contents("kept") == {"mine.txt": b"mine"}
    for place in ("out", "out/kept", "model/kept", "out.partial"):
        with pytest.raises(OptionError, match="are the same or one inside the other"):
            run("model", Gqa(groups=1), Distill(**{**SHORT, "cache_teacher": place}))
    with pytest.raises(OptionError, match=r"text\.txt is a file; give a folder"):
        run("model", Gqa(groups=1), Distill(**{**SHORT, "cache_teacher": "text.txt"}))
    assert {path.name for path in Path().iterdir()} - {"cache"} == {"model", "text.txt", "kept"}


def test_what_samples_cannot_do_and_sizes_beyond_the_vocabulary_are_refused():
    with pytest.raises(OptionError, match="--objective jsd needs the original's probability of what the model predicts, which samples do not have"):
        Distill(**SHORT, objective="jsd")
    for more, what in (
        ({"hidden": 0.5}, "--hidden needs the original's hidden states"),
        ({"unchanged_rate": 0.1}, "--unchanged-rate needs the original's weights"),
    ):
        with pytest.raises(OptionError, match=f"{what}, which --cache-teacher does not keep"):
            Distill(**SHORT, **more)
    put(Path("model"))
    put(Path("encoder"), "bert")
    with pytest.raises(OptionError, match="--cache-teacher keeps predictions of the next token, and BertForMaskedLM makes none"):
        run("encoder", Gqa(groups=1), Distill(**SHORT))
    with pytest.raises(OptionError, match="--cache-size 129 is more than the 128 tokens of the model"):
        run("model", Gqa(groups=1), Distill(**SHORT, cache_kind="topk", cache_size=129))


def test_memory_is_that_of_no_teacher(monkeypatch):
    put(Path("model"))
    from effconvert.convert.train import training_bytes

    checkpoint = open_checkpoint(Path("model"))
    whole, cached = (plan(checkpoint, (Gqa(groups=1), Refit(), Distill(**{**SHORT, "cache_teacher": place}))) for place in (None, "kept"))
    assert training_bytes(whole) - training_bytes(cached) == whole.before.bytes - 4 * 128 * whole.config.hidden


def test_who_comes_second_waits():
    Path("kept").mkdir()
    told, first = [], FileLock("kept/.lock")

    class Told(NoProgress):
        def step(self, what):
            told.append(what)
            first.release()

    first.acquire()
    with _locked(Path("kept"), Told()):
        assert told == ["waiting for another effconvert that writes kept"]


def test_files_are_plain_safetensors_with_the_token_ids():
    kept = made()
    with safe_open("kept/windows-000000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("tokens").long(), torch.stack([item["input_ids"] for item in kept.train]))
