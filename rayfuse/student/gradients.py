"""How strongly the distance to the teachers pulls, beside SFT: measured once, where a stage starts.

Every loss of a TeacherStage is (1 - lam) L_SFT + lam L_D. With the norms of the two terms' gradients with respect to
all weights, over the stage's first global batch and at the model it starts from,

    ratio = |grad L_D| / |grad L_SFT|          balance = lam ratio / (1 - lam)

so a stage that asks for a `balance` trains with lam = balance / (balance + ratio). The ratio spans two orders of
magnitude between distances (docs/methods.md), and is the first thing to look at where a stage makes a student worse.

It is measured at the start and then stays: a lam that followed the ratio would push harder the nearer SFT is to its
optimum, where its gradient vanishes while an L1 distance's does not. What was measured is in the stage's folder, so
that a resumed stage goes on with the same lam.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import Stage, TeacherStage
from rayfuse.errors import StudentError
from rayfuse.files import write_whole
from rayfuse.metrics.definitions import DISTANCE_RATIO, LAM, ROUTER
from rayfuse.stages import METHODS
from rayfuse.student.engines import Engine
from rayfuse.student.job import StageJob

FILE = "balance.json"
"""In the stage's folder: what was measured at its start."""


def at_the_start(
    job: StageJob, engine: Engine, batches: Sequence[FusionBatch], done: int, rank: int
) -> tuple[Stage, dict[str, float]]:
    """The stage with the lam it trains with, and what its first record tells of it.

    Every worker calls this, and has the same answer.

    Args:
        job: the stage's.
        engine: with the weights that the stage starts from, or goes on with.
        batches: this worker's part of the first global batch.
        done: steps that are done already.
        rank: of this worker.

    Raises:
        StudentError: `balance` cannot be had: a gradient is zero or not finite, or what was measured when the stage
            started is lost.
    """
    stage = job.stage
    if not isinstance(stage, TeacherStage):
        return stage, {}
    path = job.folder / FILE
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    engine.barrier()  # nobody writes before all have looked
    if stored.get("identity") == job.identity:
        ratio, lam = stored["ratio"], stored["lam"]
    elif not done:
        ratio = distance_ratio(job, stage, engine, batches)
        lam = stage.lam if stage.balance is None else balanced_lam(job.name, stage.balance, ratio)
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"identity": job.identity, "ratio": ratio, "lam": lam}) + "\n")
    elif stage.balance is None:
        return stage, {}
    else:
        raise StudentError(
            f"{job.name} is at step {done}, and {path} is gone, which holds the lam that its first steps were trained "
            f"with (balance {stage.balance:g}); give that lam in place of balance and start the stage anew"
        )
    # Told in the record of step 1 only: a resumed stage's records are those of one that was never interrupted.
    told = {} if done else {DISTANCE_RATIO.name: ratio, LAM.name: lam}
    return stage.model_copy(update={"lam": lam}), told


def balanced_lam(name: str, balance: float, ratio: float) -> float:
    """The lam with which a distance whose gradient is `ratio` times SFT's pulls `balance` times as strongly as SFT.

    Raises:
        StudentError: no lam does.
    """
    if not (0 < ratio < math.inf):
        raise StudentError(
            f"{name}: no lam gives balance {balance:g}: the distance's gradient is {ratio:g} times SFT's on the first "
            "batch. Where it is zero, the teachers say what the student says; give lam in place of balance"
        )
    return balance / (balance + ratio)


def distance_ratio(job: StageJob, stage: TeacherStage, engine: Engine, batches: Sequence[FusionBatch]) -> float:
    """|grad L_D| / |grad L_SFT| over the global batch; weights, moments and random numbers are left as they were."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if job.config.student.gpus else []):
        norms = []
        for lam in (0.0, 1.0):
            accumulate(job, stage.model_copy(update={"lam": lam}), engine, batches, router=False)
            norms.append(engine.take_gradient_norm())
    sft, distance = norms
    return distance / sft if sft else math.inf


def accumulate(
    job: StageJob, stage: Stage, engine: Engine, batches: Sequence[FusionBatch], *, router: bool = True
) -> tuple[list[dict[str, Any]], Counts]:
    """Forward and backward of this worker's part of a global batch; the gradients are left in the engine.

    Args:
        job: the stage's.
        stage: its configuration, with the lam that counts.
        engine: whose model it is.
        batches: the micro-batches.
        router: the router's loss of a mixture of experts is part of it.

    Returns:
        Loss and parts of each micro-batch, still on the device, and the denominators of the global batch.
    """
    loss_of, k = METHODS[stage.method], stage.kept(job.config.signals.k)
    counts = engine.sum_over_workers(np.sum([batch.counts.as_array() for batch in batches], axis=0))
    totals = Counts.of_array(counts, len(job.spec.teachers))
    # Of padding apart: a router's loss is a mean over the tokens of a micro-batch, and each counts equally in the step.
    real_tokens = engine.sum_over_workers(np.array([sum(batch.attention_mask.sum() for batch in batches)], float))[0]
    parts_of: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        with engine.accumulate(last=index == len(batches) - 1):
            output = engine.log_probabilities(batch) if k is None else engine.score(batch, k, lse=stage.lse_gradient)
            loss, parts = loss_of(stage, output, batch, totals)
            balancing = engine.router_loss() if router else None
            if balancing is not None:
                balancing = balancing * (batch.attention_mask.sum() / real_tokens)
                loss, parts = loss + balancing, {**parts, ROUTER.name: balancing}
            engine.backward(loss)
        parts_of.append({"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}})
    return parts_of, totals
