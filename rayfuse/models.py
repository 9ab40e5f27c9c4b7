"""Loading models and tokenizers, safely, and naming exactly what was loaded.

Weights come from safetensors (or GGUF, through transformers); pickled weights are refused, and Python code that ships
with a model runs only where the configuration repeats the model's name under `trust_remote_code`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfuse.config import Model, Teacher
from rayfuse.environments import engine_version
from rayfuse.errors import ModelError

WEIGHT_FILES = "*.safetensors"
RENDERING = 1
"""Version of what render and the backends make of a sample; a change there that changes answers must raise it."""


@contextmanager
def _loading(what: str, model: Model) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # transformers, tokenizers and the hub raise many kinds
        raise ModelError(
            f"cannot load {what} of {model.model}"
            + (f" (file {model.gguf_file})" if model.gguf_file else "")
            + f": {type(error).__name__}: {error}"
        ) from error


def _from_pretrained_arguments(model: Model) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": model.trust_remote_code is not None}
    if model.revision:
        arguments["revision"] = model.revision
    if model.gguf_file:
        arguments["gguf_file"] = model.gguf_file
    return arguments


def load_tokenizer(model: Model) -> Any:
    """The model's fast tokenizer.

    Raises:
        ModelError: it cannot be loaded, or is not a fast tokenizer (whose vocabulary can be read byte by byte).
    """
    from transformers import AutoTokenizer

    with _loading("the tokenizer", model):
        if model.tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(model.model, **_from_pretrained_arguments(model))
        else:
            tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"the tokenizer of {model.model} has no tokenizer.json; a fast tokenizer is needed")
    return tokenizer


def load_model_config(model: Model) -> Any:
    """The model's configuration (sizes, architecture), without its weights."""
    from transformers import AutoConfig

    with _loading("the configuration", model):
        return AutoConfig.from_pretrained(model.model, **_from_pretrained_arguments(model))


def is_causal_lm(config: Any) -> bool:
    """Whether transformers has a causal language model for this configuration (or the model brings its own code)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {})


def load_causal_lm(model: Model, *, dtype: str | None = None) -> Any:
    """The model in evaluation mode on the CPU.

    Args:
        model: what to load.
        dtype: number format of the weights; default: `model.dtype`.

    Raises:
        ModelError: it cannot be loaded, or has no safetensors (pickled weights are refused).
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    _refuse_pickled(model)
    with _loading("the weights", model):
        loaded = AutoModelForCausalLM.from_pretrained(
            model.model,
            dtype=getattr(torch, dtype or model.dtype),
            use_safetensors=None if model.gguf_file else True,
            **_from_pretrained_arguments(model),
        )
    return loaded.eval()


def load_sequence_classifier(model: Model) -> Any:
    """A sequence-classification model (a reward model) in evaluation mode on the CPU.

    Raises:
        ModelError: it cannot be loaded, has no safetensors, or its files lack weights that the model has (then it is no
            sequence-classification model: transformers would make its head up).
    """
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    _refuse_pickled(model)
    with _loading("the weights", model):
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            model.model,
            dtype=getattr(torch, model.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **_from_pretrained_arguments(model),
        )
    if info["missing_keys"]:
        raise ModelError(
            f"{model.model} is no reward model: its files lack {sorted(info['missing_keys'])[:4]}, which transformers "
            "would fill with random numbers"
        )
    return loaded.eval()


def _refuse_pickled(model: Model) -> None:
    folder = Path(model.model)
    if folder.is_dir() and not model.gguf_file and not any(folder.glob(WEIGHT_FILES)):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise ModelError(
            f"{model.model} has no *.safetensors file (it has: {found}); pickled weights are refused, "
            "convert them with transformers' save_pretrained"
        )


@dataclass(frozen=True)
class OutputLayer:
    """The output layer of a causal language model: logits = softcap(scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: factor on the logits.
        softcap: c of c * tanh(x / c), or None.
        valid_vocab: rows from here on are padding.
    """

    weight: Any
    bias: Any
    scale: float
    softcap: float | None
    valid_vocab: int

    def options(self) -> dict[str, Any]:
        """Everything but the weight, as keyword arguments of `fused_head` and `teacher_topk`."""
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap, "valid_vocab": self.valid_vocab}


def output_layer(model: Any, vocabulary: int) -> OutputLayer:
    """The output layer of a transformers causal language model, cut at the tokenizer's `vocabulary`.

    Raises:
        ModelError: the model has none that is a plain linear layer, or more tokens than the layer has rows.
    """
    layer = model.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise ModelError(f"{type(model).__name__} has no linear output layer; it cannot be a teacher or student")
    rows = layer.weight.shape[0]
    if vocabulary > rows:
        raise ModelError(
            f"the tokenizer has {vocabulary} tokens but the model predicts only {rows}; "
            "they do not belong together (or the embeddings were not resized)"
        )
    config = model.config
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    bias = getattr(layer, "bias", None)
    return OutputLayer(layer.weight, bias, scale, None if softcap is None else float(softcap), vocabulary)


def check_output_layer(model: Any, layer: OutputLayer) -> None:
    """Compare the layer with the model's own logits on a few tokens.

    Raises:
        ModelError: they differ: the architecture does something to its logits that `OutputLayer` does not know.
    """
    import torch

    ids = torch.arange(1, 5, device=layer.weight.device)[None] % layer.valid_vocab
    training = model.training
    with torch.no_grad():
        model.eval()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        model.train(training)
        logits = (torch.nn.functional.linear(hidden, layer.weight, layer.bias).float()) * layer.scale
        if layer.softcap is not None:
            logits = layer.softcap * torch.tanh(logits / layer.softcap)
    scale = float(expected.abs().max().clamp_min(1e-6))
    difference = float((logits - expected).abs().max())
    if difference > scale * (1e-3 if hidden.dtype == torch.float32 else 3e-2):
        raise ModelError(
            f"{type(model).__name__} computes its logits in a way that is not supported: the output layer alone is off "
            f"by {difference:.3g} (logits up to {scale:.3g}). Use another model, or report the architecture"
        )


def context_length(config: Any) -> int | None:
    """Longest sequence the model was made for, where its configuration tells."""
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def teacher_context(teacher: Teacher) -> int | None:
    """Tokens of prompt and response that a teacher reads: by its configuration, or as its server says.

    None where nobody tells. Stored signals have no limit of their own.
    """
    if teacher.backend == "store":
        return None
    if teacher.backend == "openai":
        from rayfuse.teachers.probe import served

        return served(teacher).context
    length = context_length(load_model_config(teacher))
    if teacher.vllm is None:
        return length
    lengths = [item for item in (length, teacher.vllm.max_model_len) if item is not None]
    return min(lengths) - 1 if lengths else None  # the engine insists on room for a token that it writes


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id that the tokenizer can produce; the model's padded rows lie above."""
    return max(tokenizer.get_vocab().values()) + 1


# --- fingerprints ------------------------------


def fingerprint(teacher: Teacher, k: int) -> str:
    """The name of everything that a teacher's answers depend on: 32 hex digits.

    Weights (revision, or the hashes of the files), tokenizer, chat template, context length, K, dtype and backend; of
    vLLM also its quantisation and version. For an endpoint, whose weights nobody here sees: its address, the model's
    name, `revision` and what the server calls the weights' origin; not the key, not the time, not the server's version
    or limits.

    Raises:
        ModelError: the model's files cannot be found.
        TeacherError: an endpoint does not answer, or does not serve the model.
    """
    if teacher.stored is not None:
        if teacher.stored.fingerprint is not None:
            return teacher.stored.fingerprint
        writer = {"backend": teacher.stored.backend, "stored": None}
        return fingerprint(teacher.model_copy(update=writer), k)
    tokenizer = load_tokenizer(teacher)
    parts = {
        "weights": _weights_identity(teacher),
        "tokenizer": _sha(tokenizer.backend_tokenizer.to_str().encode()),
        "template": _sha(json.dumps(tokenizer.chat_template, sort_keys=True).encode()),
        "context": teacher_context(teacher),
        "k": k,
        "dtype": None if teacher.endpoint else teacher.dtype,
        "backend": teacher.backend,
        "ends": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "rendering": RENDERING,
    }
    if teacher.vllm is not None:
        parts["quantization"] = teacher.vllm.quantization
        parts["engine"] = engine_version(teacher)
    return _sha(json.dumps(parts, sort_keys=True).encode())[:32]


def _weights_identity(model: Teacher) -> str:
    if model.endpoint is not None:
        from rayfuse.teachers.probe import served

        return json.dumps([model.endpoint.url, model.endpoint.model, model.revision, served(model).root])
    folder = Path(model.model)
    if not folder.is_dir():
        return f"{model.model}@{_hub_commit(model)}"
    names = [folder / model.gguf_file] if model.gguf_file else sorted(folder.glob(WEIGHT_FILES))
    files = [path for path in [*names, folder / "config.json"] if path.exists()]
    if not files:
        raise ModelError(f"{model.model} holds no weights ({model.gguf_file or WEIGHT_FILES})")
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(_sha_file, files)
        return _sha("".join(f"{path.name}:{digest};" for path, digest in zip(files, hashes, strict=True)).encode())


def _hub_commit(model: Model) -> str:
    if model.revision and re.fullmatch(r"[0-9a-f]{40}", model.revision):
        return model.revision
    commit = getattr(load_model_config(model), "_commit_hash", None)
    if not commit:
        raise ModelError(f"cannot tell which commit of {model.model} is used; set `revision` to a commit hash")
    return str(commit)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
