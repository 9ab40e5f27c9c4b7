"""Chat templates: real ones render as transformers renders them, but for the date, which is fixed."""

import ast
import datetime
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rayfuse.data.render import Renderer
from rayfuse.data.sample import Sample
from rayfuse.data.template import TODAY, ChatTemplate
from rayfuse.errors import DataError, ModelError
from tests.real_templates import DATE_STRING, GRANITE, OURS, SMOLLM3, published

PUBLISHED = published()
ALL = {**PUBLISHED, **OURS}
DATED = sorted(name for name, text in ALL.items() if "strftime_now" in text)
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hello <b>&amp; 世界"}],
    "three turns": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
    ],
}
NEEDS_PARTS = {"idefics3", "llava_next", "smolvlm"}


@pytest.fixture
def tokenizer(tiny):
    """A tokenizer with bos and eos, whose template a test sets."""
    loaded = AutoTokenizer.from_pretrained(tiny.model("instruct"))
    loaded.bos_token = "<s>"
    return loaded


def oracle(tokenizer, turns, *, open_turn=True, **arguments):
    """The text by transformers; images' templates get the parts that they read."""
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_turn, **arguments)


def as_parts(turns):
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def today_matters(compare):
    """Run a comparison with today's date; once more where midnight passed between the two sides."""
    day = datetime.date.today()
    if not compare(day):
        assert datetime.date.today() != day
        assert compare(datetime.date.today())


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", ALL)
def test_real_templates_render_as_transformers_renders_them(tokenizer, name, turns):
    tokenizer.chat_template = ALL[name]
    template = ChatTemplate(tokenizer)
    given = as_parts(turns) if name in NEEDS_PARTS else turns
    for open_turn in (True, False):
        today_matters(
            lambda day, open_turn=open_turn: (
                template.render(turns, open_turn=open_turn, today=day) == oracle(tokenizer, given, open_turn=open_turn)
            )
        )


@pytest.mark.parametrize("name", ALL)
def test_every_real_template_makes_a_renderer(tokenizer, name):
    tokenizer.chat_template = ALL[name]
    rendered = Renderer(tokenizer).render(Sample((("user", "2 + 2?"),), "It is 4."))
    assert "2 + 2?" in tokenizer.decode(rendered.prompt_ids)
    assert tokenizer.decode(rendered.response_ids[:-1]) == "It is 4."


def test_the_templates_that_print_the_date_are_among_them():
    assert {"gptoss", "llama3_2", "granite", "mistral_small", "smollm3", "date_string"} <= set(DATED)


@pytest.mark.parametrize("name", DATED)
def test_the_date_is_fixed(tokenizer, name):
    tokenizer.chat_template = ALL[name]
    template = ChatTemplate(tokenizer)
    turns = CONVERSATIONS["one turn"]
    text = template.render(turns, open_turn=True)
    assert text == template.render(turns, open_turn=True, today=TODAY)
    other = template.render(turns, open_turn=True, today=datetime.date(2031, 12, 24))
    if text != other:
        assert "2025" in text
        assert "2031" in other
    else:  # a template that needs an argument before it prints the date
        assert "2025" not in text


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("granite", "Today's Date: January 01, 2025."),
        ("mistral_small", "The current date is 2025-01-01."),
        ("smollm3", "Today Date: 01 January 2025\n"),
        ("date_string", "Today Date: 01 Jan 2025\n"),
        ("llama3_2", "Today Date: 01 Jan 2025\n"),
        ("gptoss", "Current date: 2025-01-01\n"),
    ],
)
def test_the_date_as_each_family_prints_it(tokenizer, name, printed):
    tokenizer.chat_template = ALL[name]
    assert printed in Renderer(tokenizer).prompt_text(Sample((("user", "Hello"),), "x"))


# --- arguments ------------------------------


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (SMOLLM3, {"enable_thinking": False}),
        (GRANITE, {"thinking": True}),
        (GRANITE, {"documents": [{"title": "a", "text": "b"}]}),
        (DATE_STRING, {"date_string": "24 Dec 2031", "builtin_tools": ["search", "code"]}),
        (PUBLISHED["qwen3"], {"enable_thinking": False}),
        (PUBLISHED["gptoss"], {"reasoning_effort": "high"}),
    ],
)
def test_arguments_reach_the_template(tokenizer, text, arguments):
    tokenizer.chat_template = text
    turns = CONVERSATIONS["one turn"]
    template = ChatTemplate(tokenizer, arguments)
    assert template.render(turns, open_turn=True) != ChatTemplate(tokenizer).render(turns, open_turn=True)
    today_matters(
        lambda day: template.render(turns, open_turn=True, today=day) == oracle(tokenizer, turns, **arguments)
    )
    assert arguments.keys() <= template.reads()
    assert Renderer(tokenizer, arguments).prompt_text(Sample((("user", turns[0]["content"]),), "")) == (
        template.render(turns, open_turn=True)
    )


def test_a_name_that_the_template_sets_itself_is_not_read(tokenizer):
    tokenizer.chat_template = (
        "{% set mine = 1 %}{{ mine }}{{ given }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert ChatTemplate(tokenizer).reads() == {"messages", "given"}


# --- templates in files of their own, and several of them ------------------------------

PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}{{ 'assistant: ' }}"
WITH_TOOLS = "{{ tools | tojson }}" + PLAIN
TOOLS = [{"type": "function", "function": {"name": "zebra", "description": "<ä>", "arguments": {"b": 1, "a": 2}}}]


@pytest.mark.parametrize("form", ["files", "list", "dict"])
def test_several_templates_the_one_for_tools_where_there_are_tools(tokenizer, tmp_path, form):
    tokenizer.chat_template = {"default": PLAIN, "tool_use": WITH_TOOLS}
    if form != "dict":
        tokenizer.save_pretrained(tmp_path)
        assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").exists()
        if form == "list":
            (tmp_path / "chat_template.jinja").unlink()
            (tmp_path / "additional_chat_templates" / "tool_use.jinja").unlink()
            path = tmp_path / "tokenizer_config.json"
            named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": WITH_TOOLS}]
            path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    renderer = Renderer(tokenizer)
    plain = Sample((("user", "Hello"),), "x")
    prompt = "user: Hello</s>assistant: "
    assert renderer.prompt_text(plain) == prompt
    offered = Sample(plain.messages, "x", tools=json.dumps(TOOLS))
    assert renderer.prompt_text(offered) == json.dumps(TOOLS, ensure_ascii=False) + prompt
    assert renderer.template.reads() == {"messages", "tools"}


def test_several_templates_and_no_default(tokenizer):
    tokenizer.chat_template = {"rag": PLAIN}
    with pytest.raises(ModelError, match=r"the chat template cannot be used: .* no default specified"):
        Renderer(tokenizer)


# --- what a template must not do ------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        "{{ strftime_now.__self__.year }}",
        "{{ strftime_now.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_templates_stay_in_the_sandbox(tokenizer, attack):
    tokenizer.chat_template = attack + PLAIN
    turns = [{"role": "user", "content": "Hello"}]
    with pytest.raises(DataError, match=r"refuses a conversation with the roles \[user\]: "):
        ChatTemplate(tokenizer).render(turns, open_turn=True)
    assert turns == [{"role": "user", "content": "Hello"}]


def test_nothing_else_in_the_package_renders_a_template():
    package = Path(__file__).parents[2] / "rayfuse"
    callers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            if name in ("apply_chat_template", "_compile_jinja_template", "from_string", "render_jinja_template"):
                callers.add(path.relative_to(package).as_posix())
    assert callers == {"data/template.py"}
