"""The page in a real browser, and colours as the colour-blind see them."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from effconvert.eval.results import save
from effconvert.report import report
from effconvert.report.drawing import DARK, LIGHT
from tests.report import browser as chromium
from tests.report.examples import HOSTILE, benchmark, evaluation

# Machado, Oliveira & Fernandes (2009), "A Physiologically-based Model for Simulation of Color Vision Deficiency", table 1, severity 1.0;
# applied to linear RGB: https://www.inf.ufrgs.br/~oliveira/pubs_files/CVD_Simulation/CVD_Simulation.html
SIGHT = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
}
APART = 25  # CIE76 in Lab: ten times what is just noticeable (2.3, Mahy et al. 1994), because lines are thin


def linear(colour):
    channels = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    scaled = to_xyz @ np.clip(rgb, 0, 1) / to_xyz.sum(1)
    f = np.where(scaled > (6 / 29) ** 3, np.cbrt(scaled), scaled / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, other):
    """WCAG 2.2's ratio of two linear RGB colours."""
    dark, light = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ rgb) for rgb in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize(("palette", "paper"), [(LIGHT, "#ffffff"), (DARK, "#181c22")])
def test_the_colours_of_lines_can_be_told_apart(sight, palette, paper):
    seen = [lab(SIGHT[sight] @ linear(colour)) for colour in palette]
    assert len(seen) == 4
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > APART
    assert min(contrast(linear(colour), linear(paper)) for colour in palette) >= 3  # WCAG 2.2, 1.4.11: what is no text


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """A tab of a real browser."""
    program = chromium.find()
    if program is None:
        pytest.skip(f"there is no {', '.join(chromium.NAMES)} here, and a page can only be proved in a browser")
    with chromium.browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(llama, converted, subjects, tmp_path_factory):
    """Reports with everything (four models, one with windows and a long name), with nothing measured, and on an original."""
    folder = tmp_path_factory.mktemp("pages")
    windows = tuple(None if layer % 6 == 5 else 512 for layer in range(26))
    others = (
        replace(subjects[1], name="longer_than_any_telephone_is_wide" * 5, digest="c" * 64),
        replace(subjects[1], name="windows", digest="d" * 64, layers=26, windows=windows, heads=64, kv_heads=8, longest=131072),
    )
    save(evaluation(*subjects, *others, notes=("https://example.org/" + 20 * "unbroken",)), folder / "eval.json")
    save(benchmark(*subjects, *others), folder / "bench.json")
    report(converted, [folder / "eval.json", folder / "bench.json"], folder / "full.html")
    report(converted, [], folder / "bare.html")
    report(llama, [], folder / "original.html")
    return {name: folder / f"{name}.html" for name in ("full", "bare", "original")}


# What the page says of itself: what sticks out of it, what is empty, and each text with its colours. rgb() and color(srgb …) are all that browsers compute to.
INSPECT = """(() => {
  const shown = element => element.getClientRects().length > 0;
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour;
    }
    return 'none';
  };
  const texts = [...document.querySelectorAll('body *')].filter(element =>
    shown(element) && !['STYLE', 'title'].includes(element.tagName)
    && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  return {
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    width: document.documentElement.scrollWidth,
    window: innerWidth,
    pictures: [...document.querySelectorAll('svg')].map(svg => { const box = svg.getBoundingClientRect(); return [box.width, box.height]; }),
    cut: [...document.querySelectorAll('svg text')].filter(text => {
      const box = text.getBoundingClientRect(), all = text.ownerSVGElement.getBoundingClientRect();
      return box.left < all.left - 1 || box.right > all.right + 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1;
    }).map(text => text.textContent),
    small: [...document.querySelectorAll('svg text')].filter(text => text.getBoundingClientRect().height < 9).map(text => text.textContent),
    texts: texts.map(element => {
      const style = getComputedStyle(element);
      return [element.textContent.slice(0, 40), element.ownerSVGElement ? style.fill : style.color, behind(element)];
    }),
    ink: getComputedStyle(document.body).color,
  };
})()"""


def channels(colour):
    found = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour)
    assert found, f"{colour} is no opaque colour"
    return linear("#" + "".join(f"{int(part):02x}" for part in found.groups()))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["full", "bare", "original"])
def test_the_page_can_be_read_in_a_browser(tab, pages, name, width, scheme):
    tab.open(pages[name], width, scheme)
    seen = tab.evaluate(INSPECT)
    assert seen["dark"] is (scheme == "dark")
    assert channels(seen["ink"]).mean() > 0.5 if scheme == "dark" else channels(seen["ink"]).mean() < 0.1, "the scheme did not reach the page"
    assert seen["width"] == seen["window"] == width, "the page scrolls sideways"
    assert len(seen["pictures"]) == {"full": 2 + 8 + 4 + 1, "bare": 2, "original": 2}[name]
    assert min(min(picture) for picture in seen["pictures"]) > 100
    assert not seen["cut"]
    assert not seen["small"]
    assert len(seen["texts"]) > 50
    assert not [text for text in seen["texts"] if contrast(channels(text[1]), channels(text[2])) < 4.5]
    assert tab.requests() == [pages[name].as_uri()]
    assert tab.complaints() == []


def test_the_browser_would_have_seen_what_is_wrong(tab, tmp_path):
    """Otherwise the test above proves nothing."""
    page = tmp_path / "wrong.html"
    page.write_text(
        '<!doctype html><meta name=viewport content="width=device-width"><body style="background: #fff; color: #999">pale'
        '<div style="width: 2000px">wide</div><img src="https://127.0.0.1:9/none.png"><script>console.error("told")</script>'
        '<svg width="50" height="50"><text x="40" y="20" style="font-size: 4px">outside of it</text></svg>'
    )
    tab.open(page, 1280, "light")
    seen = tab.evaluate(INSPECT)
    assert seen["width"] > seen["window"]
    assert seen["cut"] == seen["small"] == ["outside of it"]
    assert contrast(*map(channels, seen["texts"][0][1:])) < 4.5
    assert len(tab.requests()) == 2
    assert any("told" in complaint for complaint in tab.complaints())


def test_hostile_text_stays_text_in_a_browser(tab, converted, subjects, tmp_path):
    named = [replace(subject, name=f"<img src=x onerror=document.title='broken'>{index}") for index, subject in enumerate(subjects)]
    save(evaluation(*named, notes=(HOSTILE, "</style></svg><script>document.title='broken'</script>")), tmp_path / "eval.json")
    report(converted, [tmp_path / "eval.json"], tmp_path / "out.html")
    tab.open(tmp_path / "out.html", 390, "light")
    assert tab.evaluate("document.title") == "tiny-gqa-2: what the conversion cost"
    assert tab.evaluate("document.querySelectorAll('img, script').length") == 0
    assert tab.requests() == [(tmp_path / "out.html").as_uri()]
