"""Loading models and tokenizers, safely, and naming exactly what was loaded.

Weights come from safetensors (or GGUF, through transformers); pickled weights are refused, and Python code that ships
with a model runs only where the configuration repeats the model's name under `trust_remote_code`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from rayfuse.config import Dtype, Model
from rayfuse.errors import ModelError
from rayfuse.models.imports import collector_paused

WEIGHT_FILES = "*.safetensors"


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


@collector_paused()
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


@collector_paused()
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
    with collector_paused():
        import torch
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401 - brings what all models import
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


def model_folder(model: Model, path: str) -> Path:
    """The folder of the model that `path` names: itself, or what the hub has under this id and `model.revision`."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    with _loading("the files", model):
        return Path(snapshot_download(path, revision=model.revision))


def stored_dtype(model: Model) -> Dtype:
    """The number format that a model says its weights have; float32 where it says none that can be written.

    Raises:
        ModelError: the configuration cannot be loaded.
    """
    config = load_model_config(model)
    said = [str(part.dtype).removeprefix("torch.") for part in (config, config.get_text_config())]
    return next((dtype for name in said for dtype in get_args(Dtype) if dtype == name), "float32")


def context_length(config: Any) -> int | None:
    """Longest sequence the model was made for, where its configuration tells."""
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id that the tokenizer can produce; the model's padded rows lie above."""
    return max(tokenizer.get_vocab().values()) + 1


# --- fingerprints ------------------------------
