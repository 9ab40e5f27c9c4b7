"""Thoughts: what a model writes between <think> and </think> before its answer.

A response may begin with "<think>\\n...\\n</think>\\n\\n"; the answer follows. All models share these bytes. A response
whose thought was opened by the prompt of the model that wrote it begins inside the thought: it has </think> and no
<think>.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from rayfuse.data.sample import Sample
from rayfuse.errors import DataError

OPEN, CLOSE = "<think>", "</think>"
_EMPTY = re.compile(r"(<think>)?\s*</think>\s*\Z|<think>\s*\Z")
_ENDS_OPEN = re.compile(r"<think>\s*\Z")
_WHOLE = re.compile(r"\s*(<think>)?(.*?)</think>\s*", re.DOTALL)

Kind = Literal["none", "whole", "begun"]
Thoughts = Literal["keep", "context", "drop"]
"""What becomes of a response's thought; see config.data.Data.thoughts."""


def thought_kind(response: str) -> Kind:
    """Whether a response has no thought, a whole one, or the rest of one that the prompt has begun.

    Raises:
        DataError: it opens a thought and never closes it.
    """
    begins = response.lstrip().startswith(OPEN)
    if begins and CLOSE not in response:
        raise DataError(f"the response opens a thought with {OPEN} that it never closes: {response!r:.60}")
    if begins:
        return "whole"
    opened, closed = response.find(OPEN), response.find(CLOSE)
    return "begun" if closed >= 0 and not 0 <= opened < closed else "none"


def ends_open(prompt: str) -> bool:
    """Whether a prompt ends inside a thought that it has just opened."""
    return _ENDS_OPEN.search(prompt) is not None


def without_thought(prompt: str) -> str:
    """A prompt without the thought that it opens, or opens and closes, at its end."""
    return _EMPTY.sub("", prompt)


def is_empty_thought(text: str) -> bool:
    """Whether a text is a thought without a word, or only white space."""
    return not _EMPTY.sub("", text).strip()


def treated(sample: Sample, choice: Thoughts) -> Sample:
    """The sample with its response's thought learned (keep), read before the response (context), or left out (drop).

    Raises:
        DataError: there is nothing but a thought, or the thought is never closed.
    """
    if choice == "keep" or thought_kind(sample.response) == "none":
        return sample
    found = _WHOLE.match(sample.response)
    assert found is not None  # a thought that is closed
    answer = sample.response[found.end() :]
    if not answer:
        raise DataError(f"the response is a thought and nothing else, and data.thoughts is {choice}")
    thought = "" if choice == "drop" else found[0] if found[1] else f"{OPEN}\n{found[0].lstrip()}"
    return replace(sample, response=answer, thought=thought)
