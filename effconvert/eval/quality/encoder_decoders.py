"""The measurements of models with an encoder and a decoder, with their cache keys: how well they predict a target, given its source."""
# S = tokens of a source, T = tokens of a target, V = vocabulary.

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.quality.paired import make
from effconvert.eval.quality.passages import offsets
from effconvert.eval.quality.perplexity import LogitsFile, Window, measure_predictions, vocabulary
from effconvert.eval.quality.running import Running
from effconvert.eval.quality.store import Result, Store
from effconvert.eval.quality.text import Text
from effconvert.eval.quality.unit import Measurement
from effconvert.progress import Advance

Strings = tuple[str, str]  # a source and its target


@dataclass(frozen=True)
class Pairs:
    """Sources and targets in the tokens of one model, with the special tokens of its tokenizer."""

    sources: tuple[Tensor, ...]  # token ids [S]
    targets: tuple[Tensor, ...]  # token ids [T]
    sizes: tuple[int, ...]  # bytes of each target, as far as it is read

    @property
    def lists(self) -> list[list[int]]:
        """All of them, to compare."""
        return [ids.tolist() for ids in (*self.sources, *self.targets)]


class EncoderDecoders:
    """Models with an encoder and a decoder, the original first.

    The text is JSON lines with `source` and `target`; of any other text each window is cut in two halves, a source and its target.

    Raises:
        OptionError: an option does not fit one of them, or the text has no pairs.
        ModelError: one has no head, or a tokenizer does not belong to its model.
    """

    def __init__(self, models: Sequence[Running], options: EvalOptions, text: Text, store: Store, scratch: Path, show_bars: bool) -> None:
        for model in models:
            if not model.opened.head:
                raise ModelError(f"{model.name} is a {model.opened.config.architecture}, which has no head that predicts tokens; give the model with its head")
        if options.tasks or options.pairs:
            given, kind = ("--tasks", "decoders") if options.tasks else ("--pairs", "encoders")
            raise OptionError(f'{given} is for {kind}; give --text FILE.jsonl, with a "source" and a "target" in each line')
        self.models, self.store = models, store
        self.file, self.logits_file = scratch / "logits", LogitsFile(scratch / "logits", torch.float32, 0)
        options.refuse_passkey(models[0].name, "an encoder-decoder")
        first = models[0]
        longest = min((model.opened.subject.longest for model in models if model.opened.subject.longest), default=options.context)
        if options.context > longest and "context" in options.model_fields_set:
            raise OptionError(f"--context {options.context} is more than the {longest} tokens that all of the models read; give at most {longest}")
        if text.pairs:
            self.notes: list[str] = []
            self.strings = _rows(text, first.tokenizer, options.tokens)
        else:
            self.notes = ["the text has no pairs: the first half of each window is the source, the second the target"]
            self.strings = _halves(text, first.tokenizer, min(options.context, longest), options.tokens)
        self.pairs = [self._tokenized(model, longest) for model in models]
        self.alike = [pairs.lists == self.pairs[0].lists for pairs in self.pairs]
        for model, alike in zip(models, self.alike, strict=True):
            if not alike:
                self.notes.append(f"{model.name} has another tokenizer than {first.name}: compare bits per byte, not perplexities per token")

    @property
    def read(self) -> dict[str, int]:
        """The size of the text: tokens of targets, and tokens in the longest source or target."""
        return {"tokens": sum(map(len, self.pairs[0].targets)), "context": max(map(len, self.pairs[0].lists))}

    def measurements(self, index: int) -> Iterator[Measurement]:
        """Yield the one measurement of model `index`."""
        model, pairs = self.models[index], self.pairs[index]
        needed = index == 0 and any(self.store.get(self._key(other)) is None for other in range(1, len(self.models)) if self._comparable(other))
        count = sum(map(len, pairs.targets))

        def run(advance: Advance) -> Result:
            if needed:
                self.logits_file = LogitsFile(self.file, model.model.dtype, vocabulary(model.model))
            compared = self._comparable(index)
            predicted = predict(model.model, pairs, advance)
            results = measure_predictions(model.model, predicted, count, self.file if needed else None, self.logits_file if compared else None)
            return self._result(results, index, compared)

        yield Measurement(self._key(index), "predicting targets", count, "tokens", run, needed)

    def _result(self, results: Sequence[Window], index: int, compared: bool) -> Result:
        """Return how well all targets together were predicted; numbers a token only where all models have the same."""
        names = [str(number) for number in range(len(results))]
        losses = [(-window.loss, size) for window, size in zip(results, self.pairs[index].sizes, strict=True)]
        samples = [make("targets", "bits_per_byte", "bits_per_byte", losses, names, "lower")]
        if self.alike[index]:
            samples.insert(0, make("targets", "perplexity", "weighted_perplexity", [(-window.loss, window.tokens) for window in results], names, "lower"))
        if compared:
            samples.append(make("targets", "kl", "ratio", [(window.kl or 0.0, window.tokens) for window in results], names, "lower"))
            samples.append(make("targets", "same_top_token", "ratio", [(window.same or 0, window.tokens) for window in results], names, "higher"))
        return Result(tuple(samples))

    def _comparable(self, index: int) -> bool:
        first, other = self.models[0].opened.subject, self.models[index].opened.subject
        return index > 0 and self.alike[index] and first.vocabulary == other.vocabulary

    def _key(self, index: int) -> dict[str, Any]:
        original = self.models[0].key if self._comparable(index) else None
        content = sha256(repr((self.pairs[index].lists, self.pairs[index].sizes)).encode()).hexdigest()
        return {**self.models[index].key, "what": "targets", "pairs": content, "alike": self.alike[index], "original": original}

    def _tokenized(self, model: Running, longest: int) -> Pairs:
        """Return the pairs in a model's tokens; what is longer than the models read is cut, which is noted."""
        sources = [model.tokenizer(source, verbose=False).input_ids for source, _ in self.strings]
        targets = [model.tokenizer(text_target=target, verbose=False).input_ids for _, target in self.strings]
        if cut := sum(len(ids) > longest for ids in (*sources, *targets)):
            texts = f"{cut} of {2 * len(self.strings)} sources and targets"
            self.notes.append(f"{model.name}: {texts} are longer than the {longest} tokens that the models read, and are cut")
        if (most := max(map(max, (*sources, *targets)))) >= model.opened.subject.vocabulary:
            raise ModelError(
                f"the tokenizer of {model.name} gives the token {most} and the model has {model.opened.subject.vocabulary}: they do not belong together"
            )
        strings = [target for _, target in self.strings]
        for index in [index for index, ids in enumerate(targets) if len(ids) > longest]:
            strings[index] = model.tokenizer.decode(targets[index][:longest], skip_special_tokens=True)
        sizes = tuple(max(1, len(target.encode())) for target in strings)
        read = [tuple(torch.tensor(ids[:longest]) for ids in side) for side in (sources, targets)]
        return Pairs(read[0], read[1], sizes)


@torch.inference_mode()
def predict(model: Any, pairs: Pairs, advance: Advance) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits [T, V] for each target, given its source and the tokens before, and the target [T].

    Raises:
        ModelError: a logit is NaN or infinite.
    """
    for source, target in zip(pairs.sources, pairs.targets, strict=True):
        logits = model(source[None].to(model.device), labels=target[None].to(model.device), use_cache=False).logits[0]
        if not logits.isfinite().all():
            raise ModelError("the model computes NaN or infinity")
        yield logits, target
        advance(len(target))


def _rows(text: Text, tokenizer: Any, tokens: int) -> list[Strings]:
    """Return the first pairs of JSON lines, until their targets have `tokens` tokens."""
    pairs, count = list[Strings](), 0
    for number, line in enumerate(text.content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            source, target = row["source"], row["target"]
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f'line {number} of {text.name} has no "source" and "target" ({type(error).__name__}: {error}); give JSON lines with both'
            ) from None
        if not (isinstance(source, str) and isinstance(target, str) and source.strip() and target.strip()):
            raise OptionError(f'line {number} of {text.name} has no text as its "source" and "target"; give JSON lines with both')
        count += len(tokenizer(text_target=target, verbose=False).input_ids)
        if pairs and count > tokens:
            break
        pairs.append((source, target))
    return pairs


def _halves(text: Text, tokenizer: Any, context: int, tokens: int) -> list[Strings]:
    """Cut the first `tokens` tokens of a text into windows that leave room for two special tokens in each half, and each window in two."""
    spans = offsets(tokenizer, text.content, tokens)[:tokens]
    half = min(context - 2, len(spans)) // 2
    if half < 4:
        lacking = "a longer --text" if len(spans) < 8 else "a --context of at least 10"
        raise OptionError(f"{len(spans)} tokens of {text.name} in windows of {context} leave too few for a source and a target; give {lacking}")
    starts = range(0, len(spans) - 2 * half + 1, 2 * half)
    sides = [tuple(text.content[spans[at][0] : spans[at + half - 1][1]] for at in (start, start + half)) for start in starts]
    return [(source, target) for source, target in sides]
