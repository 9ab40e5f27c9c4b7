"""The wire format of /v1/completions: what is asked for a text's log-probabilities, and what an answer must be.

Pure: bodies out, bytes in, arrays back. Two dialects give token ids exactly, and are understood:

    prompt_logprobs  vLLM's own field: for each prompt token a map from token id to log-probability and rank
    echo             OpenAI's old one: `echo` and `logprobs`, with tokens written as `token_id:N`

A server that echoes token *texts* is refused: several tokens can have one text, and a part of a character has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from rayfuse.errors import SignalError

MINUS_INFINITY = -9999.0
"""What servers write for the logarithm of 0, which JSON has no number for."""
_ID = "token_id:"


class NoLogprobsError(SignalError):
    """The answer is well-formed, but has no log-probabilities by token id."""


class TooFewError(SignalError):
    """A position has fewer log-probabilities than were asked for."""


class TokenLogprob(TypedDict):
    """One entry of `prompt_logprobs`."""

    logprob: FiniteFloat
    rank: NotRequired[int | None]
    decoded_token: NotRequired[str | None]


class EchoedLogprobs(BaseModel):
    """The `logprobs` of a choice."""

    tokens: list[str]
    token_logprobs: list[FiniteFloat | None]
    top_logprobs: list[dict[str, FiniteFloat] | None] | None = None


class Choice(BaseModel):
    """One completion; fields that are not read here are let pass."""

    text: str = ""
    prompt_logprobs: list[dict[int, TokenLogprob] | None] | None = None
    logprobs: EchoedLogprobs | None = None
    token_ids: list[Annotated[int, Field(ge=0)]] | None = None


class Completion(BaseModel):
    """An answer to one prompt."""

    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]


@dataclass(frozen=True)
class Rows:
    """A teacher's predictions over the last L tokens of a prompt.

    Attributes:
        logps: [L, K] float32, sorted descending.
        ids: [L, K] int32.
        token_logps: [L] float32, of the tokens that follow.
    """

    logps: np.ndarray
    ids: np.ndarray
    token_logps: np.ndarray


def read_answer(body: bytes) -> Choice:
    """The one choice of an answer.

    Raises:
        SignalError: not JSON, or not of this form; names the first field that is not.
    """
    try:
        return _COMPLETION.validate_json(body).choices[0]
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise SignalError(f"{where + ': ' if where else ''}{fault['msg']}{_shown(fault)}") from None


_COMPLETION = TypeAdapter(Completion)


def _shown(fault: Any) -> str:
    value = fault["input"]
    return f" (is {value!r:.60})" if isinstance(value, str | int | float | None) and fault["loc"] else ""


# --- asking ------------------------------


def ask_prompt_logprobs(model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
    """vLLM: top-k and actual log-probability of every prompt token but the first; one token has to be generated."""
    return {**_plain(model, ids), "max_tokens": 1, "prompt_logprobs": k}


def ask_echo(model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
    """The older form: the prompt's tokens as if they had been generated, nothing more."""
    return {**_plain(model, ids), "max_tokens": 0, "echo": True, "logprobs": k, "return_tokens_as_token_ids": True}


def ask_text(
    model: str, ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int, end_of_turn: int
) -> dict[str, Any]:
    """A continuation of the prompt. Every setting that a server may have its own default for is given."""
    return {
        **_plain(model, ids),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "stop_token_ids": [end_of_turn],
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "return_token_ids": True,
    }


def _plain(model: str, ids: Sequence[int]) -> dict[str, Any]:
    return {"model": model, "prompt": [int(i) for i in ids], "n": 1, "stream": False, "temperature": 1.0}


def answer_limit(tokens: int, k: int) -> int:
    """Bytes that an answer about `tokens` tokens with k log-probabilities each may have, decoded texts included."""
    return 2**20 + tokens * (k + 2) * 1024


# --- reading ------------------------------


def decoded_tokens(body: bytes) -> dict[int, str]:
    """The text that a server gives to each token id in an answer with prompt_logprobs; empty where it gives none."""
    rows = read_answer(body).prompt_logprobs or []
    entries = (item for row in rows if row is not None for item in row.items())
    return {token: text for token, entry in entries if (text := entry.get("decoded_token"))}


def read_prompt_logprobs(body: bytes, ids: Sequence[int], first: int, k: int, vocab_size: int) -> Rows:
    """The predictions of tokens `first`, `first + 1`, ... of the prompt `ids`.

    Raises:
        SignalError: the answer breaks the format, in which field or position and with which value.
    """
    rows = read_answer(body).prompt_logprobs
    if rows is None:
        raise NoLogprobsError("prompt_logprobs is missing")
    if body.count(b'"logprob"') != sum(len(row) for row in rows if row):
        _refuse_duplicates(body)
    _same_length("prompt_logprobs", len(rows), len(ids))
    return _rows(
        [(ids[position], _entries(rows[position], position)) for position in range(first, len(ids))],
        first,
        k,
        vocab_size,
    )


def _entries(row: dict[int, TokenLogprob] | None, position: int) -> dict[int, float]:
    if row is None:
        raise SignalError(f"position {position} has no log-probabilities (null)")
    return {token: entry["logprob"] for token, entry in row.items()}


def _refuse_duplicates(body: bytes) -> None:
    """Of a key that stands twice in a JSON object only the last is kept, so it has to be looked for."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        for key in keys:
            if keys.count(key) > 1:
                raise SignalError(f"{key!r} stands twice in one object")
        return dict(items)

    json.loads(body, object_pairs_hook=pairs)


def read_echo(body: bytes, ids: Sequence[int], first: int, k: int, vocab_size: int) -> Rows:
    """The same from an echoed prompt.

    Raises:
        SignalError: the answer breaks the format, or has no token ids.
    """
    echoed = read_answer(body).logprobs
    if echoed is None or echoed.top_logprobs is None:
        raise NoLogprobsError("logprobs of the echoed prompt are missing")
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        _same_length(f"logprobs.{name}", len(getattr(echoed, name)), len(ids))
    rows = []
    for position in range(first, len(ids)):
        entries = {_token_id(text): value for text, value in (echoed.top_logprobs[position] or {}).items()}
        actual, value = _token_id(echoed.tokens[position]), echoed.token_logprobs[position]
        if actual != ids[position]:
            raise SignalError(f"position {position}: echoes token {actual}, but was sent {ids[position]}")
        if value is None:
            raise SignalError(f"position {position} has no log-probability (null)")
        rows.append((actual, {**entries, actual: value}))
    return _rows(rows, first, k, vocab_size)


def _token_id(text: str) -> int:
    number = text.removeprefix(_ID)
    if number == text or not number.isdecimal():
        raise NoLogprobsError(
            f"tokens are named by their text ({text!r:.30}), from which ids cannot be told exactly; the server must "
            "support prompt_logprobs (vLLM does) or return_tokens_as_token_ids"
        )
    return int(number)


Ask = Callable[[str, Sequence[int], int], dict[str, Any]]
Read = Callable[[bytes, Sequence[int], int, int, int], Rows]
READERS: dict[str, tuple[Ask, Read]] = {
    "prompt_logprobs": (ask_prompt_logprobs, read_prompt_logprobs),
    "echo": (ask_echo, read_echo),
}
"""What is asked and how the answer is read, by the name of the dialect."""


def _same_length(field: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise SignalError(f"{field} has {got} positions for a prompt of {wanted} tokens")


def _rows(
    rows: Sequence[tuple[int, dict[int, float]]],
    first: int,
    k: int,
    vocab_size: int,
) -> Rows:
    """Sort, check and cut each row to its k likeliest entries; a row is the actual token and its entries."""
    logps = np.empty((len(rows), k), dtype=np.float32)
    ids = np.empty((len(rows), k), dtype=np.int32)
    token_logps = np.empty(len(rows), dtype=np.float32)
    for i, (actual, entries) in enumerate(rows):
        position = first + i
        if actual not in entries:
            raise SignalError(f"position {position}: the token that stands there, {actual}, is not among the answer's")
        likeliest = sorted(entries.items(), key=lambda item: -item[1])
        # An answer holds the likeliest and, where it is none of them, the actual token. One that keeps k - 1 of them is
        # short only where the actual token is among them: over a text it shows. (Ranks do not tell: ties raise them.)
        if len(likeliest) < k:
            raise TooFewError(
                f"position {position} has {len(likeliest)} log-probabilities, fewer than the {k} asked for"
            )
        outside = [token for token in entries if not 0 <= token < vocab_size]
        if outside:
            raise SignalError(
                f"position {position}: id {outside[0]} is outside the tokenizer's vocabulary (0..{vocab_size - 1})"
            )
        if likeliest[0][1] > 1e-4:
            raise SignalError(
                f"position {position}: {likeliest[0][1]:g} is above 0, so it is no log-probability; a vLLM server must "
                "run with --logprobs-mode raw_logprobs (its default)"
            )
        if likeliest[k - 1][1] <= MINUS_INFINITY or entries[actual] <= MINUS_INFINITY:
            raise SignalError(f"position {position}: {MINUS_INFINITY:g}, the sign for minus infinity, is not usable")
        ids[i] = [token for token, _ in likeliest[:k]]
        logps[i] = [value for _, value in likeliest[:k]]
        token_logps[i] = entries[actual]
    mass = np.exp(logps.astype(np.float64)).sum(1)
    if (mass > 1 + 1e-3).any():
        worst = int(mass.argmax())
        raise SignalError(f"position {first + worst}: the {k} probabilities add up to {mass[worst]:.4g}, more than 1")
    return Rows(logps, ids, token_logps)
