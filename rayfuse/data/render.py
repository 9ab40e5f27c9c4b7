"""Rendering: one sample as the token ids that one model reads.

Each model has its own chat template and tokenizer. Prompt and response are encoded apart, so that the response begins
at a token boundary in every model, and the response is followed by the one token with which that model ends its turn.
"""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayfuse.alignment.token_bytes import encode_response
from rayfuse.data.sample import Sample
from rayfuse.errors import DataError, ModelError

log = logging.getLogger(__name__)
_MARK = "rayfuse-marks-the-response"
TODAY = datetime.date(2025, 1, 1)
"""The date that templates which print today's date are given: a prompt must not depend on when it is rendered."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of one sample under one model.

    Attributes:
        prompt_ids: int64 [p], at least one token: what the model reads before the response.
        response_ids: int64 [n + 1], the response and the end-of-turn token; row i of the signals predicts entry i.
        ends: int64 [n], bytes of the response read after each of its n tokens.
        cut: prompt tokens left out on the left to fit the length.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    ends: np.ndarray
    cut: int = 0

    @property
    def length(self) -> int:
        """Tokens of prompt, response and end-of-turn together."""
        return len(self.prompt_ids) + len(self.response_ids)


class Renderer:
    """Renders samples for one tokenizer: with its chat template, or as plain text where it has none."""

    def __init__(self, tokenizer: Any) -> None:
        """Find how this tokenizer's template ends an assistant turn.

        Raises:
            ModelError: the template fails on a one-turn conversation, or no end-of-turn token can be found.
        """
        self.tokenizer = tokenizer
        self.name = str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__
        self.plain = not tokenizer.chat_template
        if self.plain:
            log.warning("%s has no chat template: prompts are rendered as plain text", self.name)
        self.end_of_turn = self._find_end_of_turn()
        self.bos = self._find_bos()

    def _template(self, messages: list[dict[str, Any]], *, open_turn: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_turn, strftime_now=TODAY.strftime
            )
        except Exception as error:  # templates are programs: they raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the chat template of {self.name} refuses a conversation with the roles [{roles}]: {error}"
            ) from error

    def _find_end_of_turn(self) -> int:
        """The first special token that the template writes after the assistant's text; without a template, eos.

        Where it writes no special token there, the first token that it writes.
        """
        if not self.plain:
            turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
            try:
                _, found, after = self._template(turns, open_turn=False).rpartition(_MARK)
            except DataError as error:
                raise ModelError(f"the chat template cannot be used: {error}") from error
            if not found:
                raise ModelError(f"the chat template of {self.name} leaves the assistant's text out")
            ids = self.tokenizer.encode(after, add_special_tokens=False) if after.strip() else []
            special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
            if ids:
                return int(next((i for i in ids if i in special), ids[0]))
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"{self.name} has no end-of-turn token: its template writes nothing after the assistant's text and the "
                "tokenizer has no eos_token; set one in tokenizer_config.json"
            )
        return int(self.tokenizer.eos_token_id)

    def _find_bos(self) -> list[int]:
        """What the tokenizer itself puts before a plain text (templates write their own)."""
        if not self.plain or self.tokenizer.bos_token_id is None:
            return []
        ids = self.tokenizer.encode("", add_special_tokens=True)
        return [int(self.tokenizer.bos_token_id)] if self.tokenizer.bos_token_id in ids else []

    def prompt_text(self, sample: Sample) -> str:
        """The text that stands before the response."""
        if self.plain:
            return sample.plain_text
        return self._template(sample.turns, open_turn=True)

    def prompt_ids(self, sample: Sample) -> np.ndarray:
        """int64 [p], at least one token: what the model reads before the response.

        Raises:
            DataError: the template refuses the conversation, or an empty prompt has no token to begin with.
        """
        ids = self.bos + list(self.tokenizer.encode(self.prompt_text(sample), add_special_tokens=False))
        if not ids:
            starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            ids = [int(start) for start in starts if start is not None][:1]
            if not ids:
                raise DataError(f"the prompt is empty, and {self.name} has no token to begin with")
        return np.asarray(ids, dtype=np.int64)

    def render(self, sample: Sample, max_length: int | None = None) -> Rendered:
        """Token ids of prompt, response and end-of-turn.

        Args:
            sample: the sample.
            max_length: where given, prompt tokens are cut from the left until everything fits.

        Raises:
            DataError: the template refuses the conversation, the response alone does not fit `max_length`, or the
                prompt is empty.
            AlignmentError: the tokenizer does not keep the response's bytes.
        """
        prompt = self.prompt_ids(sample)
        ids, ends = encode_response(self.tokenizer, sample.response)
        response = np.append(np.asarray(ids, dtype=np.int64), self.end_of_turn)
        cut = 0
        if max_length is not None:
            room = max_length - len(response)
            if room < 1:
                raise DataError(
                    f"the response has {len(response)} tokens under {self.name}, more than max_length {max_length} "
                    "leaves beside one token of prompt"
                )
            cut = max(0, len(prompt) - room)
        return Rendered(prompt[cut:], response, ends, cut)
