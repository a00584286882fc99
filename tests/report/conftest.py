"""A converted model, and results about it."""

import pytest

from effconvert.convert.run import convert
from effconvert.eval.results import save
from effconvert.eval.subject import open_model
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from tests.report.examples import benchmark, evaluation


@pytest.fixture(scope="session")
def converted(llama, tmp_path_factory):
    """The tiny model with 2 KV heads instead of 4, verified. Nobody may change it: copy it."""
    output = tmp_path_factory.mktemp("converted") / "tiny-gqa-2"
    convert(str(llama), (Gqa(groups=2, pool="mean"),), RunOptions(output=output, tokens=120, context=40))
    return output


@pytest.fixture(scope="session")
def subjects(llama, converted):
    return open_model(str(llama)).subject, open_model(str(converted)).subject


@pytest.fixture
def results(subjects, tmp_path):
    """An evaluation and a benchmark of the two."""
    files = [tmp_path / "eval.json", tmp_path / "bench.json"]
    save(evaluation(*subjects), files[0])
    save(benchmark(*subjects), files[1])
    return files
