"""Which files beside the weights belong to a model: one list for a folder, for the Hub and for `push` (decision 23).

Patterns are those of `fnmatch`, compared folder by folder. JSON is parsed, Python code is read as text and never run, nothing else is opened.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from effconvert.checkpoint.config import CONFIG
from effconvert.checkpoint.tensors import PICKLES

MODULES = "modules.json"  # of sentence-transformers: which modules the model has, and their folders
TOKENIZER = (
    *("tokenizer*.json", "tokenizer.model", "tokenizer.model.v*", "special_tokens_map.json", "added_tokens.json", "tekken.json", "*.tiktoken"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "bpe.codes", "dict.txt", "sentencepiece*.model", "spiece.model", "spm*.model"),
    *("source.spm", "target.spm", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "prophetnet.tokenizer"),
    *("normalizer.json", "entity_vocab.json", "word_shape.json", "word_pronunciation.json", "emoji.json", "byte_maps.json"),
)
TEMPLATES = ("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja")
SETTINGS = ("generation_config.json", "processor_config.json", "*preprocessor_config.json", "image_processor*.json", "audio_tokenizer_config.json")
SENTENCES = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json", "1_Pooling/config.json")
PAPERS = (
    "LICEN[CS]E*",
    "Licen[cs]e*",
    "licen[cs]e",
    "licen[cs]e.*",
    "NOTICE*",
    "Notice*",
    "COPYING*",
    "MODEL_LICEN[CS]E*",
    "USE_POLICY*",
    "ACCEPTABLE_USE_POLICY*",
)
KNOWN = (*TOKENIZER, *TEMPLATES, *SETTINGS, *SENTENCES, *PAPERS)

ADAPTER = "adapter_config.json"
IN_MODULE = ("*.json", "*.safetensors", "*.txt", "*.model")
NAMES_CODE = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")  # beside config.json
CLASS = re.compile(r"([\w-]+)\.\w+")  # module.Class; owner/name--module.Class is in another repository
RELATIVE = re.compile(r"^\s*(?:import\s+\.(\w+)\s*$|from\s+\.(\w+)\s+import)", re.MULTILINE)  # the relative imports that transformers follows


def patterns(folder: Path, said: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Return patterns of all that belongs to the model in `folder`, whose JSON files say what is in `said` where that has them."""
    return (*KNOWN, *named(folder, said))


def named(folder: Path, said: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Return patterns of what the model's own files name: folders of sentence-transformers' modules, and code."""
    stems = {stem for name in (CONFIG, *NAMES_CODE) for stem in stems_of(auto_map(folder, name, said))}
    found = [f"{escape(place)}/{inside}" for place in modules(folder) if place for inside in IN_MODULE]
    stems |= {stem for kind in modules(folder).values() if not kind.startswith("sentence_transformers.") for stem in stems_of(kind)}
    return (*found, *sorted({escape(name) for stem in stems for name in code(folder, stem)}))


def belongs(name: str, among: Iterable[str]) -> bool:
    """Whether a file of this name fits one of the patterns; no pickle does, no hidden file, and none whose name cannot be shown."""
    parts = name.split("/")
    if not name.isprintable() or name.endswith(PICKLES) or any(part.startswith(".") for part in parts):
        return False
    return any(len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)) for wanted in (pattern.split("/") for pattern in among))


def modules(folder: Path) -> dict[str, str]:
    """Return the folders that modules.json names inside `folder`, with the class of each module; empty for the folder itself."""
    content, found = read_json(folder / MODULES), {}
    for entry in content if isinstance(content, list) else []:
        place, kind = (entry.get("path"), entry.get("type")) if isinstance(entry, dict) else (None, None)
        if isinstance(place, str) and isinstance(kind, str):
            path = PurePosixPath(place)
            if not path.is_absolute() and "\\" not in place and not any(part.startswith(".") for part in path.parts):
                found[path.as_posix().removeprefix(".")] = kind
    return found


def auto_map(folder: Path, name: str, said: Mapping[str, Any] | None = None) -> Any:
    """Return the `auto_map` of a JSON file: which class of the model's own code transformers may open it with. None if it has none."""
    content = said[name] if said and name in said else read_json(folder / name)
    return content.get("auto_map") if isinstance(content, dict) else None


def stems_of(entry: Any, depth: int = 2) -> set[str]:
    """Return the modules of the model's own folder that (an entry of) `auto_map` names: a text, or a list or a mapping of them."""
    if isinstance(entry, str):
        match = CLASS.fullmatch(entry)
        return {match[1]} if match and "--" not in entry else set()
    inside = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else []
    return {stem for value in inside for stem in stems_of(value, depth - 1)} if depth else set()


def code(folder: Path, stem: str) -> set[str]:
    """Return the files of a module of the model's own code: itself, and what it imports from its folder."""
    found: set[str] = set()
    waiting = {stem}
    while waiting:
        name = f"{waiting.pop()}.py"
        found.add(name)
        imports = RELATIVE.findall(text_of(folder / name) or "")
        waiting |= {one or other for one, other in imports if f"{one or other}.py" not in found}
    return found


def is_readable(path: Path) -> bool:
    """Whether a file can be opened and read: no folder, no pipe, no socket, no link to nowhere."""
    if not os.path.isfile(path):  # which, unlike Path's own, raises nothing
        return False
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False


def read_json(path: Path) -> Any:
    """Return what a JSON file says, None if it cannot be read or is damaged."""
    try:
        return json.loads(text_of(path) or "null")
    except (ValueError, RecursionError):
        return None


def text_of(path: Path) -> str | None:
    """Return what a text file says, None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if is_readable(path) else None
    except OSError:
        return None
