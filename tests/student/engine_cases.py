"""What test_engines.py does in a group of workers: stages trained by every engine on the same batches.

A group of plain processes (gloo) does all its cases one after the other, for a process takes longer to start than a
case. What it measured goes into files, which the tests compare.
"""

from __future__ import annotations

import json
import os
import time
import traceback
import uuid
import warnings
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed looks for a GPU

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayfuse.batch import FusionBatch
from rayfuse.config import Stage, Student
from rayfuse.models import loading
from rayfuse.student.checkpoint import latest_checkpoint, save_checkpoint
from rayfuse.student.engines import ENGINES
from rayfuse.student.gradients import accumulate

K = 4


@dataclass(frozen=True)
class Case:
    """One student trained for some steps.

    Attributes:
        name: its folder's.
        student: its configuration, with the engine.
        stage: the method.
        steps: micro-batches of all ranks, of each step.
        save_at: the step after which a checkpoint is written; 0: none.
        resume: folder of another case, whose checkpoint this one continues from.
        untrained: parameters whose name begins so take no gradients.
    """

    name: str
    student: Student
    stage: Stage
    steps: list[list[FusionBatch]]
    save_at: int = 0
    resume: str = ""
    untrained: str = ""


def run(cases: list[Case], folder: Path, world: int) -> dict[str, dict[str, Any]]:
    """Run the cases in a group of `world` workers; what each measured, by the case's name."""
    folder.mkdir(parents=True, exist_ok=True)
    # Forked from one process that has only imported: imports take longer than all cases.
    get_context("forkserver").set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "deepspeed"])
    meeting = folder / f"meeting-{uuid.uuid4().hex}"  # a file that an earlier group met at would hold its answers
    mp.start_processes(_work, (world, cases, folder, meeting), nprocs=world, start_method="forkserver")
    return {case.name: json.loads((folder / case.name / "measured.json").read_text()) for case in cases}


def _work(rank: int, world: int, cases: list[Case], folder: Path, meeting: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    store = dist.FileStore(str(meeting), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    warnings.simplefilter("ignore")
    for case in cases:
        (folder / case.name).mkdir(exist_ok=True)
        begun = time.perf_counter()
        try:
            measured = _train(case, folder, rank, world)
        except Exception:
            traceback.print_exc()
            raise
        if rank == 0:
            measured["seconds"] = time.perf_counter() - begun
            (folder / case.name / "measured.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


def _engine(case: Case) -> Any:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if case.untrained:
            patch.setattr(loading, "_freeze_other_parts", lambda model: _freeze(model, case.untrained))
        return _make(case)


def _freeze(model: Any, prefix: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefix))


def _make(case: Case) -> Any:
    return ENGINES[case.student.engine](case.student, case.student.model, case.stage, torch.device("cpu"))


def _train(case: Case, folder: Path, rank: int, world: int) -> dict[str, Any]:
    engine = _engine(case)
    done = 0
    if case.resume:
        checkpoint = latest_checkpoint(folder / case.resume, "this run")
        assert checkpoint is not None
        engine.load_state(checkpoint.state)
        done = checkpoint.step
    job = SimpleNamespace(
        config=SimpleNamespace(signals=SimpleNamespace(k=K)),
        spec=SimpleNamespace(teachers=case.steps[0][0].targets if "ranks" in case.stage.targets else ()),
    )
    measured: dict[str, Any] = {"loss": [], "norm": [], "probed": []}
    for step, batches in enumerate(case.steps, start=1):
        if step <= done:
            continue
        mine = batches[rank::world]
        if step == done + 1:  # as a stage measures its gradients before the first step
            accumulate(job, case.stage, engine, mine)
            measured["probed"].append(engine.take_gradient_norm())
        parts, _ = accumulate(job, case.stage, engine, mine)
        loss = torch.stack([part["loss"] for part in parts]).sum().double().numpy()[None]
        measured["loss"].append(float(engine.sum_over_workers(loss)[0]))
        measured["norm"].append(engine.step(case.stage.learning_rate))
        if step == case.save_at:
            save_checkpoint(
                folder / case.name, step, "this run", engine.state(), rank=rank, world=world, barrier=engine.barrier
            )
    with engine.whole_model() as whole:  # on every rank, as the student writes with it
        ids = torch.arange(3, 9)[None]
        summed = whole(input_ids=ids).logits.double().abs().sum().numpy()[None]
        measured["written_with"] = [float(summed[0]), float(engine.sum_over_workers(summed)[0]) / world]
    out = folder / case.name / "model"
    if rank == 0:
        out.mkdir(exist_ok=True)
    engine.barrier()
    engine.export(out)
    engine.barrier()
    return measured
