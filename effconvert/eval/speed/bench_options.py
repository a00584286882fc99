"""The options of `bench`, for the command line and Python. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from effconvert.options import HomePath, Listed, Options

Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Listed]
Kinds = Annotated[tuple[Literal["auto", "triton", "reference"], ...], Listed]
CONTEXTS = (128, 512, 2048)  # the default, as far as every model reads them


class BenchOptions(Options):
    """What to run, and how often."""

    batch: Counts = Field((1, 4), description="Sequences at a time.", json_schema_extra={"metavar": "N,…"})
    context: Counts | None = Field(
        None, description="Tokens in each prompt. Default: 128,512,2048, as far as every model reads them.", json_schema_extra={"metavar": "N,…"}
    )
    new_tokens: int = Field(16, ge=1, description="Tokens written after each prompt: decoding steps in a round.")
    rounds: int = Field(5, ge=1, description="Timed rounds; results are medians. The models take turns in each round.")
    warmup: int = Field(1, ge=0, description="Untimed rounds before them.")
    device: str | None = Field(None, description="Device. Default: this machine's accelerator, or cpu.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Type to compute in; auto: that of each model's weights.")
    cache: Literal["dynamic", "static"] = Field("dynamic", description="A cache that grows (dynamic), or one allocated for all tokens (static).")
    graphs: bool = Field(False, description="Replay decoding steps as a CUDA graph; needs --cache static.")
    kernels: Kinds = Field(
        ("auto",),
        description="Decode by Triton kernels (triton), as transformers does (reference), or by what was measured to be faster (auto): "
        "kernels on no card so far, on a CPU shared KV heads and experts without copies. Several: each model by each.",
        json_schema_extra={"metavar": "auto|triton|reference,…"},
    )
    output: HomePath | None = Field(None, description="Write the results to this JSON file.", json_schema_extra={"short": "-o", "metavar": "FILE"})

    @model_validator(mode="after")
    def _check_together(self) -> "BenchOptions":
        if not self.batch or self.context == () or not self.kernels:
            raise ValueError("--batch, --context and --kernels need at least one value each; give one, or leave the option out")
        if self.graphs and self.cache == "dynamic":
            raise ValueError("--graphs needs --cache static, as a graph replays on the same addresses; give both, or neither")
        return self
