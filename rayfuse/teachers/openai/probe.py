"""Before the first sample: can this server be this teacher at all?

It must be reachable and take the key, serve the model, read texts with the configured tokenizer, and return K
log-probabilities for each token of a prompt. Each function raises a TeacherError that says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from rayfuse.config import Teacher
from rayfuse.data.sample import Message, Sample
from rayfuse.errors import TeacherError
from rayfuse.teachers.openai.completions import (
    READERS,
    NoLogprobsError,
    Rows,
    TooFewError,
    answer_limit,
    decoded_tokens,
)
from rayfuse.teachers.openai.connection import Connection, HttpError

PROBE = Sample(
    (Message("user", "What is 12345 + 67?\n\n\tdef f(x): return x"),), "It is 12412.\n\nNaïve 世界 🙂, isn't it?  Yes."
)
"""What the probe scores: digits, white space, code, and characters of two, three and four bytes."""
LIMIT = 2**22
"""Bytes of an answer that holds no log-probabilities."""


class ServedModel(BaseModel):
    """One entry of /models; what is not read is let pass (`created` is the time of the answer, not of the model)."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: Annotated[int, Field(ge=2)] | None = None


class ServedModels(BaseModel):
    """The answer of /models."""

    data: list[ServedModel]


class Tokens(BaseModel):
    """The answer of vLLM's /tokenize."""

    tokens: list[int]


class PromptTokens(BaseModel):
    """One choice with `return_token_ids`."""

    prompt_token_ids: list[int]


class Prompts(BaseModel):
    """An answer with `return_token_ids`."""

    choices: Annotated[list[PromptTokens], Field(min_length=1)]


@dataclass(frozen=True)
class Served:
    """What a server says about one of its models.

    Attributes:
        root: path or id of the weights on the server, "" where it does not say.
        context: tokens of prompt and response that a request may have, beside the one that has to be generated.
    """

    root: str
    context: int


def served(teacher: Teacher) -> Served:
    """`find_model` through a connection of its own."""
    assert teacher.endpoint is not None
    connection = Connection(teacher.endpoint, teacher.name, teacher.patience_s)
    try:
        return connection.run(find_model(connection))
    finally:
        connection.close()


async def find_model(connection: Connection) -> Served:
    """The model's entry in the server's list."""
    endpoint = connection.endpoint
    body = await connection.ask("GET", f"{endpoint.url}/models", limit=LIMIT)
    try:
        models = {model.id: model for model in ServedModels.model_validate_json(body).data}
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise TeacherError(
            connection.say(f"does not list its models as OpenAI's API does ({where}: {fault['msg']})")
        ) from None
    if endpoint.model not in models:
        names = ", ".join(sorted(models)[:8]) or "none"
        raise TeacherError(
            connection.say(f"does not serve {endpoint.model!r} (it serves: {names}); set endpoint.model to one of them")
        )
    model = models[endpoint.model]
    base = models.get(model.parent or "", model)
    longest = model.max_model_len or base.max_model_len
    if endpoint.context is None and longest is None:
        raise TeacherError(
            connection.say(
                "does not say how long a text may be (max_model_len); set endpoint.context to that many tokens"
            )
        )
    if endpoint.context is not None and longest is not None and endpoint.context > longest:
        raise TeacherError(
            connection.say(
                f"takes {longest} tokens, and endpoint.context is {endpoint.context}; lower it, or leave it out"
            )
        )
    return Served(root=model.root or "", context=(endpoint.context or longest or 0) - 1)


async def find_dialect(connection: Connection, ids: Sequence[int], first: int, k: int, vocab_size: int) -> str:
    """The first dialect in which the server gives k log-probabilities for tokens `first`, ... of the prompt `ids`.

    Raises:
        SignalError: it answers in one, but what cannot be true.
        TeacherError: it answers in none, or gives fewer than k.
    """
    reasons = []
    for dialect in READERS:
        try:
            await ask_rows(connection, dialect, ids, first, k, vocab_size)
            return dialect
        except TooFewError as error:
            raise _too_few(connection, k, str(error)) from None
        except NoLogprobsError as error:
            reasons.append(f"{dialect}: {error}")
        except HttpError as error:
            if error.status not in (400, 422):
                raise
            if "logprobs" in error.said and re.search(r"max|at most|greater|less|between", error.said):
                raise _too_few(connection, k, error.said) from None
            reasons.append(f"{dialect}: {error.said or error.status}")
    raise TeacherError(
        connection.say(
            f"returns no log-probabilities of a prompt's tokens, so it cannot be a teacher ({'; '.join(reasons)})"
        )
    )


def _too_few(connection: Connection, k: int, reason: str) -> TeacherError:
    return TeacherError(
        connection.say(
            f"does not return the {k} log-probabilities per token of signals.k ({reason}); raise the server's limit "
            f"(vLLM: --max-logprobs {k}), or lower signals.k"
        )
    )


async def ask_rows(
    connection: Connection, dialect: str, ids: Sequence[int], first: int, k: int, vocab_size: int
) -> Rows:
    """The server's predictions of tokens `first`, ... of the prompt `ids`.

    Raises:
        SignalError: the answer cannot be true.
        TeacherError: there is none.
    """
    ask, read = READERS[dialect]
    endpoint = connection.endpoint
    body = await connection.ask(
        "POST", f"{endpoint.url}/completions", ask(endpoint.model, ids, k), limit=answer_limit(len(ids), k)
    )
    return read(body, ids, first, k, vocab_size)


async def compare_tokenizers(connection: Connection, tokenizer: Any, named: str, texts: Sequence[str]) -> None:
    """Make sure that the server reads texts as `tokenizer` does: special tokens, digits, white space, all characters.

    By its token ids of the texts, where it gives them (vLLM's /tokenize, or `return_token_ids`); else by the texts that
    it names for our ids.

    Args:
        connection: to the server.
        tokenizer: the configured one.
        named: what the configuration calls it.
        texts: what is compared.
    """
    for text in texts:
        ours = tokenizer.encode(text, add_special_tokens=False)
        theirs = await _token_ids(connection, text)
        if theirs is None:
            await _compare_names(connection, tokenizer, named, ours)
        elif theirs != ours:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
            there, here = theirs[at : at + 4], ours[at : at + 4]
            raise _other_tokenizer(connection, named, f"{text!r:.40} is {there} there, {here} here from token {at} on")


def _other_tokenizer(connection: Connection, named: str, reason: str) -> TeacherError:
    return TeacherError(
        connection.say(
            f"has another tokenizer than {named}: {reason}. Set `tokenizer` to the files of the one that belongs to "
            f"{connection.endpoint.model!r}"
        )
    )


async def _token_ids(connection: Connection, text: str) -> list[int] | None:
    """The server's ids of a text; None where it does not tell."""
    endpoint = connection.endpoint
    question = {"model": endpoint.model, "prompt": text, "add_special_tokens": False}
    try:
        body = await connection.ask("POST", re.sub(r"/v\d+$", "", endpoint.url) + "/tokenize", question, limit=LIMIT)
        return Tokens.model_validate_json(body).tokens
    except (HttpError, ValidationError):
        pass  # not a server that has it, or not open to us
    try:
        question |= {"max_tokens": 1, "return_token_ids": True}
        body = await connection.ask("POST", f"{endpoint.url}/completions", question, limit=LIMIT)
        return Prompts.model_validate_json(body).choices[0].prompt_token_ids
    except (HttpError, ValidationError):
        return None


async def _compare_names(connection: Connection, tokenizer: Any, named: str, ids: Sequence[int]) -> None:
    """Compare the text that the server gives to each token id with ours."""
    endpoint = connection.endpoint
    ask, _ = READERS["prompt_logprobs"]
    body = await connection.ask(
        "POST", f"{endpoint.url}/completions", ask(endpoint.model, ids, 1), limit=answer_limit(len(ids), 1)
    )
    compared = 0
    for token, theirs in decoded_tokens(body).items():
        ours = tokenizer.decode([token])
        if "\ufffd" not in ours + theirs and theirs.strip():  # part of a character, or white space, tells nothing
            compared += 1
            if ours.strip() != theirs.strip():
                raise _other_tokenizer(connection, named, f"token {token} is {theirs!r} there and {ours!r} here")
    if not compared:
        raise TeacherError(
            connection.say(
                "neither gives token ids of a text (/tokenize, return_token_ids) nor names its tokens, so it cannot be "
                f"told whether its tokenizer is {named}"
            )
        )
