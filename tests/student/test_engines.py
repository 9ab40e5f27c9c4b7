"""Every engine trains what DDP trains: losses, gradients, checkpoints and models, on two workers and on other numbers.

The oracle of DDP itself is plain transformers and torch (engines/test_ddp.py).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayfuse.config import DPO, SFT, Data, InfiFusion, Student, parse_config
from rayfuse.config.run import as_reference
from rayfuse.data.rows import read_preferences, read_samples
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import INITIAL, PrepareSpec
from rayfuse.quickstart.tiny_models import make_model, save
from rayfuse.teachers.identity import identify
from rayfuse.teachers.transformers import TransformersTeacher
from tests.student.engine_cases import Case, K, run

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed: pip install 'rayfuse[dev]'")
FORMS = {
    "ddp": {},
    "fsdp2": {"engine": "fsdp2"},
    "zero1": {"engine": "deepspeed", "zero_stage": 1},
    "zero2": {"engine": "deepspeed", "zero_stage": 2},
    "zero3": {"engine": "deepspeed", "zero_stage": 3},
}
SHARDED = [form for form in FORMS if form != "ddp" and (HAS_DEEPSPEED or not form.startswith("zero"))]
MAIN = [form for form in ("fsdp2", "zero3") if form in SHARDED]
LOSS = 1e-5
"""Relative tolerance of losses: in float32 the engines differ by the order of sums only."""
NORM = 1e-4
WEIGHTS = 1e-5
"""Largest difference of a weight after four steps at a rate of 1e-3; AdamW divides by the root of tiny numbers."""
FUSION = InfiFusion(learning_rate=1e-3, grad_clip=0.5, steps=4)
TUNING = SFT(learning_rate=1e-3, steps=2)
PREFERENCES = DPO(learning_rate=1e-3, steps=2)
ALL = [*FORMS] if HAS_DEEPSPEED else ["ddp", "fsdp2"]


def _student(world, form, workers=2, **changes):
    student = Student(model=world.model, workers=max(workers, 2), **FORMS[form])
    return student.model_copy(update={"workers": workers, **changes})


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A tied and an untied student of two layers, and the batches of three methods."""
    root = tmp_path_factory.mktemp("engines")
    tokenizer = AutoTokenizer.from_pretrained(tiny.model("pivot"))
    models = {}
    for name, tied in (("tied", True), ("untied", False)):
        model = make_model(tokenizer, 3, hidden=32, layers=2)
        if not tied:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.1)
        save(model, tokenizer, root / name)
        models[name] = str(root / name)
    config = parse_config(tiny.tree(root / "run"))
    config = config.model_copy(update={"student": Student(model=models["tied"])})

    def batches(stage, samples, teachers, count):
        spec = PrepareSpec(
            config.student, tuple(identify(teachers, K)), str(root / "store"), stage.kept(K), "bytes", 200
        )
        spec = spec.__class__(**{**vars(spec), "targets": stage.targets, "stage": stage})
        preparer = Preparer(spec, _InProcess)
        size = len(samples) // count
        return [preparer(samples[i * size : (i + 1) * size]) for i in range(count)]

    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=64))
    pairs, _ = read_preferences(Data(path=str(tiny.root / "pairs.jsonl"), limit=16))
    sides = [side for pair in pairs for side in pair]
    fusion = batches(FUSION, samples, list(config.teachers), 16)
    tuning = batches(TUNING, samples, [], 12)
    preferring = batches(PREFERENCES, sides, [as_reference(config, INITIAL, None)], 8)
    return SimpleNamespace(
        root=root,
        model=models["tied"],
        untied=models["untied"],
        fusion=[fusion[i : i + 4] for i in range(0, 16, 4)],
        tuning=[tuning[i : i + 6] for i in range(0, 12, 6)],
        preferring=[preferring[i : i + 4] for i in range(0, 8, 4)],
    )


class _InProcess:
    def __init__(self, identified):
        self.name = identified.name
        self.backend = TransformersTeacher(identified.teacher, K)

    def score(self, samples):
        return lambda: self.backend.score(samples)


def _variants(world, form, **changes):
    """The cases besides the plain one, by what is different in them."""
    untied = _student(world, form, model=world.untied, gradient_checkpointing=True, **changes)
    return [
        Case(f"{form}-untied", untied, TUNING, world.tuning),
        Case(f"{form}-frozen", _student(world, form, **changes), TUNING, world.tuning, untrained="model.layers.0."),
        Case(f"{form}-dpo", _student(world, form, **changes), PREFERENCES, world.preferring),
    ]


@pytest.fixture(scope="module")
def two(world):
    """What two workers measured."""
    cases = [Case(form, _student(world, form), FUSION, world.fusion, save_at=2) for form in ALL]
    cases += [Case(f"{form}-again", _student(world, form), FUSION, world.fusion, resume=form) for form in MAIN]
    for form in ("ddp", *MAIN):
        cases += _variants(world, form)
    return run(cases, world.root / "group", 2)


@pytest.fixture(scope="module")
def one(world, two):
    """What one worker measured, going on from the checkpoints of two."""
    cases = [Case(f"{form}-alone", _student(world, form, 1), FUSION, world.fusion, resume=form) for form in MAIN]
    return run(cases, world.root / "group", 1)


def _model(world, name):
    return load_file(world.root / "group" / name / "model/model.safetensors")


def _same(found, expected, loss=LOSS, norm=NORM):
    assert len(found["loss"]) == len(expected["loss"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=loss)
    assert found["norm"] == pytest.approx(expected["norm"], rel=norm)
    assert found["probed"] == pytest.approx(expected["probed"], rel=norm)


def _same_weights(found, expected, tolerance=WEIGHTS):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", SHARDED)
def test_losses_gradient_norms_and_weights_are_those_of_ddp(world, two, form):
    """Four steps of InfiFusion, two micro-batches each on each worker, whose gradients are clipped."""
    assert min(two["ddp"]["norm"]) > 2 * FUSION.grad_clip
    assert two["ddp"]["probed"] == pytest.approx(two["ddp"]["norm"][:1], rel=NORM)
    _same(two[form], two["ddp"])
    _same_weights(_model(world, form), _model(world, "ddp"))


@pytest.mark.parametrize("form", SHARDED)
def test_a_step_changes_the_output_layer_as_ddp_does(world, two, form):
    """Its weight is read without a call of its layer, so that no hook of that layer can see its gradient."""
    tied = load_file(Path(world.model) / "model.safetensors")["model.embed_tokens.weight"]
    by_ddp = _model(world, "ddp")["model.embed_tokens.weight"] - tied
    assert by_ddp.abs().max() > 1e-3
    torch.testing.assert_close(_model(world, form)["model.embed_tokens.weight"] - tied, by_ddp, rtol=0, atol=WEIGHTS)


@pytest.mark.parametrize("form", MAIN)
@pytest.mark.parametrize("variant", ["untied", "frozen", "dpo"])
def test_other_models_and_methods_too(world, two, form, variant):
    """Untied and with recomputed activations; with a frozen layer; with a loss on log-probabilities."""
    _same(two[f"{form}-{variant}"], two[f"ddp-{variant}"])
    _same_weights(_model(world, f"{form}-{variant}"), _model(world, f"ddp-{variant}"))


@pytest.mark.parametrize("form", ["ddp", *MAIN])
@pytest.mark.parametrize("variant", ["", "-untied", "-frozen"])
def test_the_whole_model_that_a_student_writes_with_is_the_exported_one(world, two, form, variant):
    exported = AutoModelForCausalLM.from_pretrained(world.root / "group" / f"{form}{variant}" / "model")
    with torch.no_grad():
        expected = float(exported(input_ids=torch.arange(3, 9)[None]).logits.double().abs().sum())
    first, mean = two[f"{form}{variant}"]["written_with"]
    assert first == pytest.approx(expected, rel=1e-5)
    assert mean == pytest.approx(first, rel=1e-12), "every rank has it"


@pytest.mark.parametrize("form", ["ddp", *MAIN])
def test_what_takes_no_gradients_is_exported_as_it_was(world, two, form):
    before, after = load_file(Path(world.model) / "model.safetensors"), _model(world, f"{form}-frozen")
    frozen = [name for name in before if name.startswith("model.layers.0.")]
    assert frozen
    for name in before:
        assert torch.equal(after[name], before[name]) is (name in frozen), name


@pytest.mark.parametrize("form", MAIN)
def test_a_resumed_group_goes_on_as_if_it_had_not_stopped(world, two, form):
    for key, since in (("loss", 2), ("norm", 2)):
        assert two[f"{form}-again"][key] == pytest.approx(two[form][key][since:], rel=1e-6)
    _same_weights(_model(world, f"{form}-again"), _model(world, form), 1e-6)


@pytest.mark.parametrize("form", MAIN)
def test_another_number_of_workers_goes_on(world, two, one, form):
    assert one[f"{form}-alone"]["loss"] == pytest.approx(two[form]["loss"][2:], rel=LOSS)
    assert one[f"{form}-alone"]["norm"] == pytest.approx(two[form]["norm"][2:], rel=NORM)
    _same_weights(_model(world, f"{form}-alone"), _model(world, form))


@pytest.mark.parametrize("form", SHARDED)
def test_every_rank_writes_its_own_part(world, two, form):
    """Together they hold every element of the weights and of both moments once."""
    folder = world.root / "group" / form / "checkpoints/step_2"
    parts = [load_file(path) for path in sorted(folder.glob("part-*.safetensors"))]
    assert len(parts) == 2
    elements = sum(value.numel() for value in load_file(Path(world.model) / "model.safetensors").values())
    sizes = [sum(value.numel() for key, value in part.items() if key != "step") for part in parts]
    assert sum(sizes) == 3 * elements
    assert max(sizes) < 0.6 * sum(sizes)


@pytest.mark.parametrize("form", MAIN)
@pytest.mark.parametrize("variant", ["", "-untied"])
def test_an_exported_model_is_that_of_ddp_and_loads_in_transformers(world, two, form, variant):
    folder = world.root / "group" / f"{form}{variant}" / "model"
    other = world.root / "group" / f"ddp{variant}" / "model"
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (folder / name).read_text() == (other / name).read_text()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    weights = _model(world, f"{form}{variant}")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert loaded.dtype == torch.float32
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied is (not variant)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zero1", "zero2"])
@needs_deepspeed
def test_the_other_stages_of_zero_train_the_other_models_too(world, two, form):
    cases = [*_variants(world, form), Case(f"{form}-again", _student(world, form), FUSION, world.fusion, resume=form)]
    found = run(cases, world.root / "group", 2)
    for variant in ("untied", "frozen", "dpo"):
        _same(found[f"{form}-{variant}"], two[f"ddp-{variant}"])
    assert found[f"{form}-again"]["loss"] == pytest.approx(two[form]["loss"][2:], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", SHARDED)
def test_three_workers_go_on_from_two_and_two_from_three(world, two, form):
    """Steps of six micro-batches, which both numbers divide; no weight has a multiple of three rows."""
    steps = [[*batches, *batches[:2]] for batches in world.fusion]
    first = run([Case(f"{form}-six", _student(world, form), FUSION, steps, save_at=2)], world.root / "group", 2)
    cases = [
        Case(f"{form}-three", _student(world, form, 3), FUSION, steps, resume=f"{form}-six"),
        Case(f"{form}-third", _student(world, form, 3), FUSION, steps, save_at=2),
    ]
    three = run(cases, world.root / "group", 3)
    back = run(
        [Case(f"{form}-back", _student(world, form), FUSION, steps, resume=f"{form}-third")], world.root / "group", 2
    )
    expected = first[f"{form}-six"]
    assert three[f"{form}-third"]["loss"] == pytest.approx(expected["loss"], rel=LOSS)
    for found in (three[f"{form}-three"], back[f"{form}-back"]):
        assert found["loss"] == pytest.approx(expected["loss"][2:], rel=LOSS)
        assert found["norm"] == pytest.approx(expected["norm"][2:], rel=NORM)


@pytest.mark.slow
@pytest.mark.parametrize("form", SHARDED)
def test_in_bfloat16_the_masters_are_float32(world, two, form):
    """A step at a tiny rate is not lost, the losses are DDP's to the rounding, and the start is not rounded."""
    tiny_rate = TUNING.model_copy(update={"learning_rate": 1e-7})
    cases = [
        Case(f"{one}-bf16", _student(world, one, dtype="bfloat16"), tiny_rate, world.tuning) for one in ("ddp", form)
    ]
    found = run(cases, world.root / "group", 2)
    assert found[f"{form}-bf16"]["loss"] == pytest.approx(found["ddp-bf16"]["loss"], rel=5e-3)
    before = load_file(Path(world.model) / "model.safetensors")
    after, by_ddp = _model(world, f"{form}-bf16"), _model(world, "ddp-bf16")
    for name, value in before.items():
        assert not torch.equal(after[name], value)
        torch.testing.assert_close(after[name], by_ddp[name], rtol=0, atol=5e-7)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(("form", "offload"), [("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "all")])
def test_offload_changes_nothing_but_where_the_state_is(world, two, form, offload):
    name = f"{form}-{offload}"
    student = _student(world, form, offload=offload)
    found = run([Case(name, student, FUSION, world.fusion, save_at=2)], world.root / "group", 2)[name]
    _same(found, two["ddp"])
    again = run([Case(f"{name}-again", student, FUSION, world.fusion, resume=name)], world.root / "group", 2)
    assert again[f"{name}-again"]["loss"] == pytest.approx(two[form]["loss"][2:], rel=LOSS)
