"""A model that is being measured; loaded only once something has to be computed."""

import gc
from functools import cached_property
from typing import Any

import torch

from effconvert.errors import ModelError
from effconvert.eval.quality.perplexity import sees_later
from effconvert.eval.subject import Opened, load_measured, pick_dtype
from effconvert.modeling.loading import load_tokenizer

LENGTH = 24  # tokens of a text that shows whether tokens see later ones


class Running:
    """One of the models that are compared."""

    def __init__(self, opened: Opened, dtype: str, device: str) -> None:
        self.opened, self.dtype, self.device = opened, dtype, device

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self.opened.subject.name

    @property
    def key(self) -> dict[str, str]:
        """The cache key: what its numbers depend on."""
        return {"model": self.opened.subject.digest, "dtype": str(pick_dtype(self.dtype, self.opened)), "device": torch.device(self.device).type}

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.opened.folder)

    @cached_property
    def model(self) -> Any:
        """The model itself, on its device.

        Raises:
            ModelError: it does not load, or its layout is unknown and it sees the tokens that it is to predict.
        """
        model = load_measured(self.opened, self.dtype, self.device)
        if self.opened.decoder and not self.opened.known:
            text = torch.randint(
                self.opened.subject.vocabulary, (min(self.opened.subject.longest or LENGTH, LENGTH),), generator=torch.Generator().manual_seed(0)
            )
            if sees_later(model, text):
                raise ModelError(
                    f"{self.name}: each token sees later ones, so how well it predicts them says nothing; give a model that predicts the next token"
                )
        return model

    def close(self) -> None:
        """Free the memory for the next model."""
        if self.__dict__.pop("model", None) is not None:
            gc.collect()
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
