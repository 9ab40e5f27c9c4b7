"""The vLLM teacher against the transformers teacher, both in float32, on SmolLM2-135M and on a small padded model.

The engine runs where it is installed (see jobs/vllm_server.py): directly, and as a replica with its own environment.
TOLERANCE is how far two float32 engines may be apart in the log-probability of a token (nats); signals are kept in
float16, whose own rounding at 16 nats is 0.008.
"""

import json
import os
import pickle
import signal
import subprocess

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from jobs.smollm2_world import human_eval_problems
from jobs.vllm_server import ROOT
from rayfuse.cluster import connect, end_embedded
from rayfuse.config import Teacher, parse_config
from rayfuse.data.sample import Sample
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving.applications import application_name, delete, deploy
from rayfuse.teachers.serving.client import TeacherClient
from rayfuse.teachers.transformers import TransformersTeacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
K = 10
TOLERANCE = 5e-4
FLOAT16 = 8e-3
PATIENCE_S = 3000.0
"""An engine starts within a minute on an idle machine; a busy one is not what is tested here."""
ENGINE = {"max_model_len": 768, "batched_tokens": 512}
ANSWERS = {"max_new_tokens": 12, "batch_size": 4}
DIRECT = """
import pickle, sys
from rayfuse.errors import RayfuseError
from rayfuse.teachers.vllm import VLLMTeacher

if __name__ == "__main__":
    teacher, k, calls = pickle.load(open(sys.argv[1], "rb"))
    backend = VLLMTeacher(teacher, k)
    answers = []
    for samples, options in calls:
        try:
            answers.append(backend.score(samples) if options is None else backend.generate(samples, **options))
        except RayfuseError as error:
            answers.append(error)
    backend.close()
    pickle.dump(answers, open(sys.argv[2], "wb"))
"""
"""Runs in vLLM's interpreter: one engine, several calls, what they returned or raised."""


def _samples():
    texts = [(prompt, response) for _, prompt, response in list(human_eval_problems())[:6]]
    texts += [("Translate to French: the sky is blue.", "Le ciel est bleu. 🙂 世界\n"), ("Say x", "x")]
    return [Sample((("user", prompt),), response) for prompt, response in texts]


def _teacher(folder, **keys):
    tree = {"model": str(folder), "name": "smollm2", "dtype": "float32", "vllm": ENGINE, "backend": "vllm"}
    return Teacher.model_validate({**tree, "patience_s": PATIENCE_S, **keys})


def _in_transformers(teacher):
    return Teacher.model_validate({**teacher.model_dump(), "backend": "transformers", "vllm": None})


def _direct(python, tmp_path, teacher, *calls):
    """What a VLLMTeacher in the other interpreter answers to each (samples, None or options of generate)."""
    asked, answered, script = tmp_path / "asked.pickle", tmp_path / "answered.pickle", tmp_path / "direct.py"
    asked.write_bytes(pickle.dumps((teacher, K, calls)))
    script.write_text(DIRECT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python, str(script), str(asked), str(answered)], env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return pickle.loads(answered.read_bytes())


def _compare(mine, theirs, tolerance=TOLERANCE):
    """Signals of vLLM and of transformers for the same samples; returns (rows, largest difference)."""
    worst, rows, decided = 0.0, 0, 0
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one.byte_ends, other.byte_ends)
        np.testing.assert_allclose(one.token_logps, other.token_logps, atol=tolerance)
        np.testing.assert_allclose(
            one.logps.astype(np.float32), other.logps.astype(np.float32), atol=tolerance + FLOAT16
        )
        first, second = other.logps[:, 0].astype(np.float32), other.logps[:, 1].astype(np.float32)
        clear = first - second > 2 * (tolerance + FLOAT16)
        decided += clear.sum()
        np.testing.assert_array_equal(one.ids[clear, 0], other.ids[clear, 0])
        # Of the others too: whatever one keeps, the other keeps, unless it is as likely as the last kept.
        for row in range(len(one)):
            edge = float(other.logps[row, -1]) + 2 * (tolerance + FLOAT16)
            above = {int(token) for token, logp in zip(other.ids[row], other.logps[row], strict=True) if logp > edge}
            assert above <= set(one.ids[row].tolist())
        worst, rows = max(worst, float(np.abs(one.token_logps - other.token_logps).max())), rows + len(one)
    assert decided > 0.8 * rows
    return rows, worst


def test_signals_and_answers_equal_transformers(vllm_python, smollm2_folder, tmp_path):
    teacher, samples = _teacher(smollm2_folder), _samples()
    sampled = {**ANSWERS, "temperature": 1.0}
    too_long = [samples[0], Sample((("user", "Count"),), " ".join(map(str, range(900))))]
    scored, again, greedy, seed_1, seed_1_alone, seed_2, refused = _direct(
        vllm_python,
        tmp_path,
        teacher,
        (samples, None),
        (samples, None),
        (samples, ANSWERS),
        (samples, {**sampled, "seed": 1}),
        (samples[2:4], {**sampled, "seed": 1}),
        (samples, {**sampled, "seed": 2}),
        (too_long, None),
    )
    plain = TransformersTeacher(_in_transformers(teacher), K)
    rows, worst = _compare(scored, plain.score(samples))
    print(f"{rows} rows, largest difference of a token's log-probability {worst:.2e}")
    _compare(again, scored, tolerance=1e-5)
    assert greedy == plain.generate(samples, **ANSWERS)
    assert seed_1 != seed_2
    assert seed_1_alone == seed_1[2:4]
    assert "sample" in str(refused)
    assert too_long[1].key[:12] in str(refused)
    assert "vllm.max_model_len" in str(refused)


def test_padded_vocabulary_rows_take_no_part_on_two_workers(vllm_python, smollm2_folder, tmp_path):
    """A small model with 64 rows beyond its tokenizer, as likely as can be, split over two processes."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = model.lm_head.weight[17] * 3
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    teacher = _teacher(tmp_path / "padded", cpus=2, vllm={**ENGINE, "tensor_parallel": 2})
    samples = _samples()
    scored, greedy = _direct(vllm_python, tmp_path, teacher, (samples, None), (samples, ANSWERS))
    plain = TransformersTeacher(_in_transformers(teacher), K)
    _compare(scored, plain.score(samples))
    assert all((item.ids < len(tokenizer)).all() for item in scored)
    # Untrained, the model knows near ties; a padded row would win somewhere in three quarters of the answers.
    same = [one == other for one, other in zip(greedy, plain.generate(samples, **ANSWERS), strict=True)]
    assert sum(same) > 0.7 * len(samples)


@pytest.fixture(scope="module")
def cluster(smollm2_folder, vllm_python, tmp_path_factory):
    """An embedded Ray whose teacher lives in the other interpreter, and the teacher."""
    environment = {"py_executable": vllm_python, "env_vars": {"RAYFUSE_TEST_MARK": "vllm"}}
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    tree = {
        "student": str(smollm2_folder),
        "teachers": [_teacher(smollm2_folder, runtime_env=environment).model_dump(exclude_none=True)],
        "data": str(folder / "train.jsonl"),
        "stages": ["infifusion"],
        "output": str(folder / "run"),
    }
    config = parse_config(tree).absolute()
    yield connect(config), config.teachers[0]
    end_embedded()


def _replica(name):
    """The process of the application's one replica."""
    marked = [
        process
        for process in psutil.process_iter(["cmdline"])
        if " ".join(process.info["cmdline"] or []).startswith("ray::ServeReplica")
        and name in " ".join(process.info["cmdline"])
    ]
    assert len(marked) == 1
    return marked[0]


@pytest.mark.chaos
def test_a_replica_in_its_own_interpreter_answers_and_outlives_its_engine(cluster, vllm_python):
    """The run's interpreter has no vLLM; the replica's has. Its engine is killed under load, and the answers come."""
    _, teacher = cluster
    name = fingerprint(teacher, K)
    samples = _samples()
    plain = TransformersTeacher(_in_transformers(teacher), K)
    expected, answers = plain.score(samples), plain.generate(samples, **ANSWERS)
    deploy([IdentifiedTeacher(teacher, name)], K)
    client = TeacherClient(IdentifiedTeacher(teacher, name))
    _compare(client.score(samples)(), expected)
    assert client.generate(samples, **ANSWERS)() == answers
    replica = _replica(application_name(IdentifiedTeacher(teacher, name)))
    packages = str(vllm_python).removesuffix("/bin/python")
    assert any(packages in mapped.path for mapped in replica.memory_maps())
    assert replica.environ()["RAYFUSE_TEST_MARK"] == "vllm"
    engines = [process for process in replica.children(recursive=True) if "EngineCore" in " ".join(process.cmdline())]
    assert engines
    waits = [client.score(samples) for _ in range(2)]
    for process in engines:
        os.kill(process.pid, signal.SIGKILL)
    for wait in [*waits, client.score(samples)]:
        _compare(wait(), expected)
    other = _replica(application_name(IdentifiedTeacher(teacher, name)))
    assert other.pid != replica.pid
    assert not replica.is_running()
    family = other.children(recursive=True)
    delete([IdentifiedTeacher(teacher, name)])
    _, alive = psutil.wait_procs([other, *family], timeout=300)
    assert not alive, alive
