"""Keep the experts of a model equally busy: the load-balancing loss of its routers, and how many tokens the most used expert gets."""
# N = tokens, M = hidden width, E = experts, K = experts chosen for a token, L = layers with experts.

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effconvert.errors import ModelError
from effconvert.modeling.transformers_experts import load_balancing_loss, routers


def balance(model: Any, needed: bool) -> "Balance | None":
    """Return what balances the experts of a model of transformers; None where it has none.

    Raises:
        ModelError: they are `needed`, and transformers does not record what their routers compute.
    """
    if all_routers := routers(model.base_model):
        return Balance(model, all_routers)
    if needed:
        raise ModelError(f"transformers does not record the router logits of {type(model).__name__}, which --balance needs; leave it out")
    return None


class Balance:
    """Records the router logits of a model whenever it runs, as transformers does on request."""

    def __init__(self, model: Any, routers: Mapping[str, torch.nn.Module]) -> None:
        self.chosen = model.config.get_text_config().num_experts_per_tok
        self.logits: tuple[Tensor, ...] = ()  # of the last run: [N, E] for each layer
        self.used: Tensor | None = None  # how often each expert was chosen on held-out text, [L, E]
        parameters = {id(parameter): parameter for router in routers.values() for parameter in router.parameters()}
        self.rates = {name: _rate(parameter) for name, parameter in model.named_parameters() if id(parameter) in parameters}
        model.base_model.register_forward_pre_hook(lambda module, given, named: (given, {**named, "output_router_logits": True}), with_kwargs=True)
        model.base_model.register_forward_hook(self._keep)

    def _keep(self, module: Any, given: Any, output: Any) -> None:
        self.logits = getattr(output, "router_logits", None) or ()

    def loss(self, counts: Tensor) -> Tensor:
        """Return the loss of the last run: 0 where each expert is chosen equally often.

        Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6, by transformers' own function. It adds up all layers, so that an expert that is busy in one
        layer would make up for its namesake in another: each layer is asked for itself, and the mean taken. K is what it gives for equal shares.

        Args:
            counts: the tokens that count, bool [B, T], where B T = N.
        """
        layers = [load_balancing_loss(logits, self.chosen, counts) - self.chosen for logits in self.logits]
        return torch.stack(layers).mean()

    def note(self, counts: Tensor) -> None:
        """Count which experts were chosen in the last run for tokens that count."""
        chosen = [logits[counts.flatten()].topk(self.chosen, -1).indices for logits in self.logits]  # [N, K]
        used = torch.stack([torch.bincount(experts.flatten(), minlength=self.logits[0].shape[-1]) for experts in chosen])
        self.used = used if self.used is None else self.used + used

    def most_used(self, accelerator: Any) -> float:
        """Return the share of the tokens noted by all processes that the most used expert got, a mean over layers, and begin again; K / E is even."""
        used, self.used = accelerator.reduce(self.used), None
        return float((self.chosen * used.amax(1) / used.sum(1)).mean())


def _rate(router: Tensor) -> float:
    """Return the learning rate of a router's weights [E, M], in multiples of the rate: in proportion to their size, where that is below a linear layer's.

    Adam's steps are as long as its rate says, however small a weight is: those of `moe-split`, whose routers are flat, would be overwritten in one step.
    """
    size = float(router.detach().float().square().mean().sqrt())
    return min(1.0, size * math.sqrt(router.shape[-1]))
