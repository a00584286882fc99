"""Linear attention by feature maps, with or without a softmax window."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, m = features, W = window.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from effconvert.errors import OptionError
from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery.mixing._call import Call, Slots

SHARE = -2.197  # logit of 0.1, the initial weight of the window, as in LoLCATs
LEAST = 1e-30  # that outputs are divided by


class Linear(Mixing):
    """Linear attention by feature maps, with or without a softmax window.

    Tokens older than the window are summed into a matrix of fixed size for each head, so a long context costs no more than a short one. Without a
    window, or before `transfer` trains the feature maps, quality is poor. Exact where the window is as long as the longest context.
    Katharopoulos et al. 2020, arXiv 2006.16236; Kasai et al. 2021, arXiv 2103.13076; Zhang et al. 2024, arXiv 2402.04347 and arXiv 2410.10254.

    \b
    Examples:
      effconvert linear --window 64 ./SmolLM2-135M -o ./lolcats
      effconvert linear --feature elu google-bert/bert-base-uncased
    """

    facts: ClassVar[Facts] = Facts("models that attend", saves="KV cache: a state of fixed size", native="", exact="with --window as long as the text")

    feature: Literal["hedgehog", "t2r", "elu"] = Field(
        "hedgehog",
        description="Feature map of queries and keys: softmax of W x and of -W x with trainable W, 2 D features (hedgehog); relu of W x + b with trainable W "
        "and b, --features of them (t2r); or elu(x) + 1 without parameters, D features (elu).",
    )
    window: int = Field(0, ge=0, description="Last tokens that softmax attends to, the query's own included, W (decoders).", json_schema_extra={"metavar": "W"})
    features: int | None = Field(None, ge=1, description="Features of t2r, m. Default: 32, as in its paper.", json_schema_extra={"metavar": "M"})

    @model_validator(mode="after")
    def _sound(self) -> Linear:
        if self.features is not None and self.feature != "t2r":
            raise ValueError(f"--features belongs to --feature t2r; --feature {self.feature} has as many as the heads' width gives")
        return self

    def check(self, config: Config) -> None:
        """Refuse a window in an encoder."""
        super().check(config)
        if self.window and not config.decoder:
            raise OptionError(f"--window {self.window} is for decoders, and {config.kind} is an encoder; leave it out")

    @property
    def softmax_tokens(self) -> int:
        """The window."""
        return self.window

    def is_exact(self, config: Config) -> bool:
        """Where no text is longer than the window."""
        return config.longest is not None and self.window >= config.longest

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The feature maps of queries and keys for each head, and the weight of the window."""
        width, count = config.head_dim, self._feature_count(config)
        maps: dict[str, tuple[int, ...]] = {}
        if self.feature != "elu":
            rows = width if self.feature == "hedgehog" else count
            maps |= {"query_map": (config.heads, rows, width), "key_map": (config.kv_heads, rows, width)}
        if self.feature == "t2r":
            maps |= {"query_bias": (config.heads, count), "key_bias": (config.kv_heads, count)}
        return {**maps, **({"share": (config.heads,)} if self.window else {})}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Identity for Hedgehog; random rows of length 1 for T2R; a window weight of 0.1."""
        import torch

        values: dict[str, Tensor] = {}
        draw = torch.Generator().manual_seed(index)
        for name, shape in self.parameters(config).items():
            if name == "share":
                values[name] = torch.full(shape, SHARE)
            elif name.endswith("bias"):
                values[name] = torch.zeros(shape)
            elif self.feature == "hedgehog":
                values[name] = torch.eye(shape[-1]).expand(shape).clone()
            else:
                values[name] = torch.nn.functional.normalize(torch.randn(shape, generator=draw), dim=-1)
        return values

    def cache_slots(self, config: Config) -> Slots:
        """The sum over older tokens, and the tokens of the window."""
        from effconvert.surgery.mixing._call import past

        if not config.decoder:
            return {}
        state: Slots = {"state": ((config.kv_heads, 1, self._feature_count(config), config.head_dim + 1), "float32")}
        return {**state, **(past(self.window, config.kv_heads, config.head_dim) if self.window else {})}

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Apply window and features to the values and to ones, and divide the two: one normaliser for both."""
        from torch.nn import functional

        from effconvert.kernels.linear_attention import Window
        from effconvert.surgery.mixing._features import attend

        groups = call.key.shape[1]
        query = self._features(call.query, weights, "query").unflatten(1, (groups, -1))  # [B, Hk, R, T, m]
        key, value, live = call.with_window(self.window) if self.window else (call.key, call.value, call.live)
        tokens = call.query.shape[-2]
        # A token leaves the window W tokens after it came, so the features get the same sequence W tokens later.
        back = self.window + tokens - key.shape[-2]  # without a state the sequence begins with the first token, not W before it
        old_key, old_live = (functional.pad(rows, (0, 0, back, 0))[..., :tokens, :] for rows in (key, live[:, None, :, None].float()))
        features = self._features(old_key, weights, "key") * old_live
        if not call.causal:
            augmented = functional.pad(value.float(), (0, 1), value=1.0)  # [B, Hk, T, D + 1]: the ones give the normaliser
            sums = query @ (features.mT @ augmented)[:, :, None]
            output: Tensor = sums[..., :-1] / sums[..., -1:].clamp_min(LEAST)
            return output.flatten(1, 2)
        window = None
        if self.window:
            soft = call.prescaled
            share = weights["share"].float().sigmoid().unflatten(0, (groups, -1))
            window = Window(soft.grouped, key, live, share, self.window, soft.scaling)
        shape = (groups, 1, query.shape[-1], value.shape[-1] + 1)
        output, state = attend(query, features, value, call.read("state", {"state": (shape, "float32")}), least=LEAST, window=window, kernels=call.kernels)
        call.write(state=state)
        return output.flatten(1, 2)

    def _feature_count(self, config: Config) -> int:
        return {"hedgehog": 2 * config.head_dim, "elu": config.head_dim, "t2r": self.features or 32}[self.feature]

    def _features(self, rows: Tensor, weights: Mapping[str, Tensor], which: str) -> Tensor:
        """Map rows [B, H, T, D] to features [B, H, T, m], none of which is negative."""
        import torch
        from torch.nn import functional

        rows = rows.float()
        if self.feature == "elu":
            return functional.elu(rows) + 1
        products = rows @ weights[f"{which}_map"].float().mT
        if self.feature == "t2r":
            return (products + weights[f"{which}_bias"].float()[:, None]).relu()
        return torch.cat([products.softmax(-1), (-products).softmax(-1)], -1)
