"""Options of the vllm backend: what is refused, and what the engine is told; the engine itself is not needed."""

import pytest

from rayfuse.config import Teacher, parse_config
from rayfuse.errors import ConfigError, TeacherError
from rayfuse.models.loading import context_length, load_model_config
from rayfuse.teachers import environments
from rayfuse.teachers.identity import fingerprint, teacher_context
from rayfuse.teachers.vllm import backend
from rayfuse.teachers.vllm.backend import engine_arguments, unsplit_groups

K = 5


def _teacher(tiny, **keys):
    return Teacher.model_validate({"model": tiny.model("code"), "name": "code", "backend": "vllm", **keys})


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"backend": "transformers", "gpus": 2}, r"gpus is 2: backend transformers runs on one GPU; use backend vllm"),
        ({"backend": "transformers", "vllm": {}}, r"the section vllm is for backend vllm, not transformers"),
        ({"gguf_file": "model.gguf"}, r"for a gguf_file use backend transformers"),
        ({"gpus": 2}, r"gpus \(2\) and vllm.tensor_parallel \(1\) must be equal"),
        ({"gpus": 1, "vllm": {"tensor_parallel": 4}}, r"gpus \(1\) and vllm.tensor_parallel \(4\) must be equal"),
        ({"gpus": 1.5, "vllm": {"tensor_parallel": 2}}, r"gpus \(1.5\) and vllm.tensor_parallel \(2\) must be equal"),
        ({"gpus": 0.5, "vllm": {"gpu_memory_utilization": 0.6}}, r"must be below the share of a GPU"),
        ({"vllm": {"max_len": 100}}, r"max_len: there is no such key"),
    ],
)
def test_options_that_do_not_fit_are_refused(tiny, tmp_path, keys, fault):
    tree = tiny.tree(tmp_path)
    tree["teachers"] = [{"model": tiny.model("code"), "backend": "vllm", **keys}]
    with pytest.raises(ConfigError, match=fault):
        parse_config(tree)


def test_the_section_is_filled_in_for_its_backend_only(tiny):
    assert _teacher(tiny).vllm.tensor_parallel == 1
    assert _teacher(tiny, backend="transformers").vllm is None
    assert _teacher(tiny, gpus=2, vllm={"tensor_parallel": 2}).vllm.tensor_parallel == 2


def test_a_sample_leaves_room_for_the_token_that_the_engine_writes(tiny):
    context = context_length(load_model_config(_teacher(tiny)))
    assert teacher_context(_teacher(tiny, backend="transformers")) == context
    assert teacher_context(_teacher(tiny)) == context - 1
    short = _teacher(tiny, vllm={"max_model_len": 64})
    assert teacher_context(short) == 63
    assert engine_arguments(short, K, 63)["max_model_len"] == 64


def test_what_the_engine_is_told(tiny):
    alone = engine_arguments(_teacher(tiny, dtype="float16"), K, 100)
    assert {"model": tiny.model("code"), "dtype": "float16", "max_logprobs": K}.items() <= alone.items()
    assert alone["load_format"] == "safetensors"
    assert alone["generation_config"] == "vllm"
    assert alone["trust_remote_code"] is False
    assert "distributed_executor_backend" not in alone
    split = engine_arguments(_teacher(tiny, gpus=4, vllm={"tensor_parallel": 4, "quantization": "fp8"}), K, 100)
    assert (split["tensor_parallel_size"], split["distributed_executor_backend"]) == (4, "mp")
    assert split["quantization"] == "fp8"


def test_tokens_of_a_step_are_what_memory_allows_within_batch_tokens(tiny, monkeypatch):
    monkeypatch.setattr(backend, "free_memory", lambda: 2**30)

    def tokens(**keys):
        teacher = _teacher(tiny, dtype="float32", **keys)
        return backend._memory_arguments(teacher, load_model_config(teacher), 100)["max_num_batched_tokens"]

    rows = load_model_config(_teacher(tiny)).vocab_size
    most = tokens(batch_tokens=10**9)
    assert most == pytest.approx((2**30 - 2**26) / 4 / (9 * rows), rel=0.01)
    assert tokens(batch_tokens=500) == 500
    assert tokens(batch_tokens=500, vllm={"batched_tokens": 2 * most}) == 2 * most


def test_the_fingerprint_names_engine_and_quantisation(tiny, monkeypatch):
    monkeypatch.setattr(environments, "own_versions", lambda: {"vllm": "0.32.0"})
    same = fingerprint(_teacher(tiny), K)
    assert fingerprint(_teacher(tiny, gpus=2, vllm={"tensor_parallel": 2, "batched_tokens": 64}), K) == same
    others = [_teacher(tiny, backend="transformers"), _teacher(tiny, vllm={"quantization": "fp8"})]
    others += [_teacher(tiny, dtype="float32"), _teacher(tiny, vllm={"max_model_len": 64})]
    prints = [fingerprint(teacher, K) for teacher in others]
    monkeypatch.setattr(environments, "own_versions", lambda: {"vllm": "0.32.5"})
    assert fingerprint(_teacher(tiny), K) == same
    monkeypatch.setattr(environments, "own_versions", lambda: {"vllm": "0.33.0"})
    prints.append(fingerprint(_teacher(tiny), K))
    assert len({same, *prints}) == len(prints) + 1


def test_prompts_that_are_sampled_are_never_split():
    assert unsplit_groups([100, 100, 50, 6, 256], 10, 256, 1024) == [[0, 1, 2, 3], [4]]
    assert unsplit_groups([100, 100, 20], 100, 1000, 512) == [[0, 1], [2]]  # blocks of 128: 256 + 256 are 512
    assert [len(group) for group in unsplit_groups([1] * 300, 1, 1000, 10**6)] == [128, 128, 44]
    with pytest.raises(TeacherError, match=r"prompt 1 has 257 tokens, more than the 256 of an engine step"):
        unsplit_groups([3, 257], 10, 256, 1024)
