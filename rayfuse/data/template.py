"""Chat templates: the one place that renders one.

A template is a program that came with a model. It runs in transformers' own sandbox, compiled once, with the arguments
that `apply_chat_template` gives it, and two differences that make its text depend on nothing but the conversation and
the model: the date is fixed (transformers >= 5.22 turns a callable among the arguments into text, so `strftime_now`
cannot be given through `apply_chat_template`), and messages are brought into the form that this template reads,
whatever the version of transformers (see messages.py).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from rayfuse.data.messages import Forms
from rayfuse.errors import DataError, ModelError

TODAY = datetime.date(2025, 1, 1)
"""The date that templates which print today's date are given: a prompt must not depend on when it is rendered."""


class ChatTemplate:
    """The chat template of one tokenizer, or its several templates, of which conversations with tools may have one.

    Attributes:
        name: the tokenizer's name in messages.
        arguments: what the template is given besides the conversation (`enable_thinking: false`).
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.name = str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__
        self.arguments = dict(arguments or {})
        self._forms: dict[str, Forms] = {}

    @property
    def present(self) -> bool:
        """Whether the tokenizer has a template at all."""
        return bool(self.tokenizer.chat_template)

    def text(self, tools: Sequence[Mapping[str, Any]] | None = None, template: str | None = None) -> str:
        """The template's source: that for conversations with tools where there is one.

        Args:
            tools: the tools of the conversation.
            template: another template's source, or the name of one of several.

        Raises:
            ValueError: the tokenizer has several templates, and none is the default.
        """
        return str(self.tokenizer.get_chat_template(template, tools))

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        open_turn: bool,
        template: str | None = None,
        today: datetime.date = TODAY,
    ) -> str:
        """The text of a conversation.

        Args:
            turns: messages as `apply_chat_template` takes them; made of plain JSON values.
            tools: the tools that the conversation offers, as JSON schemas.
            open_turn: end with what opens the assistant's turn (`add_generation_prompt`).
            template: another template's source, in place of the tokenizer's own.
            today: the date that the template prints where it prints one.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            if not turns:
                raise ValueError("there is no message")
            text = self.text(tools, template)
            return self._write(text, self._forms_of(text).fit(turns), tools, open_turn, today)
        except Exception as error:  # templates are programs: they raise anything
            roles = ", ".join(str(turn["role"]) for turn in turns)
            raise DataError(
                f"the chat template of {self.name} refuses a conversation with the roles [{roles}]: {error}"
            ) from error

    def reads(self) -> frozenset[str]:
        """The names that the template (or one of several) takes from outside.

        Raises:
            jinja2.TemplateSyntaxError: it is no template.
        """
        import jinja2.meta

        templates = self.tokenizer.chat_template
        texts = templates.values() if isinstance(templates, Mapping) else [templates]
        environment = _compiled("").environment
        return frozenset().union(*(jinja2.meta.find_undeclared_variables(environment.parse(text)) for text in texts))

    def knows_developer(self) -> bool:
        """Whether messages of the role developer are given as such, not as system messages."""
        return self._forms_of(self.text()).knows_developer

    def _forms_of(self, text: str) -> Forms:
        if text not in self._forms:
            self._forms[text] = Forms(text, lambda turns: self._write(text, turns, None, True, TODAY))
        return self._forms[text]

    def _write(
        self,
        text: str,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        open_turn: bool,
        today: datetime.date,
    ) -> str:
        given = {**self.tokenizer.special_tokens_map, **self.arguments}
        written: str = _compiled(text).render(
            messages=turns,
            tools=tools,
            documents=given.pop("documents", None),
            add_generation_prompt=open_turn,
            strftime_now=today.strftime,
            **given,
        )
        return written


def _compiled(text: str) -> Any:
    """The compiled template, in the sandbox and with the tags and filters of this version of transformers, which caches
    it."""
    from transformers import __version__
    from transformers.utils import chat_template_utils

    try:
        compile_template = chat_template_utils._compile_jinja_template
    except AttributeError as error:
        raise ModelError(
            f"transformers {__version__} compiles chat templates another way; install 5.16 to 5.24"
        ) from error
    return compile_template(text)
