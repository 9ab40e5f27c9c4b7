"""Memory of a student rank and of a teacher's replica, term by term, in bytes.

The student's arithmetic is that of the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 3 and figure 1) for
weights, gradients and optimiser, and of this package's engines and fused head for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayfuse.config import Teacher
from rayfuse.errors import PlanError, TeacherError
from rayfuse.losses.head import CHUNK_BYTES, SLICE_BYTES
from rayfuse.plan.activations import Activations, activations
from rayfuse.plan.hardware import Device
from rayfuse.plan.shapes import Shape, weight_bytes
from rayfuse.teachers.vllm import memory as vllm

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at a time (reduce_bucket_size)."""
PROCESS = 0.55e9
"""Python, torch, transformers and Ray in one process on a CPU."""
CONTEXT = 1.5e9
"""CUDA's context, libraries' workspaces, and what the allocator cannot use for its cuts."""
COLLECTIVES = 2.5e9
"""NCCL's buffers, where ranks talk."""


@dataclass(frozen=True)
class Setup:
    """How a student is trained, as far as memory and time depend on it.

    Attributes:
        engine: ddp, deepspeed or fsdp2.
        zero_stage: 1 to 3 of deepspeed; 3 for fsdp2, which shards everything; 0 for ddp.
        workers: ranks.
        dtype: number format of the pass.
        checkpointing: whether the layers' activations are recomputed.
        batch: sequences of a micro-step.
        length: tokens of the longest.
        micro_steps: of a rank in an optimiser step.
        lse_gradient: whether the loss needs the gradient of the log-sum-exp, or is taken in backward.
        offload: none, or what is in the host's memory: optimizer, or all (optimiser and weights).
    """

    engine: str
    zero_stage: int
    workers: int
    dtype: str
    checkpointing: bool
    batch: int
    length: int
    micro_steps: int = 1
    lse_gradient: bool = False
    offload: str = "none"

    @property
    def tokens(self) -> int:
        """Of a micro-step, padding included."""
        return self.batch * self.length

    @property
    def shares(self) -> int:
        """Ranks among which the optimiser is split."""
        return self.workers if self.zero_stage else 1

    def __str__(self) -> str:
        name = f"{self.engine} ZeRO-{self.zero_stage}" if self.engine == "deepspeed" else self.engine
        name += f", offload {self.offload}" if self.offload != "none" else ""
        return f"{name}, {'' if self.checkpointing else 'no '}gradient checkpointing, units of {self.batch}"


@dataclass(frozen=True)
class Term:
    """A part of the memory: its name, bytes, and how they come about."""

    name: str
    bytes: float
    why: str


@dataclass(frozen=True)
class Memory:
    """What one device holds at its fullest moment.

    Attributes:
        what: whose memory.
        terms: parts, largest first.
        room: bytes that the device has.
    """

    what: str
    terms: tuple[Term, ...]
    room: float

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(term.bytes for term in self.terms)

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.total <= self.room * (1 + 1e-9)


def _memory(what: str, terms: Sequence[Term], room: float) -> Memory:
    kept = sorted((term for term in terms if term.bytes >= 1), key=lambda term: -term.bytes)
    return Memory(what, tuple(kept), room)


def model_states(parameters: float, setup: Setup) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimiser on one rank, when all of them are there.

    With P parameters, W ranks and a 16-bit pass, of deepspeed: 2 P, 2 P and 12 P, of which ZeRO-1 splits the last by W,
    ZeRO-2 the last two and ZeRO-3 all. The other engines hold float32 weights, 4 P, 4 P and 8 P; fsdp2 splits all.
    """
    split = setup.workers
    if setup.engine == "deepspeed":
        half = setup.dtype != "float32"
        weights, gradients, optimiser = (2, 2, 12) if half else (4, 4, 8)
    else:
        weights, gradients, optimiser = 4, 4, 8
    return (
        weights * parameters / (split if setup.zero_stage >= 3 else 1),
        gradients * parameters / (split if setup.zero_stage >= 2 else 1),
        optimiser * parameters / (split if setup.zero_stage >= 1 else 1),
    )


def on_host(parameters: float, setup: Setup) -> float:
    """Bytes of a rank's weights and optimiser in the host's memory."""
    weights, _, optimiser = model_states(parameters, setup)
    return {"none": 0.0, "optimizer": optimiser, "all": weights + optimiser}[setup.offload]


def student_activations(shape: Shape, setup: Setup) -> Activations:
    """What a micro-step keeps; see `activations`. fsdp2 gathers a layer in the pass's format: autocast copies none."""
    acts = activations(shape, setup.batch, setup.length, setup.dtype, autocast=setup.engine != "deepspeed")
    return replace(acts, layer=acts.layer - acts.casts, casts=0) if setup.engine == "fsdp2" else acts


def student_memory(shape: Shape, setup: Setup, device: Device) -> Memory:
    """The fullest moment of a student rank: in the head, when all activations are there, or when all gradients are."""
    weights, gradients, optimiser = model_states(shape.parameters, setup)
    _, gradients, optimiser = (part * shape.trained / shape.parameters for part in (weights, gradients, optimiser))
    if setup.offload != "none":
        optimiser, weights = 0.0, weights if setup.offload == "optimizer" else 0.0
    acts = student_activations(shape, setup)
    kept = acts.kept(shape.layers, checkpointing=setup.checkpointing)
    head = head_terms(shape, setup, device)
    transient = sum(term.bytes for term in head[1:])
    work = acts.work(checkpointing=setup.checkpointing)
    backward = Term("a layer's backward pass", work, "gradients of its activations, and what is computed again")
    # The first micro-step of a step begins without gradients.
    before = gradients if setup.micro_steps > 1 or setup.engine != "ddp" else 0.0
    full = [
        Term("gradients", before, "of the micro-steps before"),
        Term("activations", kept, f"{setup.tokens:,} tokens" + ", layers' inputs" * setup.checkpointing),
        head[0],
        *(head[1:] if transient > work else [backward]),
    ]
    late = [Term("gradients", gradients, "of all weights"), backward]
    moment = max(full, late, key=lambda terms: sum(term.bytes for term in terms))
    always = [
        Term("weights", weights, _split(setup, 3)),
        Term("optimiser", optimiser, _split(setup, 1)),
        *_communication(shape, setup),
        *_process(device, setup.workers),
    ]
    return _memory("student rank", [*always, *moment], device.memory)


def _split(setup: Setup, stage: int) -> str:
    return f"1/{setup.workers} of it" if setup.zero_stage >= stage and setup.workers > 1 else "all of it"


def head_terms(shape: Shape, setup: Setup, device: Device) -> list[Term]:
    """What the fused head holds, its weight's gradient first (losses/fused_head.py says how much)."""
    element = BYTES[setup.dtype]
    chunk = min(CHUNK_BYTES["cuda" if device.cuda else "cpu"], 4 * setup.tokens * shape.vocabulary)
    copies = 2 * element * shape.head if setup.dtype != "float32" else 0
    hidden = setup.tokens * shape.hidden * (4 + element)
    slices = 0 if setup.dtype == "float32" else SLICE_BYTES
    return [
        Term("gradient of the output layer", 4 * shape.head, "in float32, while the head works"),
        Term("head chunk", chunk * (1.5 if copies else 1.0) + slices, "logits of a few positions at a time"),
        Term("head's copies", copies, "weight and gradient in the pass's number format"),
        Term("head's hidden states", hidden, "of the positions learnt, and their gradient"),
    ]


def _communication(shape: Shape, setup: Setup) -> list[Term]:
    """What is gathered for a while, and the buffers that ranks talk through."""
    if setup.workers == 1:
        return []
    element = BYTES[setup.dtype]
    if setup.engine == "ddp":
        return [Term("communication buckets", 4 * shape.trained, "DDP's copy of the gradients")]
    terms = []
    if setup.zero_stage >= 3:
        output = 4 if setup.engine == "fsdp2" else element  # the root's weights stay float32 there
        gathered = element * 2 * shape.layer + output * shape.head
        terms.append(Term("gathered parts", gathered, "two layers and the output layer, whole"))
    buffer = BUCKET if setup.engine == "deepspeed" else 2 * shape.layer
    terms.append(Term("communication buckets", element * min(buffer, shape.trained), "gradients on their way"))
    return terms


def _process(device: Device, workers: int) -> list[Term]:
    if not device.cuda:
        return [Term("process", PROCESS, "interpreter and libraries")]
    collectives = COLLECTIVES if workers > 1 else 0.0
    return [Term("process", CONTEXT + collectives, "CUDA, fragments" + ", NCCL" * (workers > 1))]


# --- teachers ------------------------------


def teacher_memory(teacher: Teacher, shape: Shape, device: Device, length: int) -> Memory:
    """A teacher's replica on one device (of a split one: on each), while it scores sequences of up to `length` tokens.

    Raises:
        PlanError: a vLLM engine that leaves no room for the logits of a prompt.
    """
    if teacher.vllm is not None:
        return _vllm_memory(teacher, shape, device)
    element = BYTES[teacher.dtype]
    compute = BYTES[teacher.autocast or teacher.dtype]
    tokens = max(teacher.batch_tokens, length)
    chunk = min(CHUNK_BYTES["cuda" if device.cuda else "cpu"], 4 * tokens * shape.vocabulary)
    # Residual stream and norm in the weights' format; inside a layer three tensors of its widest product.
    pass_bytes = tokens * (4 * shape.hidden * element + 3 * shape.widest * compute)
    copies = 0 if compute == element else compute * (shape.head + shape.layer)
    terms = [
        Term("weights", weight_bytes(shape, element), f"{teacher.dtype}, whole"),
        Term("activations", pass_bytes, f"{tokens:,} tokens of one layer, nothing is kept"),
        Term("prompt logits", 1.5 * chunk, "of a few positions at a time"),
        Term("copies in the pass's format", copies, "output layer and one layer"),
        *_process(device, 1),
    ]
    room = device.memory * (min(teacher.gpus, 1.0) if device.cuda and teacher.gpus else 1.0)
    return _memory(f"teacher {teacher.name}", terms, room)


def _vllm_memory(teacher: Teacher, shape: Shape, device: Device) -> Memory:
    """vLLM takes its share whole: what weights and activations leave of it is key-value cache."""
    assert teacher.vllm is not None
    split = teacher.vllm.tensor_parallel
    weights = weight_bytes(shape, BYTES[teacher.dtype])
    sizes = vllm.Shape(shape.vocabulary, teacher.dtype, weights, shape.cache * BYTES[teacher.dtype])
    share = vllm.engine_share(teacher.gpus or 1.0, teacher.vllm.gpu_memory_utilization)
    engine = share * device.memory
    try:
        fitting = vllm.gpu_tokens(sizes, int(device.memory), teacher.gpus or 1.0, share)
    except TeacherError as error:
        raise PlanError(f"teacher {teacher.name}: {error}") from error
    tokens = teacher.vllm.batched_tokens or min(fitting, teacher.batch_tokens)
    # Row-parallel products are split, the residual stream is not.
    acts = tokens * BYTES[teacher.dtype] * (4 * shape.hidden + 3 * shape.widest / split)
    cache = max(0.0, engine - weights / split - acts)
    least = (teacher.vllm.max_model_len or shape.context or 4096) * sizes.cache_per_token / split
    held = max(cache, least)
    count = f"{held * split / sizes.cache_per_token:,.0f} tokens of keys and values"
    terms = [
        Term("weights", weights / split, f"1/{split} of it" if split > 1 else "all of it"),
        Term("KV cache", held, count if cache >= least else f"{count}: one sequence of full length"),
        Term("activations", acts, f"{tokens:,} tokens of an engine's step"),
        Term("prompt logits", tokens * sizes.logits_per_token, f"{tokens:,} x {shape.vocabulary:,}, three formats"),
        Term("process", vllm.GPU_RESERVE, "CUDA"),
    ]
    return _memory(f"teacher {teacher.name}", terms, device.memory * min(teacher.gpus or 1.0, 1.0))


def with_batch(setup: Setup, batch: int) -> Setup:
    """The same step in micro-steps of another size."""
    return replace(setup, batch=batch, micro_steps=max(1, setup.micro_steps * setup.batch // batch))
