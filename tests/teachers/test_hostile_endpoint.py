"""Every fault of hostile.py, and what rayfuse says: word for word what docs/hostile-endpoints.md says."""

import pytest

from tests.teachers.hostile import CASES, KEY, KEY_VARIABLE, PAGE, heard, make_served, row
from tests.teachers.stand_in import StandIn


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return str(make_served(tmp_path_factory.mktemp("served") / "code"))


@pytest.fixture(scope="module")
def server(served):
    with StandIn(served) as server:
        yield server


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.does)
def test_what_is_said_is_what_the_page_says(case, server, served, monkeypatch, caplog):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    said = heard(case, server, served)
    assert row(case, said) in PAGE.read_text(encoding="utf-8").splitlines()
    assert KEY not in said + caplog.text


def test_the_page_has_no_other_lines():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(CASES)
