"""An engine on two ranks (gloo): what every rank is asked for, and what one rank alone would give."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from rayfuse.config import Data, Stage, Student, parse_config
from rayfuse.data.rows import read_samples
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.stages.sft import sft_loss
from rayfuse.student.engines import ENGINES
from rayfuse.student.job import StageJob
from rayfuse.student.loop import write_model

STAGE = Stage(method="sft", learning_rate=1e-3)


def job_of(model, folder):
    """The job of an SFT stage in a run folder."""
    config = parse_config({"student": model, "data": "d", "stages": ["sft"], "output": str(folder)})
    spec = PrepareSpec(config.student, (), "", 4, "bytes", 200)
    return StageJob(config, 0, model, "identity", spec, (), (), made_of={"code": "1", "data": "a"})


def _train(rank, world, model, batch, folder):
    """Two steps on the same micro-batch everywhere, then state and model by calls on all ranks."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_num_threads(1)
    engine = ENGINES["ddp"](Student(model=model), model, STAGE, torch.device("cpu"))
    for _ in range(2):
        with engine.accumulate(last=True):
            loss, _ = sft_loss(STAGE, engine.score(batch, 4), batch, batch.counts)
            engine.backward(loss / world)
        engine.step(1e-3)
    for name, part in engine.state().items():
        save_file(dict(part), folder / f"{name}-of-rank-{rank}.safetensors")
    write_model(engine, job_of(model, folder), rank)
    if world > 1:
        dist.destroy_process_group()


def test_two_ranks_leave_one_state_and_one_model_which_are_those_of_one_rank(tiny, tmp_path):
    model = tiny.model("pivot")
    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=8))
    spec = PrepareSpec(Student(model=model), (), str(tmp_path / "store"), 4, "bytes", 200)
    batch = Preparer(spec, lambda *_: None)(samples)
    for world, name in ((1, "one"), (2, "two")):
        (tmp_path / name).mkdir()
        mp.spawn(_train, (world, model, batch, tmp_path / name), nprocs=world)
        parts = sorted(path.name for path in (tmp_path / name).glob("*-of-rank-*"))
        assert parts == ["optimizer-of-rank-0.safetensors", "weights-of-rank-0.safetensors"]
    one, two = (load_file(tmp_path / name / "stages/01-sft/model/model.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
