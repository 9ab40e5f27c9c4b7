"""From the configuration of a stage to the job that its workers get."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import cast

from rayfuse.config import Config, Data
from rayfuse.config.run import as_teacher
from rayfuse.prepare.spec import INITIAL, PrepareSpec
from rayfuse.run.sources import UnitSource
from rayfuse.stages import METHODS, ranks
from rayfuse.student.job import StageJob
from rayfuse.teachers.identity import fingerprint


def stage_job(
    config: Config, index: int, fingerprints: dict[str, str], sources: Mapping[tuple[str, ...], UnitSource]
) -> StageJob:
    stage = config.stages[index]
    source = sources[stage.sides]
    previous = index > 0 and stage.start_from == "previous"
    start = str(config.stage_folder(index - 1) / "model") if previous else config.student.model
    teachers = [(teacher, fingerprints[teacher.name]) for teacher in config.teachers if stage.uses_teachers]
    if stage.uses_preferences:
        initial = as_teacher(config, INITIAL, start if previous else None)
        teachers.append((initial, fingerprint(initial, config.signals.k)))
    data = cast(Data, config.preferences) if stage.uses_preferences else config.data
    spec = PrepareSpec(
        student=config.student,
        teachers=tuple(teachers),
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
        "teachers": [(fp, teacher.weight) for teacher, fp in spec.teachers],
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
