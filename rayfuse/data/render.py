"""Rendering: one sample as the token ids that one model reads.

Each model has its own chat template and tokenizer. Prompt and response are encoded apart, so that the response begins
at a token boundary in every model, and the response is followed by the one token with which that model ends its turn.

The prompt is what the template writes before this response. A response may begin with its thought,
"<think>\\n...\\n</think>\\n\\n" and then the answer: the prompt then opens none. Before a response without a thought, a
template that opens one is asked for the closed conversation, and what it writes before the response is the prompt:
"<think>\\n\\n</think>\\n\\n" (Qwen3-Thinking) or nothing (R1's distillations).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayfuse.alignment.token_bytes import encode_response
from rayfuse.config import Model
from rayfuse.data import shown, thoughts
from rayfuse.data.sample import Sample
from rayfuse.data.template import ChatTemplate
from rayfuse.errors import DataError, ModelError
from rayfuse.models.loading import load_tokenizer, token_rows, valid_vocabulary

log = logging.getLogger(__name__)
_MARK = "rayfuse-marks-the-response"


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


_HELLO = {"role": "user", "content": "Hello"}


class Renderer:
    """Renders samples for one tokenizer: with its chat template, or as plain text where it has none."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None, *, rows: int | None = None) -> None:
        """Find how this tokenizer's template begins and ends an assistant turn.

        Args:
            tokenizer: a fast tokenizer.
            arguments: what its template is given besides the conversation.
            rows: of the model's output layer, where it is known; a token beyond them can be in no sample.

        Raises:
            ModelError: the template fails on a one-turn conversation, or no end-of-turn token can be found, or the
                model has no row for it; or the tokenizer does not belong to a model of so many rows.
        """
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, arguments)
        self.name = self.template.name
        self.plain = not self.template.present
        if self.plain:
            log.warning("%s has no chat template: prompts are rendered as plain text", self.name)
        self.vocabulary = valid_vocabulary(tokenizer, rows)
        self.end_of_turn = self._find_end_of_turn()
        if self.end_of_turn >= self.vocabulary:
            raise ModelError(
                f"{self.name} ends a turn with {self._token(self.end_of_turn)}, for which the model has no row (it has "
                f"{self.vocabulary}): resize the model's embeddings, or use the tokenizer that it was made with"
            )
        self.bos = self._find_bos()
        self.opens_thought, self.closed = (False, False) if self.plain else self._find_opening()
        self._missing: dict[Hashable, tuple[str, ...]] = {}

    @staticmethod
    def of(model: Model) -> Renderer:
        """The renderer of a configured model: its tokenizer, the arguments of its template, and its rows."""
        return Renderer(load_tokenizer(model), model.template, rows=token_rows(model))

    def _token(self, index: int) -> str:
        return f"the token {self.tokenizer.convert_ids_to_tokens(index)!r} ({index})"

    def _with_rows(self, ids: np.ndarray, part: str) -> np.ndarray:
        """The same ids [n]; raises DataError where the model has no row for one of them."""
        beyond = ids[ids >= self.vocabulary]
        if beyond.size:
            raise DataError(
                f"the {part} needs {self._token(int(beyond[0]))} of {self.name}, for which the model has no row (it "
                f"has {self.vocabulary}); remove the row from the data, or resize the model's embeddings"
            )
        return ids

    def _find_end_of_turn(self) -> int:
        """The first special token that the template writes after the assistant's text; without a template, eos.

        Where it writes no special token there, the first token that it writes.
        """
        if not self.plain:
            try:
                _, found, after = self._closed([_HELLO], None)
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

    def _find_opening(self) -> tuple[bool, bool]:
        """Whether the template's opened turn begins a thought, and whether it is less than the template itself writes
        before an assistant's text: a template that knows no opened turn, or that names a channel (gpt-oss).

        An empty thought that it only writes into closed conversations (Qwen3) is left to the model.
        """
        opened = self.template.render([_HELLO], open_turn=True)
        before, _, _ = self._closed([_HELLO], None)
        rest = before[len(opened) :] if before.startswith(opened) else ""
        return thoughts.ends_open(opened), not thoughts.is_empty_thought(rest)

    def _closed(self, turns: list[dict[str, Any]], tools: list[Any] | None) -> tuple[str, str, str]:
        """What the template writes before and after a response, and the mark in its place (empty where left out)."""
        answered = [*turns, {"role": "assistant", "content": _MARK}]
        return self.template.render(answered, tools, open_turn=False).rpartition(_MARK)

    def prompt_text(self, sample: Sample) -> str:
        """The text before the response, the sample's own thought included.

        Where there is no response yet, it is what the model is asked with.

        Raises:
            DataError: the template refuses the conversation, or opens a thought that this response cannot close.
        """
        if self.plain:
            return sample.plain_text + sample.thought
        turns, tools = sample.turns, sample.offered_tools
        response = sample.thought + sample.response
        kind = thoughts.thought_kind(response)
        if not response or not (self.closed or self.opens_thought) or (kind != "none" and not self.closed):
            text = self.template.render(turns, tools, open_turn=True)
        else:
            text, found, _ = self._closed(turns, tools)
            if not found:
                raise DataError(f"the chat template of {self.name} leaves the assistant's text out")
        return self._continued(text, kind if response else "") + sample.thought

    def _continued(self, text: str, kind: str) -> str:
        """The prompt with exactly one thought opened before a response that has one, and none before another."""
        if kind == "none" and thoughts.ends_open(text):
            raise DataError(
                f"the chat template of {self.name} opens a thought before every response, and does not close it before "
                f"one without a thought; give the responses a thought ({thoughts.OPEN} ... {thoughts.CLOSE}), or the "
                "model another template"
            )
        if kind == "whole":
            return thoughts.without_thought(text)
        if kind == "begun" and not thoughts.ends_open(text):
            return f"{thoughts.without_thought(text)}{thoughts.OPEN}\n"
        return text

    def missing(self, sample: Sample) -> tuple[str, ...]:
        """What of the sample's conversation this model's prompt does not show, in words; found once per shape of
        conversation, by marks in place of the words."""
        shape = shown.shape(sample)
        if shape not in self._missing:
            self._missing[shape] = shown.missing(sample, self.prompt_text)
        return self._missing[shape]

    def refuse_missing(self, sample: Sample) -> None:
        """Raise DataError where the prompt does not show a part of the sample's conversation."""
        missing = self.missing(sample)
        if missing:
            roles = ", ".join(message.role for message in sample.messages)
            raise DataError(
                f"the prompt of {self.name} does not show {', '.join(missing)} of the conversation with the roles "
                f"[{roles}]; `rayfuse check` says what to do"
            )

    def prompt_ids(self, sample: Sample) -> np.ndarray:
        """int64 [p], at least one token: what the model reads before the response.

        Raises:
            DataError: the template refuses the conversation, an empty prompt has no token to begin with, or the model
                has no row for a token of it.
        """
        ids = self.bos + list(self.tokenizer.encode(self.prompt_text(sample), add_special_tokens=False))
        if not ids:
            starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            ids = [int(start) for start in starts if start is not None][:1]
            if not ids:
                raise DataError(f"the prompt is empty, and {self.name} has no token to begin with")
        return self._with_rows(np.asarray(ids, dtype=np.int64), "prompt")

    def render(self, sample: Sample, max_length: int | None = None) -> Rendered:
        """Token ids of prompt, response and end-of-turn.

        Args:
            sample: the sample.
            max_length: where given, prompt tokens are cut from the left until everything fits.

        Raises:
            DataError: the template refuses the conversation, the response alone does not fit `max_length`, the
                prompt is empty, or the model has no row for a token.
            AlignmentError: the tokenizer does not keep the response's bytes.
        """
        prompt = self.prompt_ids(sample)
        ids, ends = encode_response(self.tokenizer, sample.response)
        response = np.append(self._with_rows(np.asarray(ids, dtype=np.int64), "response"), self.end_of_turn)
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
