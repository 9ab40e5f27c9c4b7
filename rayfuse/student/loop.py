"""The training loop of one student worker: units in, optimiser steps out.

It always begins at the newest checkpoint of its stage, so a restarted worker group, a resumed run and a first start are
the same thing.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.exceptions import RayError

from rayfuse.batch import FusionBatch
from rayfuse.config import Stage
from rayfuse.errors import MissingSignalsError, RayfuseError, StudentError
from rayfuse.metrics.definitions import ALIGNED, DROPPED, EVERY_RUN, metric_of
from rayfuse.metrics.records import MetricsWriter, read_metrics
from rayfuse.prepare.spec import INITIAL
from rayfuse.student.checkpoint import latest_checkpoint, restore_random_state, save_checkpoint
from rayfuse.student.engines import ENGINES, Engine
from rayfuse.student.gradients import accumulate, at_the_start
from rayfuse.student.job import StageJob
from rayfuse.student.result import commit_model, half_model
from rayfuse.student.rollouts import OwnWeights, RolloutStream
from rayfuse.student.stream import UnitStream, units_of


def learning_rate(stage: Stage, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero. `step` counts from 0."""
    warm = math.ceil(stage.warmup * steps)
    if step < warm:
        return stage.learning_rate * (step + 1) / warm
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train_in_group(loop_config: dict[str, StageJob]) -> None:
    """`train` in a worker of a Ray Train group; `loop_config["job"]` is the job."""
    import ray.train

    context = ray.train.get_context()
    world = context.get_world_size()
    try:
        train(loop_config["job"], rank=context.get_world_rank(), world=world)
    except torch.OutOfMemoryError as error:
        raise StudentError(
            f"out of memory on the student's device: lower unit_size (samples of one micro-step) or max_length of the "
            f"data, or set student.gradient_checkpointing: true. {error}"
        ) from error
    except (RayfuseError, RayError):
        raise
    except Exception as error:
        if world > 1 and isinstance(error, RuntimeError):
            raise  # the loss of another worker shows as a broken connection: the group may start again
        raise StudentError(f"the training loop failed: {type(error).__name__}: {error}") from error


def train(job: StageJob, rank: int, world: int) -> None:
    """Train one stage to its end, as worker `rank` of `world`, and write its model to `model/`."""
    config, stage = job.config, job.stage
    device = torch.device("cuda" if config.student.gpus else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.student.cpus)))
    checkpoint = latest_checkpoint(job.folder, job.identity)
    done = checkpoint.step if checkpoint is not None else 0
    # The teachers answer while the weights load, unless they are to read what these weights write.
    stream = None if stage.writes else UnitStream(job, units_of(job, rank, world, done))
    torch.manual_seed(config.seed + rank)  # dropout must differ between workers
    engine = ENGINES[config.student.engine](config.student, job.start, stage, device)
    if checkpoint is not None:
        engine.load_state(checkpoint.state)
        restore_random_state(checkpoint, rank)
    found = engine.sum_over_workers(np.array([done, done**2], dtype=np.float64))
    if found[0] != world * done or found[1] != world * done**2:
        raise StudentError(
            f"worker {rank} goes on from step {done}, others from another: is {config.output} one file system for all?"
        )

    batches_of = stream or RolloutStream(job, OwnWeights(engine, job), rank, world, done)
    metrics = Path(config.output) / "metrics.jsonl"
    dropped = sum(_dropped(record) for record in read_metrics(metrics) if _before(job, record, done))
    writer = MetricsWriter(metrics) if rank == 0 else None
    for step in range(done + 1, job.steps + 1):
        begun = time.perf_counter()
        batches = batches_of.take(job.units_per_step // world)
        if step == done + 1:
            stage, at_start = at_the_start(job, engine, batches, done, rank)
        record = _step(job, stage, engine, batches, learning_rate(stage, step - 1, job.steps), rank, world)
        seconds = time.perf_counter() - begun
        waited, batches_of.waited = batches_of.waited, 0.0
        if writer is not None:
            speed = {
                "seconds": seconds,
                "tokens_per_second": record["tokens"] / seconds,
                "wait_share": waited / seconds,
            }
            writer.write({"stage": job.name, "step": step, "steps": job.steps, **record, **at_start, **speed})
            at_start = {}
        dropped += _dropped(record)
        _refuse_too_many(job, dropped)
        if step % stage.save_every == 0 and step < job.steps:
            _save(job, engine, step, rank, world)
    write_model(engine, job, rank)


def _step(
    job: StageJob,
    stage: Stage,
    engine: Engine,
    batches: list[FusionBatch],
    rate: float,
    rank: int,
    world: int,
) -> dict[str, float]:
    """One optimiser step over this worker's batches; returns what it measured, over all workers."""
    parts_of, totals = accumulate(job, stage, engine, batches)
    # Read at the end: reading a value makes the host wait for the device.
    measured = [
        {key: float(value) for key, value in {**parts, **batch.stats}.items()}
        for batch, parts in zip(batches, parts_of, strict=True)
    ]
    record = _add_up(measured, stage, engine, rank, world)
    for s, teacher in enumerate(job.spec.teachers if "ranks" in stage.targets else ()):
        record[ALIGNED.key(teacher.name)] = totals.pairs[s] / totals.tokens
    return {**record, "tokens": totals.tokens, "learning_rate": rate, "gradient_norm": engine.step(rate)}


def _add_up(
    measured: Sequence[Mapping[str, float]], stage: Stage, engine: Engine, rank: int, world: int
) -> dict[str, float]:
    """The step's metrics from those of this worker's micro-batches; each adds up as its definition says."""
    # Every micro-batch has the same parts, so they can travel between the workers in the order of their names.
    reduce = {key: metric_of(key, (*stage.parts, *EVERY_RUN)).reduce for key in sorted(measured[0])}
    sums = np.array([0.0 if how == "max" else sum(row[key] for row in measured) for key, how in reduce.items()])
    largest = np.zeros((world, len(reduce)))
    largest[rank] = [max(row[key] for row in measured) if how == "max" else 0.0 for key, how in reduce.items()]
    sums, largest = engine.sum_over_workers(sums), engine.sum_over_workers(largest).max(axis=0)
    values = {"sum": sums, "mean": sums / (len(measured) * world), "max": largest}
    return {key: float(values[how][index]) for index, (key, how) in enumerate(reduce.items())}


def _dropped(record: Mapping[str, Any]) -> float:
    """The (sample, teacher) pairs that were dropped in a step."""
    return sum(value for key, value in record.items() if DROPPED.describes(key))


def _before(job: StageJob, record: Mapping[str, Any], done: int) -> bool:
    return record["stage"] == job.name and record["step"] <= done


def _refuse_too_many(job: StageJob, dropped: float) -> None:
    """Raises MissingSignalsError where more is dropped than `serving.max_dropped` of the whole stage's pairs."""
    teachers = sum(teacher.name != INITIAL for teacher in job.spec.teachers)
    sides = max(1, len(job.stage.sides))
    pairs = job.steps * job.stage.batch_size * sides * teachers
    allowed = job.config.serving.max_dropped * pairs
    if dropped > allowed:
        raise MissingSignalsError(
            f"stage {job.name}: {dropped:,.0f} (sample, teacher) pairs were dropped because a teacher was gone, more "
            f"than {job.config.serving.max_dropped:.2%} (serving.max_dropped) of the stage's {pairs:,}; bring the "
            "teacher back and go on with --resume, or allow more"
        )


def _save(job: StageJob, engine: Engine, step: int, rank: int, world: int) -> None:
    save_checkpoint(
        job.folder,
        step,
        job.identity,
        engine.state(),
        rank=rank,
        world=world,
        barrier=engine.barrier,
        keep=job.stage.keep,
    )


def write_model(engine: Engine, job: StageJob, rank: int) -> None:
    """The stage's result, which has its name only when it is complete. Called by all workers."""
    half = half_model(job)
    if rank == 0:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
    engine.barrier()
    engine.export(half)
    engine.barrier()
    if rank == 0:
        commit_model(job)
    engine.barrier()
