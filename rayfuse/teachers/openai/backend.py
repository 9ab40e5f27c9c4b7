"""A teacher behind an OpenAI-compatible completion server: token ids in, top-K log-probabilities out.

The weights stay where they are. The server is asked with token ids of the configured tokenizer, one request per sample,
so that templates and byte offsets are ours; what comes back is checked before it is believed. Before the first sample a
probe makes sure that the server can be a teacher at all. `lse` is NaN: such a server tells log-probabilities only.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np

from rayfuse.config import Teacher
from rayfuse.data.render import Rendered, Renderer
from rayfuse.data.sample import Sample
from rayfuse.errors import SignalError, TeacherError
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.backend import Backend
from rayfuse.teachers.openai.completions import answer_limit, ask_text, read_answer
from rayfuse.teachers.openai.connection import Connection
from rayfuse.teachers.openai.probe import PROBE, ask_rows, compare_tokenizers, find_dialect, find_model
from rayfuse.teachers.sampling import prompt_seed

T = TypeVar("T")


class OpenAITeacher(Backend):
    """Scores samples and generates through a server; safe to call from several threads.

    Attributes:
        vocab_size: ids in the signals are below this.
        k: kept log-probabilities per position.
        context: tokens of prompt and response together that a request may have.
        dialect: how the server gives log-probabilities, one of READERS.
    """

    def __init__(self, teacher: Teacher, k: int) -> None:
        """Connect and probe.

        Raises:
            TeacherError: the server cannot be this teacher; says why and what to do.
            ModelError: the tokenizer cannot be loaded.
        """
        assert teacher.endpoint is not None
        self.teacher = teacher
        self.endpoint = teacher.endpoint
        self.k = k
        self.renderer = Renderer.of(teacher)
        self.rendering = threading.Lock()  # a tokenizer is not made for several threads at once
        self.vocab_size = self.renderer.vocabulary
        if k > self.vocab_size:
            raise TeacherError(f"signals.k is {k}, but {teacher.name} has only {self.vocab_size} tokens")
        self.connection = Connection(teacher.endpoint, teacher.name, teacher.patience_s)
        try:
            self.connection.run(self._probe())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self.connection.close()

    def score(self, samples: Sequence[Sample]) -> list[TopKSignals]:
        """Signals of each sample, in order; equal to rounding only when asked again, as the server batches freely.

        Raises:
            DataError: a sample's response does not fit the server's context.
            AlignmentError: the tokenizer does not keep a response's bytes.
            TeacherError: the server does not answer, or answers what cannot be true.
        """
        with self.rendering:
            rendered = [self.renderer.render(sample, self.context) for sample in samples]
        return self.connection.run(self._score(rendered))

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        batch_size: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """One answer to each sample's prompt, in order; see Backend.generate. Each request has a seed of its own.

        At most `batch_size` requests are in flight, and never more than `max_concurrency`.
        """
        room = max(1, self.context - max_new_tokens)
        with self.rendering:
            prompts = [self.renderer.prompt_ids(sample)[-room:] for sample in samples]

        async def all_of_them() -> list[str]:
            slots = asyncio.Semaphore(batch_size)

            async def one(index: int) -> str:
                async with slots:
                    own = prompt_seed(seed, samples[index])
                    return await self._generate(prompts[index], max_new_tokens, temperature, own)

            return await _gather([one(index) for index in range(len(prompts))])

        return self.connection.run(all_of_them())

    async def _score(self, rendered: Sequence[Rendered]) -> list[TopKSignals]:
        return await _gather([self._signals(item) for item in rendered])

    async def _signals(self, item: Rendered) -> TopKSignals:
        try:
            rows = await ask_rows(self.connection, self.dialect, *_prompt(item), self.k, self.vocab_size)
            return TopKSignals(
                logps=rows.logps.astype(np.float16),
                ids=rows.ids,
                lse=np.full(len(rows.logps), np.nan, dtype=np.float32),
                token_logps=rows.token_logps,
                byte_ends=item.ends,
            ).validate(self.vocab_size)
        except SignalError as error:
            raise self._unusable(error) from None

    async def _generate(self, prompt_ids: np.ndarray, max_new_tokens: int, temperature: float, seed: int) -> str:
        end = self.renderer.end_of_turn
        request = ask_text(
            self.endpoint.model,
            prompt_ids.tolist(),
            max_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            end_of_turn=end,
        )
        limit = answer_limit(len(prompt_ids) + max_new_tokens, 0)
        body = await self.connection.ask("POST", f"{self.endpoint.url}/completions", request, limit=limit)
        try:
            answer = read_answer(body)
        except SignalError as error:
            raise self._unusable(error) from None
        if answer.token_ids is None:
            return answer.text
        ids = answer.token_ids[: answer.token_ids.index(end)] if end in answer.token_ids else answer.token_ids
        return str(self.renderer.tokenizer.decode(ids, skip_special_tokens=True))

    def _unusable(self, error: SignalError) -> TeacherError:
        return TeacherError(self.connection.say(f"gives an answer that cannot be used: {error}"))

    async def _probe(self) -> None:
        tokenizer = self.renderer.tokenizer
        self.context = (await find_model(self.connection)).context
        texts = [self.renderer.prompt_text(PROBE), PROBE.response, f" {PROBE.response}"]
        await compare_tokenizers(self.connection, tokenizer, self.teacher.tokenizer or self.teacher.model, texts)
        prompt = _prompt(self.renderer.render(PROBE, self.context))
        try:
            self.dialect = await find_dialect(self.connection, *prompt, self.k, self.vocab_size)
        except SignalError as error:
            raise self._unusable(error) from None


def _prompt(item: Rendered) -> tuple[list[int], int]:
    """All token ids of a sample, and where the predictions that are wanted begin."""
    return np.concatenate([item.prompt_ids, item.response_ids]).tolist(), len(item.prompt_ids)


async def _gather(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; at the first error the others are given up."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
