"""The parity self-test: the right teacher passes, each kind of wrong one is refused with its cause."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ray import serve
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayfuse import cluster
from rayfuse.config import Teacher, parse_config
from rayfuse.errors import ParityError
from rayfuse.quickstart.skills import make
from rayfuse.quickstart.tiny_models import STYLES, make_model, make_tokenizer, save
from rayfuse.signals.store import SignalStore
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.parity.check import LONG, PROBES, check_parity, compare
from rayfuse.teachers.parity.reference import Reference
from rayfuse.teachers.serving.applications import application_name, delete
from rayfuse.teachers.serving.replica import TeacherReplica
from rayfuse.teachers.transformers import TransformersTeacher

K = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer has a BOS, and whose output layer has 64 padded rows with real weights."""
    root = tmp_path_factory.mktemp("parity")
    texts = [f"{row['prompt']} {row['response']}" for row in make("math", 60, seed=1)] + [LONG]
    tokenizer = make_tokenizer(STYLES["instruct"], texts)
    tokenizer.bos_token = "<s>"
    model = make_model(tokenizer, 3, hidden=64, layers=2)
    model.config.max_position_embeddings = 1024
    model.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    save(model, tokenizer, root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def teacher(folder):
    return Teacher(model=str(folder), name="it", dtype="float32")


@pytest.fixture(scope="module")
def reference(teacher):
    return Reference(teacher, gpu=False)


@pytest.fixture
def backend(teacher):
    return TransformersTeacher(teacher, K)


def _answers(backend):
    return dict(zip(PROBES, backend.score(list(PROBES.values())), strict=True))


def _refused(teacher, reference, answers, templates=None):
    with pytest.raises(ParityError) as caught:
        compare(teacher, reference, answers, templates or {})
    return str(caught.value)


def test_the_reference_is_what_transformers_says_alone(folder, reference):
    """The reference itself against the model called by hand on one probe."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = f"<s>[INST]{PROBES['short'].messages[0].content}[/INST]"
    prompt = tokenizer.encode(text, add_special_tokens=False)
    ids = [*prompt, *tokenizer.encode("Yes.", add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
    mine, following = reference.logps(PROBES["short"])
    np.testing.assert_allclose(mine, logits.log_softmax(-1).numpy(), atol=1e-6)
    assert following.tolist() == ids[len(prompt) :]


def test_the_right_teacher_passes(teacher, reference, backend):
    record = compare(teacher, reference, _answers(backend), {})
    assert record["difference"] < 1e-5
    assert set(record["probes"]) == set(PROBES)
    assert record["reference"] == {"dtype": "float32", "device": "cpu"}
    assert all(probe["top1"] == 1 for probe in record["probes"].values())


def test_a_bfloat16_teacher_passes_as_bfloat16_but_not_as_float32(teacher, reference):
    half = teacher.model_copy(update={"dtype": "bfloat16"})
    answers = _answers(TransformersTeacher(half, K))
    assert compare(half, reference, answers, {})["difference"] > 1e-3
    assert "cause: dtype. It computes in bfloat16" in _refused(teacher, reference, answers)


def test_a_prompt_without_template(teacher, reference, backend):
    backend.renderer.prompt_text = lambda sample: sample.plain_text
    assert "cause: template. It reads the prompt as plain text" in _refused(teacher, reference, _answers(backend))


def test_the_template_of_another_model(teacher, reference, backend):
    other = STYLES["math"].chat_template
    backend.renderer.tokenizer.chat_template = other
    message = _refused(teacher, reference, _answers(backend), {"some/other": other})
    assert "cause: template. It uses the chat template of some/other" in message


def test_an_assistant_turn_that_is_not_opened(tiny, reference):
    """The template of `instruct` writes nothing there; that of `math` does."""
    teacher = Teacher(model=tiny.model("math"), name="math", dtype="float32")
    backend = TransformersTeacher(teacher, K)
    render = backend.renderer.template.render
    backend.renderer.template.render = lambda turns, tools, open_turn: render(turns, tools, open_turn=False)
    readable = {name: PROBES[name] for name in ("short", "numbers", "code")}
    answers = dict(zip(readable, backend.score(list(readable.values())), strict=True))
    assert "add_generation_prompt" in _refused(teacher, Reference(teacher, gpu=False), answers)


@pytest.mark.parametrize(("bos", "text"), [(2, "one more BOS"), (0, "leaves out the BOS")])
def test_a_bos_too_many_or_too_few(teacher, reference, backend, bos, text):
    right = backend.renderer.prompt_ids
    start = [backend.renderer.tokenizer.bos_token_id]
    backend.renderer.prompt_ids = lambda sample: np.array(start * bos + right(sample)[1:].tolist())
    message = _refused(teacher, reference, _answers(backend))
    assert "cause: bos." in message
    assert text in message


def test_padded_rows_in_the_softmax(teacher, reference, backend):
    backend.layer = type(backend.layer)(**{**vars(backend.layer), "valid_vocab": len(backend.layer.weight)})
    backend.vocab_size = len(backend.layer.weight)
    assert "cause: padding." in _refused(teacher, reference, _answers(backend))


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights(teacher, reference, backend, bits):
    """Rounded row by row in numpy (the 4 bits in groups of 128, here a whole row or less)."""
    levels = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for name, weight in backend.model.named_parameters():
            if weight.ndim == 2 and "layers" in name:
                rows = weight.numpy()
                for start in range(0, rows.shape[1], rows.shape[1] if bits == 8 else 128):
                    part = rows[:, start : start + (rows.shape[1] if bits == 8 else 128)]
                    scale = np.abs(part).max(1, keepdims=True) / levels
                    part[:] = np.rint(part / scale) * scale
    message = _refused(teacher, reference, _answers(backend))
    assert f"cause: quantisation. It serves weights rounded to {bits} bits" in message


def test_other_weights(teacher, reference, backend):
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in backend.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    message = _refused(teacher, reference, _answers(backend))
    assert "cause: weights." in message
    assert "the most likely token agrees in" in message


def test_displaced_rows(teacher, reference, backend):
    def late(answer):
        rows = {name: np.roll(getattr(answer, name), 1, axis=0) for name in ("logps", "ids", "lse", "token_logps")}
        return type(answer)(**rows, byte_ends=answer.byte_ends)

    answers = {name: late(answer) for name, answer in _answers(backend).items()}
    assert "cause: position. It answers 1 position too late" in _refused(teacher, reference, answers)


def test_another_tokenizer(tiny, teacher, reference):
    other = TransformersTeacher(Teacher(model=tiny.model("math"), name="it", dtype="float32"), K)
    answers = {"numbers": other.score([PROBES["numbers"]])[0]}
    assert "cause: tokenizer. It cuts '3.14159" in _refused(teacher, reference, answers)


def test_a_looser_tolerance_accepts(teacher, reference):
    answers = _answers(TransformersTeacher(teacher.model_copy(update={"dtype": "bfloat16"}), K))
    loose = Teacher.model_validate({**teacher.model_dump(), "parity": {"tolerance": 0.1}})
    assert compare(loose, reference, answers, {})["tolerance"] == 0.1


@pytest.mark.ray
def test_through_the_deployment_once_per_fingerprint(tiny, tmp_path):
    """The serving path itself: tested, remembered, refused where something else answers under the teacher's name."""
    tree = tiny.tree(tmp_path)
    tree["teachers"][0]["parity"] = True
    config = parse_config(tree)
    cluster.connect(config)
    try:
        store = SignalStore(str(tmp_path / "store"))
        teachers = [IdentifiedTeacher(teacher, fingerprint(teacher, K)) for teacher in config.teachers]
        seen = Console(record=True, width=200)
        check_parity(teachers, K, store, seen)
        note = json.loads(Path(store.root, teachers[0].fingerprint, "parity.json").read_text())
        assert note["teacher"] == "math"
        assert note["difference"] < 1e-3
        assert store.note(teachers[1].fingerprint, "parity") is None, "switched off"
        assert "math says what its weights say" in seen.export_text()
        check_parity(teachers, K, store, seen)
        assert not seen.export_text(), "a passed test is not done again"

        teacher, name = (
            config.teachers[1].model_copy(update={"parity": config.teachers[0].parity}),
            teachers[1].fingerprint,
        )
        wrong = teacher.model_copy(update={"dtype": "bfloat16"})
        application = application_name(IdentifiedTeacher(teacher, name))
        served = serve.deployment(TeacherReplica, name=teacher.name).bind(wrong, K)
        serve.run(served, name=application, route_prefix=None)
        with pytest.raises(ParityError, match=r"code .*cause: dtype"):
            check_parity([IdentifiedTeacher(teacher, name)], K, store, seen)
        assert store.note(name, "parity") is None
        delete([*teachers, IdentifiedTeacher(teacher, name)])
    finally:
        serve.shutdown()
        cluster.end_embedded()
