"""The measurements of encoders, with their cache keys."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality import encoder
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.quality.passages import offsets, same
from effconvert.eval.quality.running import Running
from effconvert.eval.quality.store import Result, Store
from effconvert.eval.quality.text import Text
from effconvert.eval.quality.unit import Measurement
from effconvert.progress import Advance


class Encoders:
    """Encoders, the original first.

    Raises:
        OptionError: an option does not fit one of them.
        ModelError: a tokenizer has no mask token.
    """

    def __init__(self, models: Sequence[Running], options: EvalOptions, text: Text, store: Store, scratch: Path, show_bars: bool) -> None:
        if options.tasks:
            raise OptionError(f"lm-eval's tasks need a model that predicts the next token, and {models[0].name} is an encoder; give --pairs, not --tasks")
        options.refuse_passkey(models[0].name, "an encoder")
        if len(models) == 1 and not models[0].opened.head and not options.pairs:
            raise OptionError(
                f"{models[0].name} has no head, so nothing can be measured of it alone; give --pairs FILE, or another model to compare its hidden states with"
            )
        self.models, self.options, self.store = models, options, store
        self.pairs = encoder.read_pairs(options.pairs) if options.pairs else None
        self.notes = [] if self.pairs else ["without sentence pairs (--pairs FILE) nothing measures whether close sentences stay close"]
        self.longest = min(_reads(model) or options.context for model in models)
        if options.context > self.longest and "context" in options.model_fields_set:
            raise OptionError(f"--context {options.context} is more than the {self.longest} tokens that all of the models read; give at most {self.longest}")
        if len({(opened.head, opened.subject.vocabulary if opened.head else opened.width) for opened in (model.opened for model in models)}) > 1:
            self.notes.append("the models differ in their heads, vocabularies or widths, so only sentence pairs can be compared, not outputs for tokens")
        self.content = _passages(models[0].tokenizer, text, min(options.context, self.longest) - 2, options.tokens)
        self.reference: list[Tensor] | None = None
        self.alike = [same(models[0].tokenizer, model.tokenizer, self.content) for model in models]
        for model, alike in zip(models, self.alike, strict=True):
            if not alike:
                self.notes.append(f"{model.name} has another tokenizer than {models[0].name}: only sentence pairs can be compared, not numbers per token")

    @property
    def read(self) -> dict[str, int]:
        """The size of the text: tokens, and tokens in the longest window."""
        lengths = [len(self.models[0].tokenizer(text, verbose=False).input_ids) for text in self.content]
        return {"tokens": sum(lengths), "context": max(lengths)}

    def measurements(self, index: int) -> Iterator[Measurement]:
        """Yield the measurements of model `index`."""
        if self.alike[index]:
            yield self._tokens(index)
        if self.pairs:
            yield self._pairs(self.pairs, self.models[index])

    def _tokens(self, index: int) -> Measurement:
        model, subject = self.models[index], self.models[index].opened.subject
        head = model.opened.head
        masked = encoder.mask(model.tokenizer, self.content, self.longest, subject.vocabulary)
        needed = index == 0 and any(self.store.get(self._key(other)) is None for other in range(1, len(self.models)) if self._comparable(other))

        def run(advance: Advance) -> Result:
            reference = self.reference if self._comparable(index) else None
            if head:
                result, outputs = encoder.fill(model.model, masked, reference, advance)
            else:
                plain = tuple(ids.where(targets == -100, targets) for ids, targets in zip(masked.inputs, masked.targets, strict=True))
                result, outputs = encoder.states(model.model, plain, reference, advance)
            if index == 0 and needed:
                self.reference = outputs
            return result

        what = "filling masked tokens" if head else "comparing the hidden states"
        return Measurement(self._key(index), what, sum(map(len, masked.inputs)), "tokens", run, needed)

    def _comparable(self, index: int) -> bool:
        first, other = self.models[0].opened, self.models[index].opened
        if not (index > 0 and self.alike[index] and first.head == other.head):
            return False
        return first.subject.vocabulary == other.subject.vocabulary if first.head else first.width == other.width

    def _key(self, index: int) -> dict[str, Any]:
        original = self.models[0].key if self._comparable(index) else None
        return {**self.models[index].key, "what": "masked", "content": sha256(repr((self.content, self.longest)).encode()).hexdigest(), "original": original}

    def _pairs(self, pairs: encoder.Pairs, model: Running) -> Measurement:
        pooling = encoder.pooling_of(model.opened.folder)

        def run(advance: Advance) -> Result:
            return encoder.closeness(model.model, model.tokenizer, pairs, pooling, _reads(model), advance)

        key = {**model.key, "what": "pairs", "pairs": sha256(repr(pairs).encode()).hexdigest(), "pooling": pooling}
        return Measurement(key, f"comparing the sentences of {pairs.name}", 2 * len(pairs.scores), "documents", run)


def _reads(model: Running) -> int | None:
    """Return the longest input, by the limits of the model and its tokenizer."""
    limits = [limit for limit in (model.opened.subject.longest, model.tokenizer.model_max_length) if limit and limit < 10**9]
    return min(limits, default=None)


def _passages(tokenizer: Any, text: Text, body: int, tokens: int) -> tuple[str, ...]:
    """Cut the first `tokens` tokens of `text` into passages of `body` tokens."""
    spans = offsets(tokenizer, text.content, tokens)[:tokens]
    body = min(body, len(spans))
    if body < 8:
        raise OptionError(f"{text.name} has {len(spans)} tokens, and at least 8 are needed to mask some; give a longer --text")
    if tokenizer.mask_token_id is None:
        raise ModelError("the tokenizer has no mask token, so it is not an encoder's; put the model's own beside it")
    return tuple(text.content[spans[at][0] : spans[at + body - 1][1]] for at in range(0, len(spans) - body + 1, body))
