"""A rollout: a sample whose response the student wrote itself, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rayfuse.alignment.token_bytes import byte_ends, encode_response, token_bytes
from rayfuse.data.render import Rendered, Renderer
from rayfuse.data.sample import Sample
from rayfuse.errors import AlignmentError


@dataclass(frozen=True)
class Rollout(Sample):
    """What the student wrote to a prompt.

    Its key is that of any sample: teachers read the text, and do not see which tokens wrote it.

    Attributes:
        token_ids: the student's tokens, without the end of the turn. They write `response`, but need not be what the
            tokenizer makes of it.
        ends: bytes of the response read after each of them.
        finished: whether the student ended the turn itself.
        likely: at each of the n + 1 rows, the tokens that the student found likeliest when it wrote, best first.
        policy_step: optimiser steps that the student that wrote it had taken.
        age: optimiser steps that it has taken since, where it learns from it.
        written: the sample as the data write it.
    """

    token_ids: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    finished: bool = True
    likely: tuple[tuple[int, ...], ...] = ()
    policy_step: int = 0
    age: int = 0
    written: Sample | None = None

    def readable_for(self, tokenizers: Sequence[Any]) -> bool:
        """Whether there is text, and none of these tokenizers changes it."""
        if not self.response:
            return False
        try:
            for tokenizer in tokenizers:
                encode_response(tokenizer, self.response)
        except AlignmentError:
            return False
        return True


class Text(NamedTuple):
    """Sampled tokens as a text: the tokens that write it, the bytes read after each, and whether the turn was ended."""

    text: str
    token_ids: tuple[int, ...]
    ends: tuple[int, ...]
    finished: bool


def text_of_tokens(tokenizer: Any, ids: Sequence[int], end_of_turn: int) -> Text:
    """What of the sampled tokens is text: up to the end of the turn, a special token, or a broken character.

    Empty where the bytes of the tokens cannot be told from them alone.
    """
    pieces = token_bytes(tokenizer)
    kept: list[int] = []
    finished = False
    for index in ids:
        finished = index == end_of_turn
        if finished or not (index < len(pieces) and pieces[index]):
            break
        kept.append(index)
    whole = _whole_characters([pieces[index] for index in kept])
    finished, kept = finished and whole == len(kept), kept[:whole]
    try:
        ends = byte_ends(tokenizer, kept).tolist()
    except AlignmentError:
        return Text("", (), (), False)
    written = b"".join(pieces[index] for index in kept)
    dummy = len(written) - (ends[-1] if ends else 0)  # the space that a tokenizer puts before a text
    if dummy > 1 or (dummy == 1 and not written.startswith(b" ")):
        return Text("", (), (), False)
    return Text(written[dummy:].decode(), tuple(kept), tuple(ends), finished)


def _whole_characters(parts: Sequence[bytes]) -> int:
    """The largest number of parts, from the left, that together are valid UTF-8."""
    for count in range(len(parts), -1, -1):
        try:
            b"".join(parts[:count]).decode()
        except UnicodeDecodeError:
            continue
        return count
    return 0


def prompt_ids(renderer: Renderer, sample: Sample, room: int) -> tuple[np.ndarray, int]:
    """What the student reads before it writes, cut from the left to `room` tokens, and how many were cut.

    Raises:
        DataError: the prompt cannot be rendered.
    """
    prompt = Sample(sample.messages, "", sample.skill, sample.tools)
    ids = renderer.prompt_ids(prompt)
    cut = max(0, len(ids) - room)
    return ids[cut:], cut


def render_rollout(renderer: Renderer, rollout: Rollout, room: int) -> Rendered:
    """The rollout as the student wrote it: its own tokens, whatever its tokenizer would make of the text.

    Args:
        renderer: the student's.
        rollout: what it wrote.
        room: tokens of the prompt, as when it was asked.

    Raises:
        DataError: the prompt cannot be rendered.
    """
    response = np.append(np.asarray(rollout.token_ids, dtype=np.int64), renderer.end_of_turn)
    prompt, cut = prompt_ids(renderer, rollout, room)
    return Rendered(prompt, response, np.asarray(rollout.ends, dtype=np.int64), cut)
