"""The measurements of decoders, with their cache keys."""

import shutil
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality import language
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.quality.harness import Harness
from effconvert.eval.quality.passages import Passages, cut, recut
from effconvert.eval.quality.perplexity import LogitsFile, vocabulary
from effconvert.eval.quality.running import Running
from effconvert.eval.quality.store import Result, Store
from effconvert.eval.quality.text import Text
from effconvert.eval.quality.unit import Measurement
from effconvert.eval.subject import pick_dtype
from effconvert.progress import Advance


class Decoders:
    """Language models, the original first.

    Raises:
        OptionError: an option does not fit one of them.
        ModelError: one has no head, or no tokenizer of its own.
    """

    def __init__(self, models: Sequence[Running], options: EvalOptions, text: Text, store: Store, scratch: Path, show_bars: bool) -> None:
        for model in models:
            if not model.opened.head:
                raise ModelError(
                    f"{model.name} is a {model.opened.config.architecture}, which has no language-model head to measure; give the model with its head"
                )
        if options.pairs:
            raise OptionError("--pairs is for encoders, and these models predict the next token; leave it out")
        self.models, self.options, self.text, self.store = models, options, text, store
        self.notes: list[str] = []
        longest = [model.opened.subject.longest for model in models if model.opened.subject.longest]
        self.longest = min(longest, default=None)
        self.context = self._within("context", options.context)
        self.max_length = self._within("max_length", options.max_length) if options.max_length else self.longest
        self.passkeys = [length for length in options.passkey if length == self._within("passkey", length) and self._fits_passkey(length)]
        self.harness = Harness(options, show_bars) if options.tasks else None
        self.notes += self.harness.notes if self.harness else []
        self.passages = self._passages()
        prompt = language.prompt_length(max(map(len, self.passages[0].windows)))
        self.new_tokens = min(language.LENGTH, self.longest - prompt) if self.longest else language.LENGTH
        self.file = scratch / "logits"
        self.logits_file: LogitsFile | None = None
        free, need = shutil.disk_usage(scratch).free, self._logits_bytes()
        if need > free:
            raise OptionError(
                f"the original's logits take {need / 1e9:.1f} GB on disk until the others are compared with them, and {free / 1e9:.1f} GB are free "
                f"in {scratch.parent}; give fewer --tokens, or another TMPDIR"
            )
        for model in models:
            if options.apply_chat_template and options.tasks and not model.tokenizer.chat_template:
                raise OptionError(f"{model.name} has no chat template; leave out --apply-chat-template")

    def measurements(self, index: int) -> Iterator[Measurement]:
        """Yield the measurements of model `index`."""
        model = self.models[index]
        yield self._text(index)
        if self.options.generation and self.new_tokens > 0:
            yield self._generation(index)
        for length in self.passkeys:
            yield self._passkey(model, length)
        for name in self.harness.tasks if self.harness else ():
            yield self._task(self.harness, name, model)

    def _generation(self, index: int) -> Measurement:
        model, passages = self.models[index], self.passages[index]

        def run(advance: Advance) -> Result:
            return language.generation(model.model, model.tokenizer, passages, length, advance)

        count, length = min(language.PROMPTS, len(passages.windows)), self.new_tokens
        return Measurement({**model.key, "what": "greedy generation", "length": length, **self._text_key(index)}, "letting it write", count, "documents", run)

    def _passkey(self, model: Running, length: int) -> Measurement:
        def run(advance: Advance) -> Result:
            return language.passkey(model.model, model.tokenizer, length, advance)

        return Measurement({**model.key, "what": "greedy passkey", "length": length}, f"passkey in {length} tokens", length * language.KEYS, "tokens", run)

    def _task(self, harness: Any, name: str, model: Running) -> Measurement:
        def run(advance: Advance) -> Result:
            result: Result = harness.run(name, model.model, model.tokenizer, self.max_length)
            advance(1)
            return result

        return Measurement({**model.key, "what": "task", **harness.key(name), "max_length": self.max_length}, name, 1, "steps", run)

    def _text(self, index: int) -> Measurement:
        model, passages = self.models[index], self.passages[index]

        def run(advance: Advance) -> Result:
            if index == 0 and needed:
                self.logits_file = LogitsFile(self.file, model.model.dtype, vocabulary(model.model))
            reference = self.logits_file if self._comparable(index) else None
            return language.text(model.model, passages, self.file if index == 0 and needed else None, reference, advance)

        needed = index == 0 and any(self.store.get(self._key_of_text(other)) is None for other in range(1, len(self.models)) if self._comparable(other))
        return Measurement(self._key_of_text(index), "reading the text", sum(map(len, passages.windows)), "tokens", run, needed)

    def _comparable(self, index: int) -> bool:
        """Whether the next-token distributions of model `index` can be compared with the original's."""
        first, other = self.models[0].opened.subject, self.models[index].opened.subject
        return index > 0 and self.passages[index].alike and first.vocabulary == other.vocabulary

    def _key_of_text(self, index: int) -> dict[str, Any]:
        original = self.models[0].key if self._comparable(index) else None
        return {**self.models[index].key, "what": "text", **self._text_key(index), "original": original}

    def _text_key(self, index: int) -> dict[str, Any]:
        passages = self.passages[index]
        windows = [window.tolist() for window in passages.windows]
        return {"windows": sha256(repr((windows, passages.bytes)).encode()).hexdigest(), "alike": passages.alike}

    def _passages(self) -> list[Passages]:
        first = self.models[0]
        passages = [cut(first.tokenizer, self.text, self.context, self.options.tokens, first.opened.subject.vocabulary)]
        for model in self.models[1:]:
            subject = model.opened.subject
            passages.append(recut(first.tokenizer, passages[0], model.tokenizer, subject.vocabulary, subject.longest, model.name))
            if not passages[-1].alike:
                self.notes.append(f"{model.name} has another tokenizer than {first.name}: compare bits per byte, not perplexities per token")
            elif subject.vocabulary != first.opened.subject.vocabulary:
                self.notes.append(
                    f"{model.name} has {subject.vocabulary} logits and {first.name} {first.opened.subject.vocabulary}, so there is no KL between them"
                )
        return passages

    @property
    def read(self) -> dict[str, int]:
        """The size of the text: tokens, and tokens in the longest window."""
        lengths = [len(window) for window in self.passages[0].windows]
        return {"tokens": sum(lengths), "context": max(lengths)}

    def _logits_bytes(self) -> int:
        if len(self.models) == 1:
            return 0
        itemsize = pick_dtype(self.options.dtype, self.models[0].opened).itemsize
        return self.read["tokens"] * self.models[0].opened.subject.vocabulary * itemsize

    def _fits_passkey(self, length: int) -> bool:
        """Whether a passkey fits into `length` tokens of every model."""
        need = max(language.shortest(model.tokenizer) for model in self.models)
        if length >= need:
            return True
        if "passkey" in self.options.model_fields_set:
            raise OptionError(f"--passkey {length} is too short: the question alone takes {need} tokens; give at least {need}")
        self.notes.append(f"--passkey {length} is too short for the question, which takes {need} tokens: left out")
        return False

    def _within(self, option: str, length: int) -> int:
        """Return `length`, or the shortest limit of the models where the length is a default."""
        if self.longest is None or length <= self.longest:
            return length
        if option in self.options.model_fields_set:
            short = next(model for model in self.models if model.opened.subject.longest == self.longest)
            raise OptionError(
                f"--{option.replace('_', '-')} {length} is more than the {self.longest} tokens that {short.name} reads; give at most {self.longest}"
            )
        self.notes.append(f"--{option} {length} is more than the models read: {'left out' if option == 'passkey' else f'{self.longest} instead'}")
        return self.longest
