"""The same numbers on every device and in both precisions: losses, student and teacher.

The CPU's cases run by default; those of a GPU with `-m gpu`. Each is compared with float64 or float32 on the CPU.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rayfuse.config import STAGES, Data, Student, Teacher
from rayfuse.data.rows import read_samples
from rayfuse.losses import fused_head, gauge, gld_distance, gld_features, teacher_topk, token_logps, uld_loss
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.stages import METHODS
from rayfuse.stages.tensors import on_device
from rayfuse.student.engines.ddp import DDPEngine
from rayfuse.teachers.identity import IdentifiedTeacher
from rayfuse.teachers.transformers import TransformersTeacher

K = 5
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
in_both_precisions = pytest.mark.parametrize(
    ("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 0.02)], ids=["float32", "bfloat16"]
)


@on_every_device
@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float16, np.float32, bool])
def test_arrays(device, dtype):
    array = (np.arange(12).reshape(3, 4) % 5).astype(dtype)
    tensor = on_device(array, torch.device(device))
    assert tensor.device.type == device
    assert tensor.cpu().numpy().dtype == dtype
    np.testing.assert_array_equal(tensor.cpu().numpy(), array)
    shared = device == "cpu"
    array[0, 0] = 1
    assert bool(tensor[0, 0].cpu() == array[0, 0]) is shared


@on_every_device
@in_both_precisions
def test_losses(device, dtype, rtol):
    """Cross-entropy, ULD and GLD on the fused head, values and gradients, against full logits in float64."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 24, generator=draw).to(getattr(torch, dtype)) for n in (41, 503))
    labels = torch.randint(503, (41,), generator=draw)
    sample = torch.arange(41) % 3
    teacher = torch.randn(41, K, generator=draw).mul(3).sort(-1, descending=True).values

    def loss_of(loss_ce, topk, place):
        features = [gld_features(gauge(values), sample.to(place), 3) for values in (topk, teacher.to(place))]
        return 0.5 * loss_ce + 0.5 * (uld_loss(topk, teacher.to(place)) + gld_distance(*features).mean())

    ours = [x.to(device).requires_grad_() for x in (hidden, weight)]
    out = fused_head(*ours, labels.to(device), K, chunk=8)
    loss = loss_of(out.loss_ce, out.topk, device)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    # Rounding may swap neighbours in the top-K: the exact side is read at our ids.
    expected = loss_of(F.cross_entropy(logits, labels), logits.gather(1, out.ids.cpu()), "cpu")
    assert loss.device.type == out.topk.device.type == device
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=rtol, atol=0.0)
    # Where two ranks lie close, rounding to bfloat16 turns the sign of an L1: there the cross-entropy's gradient alone.
    whole = dtype == "float32"
    loss = loss if whole else fused_head(*ours, labels.to(device), K, chunk=8).loss_ce
    wanted = torch.autograd.grad(expected if whole else F.cross_entropy(logits, labels), exact, retain_graph=True)
    for got, want in zip(torch.autograd.grad(loss, ours), wanted, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=rtol, atol=2 * rtol * want.abs().max().item())

    scored = teacher_topk(*[x.detach() for x in ours], labels.to(device), K, chunk=8)
    chosen = token_logps(*ours, labels.to(device), chunk=8)
    logps = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    for got in (scored.next_logps, chosen):
        torch.testing.assert_close(got.detach().cpu().double(), logps.detach(), rtol=rtol, atol=10 * rtol)


@on_every_device
@in_both_precisions
@pytest.mark.parametrize("method", ["sft", "infifusion", "infigfusion"])
def test_a_step_of_the_student(tiny, tmp_path, device, dtype, rtol, method):
    """Loss and gradient norm of a micro-batch, against the same in float32 on the CPU."""
    teacher = Teacher(model=tiny.model("code"), name="code", dtype="float32")
    local = TransformersTeacher(teacher, K)
    scorer = type("Local", (), {"score": lambda self, unit: lambda: local.score(unit)})
    stage = STAGES[method](method=method)
    teachers = (IdentifiedTeacher(teacher, "code"),) if STAGES[method].uses_teachers else ()
    spec = PrepareSpec(
        student=Student(model=tiny.model("pivot")),
        teachers=teachers,
        store=str(tmp_path),
        k=K,
        alignment="bytes",
        max_length=200,
        targets=stage.targets,
        stage=stage,
    )
    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=16))
    batch = Preparer(spec, lambda *_: scorer())(samples)

    def step(place, precision):
        student = Student(model=tiny.model("pivot"), dtype=precision, gpus=float(place == "cuda"))
        engine = DDPEngine(student, student.model, stage, torch.device(place))
        loss, _ = METHODS[method](stage, engine.score(batch, K), batch, batch.counts)
        engine.backward(loss)
        return float(loss.detach()), engine.step(1e-3)

    assert step(device, dtype) == pytest.approx(step("cpu", "float32"), rel=5 * rtol)


@on_every_device
@in_both_precisions
def test_the_signals_of_a_teacher(tiny, device, dtype, rtol):
    """Top-K and log-probabilities, against float32 on the CPU."""
    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=12))

    def answers(place, precision):
        teacher = Teacher(model=tiny.model("code"), name="code", dtype=precision, gpus=float(place == "cuda"))
        return TransformersTeacher(teacher, K).score(samples)

    for got, want in zip(answers(device, dtype), answers("cpu", "float32"), strict=True):
        assert got.byte_ends.tolist() == want.byte_ends.tolist()
        for field in ("logps", "token_logps", "lse"):
            ours, theirs = (torch.from_numpy(getattr(side, field)).float() for side in (got, want))
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=5e-3 if dtype == "float32" else 0.1)
