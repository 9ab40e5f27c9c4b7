"""One run, three teachers, three engines: vLLM here, a vLLM server over HTTP, and transformers; each with the real
tokenizer of another family, all online. Its twin has the same three models in transformers.

    make vllm

While the mixed run goes on, the transformers teacher gets a second copy and loses it again. TOLERANCE is what vLLM's
float32 differs from that of transformers (tests/teachers/test_vllm.py), seen through a training: the gradient of the
rank distance is made of signs, so that the weights are mostly the same to the last bit.
"""

import json
import signal
import threading
import time

import pytest
import torch
from ray import serve
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.mistral import convert_tekken_tokenizer

from jobs.smollm2_world import library_docstrings, package_file, qwen_tokenizer
from jobs.vllm_server import start_server
from rayfuse.config import parse_config
from rayfuse.quickstart.tiny_models import STYLES, make_model, make_tokenizer, save
from rayfuse.run.fuse import fuse
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving.applications import application_name
from rayfuse.teachers.serving.manage import manage
from tests.real_tokenizers import TEKKEN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROWS, STEPS = 96, 24
TOLERANCE = {"loss": 2e-3, "bits": 2e-3, "weights": 2e-2}
"""Largest difference of a step's loss (nats), of held-out bits per byte, and of the weights over how far they moved."""
KEY = "RAYFUSE_TEST_TEACHER_KEY"
INSTRUCT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}"
    "{% else %}{{ message['content'] + '</s>' }}{% endif %}{% endfor %}"
)


def _small_llama(folder, seed):
    """A Llama of random weights for the tokenizer in `folder`, of a shape that vLLM has kernels for."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)


def _mistral(folder):
    tokenizer = convert_tekken_tokenizer(str(package_file("mistral_common", TEKKEN)))
    tokenizer.chat_template = INSTRUCT
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(folder)
    _small_llama(folder, seed=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Student, the two small teachers, and docstrings of the standard library; SmolLM2 comes from its own fixture."""
    folder = tmp_path_factory.mktemp("world")
    rows = [
        {"prompt": prompt, "response": response}
        for _, prompt, response in library_docstrings()
        if len(response.encode()) < 300
    ][: ROWS + 16]
    for name, part in (("train", rows[:ROWS]), ("eval", rows[ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    tokenizer = make_tokenizer(STYLES["pivot"], [row["response"] for row in rows])
    tokenizer.model_max_length = 1024
    student = make_model(tokenizer, seed=0, hidden=64, layers=2)
    student.config.max_position_embeddings = 1024
    save(student, tokenizer, folder / "student")
    qwen_tokenizer(folder / "qwen")
    _small_llama(folder / "qwen", seed=1)
    (folder / "mistral").mkdir()
    _mistral(folder / "mistral")
    return folder


def _tree(world, smollm2, output, /, **teachers):
    """The run's configuration; `teachers` are changes to the plain transformers teachers."""
    models = {"smollm2": smollm2, "qwen": world / "qwen", "mistral": world / "mistral"}
    return {
        "student": str(world / "student"),
        "teachers": [
            {"name": name, "model": str(path), "dtype": "float32", "patience_s": 3000, **teachers.get(name, {})}
            for name, path in models.items()
        ],
        "data": {"path": str(world / "train.jsonl"), "unit_size": 4, "max_length": 900},
        "stages": [
            {"method": "infifusion", "lam": 0.3, "steps": STEPS, "batch_size": 4, "learning_rate": 1e-3, "warmup": 0}
        ],
        "evaluate": {"path": str(world / "eval.jsonl"), "generate": False, "teachers": False},
        "output": str(output),
    }


def _watch(config, server, ended, seen):
    """Add a copy of the transformers teacher after the first steps, and remove it half way; note its copies all the
    way. The endpoint stalls until each change is done, so that the run is still going on."""
    teacher = next(teacher for teacher in config.teachers if teacher.name == "qwen")
    name = application_name(IdentifiedTeacher(teacher, fingerprint(teacher, config.signals.k)))
    todo = [(2, 2), (STEPS // 2, 1)]
    wanted = None
    metrics = config.stage_folder(0).parents[1] / "metrics.jsonl"
    while not ended.wait(0.5):
        steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        if not steps:
            continue
        (deployment,) = serve.status().applications[name].deployments.values()
        seen.append((steps, deployment.replica_states.get("RUNNING", 0)))
        if wanted is None and todo and steps >= todo[0][0]:
            server.process.send_signal(signal.SIGSTOP)
            _, wanted = todo.pop(0)
            manage(config, "scale", ["qwen", str(wanted)], Console(quiet=True))
        elif seen[-1][1] == wanted:
            server.process.send_signal(signal.SIGCONT)
            wanted = None


def test_a_run_with_three_engines_equals_its_twin_in_transformers(
    vllm_python, smollm2_folder, world, tmp_path, monkeypatch
):
    monkeypatch.setenv(KEY, "a-key-for-tests-only")
    seen, ended = [], threading.Event()
    with start_server(vllm_python, world / "mistral", tmp_path / "server.log", served_name="mistral") as server:
        engine = {"vllm": {"max_model_len": 900, "batched_tokens": 512}, "runtime_env": {"py_executable": vllm_python}}
        endpoint = {"url": server.url, "api_key_env": KEY}
        mixed = parse_config(
            _tree(
                world,
                smollm2_folder,
                tmp_path / "mixed",
                smollm2={"backend": "vllm", **engine},
                qwen={"replicas": {"max": 2, "upscale_s": 3600}},
                mistral={
                    "backend": "openai",
                    "model": "mistral",
                    "tokenizer": str(world / "mistral"),
                    "endpoint": endpoint,
                },
            )
        ).absolute()
        watcher = threading.Thread(target=_watch, args=(mixed, server, ended, seen))
        watcher.start()
        begun = time.monotonic()
        try:
            fuse(mixed)
        finally:
            ended.set()
            watcher.join()
        seconds = time.monotonic() - begun
    fuse(parse_config(_tree(world, smollm2_folder, tmp_path / "twin")))

    losses = [_losses(tmp_path / name) for name in ("mixed", "twin")]
    assert len(losses[0]) == len(losses[1]) == STEPS
    loss = max(abs(one - other) for one, other in zip(*losses, strict=True))
    bits = [_bits(tmp_path / name) for name in ("mixed", "twin")]
    mine, twin = (load_file(tmp_path / name / "model/model.safetensors") for name in ("mixed", "twin"))
    start = load_file(world / "student/model.safetensors")
    apart = sum(float((mine[name] - twin[name]).square().sum()) for name in twin) ** 0.5
    moved = sum(float((twin[name] - start[name]).square().sum()) for name in twin) ** 0.5
    print(
        f"\n{STEPS} steps in {seconds:.0f} s; copies of qwen by step: {_changes(seen)}; largest difference of a loss "
        f"{loss:.1e} (losses {losses[1][0]:.3f} to {losses[1][-1]:.3f}); bits per byte {bits[0]:.4f} and "
        f"{bits[1]:.4f}; weights {apart / moved:.1e} of the way apart"
    )
    assert [copies for _, copies in _changes(seen)] == [1, 2, 1], seen
    assert loss < TOLERANCE["loss"]
    assert abs(bits[0] - bits[1]) < TOLERANCE["bits"]
    assert apart < TOLERANCE["weights"] * moved


def _losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _bits(folder):
    models = json.loads((folder / "results.json").read_text())["models"]
    return next(model["bits_per_byte"] for model in models if model["role"] == "stage")


def _changes(seen):
    """(step, copies) at every change of the number of copies from one on."""
    seen = [item for item in seen if item[1]]
    return [item for index, item in enumerate(seen) if index == 0 or item[1] != seen[index - 1][1]]
