"""What on-policy distillation asks of a run, and refuses by name."""

from __future__ import annotations

import pytest

from rayfuse.config import parse_config
from rayfuse.errors import ConfigError


def _tree(stage=None, **changes):
    tree = {
        "student": "a/student",
        "teachers": ["b/math", "c/code"],
        "data": {"path": "train.jsonl", "max_length": 400},
        "stages": [{"method": "onpolicy", **(stage or {})}],
        "output": "out",
    }
    return {**tree, **changes}


def test_one_word_is_enough():
    config = parse_config(_tree(stages=["onpolicy"]))
    (stage,) = config.stages
    assert stage.writes
    assert config.rollouts_url == "out/rollouts"
    elsewhere = parse_config(_tree(signals={"store": "s3://bucket/signals/"}))
    assert elsewhere.rollouts_url == "s3://bucket/signals-rollouts"


FAULTS = [
    (
        {"stage": {"max_new_tokens": 399}},
        r"max_new_tokens 399 leaves no room for a prompt in data\.max_length 400; .*39",
    ),
    ({"stage": {"budget": "teachers"}}, r"budget: teachers needs teacher_weights: consensus"),
    ({"serving": {"mode": "first"}}, r"serving\.mode: first lets the teachers go before the student writes"),
    (
        {"teachers": ["b/math", {"name": "law", "model": "d/law", "backend": "store"}]},
        r"of law there are only stored signals, and the student's own texts are new",
    ),
    ({"stage": {"share": 0}}, r"share"),
    ({"teachers": []}, r"onpolicy\) needs at least one teacher"),
]


@pytest.mark.parametrize(("changes", "text"), FAULTS, ids=[text[:30] for _, text in FAULTS])
def test_a_run_that_cannot_be_is_refused_by_name(changes, text):
    with pytest.raises(ConfigError, match=text):
        parse_config(_tree(**changes))


def test_the_same_run_without_the_students_own_texts_may_use_stored_signals():
    teachers = ["b/math", {"name": "law", "model": "d/law", "backend": "store"}]
    assert parse_config(_tree(teachers=teachers, stages=["infifusion"])).teachers[1].stored is not None
