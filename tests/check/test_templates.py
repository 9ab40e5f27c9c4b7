"""Check of the templates: what a model's prompt does not show, arguments that change nothing, roles and thoughts."""

import json
import shutil
from pathlib import Path

import pytest

from rayfuse.check.templates import check_templates
from rayfuse.config import Config
from tests.real_templates import DEEPSEEK, published

PUBLISHED = published()
WITHOUT_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<s>{{ m.content }}</s>{% endfor %}"
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
)


@pytest.fixture
def checked(tiny, tmp_path):
    """Findings of a run with two teachers, whose templates and data are given."""

    def check(*rows, student=None, templates=(None, None), arguments=None):
        tree = tiny.tree(tmp_path / "run")
        places = [tree["student"], *tree["teachers"]]
        for number, (place, template) in enumerate(zip(places, [student, *templates], strict=True)):
            folder = tmp_path / str(number) / Path(place["model"]).name
            shutil.copytree(place["model"], folder)
            if template:
                (folder / "chat_template.jinja").write_text(template)
            place["model"] = str(folder)
        if arguments is not None:
            tree["teachers"][0]["template"] = arguments
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tree["data"] |= {"path": str(path)}
        return list(check_templates(Config.model_validate(tree)))

    return check


SYSTEM = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]
}
THOUGHT = {"prompt": "2 + 2?", "response": "<think>\na\n</think>\n\n4"}


def test_templates_that_show_everything_are_right(checked):
    assert checked(SYSTEM, student=PUBLISHED["qwen3"], templates=(PUBLISHED["qwen2_5"], PUBLISHED["llama3_2"])) == []


def test_what_one_model_does_not_read_is_a_fault_that_names_it_and_the_others(checked):
    (finding,) = checked(SYSTEM, student=PUBLISHED["qwen3"], templates=(WITHOUT_SYSTEM, PUBLISHED["qwen2_5"]))
    assert finding.fault
    assert finding.where == "data"
    assert finding.text.startswith("the prompt of teachers.0 (math), /")
    assert "/1/math, does not show the system message of a conversation with the roles [system, user]" in finding.text
    assert "(student, teachers.1 (code) read it); give the model a template that shows it" in finding.text


def test_what_no_model_reads_is_a_fault_of_each(checked):
    findings = checked(SYSTEM, student=WITHOUT_SYSTEM, templates=(WITHOUT_SYSTEM, WITHOUT_SYSTEM))
    models = [finding.text.removeprefix("the prompt of ").partition(", /")[0] for finding in findings]
    assert models == ["student", "teachers.0 (math)", "teachers.1 (code)"]
    assert all(finding.fault and "no model reads it" in finding.text for finding in findings)


def test_an_argument_that_is_never_read_is_a_fault(checked):
    arguments = {"enable_thinking": False, "enabel_thinking": False}
    (finding,) = checked(THOUGHT, templates=(WITHOUT_SYSTEM, None), arguments=arguments)
    assert finding.fault
    assert finding.where == "teachers.0 (math).template"
    assert finding.text == "enabel_thinking changes nothing: its chat template never reads it; leave it out"


def test_thoughts_that_a_template_writes_otherwise_are_a_remark(checked):
    (finding,) = checked(THOUGHT, templates=(PUBLISHED["gptoss"], PUBLISHED["qwen3"]))
    assert not finding.fault
    assert finding.where == "teachers.0 (math)"
    assert "analysis" in finding.text
    assert "<think>...</think>" in finding.text


def test_thoughts_of_earlier_turns_that_only_some_read_are_a_remark(checked):
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": THOUGHT["response"]},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": THOUGHT["response"]},
    ]
    (finding,) = checked({"messages": turns}, student=PUBLISHED["qwen2_5"], templates=(PUBLISHED["qwen3"], DEEPSEEK))
    assert not finding.fault
    assert finding.text == (
        "thoughts of earlier turns are read by student, and left out for teachers.0 (math), teachers.1 (code), as "
        "their templates do"
    )
