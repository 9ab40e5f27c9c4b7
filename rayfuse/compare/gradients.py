"""What a distance to the teachers pulls towards, where a student starts: its gradient beside that of the right answers.

A method whose distance carries knowledge has a gradient that points where SFT on right answers points. Both gradients
are taken at the pivot, with respect to all weights, over the same samples, whose responses are right.
"""

from __future__ import annotations

from typing import Any

import ray
import torch

from rayfuse.config import Config, TeacherStage
from rayfuse.prepare.tasks import preparer
from rayfuse.run.sources import load_source
from rayfuse.run.stage_job import stage_job
from rayfuse.student.engines.ddp import DDPEngine
from rayfuse.student.gradients import accumulate
from rayfuse.teachers.identity import identify, live
from rayfuse.teachers.serving import applications

UNITS = 12
"""How many units the gradients are taken over."""


def measure_gradients(config: Config, console: Any) -> dict[str, float]:
    """`gradient_ratio`, |grad distance| / |grad SFT|, and `gradient_cosine`, the cosine between the two.

    Args:
        config: of a run with one stage that learns from teachers, on right responses.
        console: where it is said what became of the rows.
    """
    teachers = identify(config.teachers, config.signals.k)
    job = stage_job(config, 0, teachers, {"data": load_source(config, (), console)})
    stage = job.stage
    assert isinstance(stage, TeacherStage)
    applications.deploy(live(job.spec.teachers), config.signals.k)
    units = ray.get(list(job.blocks))[0][:UNITS]
    batches = [preparer(job.spec)(unit) for unit in units]
    engine = DDPEngine(config.student, job.start, stage, torch.device("cpu"))
    gradients = []
    for lam in (0.0, 1.0):
        accumulate(job, stage.model_copy(update={"lam": lam}), engine, batches, router=False)
        parts = [weight.grad.flatten().double() for weight in engine.named.values() if weight.grad is not None]
        gradients.append(torch.cat(parts))
        engine.take_gradient_norm()
    sft, distance = gradients
    return {
        "gradient_ratio": float(distance.norm() / sft.norm()),
        "gradient_cosine": float(torch.nn.functional.cosine_similarity(sft, distance, dim=0)),
    }
