"""Low-rank adapters (LoRA) beside weights that stay: W x + s B (A x) is trained, and W + s B A is what is written."""
# r = rank; W [out, in], A [r, in], B [out, r].

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from effconvert.errors import ModelError
from effconvert.heal._sharing import LAYER
from effconvert.modeling.transformers_internals import Conv1D

FILE = "adapters.safetensors"  # beside the weights of a checkpoint, which have the adapters in them: what a stopped run goes on with
NAMES = ("lora_A", "lora_B")  # of the parameters, in the module of W
SCALE = 2.0  # s: alpha is twice the rank
RATE = 10  # learning rate of adapters, in multiples of the rate


class Adapters:
    """Adapters on the linear layers of a model."""

    def __init__(self, model: Any, kept: Iterable[str], rank: int) -> None:
        """Put an adapter beside each of the weights named `kept` that is a matrix of a linear layer in a block of the model; it changes nothing yet.

        Raises:
            ModelError: there is none.
        """
        self.model, self.weights = model, dict[str, Any]()  # name of W -> its module
        adapters: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # layers that share a W share its adapter
        draw = torch.Generator().manual_seed(0)
        for name in kept:
            module = model.get_submodule(name.rpartition(".")[0])
            if not LAYER.fullmatch(name) or not name.endswith(".weight") or not isinstance(module, (nn.Linear, Conv1D)):
                continue
            weight = module.weight
            out, width = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
            if id(weight) not in adapters:
                a = (torch.rand(rank, width, generator=draw) * 2 - 1) * width**-0.5  # as Hu et al. begin: A is random, B zero
                adapters[id(weight)] = nn.Parameter(a.to(weight)), nn.Parameter(torch.zeros(out, rank).to(weight))
            for own, parameter in zip(NAMES, adapters[id(weight)], strict=True):
                module.register_parameter(own, parameter)
            module.register_forward_hook(_add)
            self.weights[name] = module
        if not self.weights:
            raise ModelError("no matrix of a linear layer is as in the original, so --lora has none to put an adapter beside; leave it out")

    def merged(self) -> dict[str, Tensor]:
        """Return the tensors of the model with each adapter added to its weight, under the names without adapters."""
        state = {name: tensor for name, tensor in self.model.state_dict().items() if not name.endswith(NAMES)}
        sums: dict[int, Tensor] = {}
        for name, module in self.weights.items():
            weight, change = state[name], SCALE * module.lora_B.detach() @ module.lora_A.detach()
            if id(module.lora_B) not in sums:
                sums[id(module.lora_B)] = weight + (change if isinstance(module, nn.Linear) else change.T)
            state[name] = sums[id(module.lora_B)]
        return state

    def save(self, folder: Path) -> None:
        """Write the adapters as they are, for `load`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.{own}": getattr(module, own).detach().cpu().clone() for name, module in self.weights.items() for own in NAMES}
        save_file(tensors, folder / FILE)

    def load(self, folder: str, trained: Mapping[str, Tensor]) -> None:
        """Read the adapters, and take those weights of the checkpoint that are trained whole: all others are the teacher's too, and stay."""
        stored = load_file(Path(folder) / FILE)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                stem, _, own = name.rpartition(".")
                if own in NAMES:
                    parameter.copy_(stored[f"{stem}.weight.{own}"])
                elif parameter.requires_grad:
                    parameter.copy_(trained[name])


def _add(module: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + SCALE * linear(linear(given[0], module.lora_A), module.lora_B)
