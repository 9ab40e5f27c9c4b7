"""`rayfuse teachers`: what it says of teachers that it cannot ask; see test_scaling.py for those on a cluster."""

import pytest
from rich.console import Console

from rayfuse.config import Teacher
from rayfuse.errors import TeacherError
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving import manage


def test_an_endpoint_that_is_away_is_left_out_only_where_it_does_not_matter(tiny, monkeypatch):
    monkeypatch.setattr(manage, "SHORT_PATIENCE_S", 0.1)
    here = Teacher(model=tiny.model("math"), name="math")
    away = Teacher.model_validate(
        {
            "model": "m",
            "name": "away",
            "backend": "openai",
            "tokenizer": tiny.model("code"),
            "patience_s": 0.1,
            "endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m"},
        }
    )
    shown = Console(record=True, width=300)
    found = manage._identified([away, here], 5, True, shown)
    assert found == [IdentifiedTeacher(here, fingerprint(here, 5))]
    assert "away is left out: " in shown.export_text()
    with pytest.raises(TeacherError, match=r"127\.0\.0\.1:9"):
        manage._identified([away, here], 5, False, shown)
