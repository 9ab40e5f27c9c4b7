"""What tests of prepare tasks share: two teachers, and eight samples for them."""

import pytest

from rayfuse.config import Data, parse_config
from rayfuse.data.rows import read_samples
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint

K = 5


@pytest.fixture
def world(tiny, tmp_path):
    config = parse_config(tiny.tree(tmp_path / "run"))
    spec = PrepareSpec(
        student=config.student,
        teachers=tuple(IdentifiedTeacher(teacher, fingerprint(teacher, K)) for teacher in config.teachers),
        store=str(tmp_path / "store"),
        k=K,
        alignment="bytes",
        max_length=200,
    )
    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=8))
    return spec, samples
