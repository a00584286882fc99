"""Write a report as HTML, Markdown and JSON, and the picture of a training as PNG: all of them or none."""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from effconvert.errors import EffconvertError, OptionError
from effconvert.report import tables
from effconvert.report.facts import Report

PICTURE = ".png"  # of a training
FORMS = (".html", ".json", ".md", PICTURE)


def check_drawing() -> None:
    """Refuse a report, before anything is read or computed, if matplotlib is missing: it is an optional dependency.

    Raises:
        EffconvertError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise EffconvertError("a report needs matplotlib, which is not installed; run, in a clone of the repository: pip install '.[report]'")


def forms(report: Report) -> tuple[str, ...]:
    """Return the endings of the files of a report: the picture is there if the model was distilled."""
    training = report.manifest and report.manifest.distillation
    return FORMS if training and len(training.curve) > 1 else FORMS[:-1]


def check_output(folder: Path, results: Sequence[Path], page: Path, overwrite: bool, written: Sequence[str] = FORMS[:-1]) -> None:
    """Refuse an output where the files with these endings cannot be written.

    Raises:
        OptionError: one of them exists, is a source of the report, or would change the model.
    """
    if page.resolve().parent.is_relative_to(folder.resolve()):
        raise OptionError(f"{page} is inside the model's folder, where a .json file is part of the model; give another --output")
    for file in (page.with_suffix(form) for form in written):
        if file.is_dir():
            raise OptionError(f"{file} is a folder; give another --output")
        if file.resolve() in [path.resolve() for path in results]:
            raise OptionError(f"{file} is one of the results files, and would be replaced; give another --output")
        if not overwrite and (file.exists() or file.is_symlink()):
            raise OptionError(f"{file} exists; give another --output, or --overwrite to replace it")


def write(report: Report, page: Path) -> None:
    """Write the forms of `report`.

    Raises:
        OptionError: they cannot be written there.
    """
    data = json.dumps(asdict(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    drawn = PICTURE in forms(report)
    texts = (html(report), data, markdown(report, page.with_suffix(PICTURE).name if drawn else ""))
    contents = {form: text.encode() for form, text in zip(FORMS, texts, strict=False)} | ({PICTURE: training_picture(report)} if drawn else {})
    drafts = {page.with_name(f".{page.stem}{form}.draft"): page.with_suffix(form) for form in contents}
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for draft, file in drafts.items():
            draft.write_bytes(contents[file.suffix])
        for draft, file in drafts.items():
            draft.replace(file)
    except OSError as error:
        raise OptionError(f"{page} cannot be written ({error.strerror}); give another --output") from None
    finally:
        for draft in drafts:
            with contextlib.suppress(OSError):  # no draft was written, and the error above says why
                draft.unlink()


def html(report: Report) -> str:
    """Return a self-contained page."""
    from effconvert.report import course, diagram, plots  # not before: recipes without a report need no matplotlib
    from effconvert.report.drawing import DARK, LIGHT

    pictures = {
        "differences": list(plots.differences(report)),
        "speed": plots.speed(report),
        "layers": diagram.layers(report),
        "cache": plots.cache(report),
        "training": course.training(report),
    }
    colours = list(enumerate(zip(LIGHT, DARK, strict=True)))
    return _template("page.html", autoescape=True).render(**_content(report), pictures=pictures, colours=colours)


def training_picture(report: Report) -> bytes:
    """Return the picture of a training."""
    from effconvert.report import course

    assert report.manifest
    assert report.manifest.distillation
    return course.png(report.manifest.distillation)


def markdown(report: Report, picture: str = "") -> str:
    """Return the report without pictures, but for that of a training in the file of this name."""
    text = _template("page.md", autoescape=False).render(**_content(report), picture=picture)
    return re.sub(r"\n{3,}", "\n\n", text)


def _content(report: Report) -> dict[str, Any]:
    manifest = report.manifest
    verification, training = (manifest.report, manifest.distillation) if manifest else (None, None)
    return {
        "report": report,
        "verification": verification and tables.verification(verification),
        "training": training and tables.training(training),
        "quality": list(tables.quality(report)),
        "speed": list(tables.speed(report)),
        "shapes": tables.shapes(report),
        "cache": tables.cache(report),
        "provenance": list(tables.provenance(report)),
        "writes": list(tables.writes(report)),
    }


def _template(name: str, autoescape: bool) -> Template:
    environment = Environment(
        loader=PackageLoader("effconvert.report", ""), autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"md": _plain, "svg": Markup, "block": lambda text: "\n".join(f"    {line}" for line in str(text).splitlines())}
    return environment.get_template(name)


def _plain(text: object) -> str:
    """Escape text for Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(str(text).split()))
