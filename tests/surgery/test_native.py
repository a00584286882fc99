"""What techniques write as another family of transformers is opened, run and generated with where nothing of effconvert can be imported."""

import json
import subprocess
from pathlib import Path

import torch

from effconvert.surgery.attention.mla import Mla
from effconvert.surgery.attention.rope import Rope
from effconvert.surgery.attention.rope_layout import RopeLayout
from effconvert.surgery.depth.albert import Albert
from effconvert.surgery.ffn.moe import Moe
from effconvert.surgery.mixing.fnet import Fnet
from tests.heal.healing import opened, prose, put, run

UNBIASED = {"attention_bias": False, "mlp_bias": False}
CASES = {  # class that is written: the family before, changes to its config, the step, whether it changes logits
    "MixtralForCausalLM": ("llama", UNBIASED, Moe(experts=4), False),
    "DeepseekV3ForCausalLM": ("llama", {"num_key_value_heads": 2, **UNBIASED}, Mla(rank=16), False),
    "AlbertForMaskedLM": ("bert", {}, Albert(groups=1), True),
    "FNetForMaskedLM": ("bert", {}, Fnet(), True),
    "RoFormerForMaskedLM": ("bert", {}, Rope(), True),
    "JinaEmbeddingsV3ForMaskedLM": ("roberta", {}, Rope(), True),
    "GPTNeoXForCausalLM": ("gpt2", {}, Rope(), True),
    "LlamaForCausalLM": ("glm", {}, RopeLayout(), False),
    "PhiForCausalLM": ("codegen", {}, RopeLayout(), False),
}
ALONE = """
import sys
sys.modules["effconvert"] = None
import torch, transformers
ids = torch.arange(3, 23)[None].repeat(2, 1)
for name in sys.argv[1:]:
    auto = transformers.AutoModelForCausalLM if "Causal" in name else transformers.AutoModelForMaskedLM
    model, info = auto.from_pretrained(name, output_loading_info=True)
    assert type(model) is getattr(transformers, name)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.inference_mode():
        made = {"logits": model.eval()(ids).logits}
        if "Causal" in name:
            made["tokens"] = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    torch.save(made, name + ".pt")
"""


def test_native_classes_need_nothing_of_effconvert(python, environment):
    Path("text.txt").write_text(prose())
    ids, originals = torch.arange(3, 23)[None].repeat(2, 1), {}
    for name, (kind, changes, step, _) in CASES.items():
        originals[name] = opened(put(Path(f"{name}-source"), kind, **changes))
        run(f"{name}-source", step, place=name)
        assert json.loads(Path(name, "config.json").read_text())["architectures"] == [name]
    done = subprocess.run([python, "-W", "ignore", "-c", ALONE, *CASES], env=environment, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    for name, (*_, changed) in CASES.items():
        alone = torch.load(f"{name}.pt")
        model = opened(name) if changed else originals[name]
        with torch.inference_mode():
            expected = model(ids).logits
        assert (alone["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        if "tokens" in alone:
            assert torch.equal(alone["tokens"], model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)), name
