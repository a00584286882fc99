"""Push a converted model to the Hub: the files that effconvert wrote and no others, with a new card, in one commit.

All local checks run before the first request. Large files are uploaded first, one by one, and a single commit at the end names them all. So an
interrupted push is never visible, and files are not sent twice.
"""

import json
import sys
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id  # type: ignore[attr-defined]

from effconvert.checkpoint.belonging import belongs, patterns, read_json
from effconvert.checkpoint.config import CONFIG
from effconvert.checkpoint.digest import digest, file_hash
from effconvert.checkpoint.manifest import CARD, MANIFEST, RECIPE, foreign_files, read_manifest
from effconvert.checkpoint.replaced import STUB_FILE
from effconvert.checkpoint.tensors import INDEX, PICKLES, SINGLE
from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.eval.results import Benchmark, Evaluation
from effconvert.hub.card import render
from effconvert.hub.card_data import training
from effconvert.hub.hub_errors import explain_errors
from effconvert.hub.push_options import PushOptions
from effconvert.progress import NoProgress, Progress
from effconvert.publishable import last_name, without_paths
from effconvert.quiet import quiet_hub
from effconvert.report.inputs import read_results
from effconvert.surgery._placed import open_checked

WEIGHTS = (".safetensors", ".safetensors.index.json")  # a repository may have only one set of these
PICTURE = "training.png"
Content = Path | bytes


@dataclass(frozen=True)
class Pushed:
    """The result of a push, or in a dry run its plan."""

    repo: str
    url: str | None  # of the commit or the pull request; None in a dry run
    commit: str | None  # None in a dry run
    revision: str
    files: dict[str, int]  # name -> bytes
    left_alone: tuple[str, ...]  # files of the folder that are not part of the checkpoint
    stayed: tuple[str, ...] = ()  # files of the repository that the push did not touch
    changed: bool = True  # False: the repository had all of it already
    card_edited: bool = False  # the folder's README.md was edited by hand; the push sends a new card instead


def push(folder: Path, repo: str, options: PushOptions | None = None, progress: Progress | None = None) -> Pushed:
    """Push the converted model in `folder` to `repo` on the Hub.

    Args:
        folder: a verified output of a conversion.
        repo: `owner/name`, or `name` for one of your own; created if it does not exist.
        options: branch, visibility, commit message, results.
        progress: shows the progress; by default nothing is shown.

    Raises:
        OptionError: there is no such folder, the Hub does not allow it, or a results file is about another model.
        ModelError: the model was not verified, or is not what effconvert wrote.
        EffconvertError: the network failed; the same call resumes.
    """
    options, progress = options or PushOptions(), progress or NoProgress()
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OptionError(f"{repo!r} is no name for a repository ({str(error).rstrip('.')}); give one like owner/{folder.resolve().name}") from None
    manifest = check(folder)
    files = contents(folder, repo, manifest, read_own_results(folder, options.results))
    foreign = foreign_files(folder)
    sizes = {name: len(content) if isinstance(content, bytes) else content.stat().st_size for name, content in files.items()}
    left_alone = tuple(name for name in foreign if name not in files)
    edited = CARD in manifest["files"] and manifest["sha256"].get(CARD) != file_hash(folder / CARD)
    planned = Pushed(repo, None, None, options.revision or "main", sizes, left_alone, card_edited=edited)
    return planned if options.dry_run else _send(planned, files, message(manifest, options), options, progress)


def check(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder`, after checking the folder against it.

    Raises:
        OptionError: effconvert did not write the folder.
        ModelError: it was not verified, or a file was changed, replaced or lost, or must not be published.
    """
    if not folder.is_dir():
        raise OptionError(f"there is no folder {folder}; give the output of a conversion")
    manifest = read_manifest(folder)
    if not manifest:
        raise OptionError(f"{folder} has no complete {MANIFEST}, so effconvert did not write it; give the output of a conversion")
    if manifest.get("verified") is not True:
        raise ModelError(f"{folder} was never verified, and only verified models are published; convert again without --no-verify")
    if not isinstance(hashes := manifest.get("sha256"), dict):
        raise ModelError(f"{folder / MANIFEST} has no hashes of the verified files, so they cannot be checked; convert again")
    for name in manifest["files"]:
        path = folder / name
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or "\\" in name or any(part.startswith(".") for part in parts) or name.endswith(PICKLES):
            raise ModelError(f"{folder / MANIFEST} names {name}, which no conversion writes; convert again")
        if any((folder / Path(*parts[: depth + 1])).is_symlink() for depth in range(len(parts))):
            raise ModelError(f"{path} is a link, and its target would be published; replace it by the file itself, or convert again")
        if not path.is_file():
            raise ModelError(f"{path} is part of the model and missing; convert again")
        if name != CARD and hashes.get(name) != file_hash(path):
            raise ModelError(f"{path} changed since effconvert wrote and verified it; convert again")
    if CONFIG not in manifest["files"]:
        raise ModelError(f"{folder / MANIFEST} names no {CONFIG}; convert again")
    if strange := _strange(folder, manifest):
        raise ModelError(f"{folder / MANIFEST} names {strange[0]}, which is no part of a model; convert again")
    return manifest


def _strange(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return what the manifest names and a conversion would not take along: earlier versions copied whatever lay in a folder."""
    index = read_json(folder / INDEX) if INDEX in manifest["files"] else None
    where = index.get("weight_map") if isinstance(index, dict) else None
    shards = [*where.values()] if isinstance(where, dict) else [SINGLE]
    ours, wanted = (CONFIG, INDEX, RECIPE, CARD, STUB_FILE, *shards), patterns(folder)
    return [name for name in manifest["files"] if name not in ours and not belongs(name, wanted)]


def read_own_results(folder: Path, paths: tuple[Path, ...]) -> list[Evaluation | Benchmark]:
    """Read this model's results, with those of the model that it was compared with.

    Raises:
        OptionError: a file is no results file, or is not about this model.
    """
    files = [read_results(path) for path in paths]
    mine = digest(open_checked(folder)) if files else ""
    own_results = []
    for path, results in zip(paths, files, strict=True):
        digests = [subject.digest for subject in results.subjects]
        if mine not in digests:
            others = ", ".join(subject.name for subject in results.subjects)
            raise OptionError(f"{path} is about {others}, and not about the current content of {folder}; measure it again, or leave the file out")
        own_results.append(_beside_the_first(results, digests.index(mine)))
    return own_results


def _beside_the_first(results: Evaluation | Benchmark, at: int) -> Evaluation | Benchmark:
    indices = [0, at] if at else [0]
    subjects = tuple(results.subjects[index] for index in indices)
    if isinstance(results, Benchmark):
        return replace(
            results, subjects=subjects, cells=tuple(replace(cell, subject=indices.index(cell.subject)) for cell in results.cells if cell.subject in indices)
        )
    rows = tuple(replace(row, values=tuple(row.values[index] for index in indices)) for row in results.rows)
    return replace(results, subjects=subjects, rows=rows)


def contents(folder: Path, repo: str, manifest: dict[str, Any], results: list[Evaluation | Benchmark]) -> dict[str, Content]:
    """Return the files to send: as they are, except for the card, and for records that could contain a path of this machine.

    Raises:
        ModelError: a record is damaged.
    """
    files: dict[str, Content] = {name: folder / name for name in manifest["files"]}
    try:
        before = (folder / CARD).read_text(encoding="utf-8", errors="replace") if CARD in files else ""
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        files |= _picture(manifest)
        files[CARD] = render(manifest, config, before, results, repo, PICTURE if PICTURE in files else "").encode()
        if RECIPE in files:
            files[RECIPE] = _recipe((folder / RECIPE).read_text(encoding="utf-8"), manifest).encode()
    except (ValueError, yaml.YAMLError) as error:
        raise ModelError(f"a file in {folder} is damaged ({' '.join(str(error).split())}); convert again") from None
    sizes = {name: len(content) if isinstance(content, bytes) else manifest["files"][name] for name, content in files.items()}
    hashes = {name: sha256(content).hexdigest() if isinstance(content, bytes) else manifest["sha256"][name] for name, content in files.items()}
    files[MANIFEST] = (json.dumps({**without_paths(manifest), "files": sizes, "sha256": hashes}, indent=2) + "\n").encode()
    return files


def _picture(manifest: dict[str, Any]) -> dict[str, Content]:
    """Return the picture of a training, where there was one and matplotlib is installed."""
    course = training(manifest)
    if not course or len(course.curve) < 2 or find_spec("matplotlib") is None:
        return {}
    from effconvert.report.course import png

    return {PICTURE: png(course)}


def _recipe(text: str, manifest: dict[str, Any]) -> str:
    """Return a recipe without paths of this machine; unchanged where it has none."""
    recipe = yaml.safe_load(text)
    published = without_paths(recipe)
    if isinstance(published, dict) and isinstance(published.get("model"), str) and not manifest["source"].get("commit"):
        published["model"] = last_name(published["model"])
    if published == recipe:
        return text
    comments = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    return comments + yaml.safe_dump(published, sort_keys=False, allow_unicode=True)


def message(manifest: dict[str, Any], options: PushOptions) -> str:
    """Return the message of the commit."""
    return options.message or f"{', '.join(name for step in manifest['recipe'] for name in step)} by effconvert {manifest['effconvert']}"


def _send(planned: Pushed, files: dict[str, Content], text: str, options: PushOptions, progress: Progress) -> Pushed:
    if not (token := get_token()):
        raise OptionError("there is no Hub token on this machine; run `hf auth login` with a token that may write, or set HF_TOKEN")
    api = HfApi(token=token)
    with quiet_hub(bars=sys.stderr.isatty()), explain_errors(api, token, planned.repo, options):
        _check_card(api, files[CARD])
        repo, info = _open(api, planned.repo, options)
        _check_place(repo, info, files, options)
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        _upload(api, repo, operations, options, progress)
        progress.step("making the commit")
        summary, _, description = text.strip().partition("\n")
        commit = api.create_commit(
            repo, operations, commit_message=summary, commit_description=description.strip(), revision=options.revision, create_pr=options.pr
        )
        _check_arrived(api, repo, commit.pr_revision or commit.oid, planned.files)
    names = {sibling.rfilename for sibling in info.siblings or []}
    return replace(
        planned,
        repo=repo,
        url=commit.pr_url or commit.commit_url,
        commit=commit.oid,
        revision=commit.pr_revision or planned.revision,
        stayed=tuple(sorted(names - set(files) - {".gitattributes"})),
        changed=commit.oid != info.sha,
    )


def _open(api: HfApi, repo: str, options: PushOptions) -> tuple[str, ModelInfo]:
    """Create the repository and the branch if they do not exist; return the repository's full name and its content."""
    if not options.pr:
        repo = api.create_repo(repo, private=options.private or None, exist_ok=True).repo_id
        if options.revision and not options.revision.startswith("refs/"):
            api.create_branch(repo, branch=options.revision, exist_ok=True)
    return repo, api.model_info(repo, revision=options.revision)


def _check_place(repo: str, info: ModelInfo, files: dict[str, Content], options: PushOptions) -> None:
    if options.private and not info.private:
        raise OptionError(f"{repo} is public, and --private does not change that; make it private in its settings first, or leave --private out")
    for name in (sibling.rfilename for sibling in info.siblings or []):
        if name.endswith(WEIGHTS) and name not in files:
            raise OptionError(f"{repo} has {name}, which would mix with this model's weights; remove it there, or push to another repository")


def _check_card(api: HfApi, content: Content) -> None:
    """Let the Hub validate the card before gigabytes are sent."""
    assert isinstance(content, bytes)
    # Not `ModelCard.validate`, which ignores HF_ENDPOINT before huggingface_hub 2.
    request = {"repoType": "model", "content": content.decode()}
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=request, headers={"Accept": "text/plain"})
    if answer.status_code == 400:
        raise ModelError(f"the Hub does not accept the card's metadata ({' '.join(answer.text.split())}); fix the beginning of {CARD}")
    hf_raise_for_status(answer)


def _upload(api: HfApi, repo: str, operations: list[CommitOperationAdd], options: PushOptions, progress: Progress) -> None:
    shards = [operation for operation in operations if operation.path_in_repo.endswith(".safetensors")]
    rest = [operation for operation in operations if operation not in shards]
    for at, group in enumerate([*([shard] for shard in shards), rest], 1):
        progress.step(f"uploading {group[0].path_in_repo} ({at} of {len(shards)})" if group is not rest else "uploading small files")
        api.preupload_lfs_files(repo, group, revision=options.revision, create_pr=options.pr, free_memory=False)


def _check_arrived(api: HfApi, repo: str, revision: str, files: dict[str, int]) -> None:
    sizes = {file.path: file.size for file in api.list_repo_tree(repo, recursive=True, revision=revision) if isinstance(file, RepoFile)}
    for name, size in files.items():
        if sizes.get(name) != size:
            raise EffconvertError(f"{repo} lacks {name} after the commit; check for a .gitignore there that excludes it, and push again")
