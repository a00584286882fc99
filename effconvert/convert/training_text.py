"""The text of a distillation: read before anything is written, and cut into windows."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from effconvert import processes
from effconvert.convert.calibration import DOCSTRINGS, special_ends
from effconvert.convert.plan import Plan
from effconvert.convert.selftext import SELF
from effconvert.convert.teacher_cache import options_of
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.perplexity import beginning
from effconvert.eval.quality.rows import Conversation, has_rows, read_rows
from effconvert.eval.quality.text import PIECE, calibration_text, name_of, read_pieces
from effconvert.heal._documents import Filled, predicted_tokens, windows_of_conversations, windows_of_texts
from effconvert.heal._windows import MOST_HELD_OUT, Windows, held_out, masked, next_tokens, repeating, unlabelled
from effconvert.heal.distill import Distill
from effconvert.modeling import loading
from effconvert.paths import expand

LEAST = 4  # windows of a text to train on
READ = 5_000_000  # tokens of a text that are read in any case; of a longer one more are read only if they are needed
BETWEEN = "\n\n"  # rows of a dataset


@dataclass(frozen=True)
class TrainingText:
    """A text to train on, in windows [N, T]."""

    name: str
    ids: Tensor
    predicted: Tensor | None = None  # bool [N, T]: which tokens are predicted, in windows of one document each

    @property
    def sha256(self) -> str:
        """The hash of all windows."""
        parts = [self.ids, *([self.predicted] if self.predicted is not None else [])]
        return hashlib.sha256(f"{[*self.ids.shape]}".encode() + b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def read_text(plan: Plan) -> TrainingText:
    """Read the text of a distillation, before anything is written.

    Raises:
        OptionError: it cannot be read, or is too short; or a window is longer than the models read.
        ModelError: the model has no tokenizer, or another one or another vocabulary than the teacher.
    """
    options, folder, config = options_of(plan), plan.checkpoint.folder, plan.checkpoint.config
    if not loading.has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer, so it cannot be trained on a text; put it there")
    if options.data == SELF:
        raise OptionError("--data self is not possible: training needs more text than a model writes in time; give a file, or a dataset")
    if config.predicts and not plan.teacher.config.predicts:
        raise ModelError(f"the teacher ({plan.teacher.config.architecture}) has no head that predicts tokens, and the model has one; name one that has it")
    if options.cache_teacher and options.cache_size > (known := min(config.vocabulary, plan.teacher.config.vocabulary)) and options.cache_kind == "topk":
        raise OptionError(f"--cache-size {options.cache_size} is more than the {known} tokens that both models have; give at most that")
    if options.windows % processes.count():
        raise OptionError(f"a step has {options.windows} windows, which {processes.count()} processes cannot share evenly; change --batch-tokens")
    if (options.hidden or not config.predicts) and config.hidden != plan.teacher.config.hidden and processes.count() > 1:
        raise OptionError("--hidden towards a teacher of another width is for one process; leave --hidden out")
    if options.cache_teacher and processes.count() > 1:
        raise OptionError("--cache-teacher is for one process; fill the folder with one, or leave it out")
    tokenizer = loading.load_tokenizer(folder)
    _check_tokenizers(plan, tokenizer)
    longest = min((length for length in (config.longest, plan.teacher.config.longest) if length), default=None)
    if longest and options.window > longest:
        raise OptionError(f"--window {options.window} is more than the {longest} tokens that the models read; give at most that")
    name, rows, between = _rows(options)
    first = next(rows, "")
    rows, talk = chain([first], rows), not isinstance(first, str)
    if talk or options.packing == "documents":
        ids, predicted = _apart(plan, tokenizer, rows)
        have = f"{len(ids)} windows"
    else:
        (ids, tokens), predicted = _joined(plan, tokenizer, rows, between), None
        have = f"{tokens} tokens"
    if talk and not len(ids):
        raise OptionError(f"{name} has no conversation in which the assistant answers, and only answers are trained on; give one that has them")
    if len(ids) < LEAST:
        need = f"at least {LEAST}" if predicted is not None else LEAST * options.window
        raise OptionError(f"{name} has {have}, and --window {options.window} needs {need}; give a longer --data")
    if ids.max() >= (vocabulary := min(config.vocabulary, plan.teacher.config.vocabulary)):
        raise ModelError(f"the tokenizer gives the token {int(ids.max())} and the model has {vocabulary}: they do not belong together")
    return TrainingText(f"the first {ids.numel():,} tokens of {name}" if len(ids) == _needed(options) else name, ids, predicted)


def _rows(options: Distill) -> tuple[str, Iterator[str | Conversation], str]:
    """Return the name of --data, its rows as they come, pieces of one text or documents, and what stands between them in one text.

    Raises:
        OptionError: it cannot be read, or --packing documents has none.
    """
    path = expand(options.data)
    if options.data != DOCSTRINGS and not (path.is_file() and not has_rows(path)):
        return name_of(options.data), read_rows(options.data, "--data"), BETWEEN
    if options.packing == "documents":
        raise OptionError(f"--packing documents needs documents, and --data {options.data} is one text; give JSON lines, parquet or a dataset")
    if options.data != DOCSTRINGS:
        return path.name, read_pieces(path, "--data"), ""
    text = calibration_text()
    return text.name, iter([text.content]), ""


def _needed(options: Distill) -> int:
    """Return how many windows are read: all that a run sees once, with those that are held out, and of a short run many more to choose from."""
    steps = 0 if options.minutes else options.steps
    return max(READ // options.window, steps * options.windows + MOST_HELD_OUT)


def _joined(plan: Plan, tokenizer: Any, rows: Iterator[Any], between: str) -> tuple[Tensor, int]:
    """Return windows [N, T] of rows one after the other, and how many tokens there were."""
    options, first = options_of(plan), next(rows)
    before, after = (beginning(tokenizer, first), ()) if plan.config.decoder else special_ends(tokenizer)
    body = options.window - len(before) - len(after)
    rows, parts, count = chain([first], rows), list[Tensor](), 0
    while count < _needed(options) * body and (piece := _piece(rows, between)):
        parts.append(torch.tensor(tokenizer(piece, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int32))
        count += len(parts[-1])
    ids = torch.cat(parts)[: _needed(options) * body]
    ids = ids[: len(ids) // body * body].view(-1, body)
    around = (torch.tensor(end, dtype=ids.dtype).expand(len(ids), -1) for end in (before, after))
    return torch.cat([next(around), ids, next(around)], 1), count


def _piece(rows: Iterator[str], between: str) -> str:
    """Join rows to a text that is long enough to be tokenised at once."""
    texts, size = list[str](), 0
    while size < PIECE and (row := next(rows, None)) is not None:
        texts.append(row)
        size += len(row)
    return "".join(text + between for text in texts)


def _apart(plan: Plan, tokenizer: Any, rows: Iterator[Any]) -> tuple[Tensor, Tensor]:
    """Return windows [N, T] of one document each, and which tokens are predicted.

    Raises:
        OptionError: --recall, which would copy what fills windows up.
        ModelError: the model does not predict next tokens.
    """
    options, config, first = options_of(plan), plan.checkpoint.config, next(rows)
    if not (config.decoder and config.predicts):
        raise ModelError(f"windows of one document each are for models that predict the next token, and {config.architecture} does not; give a joined text")
    if options.recall:
        raise OptionError("--recall copies passages within full windows, and windows of one document each are filled up; leave it out, or join the text")
    rows, needed = chain([first], rows), _needed(options)
    if isinstance(first, str):
        windows = windows_of_texts(tokenizer, beginning(tokenizer, first), rows, options.window, needed)
    else:
        windows = windows_of_conversations(tokenizer, rows, options.window, needed)
    return windows.ids, windows.predicted


def _check_tokenizers(plan: Plan, tokenizer: Any) -> None:
    """Refuse a teacher that reads a text as other tokens."""
    if plan.teacher.folder == plan.checkpoint.folder or not loading.has_tokenizer(plan.teacher.folder):
        return
    own, theirs = tokenizer.get_vocab(), loading.load_tokenizer(plan.teacher.folder).get_vocab()
    if own != theirs:
        other = sum(theirs.get(token) != number for token, number in own.items())
        raise ModelError(
            f"the teacher's tokenizer is another one: of {len(own):,} tokens of the student, {other:,} have another number there or none, so predictions "
            "cannot be compared; name a teacher with the same tokenizer"
        )


def items(plan: Plan, text: TrainingText) -> Windows:
    """Return what the model is trained on and what is held out.

    Raises:
        ModelError: it is a masked language model, and its tokenizer has no mask.
    """
    options, config = options_of(plan), plan.checkpoint.config
    chosen = held_out(len(text.ids))
    if text.predicted is not None:
        return Windows(*(predicted_tokens(Filled(text.ids[rows], text.predicted[rows])) for rows in (~chosen, chosen)))
    begin, end = map(len, special_ends(loading.load_tokenizer(plan.checkpoint.folder))) if options.recall else (0, 0)
    train = text.ids[~chosen]
    inner = repeating(train[:, begin : train.shape[1] - end], options.recall)  # no passage has the special tokens at the ends
    parts = torch.cat([train[:, :begin], inner, train[:, train.shape[1] - end :]], 1), text.ids[chosen]
    if not config.predicts:
        return Windows(*map(unlabelled, parts))
    if config.decoder:
        return Windows(*map(next_tokens, parts))
    tokenizer = loading.load_tokenizer(plan.checkpoint.folder)
    if tokenizer.mask_token_id is None:
        raise ModelError(f"the tokenizer in {plan.checkpoint.folder} has no mask token, so a masked language model cannot be trained with it; put it there")
    return Windows(*(masked(ids, tokenizer.mask_token_id, tokenizer.all_special_ids, config.vocabulary) for ids in parts))
