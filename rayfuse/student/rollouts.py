"""The student's own texts: written by its workers between two optimiser steps, kept, and read by the teachers.

A text that optimiser step t learns from is written by the student of step max(0, t - 1 - max_age), right after that
step, so its age is bounded and depends on no timing. While the teachers read the texts of one step, the student trains
on those of the step before (max_age 1).

The workers write with their own weights, in turn with training: nothing is pushed anywhere, no second copy of the model
is held, and the policy that writes is exactly the one of that step. What writes is behind `Generator`.

A rollout is data. It is named by (run, policy step, prompt, sampling) and kept like signals, first writer wins; so a
resumed run learns from the same texts, also from those that an older student wrote before the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from transformers import GenerationConfig

from rayfuse import cluster
from rayfuse.batch import FusionBatch
from rayfuse.config import OnPolicy
from rayfuse.data.render import Renderer
from rayfuse.data.rollout import Rollout, Text, prompt_ids, text_of_tokens
from rayfuse.data.sample import Sample
from rayfuse.errors import SignalError, StudentError
from rayfuse.metrics.definitions import ROLLOUT_SECONDS
from rayfuse.prepare.tasks import prepare_unit
from rayfuse.signals.objects import ObjectStore
from rayfuse.student.engines import Engine
from rayfuse.student.job import BLOCK, StageJob
from rayfuse.student.stream import units_of
from rayfuse.teachers.generation import LikelyTokens, generate_ids
from rayfuse.teachers.sampling import SeededSampling

FORMAT = "rayfuse-rollouts-1"


@dataclass(frozen=True)
class Sampling:
    """How the student is asked for one step's texts; a text depends on this, the policy and the prompt.

    Attributes:
        seed: of the step.
        max_new_tokens: at most so many.
        temperature: above 0.
        likely: of the likeliest tokens at each position, so many are noted.
    """

    seed: int
    max_new_tokens: int
    temperature: float
    likely: int


Likely = tuple[tuple[int, ...], ...]
"""Per row, the tokens found likeliest there."""


class Generator(Protocol):
    """What writes the student's texts with its present weights. An engine of its own, to which weights are pushed, is
    another implementation: it knows by `policy_step` whether what it holds is old."""

    def writing(self, policy_step: int) -> contextlib.AbstractContextManager[Any]:
        """Around the calls of `write` between two optimiser steps. Collective: all ranks enter it together."""

    def write(self, samples: Sequence[Sample], sampling: Sampling) -> list[tuple[Text, Likely]]:
        """A text to each sample's prompt, in order, and the likely tokens at each of its n + 1 rows.

        The same samples, sampling and weights give the same bits.
        """


class OwnWeights:
    """A Generator: transformers, with the weights that the rank trains.

    Args:
        engine: whose weights they are.
        job: the stage's.
    """

    def __init__(self, engine: Engine, job: StageJob) -> None:
        stage = job.stage
        assert isinstance(stage, OnPolicy)
        self.engine = engine
        self.renderer = Renderer.of(job.config.student)
        self.room = stage.room(job.data.max_length)
        self.model: Any = None

    @contextlib.contextmanager
    def writing(self, policy_step: int) -> Iterator[None]:
        """Around the calls of `write`; the model's own generation settings do not count meanwhile."""
        with self.engine.whole_model() as self.model:
            own, self.model.generation_config = self.model.generation_config, GenerationConfig()
            try:
                yield
            finally:
                self.model.generation_config = own
                self.model = None

    def write(self, samples: Sequence[Sample], sampling: Sampling) -> list[tuple[Text, Likely]]:
        """A text to each sample's prompt; see Generator."""
        end, vocabulary = self.renderer.end_of_turn, self.renderer.vocabulary
        likely = LikelyTokens(sampling.likely, vocabulary)
        drawn = SeededSampling(
            samples,
            seed=sampling.seed,
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            vocab_size=vocabulary,
        )
        written = generate_ids(
            self.model,
            [prompt_ids(self.renderer, sample, self.room)[0] for sample in samples],
            max_new_tokens=sampling.max_new_tokens,
            end=end,
            processors=[likely, drawn],
        )
        texts = [text_of_tokens(self.renderer.tokenizer, ids, end) for ids in written]
        return [(text, likely.rows(b, len(text.token_ids) + 1)) for b, text in enumerate(texts)]


class RolloutStore(ObjectStore):
    """Rollouts by (run's identity, policy step, sampling, prompt): one JSON object each."""

    what = "rollout store"

    def path(self, about: Mapping[str, Any]) -> str:
        """Where a rollout is."""
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return f"{self.root}/{about['identity'][:32]}/{about['policy_step']}/{name[:2]}/{name}.json"

    def get(self, about: Mapping[str, Any]) -> dict[str, Any] | None:
        """The rollout's text, tokens and likely tokens, or None where there is none (or only a damaged object)."""
        path = self.path(about)
        return self.read(path, lambda: _decode(self.fs.cat_file(path), about))

    def put(self, about: Mapping[str, Any], rollout: Mapping[str, Any]) -> bool:
        """Write a rollout, unless it is there; True where this call wrote it."""
        content = {"about": about, "rollout": rollout, "hash": _hash(rollout)}
        return self.write(self.path(about), json.dumps(content, ensure_ascii=False).encode())


def _hash(rollout: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rollout, sort_keys=True).encode()).hexdigest()


def _decode(blob: bytes, about: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads(blob.decode())
        rollout: dict[str, Any] = content["rollout"]
        whole = content["about"] == about and content["hash"] == _hash(rollout)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignalError(f"not a readable rollout: {type(error).__name__}: {error}") from error
    if not whole:
        raise SignalError(f"the rollout is of another run, step or prompt, or damaged: {content['about']}")
    return rollout


class RolloutStream:
    """The batches of one worker in a stage whose student writes; in place of UnitStream.

    Attributes:
        waited: seconds spent waiting for a batch, since it was last read.
    """

    def __init__(self, job: StageJob, generator: Generator, rank: int, world: int, done: int) -> None:
        stage = job.stage
        assert isinstance(stage, OnPolicy)
        self.job, self.stage, self.generator = job, stage, generator
        self.store = RolloutStore(job.config.rollouts_url)
        self.task = prepare_unit.options(**cluster.prepare_task())
        self.units = iter(units_of(job, rank, world, done))
        self.count = job.units_per_step // world
        self.taken = done
        self.sent = done
        self.pending: deque[tuple[Any, float]] = deque()
        self.blocks: dict[int, list[list[Sample]]] = {}
        self.waited = 0.0

    def take(self, count: int) -> list[FusionBatch]:
        """The `count` batches of the next step; called when the steps before it are done."""
        assert count == self.count
        while self.sent < min(self.job.steps, self.taken + 1 + self.stage.max_age):
            self._send(self.sent + 1)
            self.sent += 1
        self.taken += 1
        batches = []
        for _ in range(count):
            ref, seconds = self.pending.popleft()
            begun = time.perf_counter()
            batch: FusionBatch = ray.get(ref)
            self.waited += time.perf_counter() - begun
            batch.stats[ROLLOUT_SECONDS.name] = seconds
            batches.append(batch)
        return batches

    def _send(self, step: int) -> None:
        """Have the texts of one step written or looked up, and its units prepared."""
        policy_step = max(0, step - 1 - self.stage.max_age)
        ours = policy_step == self.taken
        with self.generator.writing(policy_step) if ours else contextlib.nullcontext():
            for unit in [next(self.units) for _ in range(self.count)]:
                begun = time.perf_counter()
                samples = self._with_rollouts(self._samples(unit), step, policy_step, unit, ours)
                seconds = time.perf_counter() - begun
                self.pending.append((self.task.remote(self.job.spec, [samples], 0), seconds))

    def _samples(self, unit: int) -> list[Sample]:
        block, index = divmod(unit, BLOCK)
        if block not in self.blocks:
            if len(self.blocks) >= 4:  # a step's units lie anywhere: a few blocks are kept, not all of the data
                self.blocks.pop(next(iter(self.blocks)))
            self.blocks[block] = ray.get(self.job.blocks[block])
        return self.blocks[block][index]

    def _with_rollouts(
        self, samples: Sequence[Sample], step: int, policy_step: int, unit: int, ours: bool
    ) -> list[Sample]:
        """The unit with the student's texts in place of its share of the samples.

        Raises:
            StudentError: an older student's text is not in the store any more.
        """
        stage, seed = self.stage, self.job.config.seed
        sampling = Sampling(step_seed(seed, step), stage.longest(step, self.job.steps), stage.temperature, stage.likely)
        chosen = own_samples(samples, stage.share, seed, step, unit)
        abouts = [self._about(samples[b], policy_step, sampling) for b in chosen]
        found = [self.store.get(about) for about in abouts]
        if None in found:
            if not ours:
                raise StudentError(
                    f"{self.job.name}: step {step} learns from texts that the student of step {policy_step} wrote, and "
                    f"they are not in {self.store.url} any more; that student is gone. Bring the folder back, or "
                    f"delete {self.job.folder} to start the stage anew"
                )
            found = [
                self._kept(about, text, likely)
                for about, (text, likely) in zip(
                    abouts, self.generator.write([samples[b] for b in chosen], sampling), strict=True
                )
            ]
        unit_samples = list(samples)
        for b, rollout in zip(chosen, found, strict=True):
            assert rollout is not None
            unit_samples[b] = rollout_of(samples[b], rollout, policy_step, step - 1 - policy_step)
        return unit_samples

    def _about(self, sample: Sample, policy_step: int, sampling: Sampling) -> dict[str, Any]:
        identity = {"format": FORMAT, "identity": self.job.identity, "policy_step": policy_step}
        return {**identity, "prompt": sample.prompt_key, **vars(sampling)}

    def _kept(self, about: Mapping[str, Any], text: Text, likely: Likely) -> dict[str, Any]:
        """The rollout as the store has it: what another process wrote first counts."""
        rollout = {**text._asdict(), "likely": likely}
        rollout = json.loads(json.dumps(rollout))
        if not self.store.put(about, rollout):
            return self.store.get(about) or rollout
        return rollout


def rollout_of(sample: Sample, rollout: Mapping[str, Any], policy_step: int, age: int) -> Rollout:
    """A stored rollout as a sample."""
    return Rollout(
        messages=sample.messages,
        response=rollout["text"],
        skill=sample.skill,
        tools=sample.tools,
        weights=sample.weights,
        token_ids=tuple(rollout["token_ids"]),
        ends=tuple(rollout["ends"]),
        finished=rollout["finished"],
        likely=tuple(map(tuple, rollout["likely"])),
        policy_step=policy_step,
        age=age,
        written=sample,
    )


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's sampling, below 2^31."""
    return int.from_bytes(hashlib.sha256(f"rollouts/{seed}/{step}".encode()).digest()[:4], "little") >> 1


def own_samples(samples: Sequence[Sample], share: float, seed: int, step: int, unit: int) -> list[int]:
    """Which samples of a unit the student writes itself, in order: `share` of them, rounded by lot.

    The lots are drawn by seed, step and unit, so that over the epochs each prompt has its turn.
    """
    lots = [hashlib.sha256(f"{seed}/{step}/{unit}/{b}".encode()).digest() for b in range(len(samples) + 1)]
    rounding = int.from_bytes(lots[-1][:4], "big") / 2**32
    count = math.floor(share * len(samples) + rounding)
    return sorted(sorted(range(len(samples)), key=lots.__getitem__)[:count])
