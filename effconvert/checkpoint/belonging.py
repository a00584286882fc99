"""Which files beside the weights belong to a model. One list serves folders, the Hub and `push` (decision 23).

Patterns are those of `fnmatch`, compared folder by folder. JSON is parsed. Python code is read as text and never run. Nothing else is opened.
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

MODULES = "modules.json"  # of sentence-transformers: the model's modules and their folders
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


def patterns(folder: Path, contents: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Return the patterns of all files that belong to the model in `folder`; `contents` overrides its JSON files (name -> content)."""
    return (*KNOWN, *own_patterns(folder, contents))


def own_patterns(folder: Path, contents: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Return the patterns of files that the model's own files name: folders of sentence-transformers' modules, and code."""
    stems = {stem for name in (CONFIG, *NAMES_CODE) for stem in stems_of(auto_map(folder, name, contents))}
    in_modules = [f"{escape(place)}/{pattern}" for place in modules(folder) if place for pattern in IN_MODULE]
    stems |= {stem for kind in modules(folder).values() if not kind.startswith("sentence_transformers.") for stem in stems_of(kind)}
    return (*in_modules, *sorted({escape(name) for stem in stems for name in code(folder, stem)}))


def belongs(name: str, among: Iterable[str]) -> bool:
    """Whether a file name fits one of the patterns. Pickles, hidden files and names that cannot be printed never do."""
    parts = name.split("/")
    if not name.isprintable() or name.endswith(PICKLES) or any(part.startswith(".") for part in parts):
        return False
    return any(len(parts) == len(steps) and all(map(fnmatchcase, parts, steps)) for steps in (pattern.split("/") for pattern in among))


def modules(folder: Path) -> dict[str, str]:
    """Return the folder and class of each module in modules.json. The folder itself is the empty name; others are left out."""
    content, kinds = read_json(folder / MODULES), {}
    for entry in content if isinstance(content, list) else []:
        place, kind = (entry.get("path"), entry.get("type")) if isinstance(entry, dict) else (None, None)
        if isinstance(place, str) and isinstance(kind, str):
            path = PurePosixPath(place)
            if not path.is_absolute() and "\\" not in place and not any(part.startswith(".") for part in path.parts):
                kinds[path.as_posix().removeprefix(".")] = kind
    return kinds


def auto_map(folder: Path, name: str, contents: Mapping[str, Any] | None = None) -> Any:
    """Return the `auto_map` of a JSON file, which names classes in the model's own code; None if it has none."""
    content = contents[name] if contents and name in contents else read_json(folder / name)
    return content.get("auto_map") if isinstance(content, dict) else None


def stems_of(entry: Any, depth: int = 2) -> set[str]:
    """Return the modules in the model's folder that `auto_map` or an entry of it names: a string, or a list or mapping of strings."""
    if isinstance(entry, str):
        match = CLASS.fullmatch(entry)
        return {match[1]} if match and "--" not in entry else set()
    values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else []
    return {stem for value in values for stem in stems_of(value, depth - 1)} if depth else set()


def code(folder: Path, stem: str) -> set[str]:
    """Return the files of a module of the model's own code: its own, and those that it imports from its folder."""
    files: set[str] = set()
    waiting = {stem}
    while waiting:
        name = f"{waiting.pop()}.py"
        files.add(name)
        imports = RELATIVE.findall(text_of(folder / name) or "")
        waiting |= {module or package for module, package in imports if f"{module or package}.py" not in files}
    return files


def is_readable(path: Path) -> bool:
    """Whether a file can be opened and read: no folder, no pipe, no socket, no link to nowhere."""
    if not os.path.isfile(path):  # unlike Path.is_file, never raises
        return False
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it cannot be read or is damaged."""
    try:
        return json.loads(text_of(path) or "null")
    except (ValueError, RecursionError):
        return None


def text_of(path: Path) -> str | None:
    """Return the text of a file; None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if is_readable(path) else None
    except OSError:
        return None
