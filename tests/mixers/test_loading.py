"""Checkpoints with mixers are opened by transformers wherever effconvert is imported, and by nobody as what they are not."""

import json
import pickle
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

import effconvert
from effconvert.checkpoint.replaced import STUB_FILE, decode
from effconvert.convert.run import convert
from effconvert.errors import ModelError
from effconvert.families import FAMILIES
from effconvert.options import RunOptions
from effconvert.steps import load
from tests.mixers.mixing import pair, run, small, stock_config, tokens, wide
from tests.models import ATTENDING, DECODERS, characters, save, tiny

NAME = dict.fromkeys(ATTENDING, "linear") | {"gemma2": "streaming"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each family, made when it is asked for: its folder, and the model."""
    made = {}

    def find(kind):
        if kind not in made:
            _, model = pair(kind, (NAME[kind], small(NAME[kind], kind)))
            folder = save(model, tmp_path_factory.mktemp(kind) / kind)
            characters(folder)
            made[kind] = folder, model
        return made[kind]

    return find


@pytest.fixture
def script(python, environment, tmp_path):
    """Run lines of Python in a process of their own, without the network; return what they print, one JSON value."""

    def run_it(code, without=False):
        place = tmp_path / "place"
        place.mkdir(exist_ok=True)
        given = {**environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        given["PYTHONPATH"] = "" if without else given["PYTHONPATH"]
        done = subprocess.run([python, "-W", "ignore", "-c", textwrap.dedent(code)], env=given, cwd=place, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run_it


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "effconvert":
            raise ModuleNotFoundError("No module named 'effconvert'", name=name)
sys.meta_path.insert(0, Hidden())
"""

OPEN = """
found = {}
for auto in ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"):
    model = getattr(transformers, auto).from_pretrained(FOLDER)
    found[auto] = type(model).__name__
found["config"] = type(transformers.AutoConfig.from_pretrained(FOLDER)).__name__
found["by config"] = type(transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(FOLDER))).__name__
found["tokenizer"] = transformers.AutoTokenizer.from_pretrained(FOLDER).eos_token
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "order", [pytest.param("import effconvert, transformers", marks=pytest.mark.slow), "from transformers import AutoModel\nimport effconvert"]
)
def test_auto_classes_open_it_in_any_order_of_imports(folders, script, order):
    folder, _ = folders("llama")
    found = script(f"import json\n{order}\nimport transformers\nFOLDER = {str(folder)!r}\n{OPEN}")
    assert found == {
        "AutoModelForCausalLM": "EffconvertLlamaForCausalLM",
        "AutoModel": "EffconvertLlamaModel",
        "AutoModelForSequenceClassification": "EffconvertLlamaForSequenceClassification",
        "config": "EffconvertLlamaConfig",
        "by config": "EffconvertLlamaForCausalLM",
        "tokenizer": "</s>",
    }


def test_importing_effconvert_imports_neither_torch_nor_transformers(script):
    told = script("import effconvert, sys, json\nprint(json.dumps(sorted({'torch', 'transformers', 'numpy', 'safetensors'} & {*sys.modules})))")
    assert told == []


def test_importing_both_makes_no_family_of_transformers(script):
    """Registering twenty families would take seconds if it imported them."""
    told = script("import effconvert, transformers, sys, json\nfrom transformers import AutoModelForCausalLM\nprint(json.dumps([*sys.modules]))")
    assert not [name for name in told if name.startswith("transformers.models.") and ".modeling_" in name and ".auto." not in name]


@pytest.mark.slow
def test_the_module_that_is_waited_for_is_found_as_it_would_be_without_us(script):
    """Its source, for tracebacks and debuggers; anew when somebody reloads it; by other finders that wait for it; and not where transformers is not."""
    told = script("""
        import effconvert, importlib, inspect, json, sys

        class Other:
            seen = []
            def find_spec(self, name, path=None, target=None):
                if name.endswith(".configuration_auto"):
                    self.seen.append(name)

        class Old:
            def find_module(self, name, path=None):
                return None

        sys.meta_path[1:1] = [Old(), Other()]
        from transformers.models.auto import configuration_auto as auto
        known = ["effconvert_llama" in auto.CONFIG_MAPPING]
        auto = importlib.reload(auto)
        known.append("effconvert_llama" in auto.CONFIG_MAPPING)
        print(json.dumps([known, "class AutoConfig" in inspect.getsource(auto), len(Other.seen), auto.__spec__.origin == auto.__file__]))
    """)
    assert told == [[True, True], True, 2, True]


def test_without_transformers_the_error_is_pythons_own(script):
    told = script("""
        import effconvert, importlib.util, json, sys

        class Hidden:
            def find_spec(self, name, *_):
                if name.partition(".")[0] == "transformers":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Hidden())
        try:
            import transformers.models.auto.configuration_auto
        except ModuleNotFoundError as error:
            print(json.dumps(error.name))
    """)
    assert told == "transformers"


@pytest.mark.parametrize("kind", ATTENDING)
def test_auto_classes_open_every_family_with_its_weights(folders, kind):
    folder, model = folders(kind)
    family = FAMILIES[kind]
    head = transformers.AutoModelForCausalLM if family.decoder else transformers.AutoModelForMaskedLM
    opened, info = head.from_pretrained(folder, output_loading_info=True)
    assert type(opened) is type(model)
    assert isinstance(opened, getattr(transformers, family.lm))
    assert not any(info[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(run(opened.eval(), tokens()), run(model, tokens()))
    bare = transformers.AutoModel.from_pretrained(folder)
    assert type(bare).__name__ == f"Effconvert{family.base}"
    assert isinstance(bare, getattr(transformers, family.base))
    with torch.no_grad():
        made, expected = bare.eval()(tokens(1)).last_hidden_state, model.base_model(tokens(1), **({"use_cache": False} if family.decoder else {}))
    assert torch.equal(made, expected.last_hidden_state)


@pytest.mark.parametrize("kind", ATTENDING)
def test_without_effconvert_nobody_opens_it_as_what_it_is_not(folders, kind):
    """The class of transformers itself would leave the mixers out, and compute something else."""
    folder, _ = folders(kind)
    family = FAMILIES[kind]
    for name in (family.lm, family.base):
        for opens in (getattr(transformers, name), getattr(transformers, name).config_class):
            with pytest.raises(StrictDataclassError):
                opens.from_pretrained(folder)


def test_without_effconvert_auto_classes_name_what_is_missing(folders, script):
    folder, _ = folders("llama")
    told = script(
        HIDE
        + f"""
import json, transformers
found = {{}}
for auto in ("AutoModelForCausalLM", "AutoModel", "AutoConfig"):
    for trusted in (False, True):
        try:
            getattr(transformers, auto).from_pretrained({str(folder)!r}, trust_remote_code=trusted)
            found[f"{{auto}} {{trusted}}"] = "opened"
        except Exception as error:
            found[f"{{auto}} {{trusted}}"] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(found))
"""
    )
    assert len(told) == 6
    for how, said in told.items():
        assert ("pip install effconvert" if how.endswith("True") else "trust_remote_code") in said, (how, said)


@pytest.mark.slow
def test_trusted_code_opens_it_without_an_import_of_ones_own(folders, script):
    folder, model = folders("llama")
    told = script(
        f"""
import json, torch, transformers
ids = torch.tensor({tokens().tolist()})
found = {{}}
for auto in ("AutoModelForCausalLM", "AutoModel"):
    model = getattr(transformers, auto).from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
    found[auto] = type(model).__name__
    if auto == "AutoModelForCausalLM":
        found["sum"] = model(ids, use_cache=False).logits.double().sum().item()
        model.save_pretrained("again")
        found["files"] = sorted(__import__("os").listdir("again"))
print(json.dumps(found))
"""
    )
    assert [told["AutoModelForCausalLM"], told["AutoModel"]] == ["EffconvertLlamaForCausalLM", "EffconvertLlamaModel"]
    assert told["sum"] == pytest.approx(float(run(model, tokens()).double().sum()), rel=1e-6)
    assert STUB_FILE in told["files"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_file_beside_the_weights_says_what_is_needed(folders, kind):
    folder, model = folders(kind)
    stub = (folder / STUB_FILE).read_text()
    assert kind in stub
    assert "pip install effconvert" in stub
    said = json.loads((folder / "config.json").read_text())
    space = {}
    exec(compile(stub, STUB_FILE, "exec"), space)
    for auto, place in said["auto_map"].items():
        module, _, name = place.partition(".")
        assert f"{module}.py" == STUB_FILE
        found = space["__getattr__"](name)
        if auto != "AutoConfig":
            assert found is type(getattr(transformers, auto).from_config(model.config))
        else:
            assert found is type(model.config)
    head = "AutoModelForCausalLM" if kind in DECODERS else "AutoModelForMaskedLM"
    assert set(said["auto_map"]) == {"AutoConfig", "AutoModel", head}


def test_what_a_conversion_writes_is_what_transformers_writes(tmp_path):
    source = save(tiny("llama"), tmp_path / "source")
    step = load("linear")(window=6)
    out = convert(str(source), (step,), RunOptions(output=tmp_path / "out", verify=False)).output
    said = json.loads((out / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    again = save(model, tmp_path / "again")
    resaved = json.loads((again / "config.json").read_text())
    for key in ("model_type", "architectures", "auto_map", "layer_types", "effconvert"):
        assert resaved[key] == said[key], key
    assert (again / STUB_FILE).read_text() == (out / STUB_FILE).read_text()
    assert "effconvert.json" in {file.name for file in out.iterdir()}
    opened = transformers.AutoModelForCausalLM.from_pretrained(again)
    assert torch.equal(run(opened.eval(), tokens()), run(model.eval(), tokens()))
    assert type(effconvert.load(again).model) is type(model)


@pytest.mark.parametrize("kind", ATTENDING)
def test_a_config_without_its_mixers_is_the_one_it_was(kind):
    model = tiny(kind, **wide(kind))
    config = stock_config(model)
    for step in (load(NAME[kind])(**small(NAME[kind], kind), layers="0"), load(NAME[kind])(**small(NAME[kind], kind), layers="1")):
        config = step.config(config)
    raw, _, replaced, _ = decode(json.loads(json.dumps(config.content)))
    assert raw == json.loads(json.dumps(stock_config(model).raw))
    assert replaced == config.replaced
    assert [entry["layers"] for entry in config.content["effconvert"]["replaced"]] == [[0, 1]]  # the same in both
    assert not {"layers", "keep_softmax"} & config.content["effconvert"]["replaced"][0]["options"].keys()


def test_mixers_named_in_a_config_survive_being_copied_and_printed(folders):
    _, model = folders("llama")
    for copied in (
        pickle.loads(pickle.dumps(model.config)),
        type(model.config).from_dict(model.config.to_dict()),
        type(model.config)(**model.config.to_dict()),
    ):
        assert copied.to_dict() == model.config.to_dict()
    assert json.loads(model.config.to_json_string(use_diff=True))["effconvert"] == model.config.effconvert
    assert "effconvert_linear" in repr(model.config)


def test_a_model_is_pickled(folders):
    _, model = folders("llama")
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(run(again, tokens()), run(model, tokens()))
    text = again.generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(text, model.generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_a_model_moved_to_another_type_or_loaded_in_one_keeps_its_mixers(folders):
    folder, model = folders("llama")
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    own = dict(model.named_parameters())
    assert all(torch.equal(parameter, own[name].bfloat16()) for name, parameter in half.named_parameters())


def test_pipelines_take_it(folders):
    folder, _ = folders("llama")
    writer = transformers.pipeline("text-generation", model=str(folder))
    assert writer.model.__class__.__name__ == "EffconvertLlamaForCausalLM"
    assert len(writer("abc", max_new_tokens=5, do_sample=False)[0]["generated_text"]) > 3


def test_a_head_of_another_kind_begins_anew_and_keeps_the_mixers(folders, tmp_path):
    folder, model = folders("llama")
    made = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert type(made).__name__ == "EffconvertLlamaForSequenceClassification"
    mine, theirs = made.model.state_dict(), model.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    made.save_pretrained(tmp_path / "made")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "made")
    made.config.pad_token_id = again.config.pad_token_id = 0
    assert torch.equal(again.eval()(tokens()).logits, made.eval()(tokens()).logits)


def test_a_model_begun_from_its_config_has_mixers_as_they_begin(folders):
    _, model = folders("llama")
    made = type(model)(model.config)
    for name, parameter in made.named_parameters():
        if ".effconvert." in name:
            index = int(name.split(".")[2])
            begun = load("linear")(window=6).initial_values(made.model.layers[index].self_attn.effconvert.config, index)
            assert torch.equal(parameter.detach(), begun[name.rpartition(".")[2]]), name


def test_copies_in_another_folder_open(folders, tmp_path):
    folder, _ = folders("llama")
    place = Path(shutil.copytree(folder, tmp_path / "ein Ordner mit Ü"))
    assert type(effconvert.load(place).model).__name__ == "EffconvertLlamaForCausalLM"


def test_effconvert_mixers_has_the_classes_and_nothing_else(folders):
    from effconvert import modeling as mixers

    _, model = folders("llama")
    assert mixers.EffconvertLlamaForCausalLM is type(model)
    assert mixers.EffconvertLlamaConfig is type(model.config)
    for name in ("Nonsense", "State", "_call_", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(mixers, name)
    for name in ("EffconvertNonsense", "EffconvertT5Model", "EffconvertNonsenseConfig", "EffconvertT5Config", "EffconvertLlamaNonsense"):
        with pytest.raises(ModelError, match=f"^{name.removeprefix('Effconvert')} is no class of a family that effconvert knows; it knows llama, "):
            getattr(mixers, name)
