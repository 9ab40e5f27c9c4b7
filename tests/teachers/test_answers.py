"""Answers: written once, kept, and the same whoever writes them."""

import json
from pathlib import Path

import pytest

from rayfuse.config import Teacher
from rayfuse.data.sample import Sample
from rayfuse.errors import MissingSignalsError
from rayfuse.teachers.answers import AnswerStore, Author, Sampling, ask
from rayfuse.teachers.identity import IdentifiedTeacher

SAMPLING = Sampling(count=3, temperature=0.8, max_new_tokens=7, seed=5)
PROMPTS = [Sample((("user", text),), "") for text in ("a", "b", "ü🙂")]


class Writer:
    """Answers with what it was asked, and counts."""

    def __init__(self, lost=0):
        self.calls, self.lost = [], lost

    def generate(self, samples, **options):
        self.calls.append(options)
        return lambda: [f"{s.messages[0].content} {options['seed']} \ud800" for s in samples][self.lost :]


def source(folder):
    return Author(IdentifiedTeacher(Teacher(model="m", name="m"), "f" * 32), SAMPLING, str(folder))


def test_each_sample_index_is_a_call_with_a_seed_of_its_own(tmp_path):
    writer = Writer()
    answers = ask(source(tmp_path), writer, AnswerStore(str(tmp_path)), PROMPTS)()
    assert [call["seed"] for call in writer.calls] == [SAMPLING.call_seed(i) for i in range(3)]
    assert len({call["seed"] for call in writer.calls}) == 3
    rest = {"max_new_tokens": 7, "batch_size": 3, "temperature": 0.8}
    assert all({k: v for k, v in call.items() if k != "seed"} == rest for call in writer.calls)
    assert answers[2] == [f"ü🙂 {SAMPLING.call_seed(i)} \ud800" for i in range(3)]


def test_what_is_there_is_not_written_again(tmp_path):
    store = AnswerStore(str(tmp_path))
    first = ask(source(tmp_path), Writer(), store, PROMPTS)()
    silent = Writer()
    assert ask(source(tmp_path), silent, store, PROMPTS)() == first
    assert silent.calls == []
    # One object is lost: the unit is answered as a whole, and only that object is written.
    paths = {key: Path(store.path("f" * 32, SAMPLING, key)) for key in (prompt.key for prompt in PROMPTS)}
    gone = paths[PROMPTS[1].key]
    before = {path: path.stat().st_mtime_ns for path in paths.values()}
    gone.unlink()
    assert ask(source(tmp_path), Writer(), store, PROMPTS)() == first
    assert [path for path in paths.values() if path.stat().st_mtime_ns != before[path]] == [gone]


@pytest.mark.parametrize("harm", ["truncate", "edit", "other sampling"])
def test_a_damaged_or_foreign_object_is_written_again(tmp_path, harm):
    store = AnswerStore(str(tmp_path))
    first = ask(source(tmp_path), Writer(), store, PROMPTS)()
    path = Path(store.path("f" * 32, SAMPLING, PROMPTS[0].key))
    if harm == "truncate":
        path.write_bytes(path.read_bytes()[:-10])
    elif harm == "edit":
        path.write_bytes(path.read_bytes().replace(b'"a ', b'"z ', 1))
    else:
        content = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
        content["about"]["temperature"] = 0.9
        path.write_bytes(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    assert store.get("f" * 32, SAMPLING, PROMPTS[0].key) is None
    assert store.damaged == 1
    assert ask(source(tmp_path), Writer(), store, PROMPTS)() == first


def test_settings_do_not_share_answers(tmp_path):
    store = AnswerStore(str(tmp_path))
    store.put("f", SAMPLING, "ab", ["x", "y", "z"])
    assert store.get("f", SAMPLING, "ab") == ["x", "y", "z"]
    for change in ({"seed": 6}, {"temperature": 0.9}, {"max_new_tokens": 8}, {"count": 2}):
        assert store.get("f", Sampling(**{**vars(SAMPLING), **change}), "ab") is None
    assert store.get("g", SAMPLING, "ab") is None
    assert not store.put("f", SAMPLING, "ab", ["other", "y", "z"])
    assert store.get("f", SAMPLING, "ab") == ["x", "y", "z"]


def test_too_few_answers_are_an_error(tmp_path):
    with pytest.raises(MissingSignalsError, match="m answered 2 of 3 prompts"):
        ask(source(tmp_path), Writer(lost=1), AnswerStore(str(tmp_path)), PROMPTS)()
