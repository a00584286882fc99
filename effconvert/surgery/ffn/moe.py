"""Copy each FFN into experts behind a router: sparse upcycling (MoE)."""
# E = experts, K = experts that run for a token, G = granularity, M = hidden width, F = width inside the FFN.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from pydantic import Field

from effconvert.checkpoint.families import FAMILIES
from effconvert.checkpoint.replaced import DEEPEST, overlap
from effconvert.checkpoint.shape import TOP_K_KEY
from effconvert.errors import ModelError, OptionError
from effconvert.surgery._surgery import Layerwise

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer

FFN = ("gate", "up", "down")
SPREAD = 0.02  # of the router's weights, a standard deviation
BALANCE = 0.02  # of the loss that keeps experts equally busy, as in Drop-Upcycling; it counts once `output_router_logits` is true
SHARED = 32  # neurons of the expert that qwen2_moe runs for every token, which gives nothing at first: the least that every loader takes
CODE = ("auto_map", "layer_types", "max_window_layers")  # keys that speak of the class before


class Moe(Layerwise):
    """Copy each FFN into experts behind a router: sparse upcycling (MoE).

    This makes a model LARGER: every FFN is stored E times, and each token runs K of them. It is where training of an MoE begins; without training
    nothing gets better. The output is transformers' own family with experts (llama becomes mixtral, qwen3 becomes qwen3_moe) with the same logits:
    the experts are equal at first, and the weights of the chosen ones sum to one. --noise and --drop-upcycling make experts differ and change the
    logits.
    Komatsuzaki et al. 2023, arXiv 2212.05055; Drop-Upcycling: Nakamura et al. 2025, arXiv 2502.19261; granular experts: He et al. 2024,
    arXiv 2410.07524.

    \b
    Examples:
      effconvert moe --experts 8 ./SmolLM2-135M
      effconvert moe --experts 8 --top-k 1 --granularity 4 ./Qwen3-0.6B -o ./fine
      effconvert moe --experts 8 --drop-upcycling 0.5 --layers 1-27/2 ./Qwen2.5-0.5B
    """

    experts: int = Field(ge=2, le=1024, description="Experts of a layer, each a copy of its FFN.", json_schema_extra={"metavar": "E"})
    top_k: int = Field(2, ge=1, description="Experts that run for a token.", json_schema_extra={"metavar": "K"})
    granularity: int = Field(
        1,
        ge=1,
        description="Cut each expert into so many, of as many neurons fewer: E*G experts, of which K*G run. All G of an expert are chosen together at first.",
        json_schema_extra={"metavar": "G"},
    )
    noise: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Add normal noise to the experts, so many times as large as the numbers of a matrix are spread: 0.01."
    )
    drop_upcycling: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Draw this share of each expert's neurons anew, by mean and spread of those they replace, and train it then: 0.5 in the paper.",
        json_schema_extra={"metavar": "FRACTION"},
    )
    seed: int = Field(0, ge=0, lt=2**31, description="What routers, noise and neurons are drawn by.")

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Any numbers, and what it becomes."""
        return f"--experts E --top-k K, as a {next(iter(_with_experts(config)))}"

    def check(self, config: Config) -> None:
        """Refuse models that no family of experts is like, and numbers that do not go together."""
        self._becomes(config)
        if self.top_k > self.experts:
            raise OptionError(f"--top-k {self.top_k} is more than the {self.experts} --experts that there are to choose from; give at most that")
        if self.experts * self.granularity > DEEPEST:
            raise OptionError(f"--experts {self.experts} times --granularity {self.granularity} is more experts than any model has; give at most {DEEPEST}")
        if config.ffn % self.granularity:
            fits = [number for number in range(1, 65) if config.ffn % number == 0]
            raise OptionError(
                f"--granularity {self.granularity} does not divide the {config.ffn} neurons of this model's FFN; give {', '.join(map(str, fits[1:])) or 1}"
            )
        for index in sorted(self.chosen(config)):
            other = next((record.technique for record in config.replaced_in(index) if overlap(record.place, "ffn")), None)
            if other or "ffn" in config.skips(index):
                raise OptionError(f"layer {index} has {other or 'nothing'} in place of its FFN, and experts are copies of one; begin from the original")

    def is_exact(self, config: Config) -> bool:
        """Where experts are copies, or slices whose scale is a power of two, so that no number is rounded."""
        return not (self.noise or self.drop_upcycling) and self.granularity & (self.granularity - 1) == 0

    def notes(self, config: Config) -> str:
        """Say that this is to be trained, and what it costs until then."""
        told = [f"it gets larger, a token's FFNs cost {self.top_k} x what they cost before, and nothing is better until it is trained"]
        told += ["what is drawn changes what the model computes"] if self.noise or self.drop_upcycling else []
        if self.granularity > 1:
            told.append("in bfloat16 the slices of two experts can tie, and then a few tokens get some of each")
        return "; ".join(told)

    def config(self, config: Config) -> Config:
        """Become the family with experts: what transformers takes for granted in this one is written out, where it takes something else in that."""
        return self._becomes(config)

    def layer(self, layer: Layer) -> None:
        """Put copies of the FFN, or slices of it, in its place, and a router before them."""
        import torch

        family, width = self._becomes(layer.config).family, layer.config.hidden
        for number in range(self.experts * self.granularity):
            for part in FFN:
                self._expert(layer, number, part)
        layer["router"] = self._normal(layer, "router", self.experts, width)[:, None].expand(-1, self.granularity, -1).flatten(0, 1)
        if family.shared_ffn_key:
            for part in ("shared_gate", "shared_up"):
                layer[part] = self._normal(layer, part, SHARED, width)
            for part, shape in (("shared_down", (width, SHARED)), ("shared_router", (1, width))):
                layer[part] = torch.zeros(shape, device="meta" if layer.shapes_only else "cpu")
        for part in FFN:
            del layer[part]

    def _becomes(self, config: Config) -> Config:
        chosen = self.chosen(config)
        families = _with_experts(config)
        able = [kind for kind in families if FAMILIES[kind].dense_layers_key or len(chosen) == config.layers]
        if not able:
            raise OptionError(f"a {' or a '.join(families)} has experts in all of its layers, and --layers leaves some out; leave out --layers")
        made = families[able[0]]
        family = made.family
        inner = config.ffn // self.granularity
        said: dict[str, Any] = {family.experts_key: self.experts * self.granularity, TOP_K_KEY: self.top_k * self.granularity}
        said |= {family.expert_ffn_key or family.ffn_key: inner, "output_router_logits": False, "router_aux_loss_coef": BALANCE}
        said |= {family.shared_ffn_key: SHARED} if family.shared_ffn_key else {}
        said |= {family.dense_layers_key: sorted(set(range(config.layers)) - chosen)} if family.dense_layers_key else {}
        return made.saying(said)

    def _expert(self, layer: Layer, number: int, part: str) -> None:
        to, inner, width = f"experts.{number}.{part}", layer.config.ffn // self.granularity, layer.config.hidden
        if self.granularity == 1 and not (self.noise or self.drop_upcycling):
            layer.copy(part, to)
        else:
            layer.defer(to, (width, inner) if part == "down" else (inner, width), partial(self._made, layer, number, part))

    def _made(self, layer: Layer, number: int, part: str) -> Tensor:
        """Return a projection of an expert: a slice of the neurons, some of them drawn anew, with noise."""
        import torch

        inner = layer.config.ffn // self.granularity
        start, whole = number % self.granularity * inner, layer.before(part)
        neurons = (whole.T if part == "down" else whole)[start : start + inner].clone()  # [F/G, M], a row for each neuron
        del whole  # of large matrices there are never more than two
        if part == "down":
            neurons *= self.granularity  # each of the G slices has a G-th of the weight
        if self.drop_upcycling:
            new = torch.randperm(inner, generator=self._draw(layer, number, "neurons"))[: int(self.drop_upcycling * inner)]
            old = neurons[new]
            if len(new):
                neurons[new] = torch.randn(old.shape, generator=self._draw(layer, number, f"new {part}")).mul_(old.std(correction=0)).add_(old.mean())
        if self.noise:
            noise = torch.randn(neurons.shape, generator=self._draw(layer, number, f"noise {part}"))
            neurons += noise.mul_(self.noise * neurons.std(correction=0))
        return neurons.T if part == "down" else neurons

    def _normal(self, layer: Layer, part: str, rows: int, columns: int) -> Tensor:
        import torch

        if layer.shapes_only:
            return torch.empty(rows, columns, device="meta")
        return SPREAD * torch.randn(rows, columns, generator=self._draw(layer, 0, part))

    def _draw(self, layer: Layer, number: int, what: str) -> Generator:
        import torch

        return torch.Generator().manual_seed(Random(f"{self.seed}, {layer.index}, {number}, {what}").getrandbits(63))


def _with_experts(config: Config) -> dict[str, Config]:
    """Return the families that are this model's with experts, and its config as one of them, the best first.

    Raises:
        ModelError: there is none.
    """
    kind, family = config.kind, config.family
    if family.experts_key:
        raise ModelError(f"{kind} has experts already; begin from a model without")
    if "gate" not in family.parts:
        raise ModelError(
            f"{kind} has no gate in its FFN, and the experts of transformers' families have one; take a llama, mistral, qwen2, qwen3, olmo2 or granite"
        )
    if not family.upcycled:
        raise ModelError(f"{kind} computes what no family with experts does that effconvert knows; take a llama, mistral, qwen2, qwen3, olmo2, granite or phi3")
    found: dict[str, Config] = {}
    reasons: dict[str, None] = {}
    for other, said in family.upcycled.items():
        try:
            found[other] = _as(config, other).saying(said)
        except ModelError as error:
            reasons[str(error).partition(";")[0]] = None
    if not found:
        raise ModelError(f"{'; '.join(reasons)}; nothing else with experts is like it, and `effconvert inspect` says what works with this model")
    return found


def _as(config: Config, kind: str) -> Config:
    """Return the config of a model as one of family `kind`, which computes the same in all but its FFN.

    Raises:
        ModelError: it would compute something else.
    """
    made, family, windows = config.spelt_out().become(kind), FAMILIES[kind], config.windows()
    if config.rotary != config.head_dim:
        raise ModelError(f"{config.kind} turns {config.rotary} of the {config.head_dim} dimensions of a head by RoPE, and {kind} turns all")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        raise ModelError(f"{config.kind} with longrope begins anew with other angles when a text gets long, and {kind} does not")
    said: dict[str, Any] = {family.scale_key: config.scale} if family.scale_key else {}
    if family.layers_alike or not family.windowed:
        if len(set(windows)) > 1 or (windows[0] and not family.windowed):
            raise ModelError(f"{config.kind} has a sliding window in some layers, and {kind} {'in all or in none' if family.windowed else 'has none'}")
        said |= {"sliding_window": windows[0]} if family.windowed else {}
        said |= {key: bool(windows[0]) for key in family.window_keys}
    else:
        said["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return made.without(*CODE).saying(said)
