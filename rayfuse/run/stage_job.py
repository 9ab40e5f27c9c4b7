"""From the configuration of a stage to the job that its workers get."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import cast

from rayfuse.config import Config, Data
from rayfuse.config.run import as_teacher
from rayfuse.prepare.spec import INITIAL, PrepareSpec
from rayfuse.run.sources import UnitSource
from rayfuse.stages import METHODS, ranks
from rayfuse.student.job import StageJob
from rayfuse.teachers.identity import IdentifiedTeacher, identify


def stage_job(
    config: Config,
    index: int,
    teachers: Sequence[IdentifiedTeacher],
    sources: Mapping[tuple[str, ...], UnitSource],
) -> StageJob:
    """The job of stage `index`.

    Args:
        config: the run.
        index: which of `config.stages`.
        teachers: of the run, identified; a stage on preferences adds the model that it starts from.
        sources: the run's data, by the sides that a stage compares.
    """
    stage = config.stages[index]
    source = sources[stage.sides]
    previous = index > 0 and stage.start_from == "previous"
    start = str(config.stage_folder(index - 1) / "model") if previous else config.student.model
    scorers = list(teachers) if stage.uses_teachers else []
    if stage.uses_preferences:
        scorers += identify([as_teacher(config, INITIAL, start if previous else None)], config.signals.k)
    data = cast(Data, config.preferences) if stage.uses_preferences else config.data
    spec = PrepareSpec(
        student=config.student,
        teachers=tuple(scorers),
        store=config.store_url,
        k=ranks(config, stage),
        alignment=getattr(stage, "alignment", "bytes"),
        max_length=data.max_length,
        targets=METHODS[stage.method].targets,
        stage=stage,
        on_missing=config.serving.on_missing,
    )
    identity = {
        "stage": stage.model_dump(mode="json", exclude={"save_every": True, "keep": True, "merge": {"parallel"}}),
        "student": config.student.model_dump(mode="json", exclude={"prefetch", "max_failures", "cpus"}),
        "teachers": [(one.fingerprint, one.teacher.weight) for one in spec.teachers],
        "data": source.content,
        "k": spec.k,
        "seed": config.seed,
        "index": index,
    }
    return StageJob(
        config=config,
        index=index,
        start=start,
        identity=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        spec=spec,
        blocks=source.blocks,
        sizes=source.sizes,
    )
