"""Checks of the chat templates: what each model's prompt shows of the data, and what its template is given.

Templates leave out what they do not know, most of them without a word. Marks are put into every part of a conversation
and looked for in each model's prompt, so that two models which would answer different questions are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from rayfuse.check.data import FIRST_ROWS
from rayfuse.check.finding import Finding
from rayfuse.config import Config, Model
from rayfuse.data.render import Renderer
from rayfuse.data.rows import read_preferences, read_samples
from rayfuse.data.sample import Message, Sample
from rayfuse.data.shown import shape
from rayfuse.data.thoughts import CLOSE, OPEN, thought_kind
from rayfuse.errors import DataError, ModelError

_THOUGHT = "rayfuse-marks-a-thought"
_ANSWER = "rayfuse-marks-an-answer"


def check_templates(config: Config) -> Iterator[Finding]:
    """Every model's prompt shows all of the conversations, and every argument of a template is read by it."""
    renderers = dict(_renderers(config))
    for where, renderer in renderers.items():
        yield from _unread(where, renderer)
    samples = _samples(config)
    yield from _lost(renderers, samples)
    yield from _renamed(renderers, samples)
    yield from _thoughts(renderers, samples)


def _renderers(config: Config) -> Iterator[tuple[str, Renderer]]:
    """Models whose tokenizer can be loaded here and whose template can be used; check_models names the others."""
    models: list[tuple[str, Model]] = [("student", config.student)]
    for index, teacher in enumerate(config.teachers):
        if teacher.stored is None or teacher.tokenizer is not None:
            models.append((f"teachers.{index} ({teacher.name})", teacher))
    for where, model in models:
        with suppress(ModelError):
            yield where, Renderer.of(model)


def _unread(where: str, renderer: Renderer) -> Iterator[Finding]:
    arguments = renderer.template.arguments
    if renderer.plain:
        unread, reason = sorted(arguments), "this model has no chat template"
    else:
        unread, reason = sorted(arguments.keys() - renderer.template.reads()), "its chat template never reads it"
    for name in unread:
        yield Finding(f"{where}.template", f"{name} changes nothing: {reason}; leave it out")


def _samples(config: Config) -> list[Sample]:
    """One sample of each shape among the first rows that the stages read."""
    samples: list[Sample] = []
    with suppress(DataError):  # check_data says so
        samples += read_samples(config.data, first=FIRST_ROWS)[0]
    for sides in sorted({stage.sides for stage in config.stages if stage.sides}):
        with suppress(DataError):
            if config.preferences is not None:
                compared, _ = read_preferences(config.preferences, sides, first=FIRST_ROWS)
                samples += [sample for group in compared for sample in group]
    return list({(shape(sample), _has_thought(sample)): sample for sample in reversed(samples)}.values())


def _lost(renderers: Mapping[str, Renderer], samples: Sequence[Sample]) -> Iterator[Finding]:
    """What some model's prompt does not show, with those that do."""
    lost: dict[str, dict[str, Sample]] = {}
    for sample in samples:
        for where, renderer in renderers.items():
            for part in renderer.missing(sample):
                lost.setdefault(part, {}).setdefault(where, sample)
    for part, losers in lost.items():
        seen = [where for where in renderers if where not in losers]
        for where, sample in losers.items():
            roles = ", ".join(message.role for message in sample.messages)
            others = f"{', '.join(seen)} read{'s' if len(seen) == 1 else ''} it" if seen else "no model reads it"
            yield Finding(
                "data",
                f"the prompt of {where}, {renderers[where].name}, does not show {part} of a conversation with the "
                f"roles [{roles}] ({others}); give the model a template that shows it (`tokenizer`: a folder with "
                "another chat_template.jinja), or leave such rows or that part out of the data",
            )


def _renamed(renderers: Mapping[str, Renderer], samples: Sequence[Sample]) -> Iterator[Finding]:
    if not any(message.role == "developer" for sample in samples for message in sample.messages):
        return
    for where, renderer in renderers.items():
        if not renderer.plain and not renderer.template.knows_developer():
            yield Finding(where, f"{renderer.name} reads the developer's messages as system messages", fault=False)


def _thoughts(renderers: Mapping[str, Renderer], samples: Sequence[Sample]) -> Iterator[Finding]:
    """What becomes of thoughts, where the data hold some: templates treat those of earlier turns differently."""
    templates = {where: renderer for where, renderer in renderers.items() if not renderer.plain}
    if any(_has_thought(sample) for sample in samples):
        for where, renderer in templates.items():
            marks = _own_marks(renderer)
            if marks:
                text = f"{renderer.name} writes a thought after {marks!r}, but reads the responses' as {OPEN}...{CLOSE}"
                yield Finding(where, text, fault=False)
    if any(OPEN in message.text for sample in samples for message in sample.messages if message.role == "assistant"):
        shown = [where for where, renderer in templates.items() if _shows_earlier(renderer)]
        hidden = [where for where in templates if where not in shown]
        if shown and hidden:
            text = f"thoughts of earlier turns are read by {', '.join(shown)}, and left out for {', '.join(hidden)}"
            yield Finding("data", f"{text}, as their templates do", fault=False)


def _has_thought(sample: Sample) -> bool:
    with suppress(DataError):
        return thought_kind(sample.thought + sample.response) != "none"
    return True


def _own_marks(renderer: Renderer) -> str:
    """What a template writes before a thought that a message holds in a field of its own; empty where it is <think>,
    or where the template shows no such thought."""
    answer = {"role": "assistant", "content": _ANSWER, "reasoning_content": _THOUGHT}
    try:
        text = renderer.template.render([{"role": "user", "content": "Hello"}, answer], open_turn=False)
    except DataError:
        return ""
    before, found, _ = text.partition(_THOUGHT)
    return before[-24:].lstrip() if found and not before.rstrip().endswith(OPEN) else ""


def _shows_earlier(renderer: Renderer) -> bool:
    earlier = Message("assistant", f"{OPEN}\n{_THOUGHT}\n{CLOSE}\n\n{_ANSWER}")
    sample = Sample((Message("user", "Hello"), earlier, Message("user", "And?")), "")
    with suppress(DataError):
        return _THOUGHT in renderer.prompt_text(sample)
    return False
