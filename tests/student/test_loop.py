"""The training loop around the engine: which units a worker takes, and what it starts with."""

from types import SimpleNamespace

import pytest

from rayfuse.config import SFT
from rayfuse.prepare.units import share_out, unit_order
from rayfuse.student import loop


def job(tmp_path, workers=1):
    """As much of a StageJob as the loop looks at before its first step: 5 steps of 6 units, of 20 units."""
    student = SimpleNamespace(gpus=0, cpus=1, engine="ddp", workers=workers)
    return SimpleNamespace(
        config=SimpleNamespace(student=student, seed=3, output=str(tmp_path)),
        stage=SFT(),
        folder=tmp_path,
        identity="identity",
        start="model",
        sizes=[10 + 7 * unit % 31 for unit in range(20)],
        units=20,
        units_per_step=6,
        steps=5,
    )


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("done", [0, 2])
def test_the_workers_share_every_step_and_go_on_where_it_ended(tmp_path, world, done):
    asked = job(tmp_path, world)
    shares = [list(loop.units_of(asked, rank, world, done)) for rank in range(world)]
    order, room = unit_order(20, 30, 3), 6 // world
    for step in range(done, 5):
        at = (step - done) * room
        of_step = [share[at : at + room] for share in shares]
        assert of_step == share_out(order[6 * step : 6 * step + 6], asked.sizes, world)
    assert [len(share) for share in shares] == [(5 - done) * room] * world


def test_the_teachers_are_asked_before_the_students_weights_are_loaded(tmp_path, monkeypatch):
    happened = []

    class LoadingError(Exception):
        pass

    def engine(*_):
        happened.append("weights")
        raise LoadingError

    monkeypatch.setattr(loop, "UnitStream", lambda _, units: happened.append(f"stream of {len(list(units))}"))
    monkeypatch.setitem(loop.ENGINES, "ddp", engine)
    with pytest.raises(LoadingError):
        loop.train(job(tmp_path), rank=0, world=1)
    assert happened == ["stream of 30", "weights"]
