"""The facts of a method are in its configuration class, and its loss is what they say."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from rayfuse.config import STAGES, Distillation, InfiFusion, InfiGFusion, Stage, parse_config
from rayfuse.losses import gw_couplings
from rayfuse.metrics.definitions import EVERY_RUN, ROLLOUTS, SFT_PART, Metric, metric_of
from rayfuse.prepare.targets import TARGETS
from rayfuse.report.card import write_card
from rayfuse.report.page import write_report
from rayfuse.stages import METHODS
from rayfuse.stages.distillation import distill
from rayfuse.student import loop
from tests.stages.batches import TEACHERS, every_stage, make_case

RECORDED = json.loads((Path(__file__).parent / "losses.json").read_text())
EXACT = InfiGFusion(mode="exact", lam=0.5)


def _measure(stage, monkeypatch):
    monkeypatch.setattr(
        "rayfuse.stages.couplings.begin_couplings",
        lambda student, graphs: (
            lambda: [torch.from_numpy(gw_couplings(student.detach().double().numpy(), graph)) for graph in graphs]
        ),
    )
    case = make_case(stage, stage.targets)
    output = case.output(preferences=stage.kept(6) is None)
    loss, parts = METHODS[stage.method](stage, output, case.batch, case.batch.counts)
    return case, loss, parts


def test_every_method_has_a_loss_a_sentence_its_parts_and_known_targets():
    assert set(METHODS) == set(STAGES)
    for method, kind in STAGES.items():
        stage = kind(method=method)
        assert kind.text is not Stage.text
        assert set(stage.targets) <= set(TARGETS)
        assert stage.parts
        assert len({(metric.name, metric.per_teacher) for metric in stage.parts}) == len(stage.parts)


@pytest.mark.parametrize("stage", [*every_stage().values(), EXACT], ids=lambda stage: f"{stage.method}")
def test_every_part_that_a_loss_returns_is_defined(stage, monkeypatch):
    """And every defined part is returned, but for what only an option or the targets measure."""
    _, _, parts = _measure(stage, monkeypatch)
    defined = {metric.key(name): metric for metric in stage.parts for name in TEACHERS}
    assert set(parts) <= set(defined)
    others = {metric.name for key, metric in defined.items() if key not in parts}
    assert others <= {"chosen", "coupling_wait", *(metric.name for metric in ROLLOUTS)}


@pytest.mark.parametrize(("method", "stage"), every_stage().items(), ids=list(every_stage()))
def test_values_and_gradients_are_those_that_were_recorded(method, stage, monkeypatch):
    """Recorded before the facts of a method moved into its class: what a default method computes does not drift."""
    case, loss, parts = _measure(stage, monkeypatch)
    gradients = torch.autograd.grad(loss, (case.hidden, case.weight))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
    found = {"loss": loss.detach(), "gradient": norm, **parts}
    assert {key: float(value) for key, value in found.items()} == pytest.approx(RECORDED[method], rel=2e-5)


def test_no_knob_is_guessed_by_its_name():
    """A stage is asked through its class: getattr with a default hides a knob that was renamed."""
    package = Path(inspect.getfile(STAGES["sft"])).parents[2]
    guesses = [
        f"{path.name}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "getattr(stage" in line or "getattr(job.stage" in line or '.stage, "' in line
    ]
    assert not guesses


class Median(Distillation):
    """A method that exists in this test only: the middle rank of both sides."""

    parts: ClassVar[tuple[Metric, ...]] = (
        SFT_PART,
        Metric("loss_median", "distance of the middle ranks", "nats", per_teacher=True),
        Metric("widest", "widest gap", "nats", reduce="max"),
    )

    method: Literal["median"] = "median"

    def text(self, signals_k: int) -> str:
        return f"`median`: {self.mixture_text(f'distance between the middle of the top-{self.kept(signals_k)}')}."


def median_loss(stage, head, batch, totals):
    def distance(s):
        target = batch.targets[s]
        middle = target.logps.shape[1] // 2
        return (head.topk[target.rows, middle] - torch.from_numpy(target.logps[:, middle])).abs().sum()

    loss, parts = distill(stage, head, batch, totals, "loss_median", distance)
    return loss, {**parts, "widest": head.topk.detach().max()}


class OneWorker:
    """As much of an engine as adding up needs."""

    def sum_over_workers(self, values):
        return values


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_a_new_method_is_a_class_and_a_loss(tmp_path, monkeypatch):
    """Nothing else names it: it trains, is reported and described from its class alone."""
    monkeypatch.setitem(STAGES, "median", Median)
    monkeypatch.setitem(METHODS, "median", median_loss)
    stage = Median(lam=0.25)
    _, loss, parts = _measure(stage, monkeypatch)
    rows = [{"loss": float(loss.detach()), **{key: float(value) for key, value in parts.items()}, "cut": 0.0}] * 2
    rows[1] = {**rows[1], "widest": 0.5}
    record = loop._add_up(rows, stage, OneWorker(), 0, 1)
    assert record["loss_median/t0"] == pytest.approx(2 * float(parts["loss_median/t0"]))
    assert record["widest"] == float(parts["widest"]) > 0.5
    step = {"stage": "01-median", "step": 1, "steps": 1, "tokens": 9, "seconds": 1.0, "wait_share": 0.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**record, **step}) + "\n")
    page = write_report(tmp_path).read_text()
    assert "distance of the middle ranks" in page
    assert "widest gap" in page
    tree = {"student": "a/b", "teachers": ["c/d"], "data": "e", "stages": ["sft"], "output": "f"}
    config = parse_config(tree).model_copy(update={"stages": (stage,)})
    write_card(tmp_path / "README.md", config, {})
    assert "0.75 x cross-entropy + 0.25 x the sum over the teachers" in (tmp_path / "README.md").read_text()


class Workers:
    """Two workers that measured the same."""

    def sum_over_workers(self, values):
        if values.ndim == 2:  # a row per worker
            values = np.stack([values[0], values[0] / 2])
            return values
        return 2 * values


def test_a_metric_adds_up_as_its_definition_says():
    rows = [
        {"loss": 1.0, "gradient_ratio": 0.2, "coupling_wait": 3.0},
        {"loss": 2.0, "gradient_ratio": 0.4, "coupling_wait": 1.0},
    ]
    assert loop._add_up(rows, EXACT, OneWorker(), 0, 1) == pytest.approx(
        {"loss": 3.0, "gradient_ratio": 0.3, "coupling_wait": 3.0}
    )
    assert loop._add_up(rows, EXACT, Workers(), 0, 2) == pytest.approx(
        {"loss": 6.0, "gradient_ratio": 0.3, "coupling_wait": 3.0}
    )


def test_a_metric_that_nobody_defined_is_refused():
    with pytest.raises(KeyError, match="loss_unheard"):
        metric_of("loss_unheard/t0", (*InfiFusion.parts, *EVERY_RUN))
    with pytest.raises(KeyError, match="loss_uld"):
        metric_of("loss_uld", (*InfiFusion.parts, *EVERY_RUN))  # there is one per teacher only
