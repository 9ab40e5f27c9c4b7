"""Rows of data as prompts with labels."""

import json

import pytest

from rayfuse.config import Data
from rayfuse.consensus.candidates import LABEL, Answer, parse_candidates, read_candidates
from rayfuse.errors import DataError


def read(tmp_path, rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_candidates(Data(path=str(path), **settings))


@pytest.mark.parametrize(
    ("row", "labels"),
    [
        ({"prompt": "q", "response": "r"}, ["r"]),
        ({"prompt": "q", "response": "the long way to 4", "answer": "4"}, ["the long way to 4"]),
        ({"prompt": "q", "answer": "4"}, ["4"]),
        ({"prompt": "q"}, [None]),
        ({"prompt": "q", "response": ""}, [None]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}, ["r"]),
        ({"messages": [{"role": "user", "content": "q"}]}, [None]),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "r"},
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "s"},
                ]
            },
            ["r", "s"],
        ),
    ],
)
def test_a_row_gives_its_prompts_and_labels(row, labels):
    found = parse_candidates(row, {}).items
    assert [one.labels[0].text if one.labels else None for one in found] == labels
    assert all(one.prompt.sample.response == "" for one in found)
    assert len(found[-1].prompt.sample.messages) == 2 * len(labels) - 1


def test_rows_of_one_prompt_become_one(tmp_path):
    rows = [
        {"prompt": "q", "response": "a"},
        {"prompt": "p"},
        {"prompt": "q", "response": "b"},
        {"prompt": "q", "response": "a"},
        {"prompt": "q"},
    ]
    found, counts = read(tmp_path, rows)
    assert [one.prompt.sample.plain_text for one in found] == ["q", "p"]
    assert found[0].answers == (Answer(LABEL, "a"), Answer(LABEL, "b"))
    assert (counts.rows, counts.samples) == (5, 2)


def test_a_trusted_label_stands_first(tmp_path):
    rows = [{"prompt": "q", "response": "a"}, {"prompt": "q", "response": "b", "trusted": True}]
    for given in (rows, rows[::-1]):
        (one,), _ = read(tmp_path, given)
        assert one.trusted
        assert [answer.text for answer in one.labels] == ["b", "a"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "q", "trusted": True}], "a trusted row needs a label"),
        ([{"prompt": "q", "response": "a", "trusted": "yes"}], "'trusted' must be true or false, not 'yes'"),
        ([{"response": "a"}], "a row needs 'prompt' or 'messages'"),
        (
            [{"prompt": "q", "response": text, "trusted": True} for text in "ab"],
            "the prompt 'q' has two trusted labels, 'a' and 'b'",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, rows)
