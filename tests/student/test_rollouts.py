"""The student's own texts: who writes when, what is kept, and that it is the same bits again."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from rayfuse.config import OnPolicy, parse_config
from rayfuse.data.rollout import Rollout, Text
from rayfuse.data.sample import Sample
from rayfuse.errors import StudentError
from rayfuse.student import rollouts
from rayfuse.student.engines import DDPEngine
from rayfuse.student.rollouts import OwnWeights, RolloutStore, RolloutStream, Sampling, own_samples, step_seed

SAMPLES = [Sample((("user", f"Say {word}."),), word) for word in ("red", "blue", "green", "cat")]
SAMPLING = Sampling(seed=3, max_new_tokens=12, temperature=1.0, likely=4)


def _tree(tiny, folder, **stage):
    stages = [{"method": "onpolicy", "steps": 6, "batch_size": 16, "max_new_tokens": 12, **stage}]
    return parse_config(tiny.tree(folder, stages=stages))


@pytest.fixture
def writer(tiny, tmp_path):
    """The tiny pivot as an engine that trains with dropout, and what writes with its weights."""
    config = _tree(tiny, tmp_path / "run")
    (stage,) = config.stages
    engine = DDPEngine(config.student, config.student.model, stage, torch.device("cpu"))
    job = SimpleNamespace(config=config, stage=stage, data=config.data)
    return engine, OwnWeights(engine, job)


def _write(generator, samples, sampling):
    with generator.writing(0):
        return generator.write(samples, sampling)


def test_a_seed_gives_the_same_texts_and_another_seed_others(writer):
    _, generator = writer
    first, again = _write(generator, SAMPLES, SAMPLING), _write(generator, SAMPLES, SAMPLING)
    other = _write(generator, SAMPLES, Sampling(4, 12, 1.0, 4))
    assert first == again
    assert [text for text, _ in first] != [text for text, _ in other]
    assert len({text.token_ids for text, _ in first}) == len(SAMPLES), "every prompt has random numbers of its own"


def test_a_texts_random_numbers_are_those_of_its_prompt_alone(writer):
    _, generator = writer
    alone = [_write(generator, [sample], SAMPLING)[0] for sample in SAMPLES]
    together = _write(generator, SAMPLES, SAMPLING)
    assert [text.token_ids for text, _ in alone] == [text.token_ids for text, _ in together]


def test_likely_tokens_are_those_of_a_plain_forward(writer):
    engine, generator = writer
    (text, likely), *_ = _write(generator, SAMPLES[:1], SAMPLING)
    prompt = generator.renderer.prompt_ids(Sample(SAMPLES[0].messages, ""))
    ids = torch.tensor([[*prompt.tolist(), *text.token_ids]])
    with engine.whole_model() as model:
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 :]
    assert len(likely) == len(text.token_ids) + 1
    noted = [row for row in likely if row]
    assert len(noted) >= len(text.token_ids)
    for row, expected in zip(noted, logits, strict=False):
        assert list(row) == expected.topk(4).indices.tolist()


def test_writing_leaves_the_training_as_it_was(writer):
    engine, generator = writer
    engine.model.generation_config.temperature = 0.3
    own = engine.model.generation_config
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _write(generator, SAMPLES, SAMPLING)
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.model.training
    assert engine.model.generation_config is own
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_the_student_writes_its_share_of_every_step_and_each_prompt_has_its_turn():
    samples = SAMPLES * 2
    assert all(len(own_samples(samples, 0.5, 0, step, 1)) == 4 for step in range(9))
    drawn = [own_samples(samples, 0.3, 0, step, 1) for step in range(400)]
    assert {len(one) for one in drawn} == {2, 3}
    assert sum(map(len, drawn)) / 3200 == pytest.approx(0.3, abs=0.01)
    assert {b for one in drawn for b in one} == set(range(8))
    assert own_samples(samples, 1.0, 0, 1, 1) == list(range(8))
    assert drawn[3] == own_samples(samples, 0.3, 0, 3, 1)
    assert drawn[3:9] != [own_samples(samples, 0.3, 1, step, 1) for step in range(3, 9)]


ABOUT = {"format": "f", "identity": "a" * 64, "policy_step": 3, "prompt": "p", "seed": 1}
CONTENT = {"text": "é", "token_ids": [1, 2], "ends": [1, 2], "finished": True, "likely": [[4], [5], []]}


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_the_first_writer_of_a_rollout_wins(tmp_path, scheme):
    store = RolloutStore(f"{scheme}{tmp_path}/rollouts")
    assert store.get(ABOUT) is None
    assert store.put(ABOUT, CONTENT)
    assert not store.put(ABOUT, {**CONTENT, "text": "other"})
    assert store.get(ABOUT) == CONTENT
    assert store.get({**ABOUT, "policy_step": 4}) is None


def test_a_damaged_rollout_is_set_aside(tmp_path):
    store = RolloutStore(str(tmp_path))
    store.put(ABOUT, CONTENT)
    path = store.path(ABOUT)
    with open(path, "r+b") as file:
        content = file.read().replace(b'"finished": true', b'"finished": null')
        file.seek(0)
        file.write(content)
        file.truncate()
    assert store.get(ABOUT) is None
    assert store.damaged == 1
    assert store.put(ABOUT, CONTENT)


class Policy:
    """A generator whose text says which step's student wrote it, and that notes what it was asked."""

    def __init__(self):
        self.step, self.asked = 0, []

    @contextlib.contextmanager
    def writing(self, policy_step):
        assert policy_step == self.step, "only the present student can write"
        yield

    def write(self, samples, sampling):
        self.asked.append((self.step, sampling.max_new_tokens))
        return [(Text(f"by {self.step}", (self.step,), (4,), True), ((7,), ())) for _ in samples]


class Here:
    """prepare_unit and ray.get without a cluster: the batch is the unit itself."""

    def options(self, **_):
        return self

    def remote(self, spec, units, index):
        return SimpleNamespace(samples=units[index], stats={})


@pytest.fixture
def job(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "prepare_unit", Here())
    monkeypatch.setattr(rollouts.ray, "get", lambda ref: ref)

    def make(**stage):
        config = _tree(tiny, tmp_path / "run", **stage)
        return SimpleNamespace(
            config=config,
            stage=config.stages[0],
            spec=None,
            identity="b" * 64,
            name="01-onpolicy",
            folder=tmp_path,
            sizes=[10] * 4,
            units=4,
            units_per_step=2,
            steps=6,
            blocks=[[SAMPLES] * 4],
        )

    return make


def _run(stream, policy, steps):
    """What each step learns from, as (age, text) of its rollouts, while the student takes its steps."""
    seen = []
    for _ in range(steps):
        own = [s for batch in stream.take(2) for s in batch.samples if isinstance(s, Rollout)]
        seen.append(sorted({(rollout.age, rollout.response) for rollout in own}))
        policy.step += 1
    return seen


@pytest.mark.parametrize("age", [0, 1, 3])
def test_no_text_is_older_than_it_may_be(job, age):
    policy = Policy()
    seen = _run(RolloutStream(job(max_age=age), policy, 0, 1, 0), policy, 6)
    assert seen == [[(min(step, age), f"by {max(0, step - age)}")] for step in range(6)]


def test_a_resumed_worker_learns_from_what_an_older_student_wrote(job):
    policy = Policy()
    undisturbed = _run(RolloutStream(job(max_age=2), policy, 0, 1, 0), policy, 6)
    asked = len(policy.asked)
    policy.step = 3
    resumed = _run(RolloutStream(job(max_age=2), policy, 0, 1, 3), policy, 3)
    assert resumed == undisturbed[3:]
    assert len(policy.asked) == asked, "all of it was in the store"


def test_an_older_students_lost_texts_are_an_error_and_never_written_by_another(job, tmp_path):
    policy = Policy()
    policy.step = 3
    with pytest.raises(StudentError, match=r"step 4 learns from texts that the student of step 2 wrote.*not in .*roll"):
        RolloutStream(job(max_age=1), policy, 0, 1, 3).take(2)


def test_the_workers_share_a_step_and_write_the_same_as_one_alone(job):
    made = job(max_age=0)
    alone, policies = RolloutStream(made, Policy(), 0, 1, 0).take(2), [Policy(), Policy()]
    made.units_per_step = 2
    shared = []
    for rank, policy in enumerate(policies):
        stream = RolloutStream(made, policy, rank, 2, 0)
        shared += stream.take(1)
    assert [one.samples for one in shared] == [one.samples for one in alone]


def test_the_prefix_is_what_the_student_is_asked_for(job):
    policy = Policy()
    _run(RolloutStream(job(max_age=0, prefix=0.5, share=1.0), policy, 0, 1, 0), policy, 6)
    stage = OnPolicy(prefix=0.5, max_new_tokens=12)
    assert sorted(set(policy.asked)) == [(step, stage.longest(step + 1, 6)) for step in range(6)]


def test_seeds_of_steps_differ_and_fit():
    seeds = {step_seed(seed, step) for seed in range(3) for step in range(100)}
    assert len(seeds) == 300
    assert max(seeds) < 2**31
