"""Loading models and tokenizers, safely, and naming exactly what was loaded.

Weights come from safetensors (or GGUF, through transformers); pickled weights are refused, and Python code that ships
with a model runs only where the configuration repeats the model's name under `trust_remote_code`.

A model of text inside one of images or sound is loaded for its text: by transformers' text class where it has one
(Llama 4), else by the class of the whole (Mistral 3, Gemma 3, Qwen-VL, Mllama), of which only the text part is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from rayfuse.config import Dtype, Model, Student, Teacher
from rayfuse.errors import ModelError
from rayfuse.models.imports import collector_paused
from rayfuse.models.meta import parameters_on_meta
from rayfuse.models.output_layer import check_architecture, text_decoder
from rayfuse.models.quantised import quantisation, refuse_quantised
from rayfuse.models.text_config import context_length, text_config
from rayfuse.models.tokenizer_files import read_tokenizer, require_fast, valid_vocabulary, vocabulary_size
from rayfuse.models.weight_files import some_of, weight_files

__all__ = [
    "WEIGHT_FILES",
    "context_length",
    "empty_causal_lm",
    "empty_model",
    "inspect_model",
    "load_causal_lm",
    "load_model_config",
    "load_sequence_classifier",
    "load_tokenizer",
    "model_folder",
    "refuse_unloadable",
    "stored_dtype",
    "text_config",
    "token_rows",
    "valid_vocabulary",
    "vocabulary_size",
]

log = logging.getLogger(__name__)
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
    with _loading("the tokenizer", model):
        if model.tokenizer is None:
            tokenizer = read_tokenizer(model.model, _from_pretrained_arguments(model))
        else:
            tokenizer = read_tokenizer(model.tokenizer, {"trust_remote_code": False})
    return require_fast(tokenizer, model.model)


@collector_paused()
def load_model_config(model: Model) -> Any:
    """The model's configuration (sizes, architecture), without its weights."""
    from transformers import AutoConfig

    with _loading("the configuration", model):
        return AutoConfig.from_pretrained(model.model, **_from_pretrained_arguments(model))


def token_rows(model: Model) -> int | None:
    """Rows of the model's output layer by its configuration: ids from there on are never predicted, nor read.

    None where nobody knows here: stored signals, and a server whose tokenizer's folder has no config.json.
    """
    from transformers import AutoConfig

    if not (isinstance(model, Teacher) and model.backend in ("openai", "store")):
        return int(text_config(load_model_config(model)).vocab_size)
    folder = Path(model.tokenizer or model.model)
    if model.backend == "store" or not (folder / "config.json").is_file():
        return None
    with _loading("the configuration beside the tokenizer", model):
        return int(text_config(AutoConfig.from_pretrained(folder)).vocab_size)


def _auto_class(config: Any) -> Any:
    """The class of transformers that loads the language model of this configuration; None where there is none."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
    )

    if "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return AutoModelForCausalLM
    text = text_config(config)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        whole = found.config_class is not type(text)
        # A text class whose own configuration is not registered (Mllama's) could be saved, but not loaded again.
        if text is config or whole or type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return AutoModelForCausalLM
    several = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and not text.is_encoder_decoder
    return AutoModelForMultimodalLM if several else None


def load_causal_lm(model: Model, *, dtype: str | None = None, device: Any = "cpu") -> Any:
    """The model in evaluation mode. What is not part of its text model (a vision tower) takes no gradients.

    Args:
        model: what to load.
        dtype: number format of the weights; default: `model.dtype`.
        device: where to; quantised weights cannot be moved later.

    Raises:
        ModelError: it cannot be loaded, has no safetensors (pickled weights are refused), lacks tensors, or is
            quantised in a way that cannot run here (a student: in any way).
    """
    with collector_paused():
        import torch
        from transformers import PreTrainedModel  # noqa: F401 - brings what all models import
        from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config = load_model_config(model)
    auto = _checked_class(model, config)
    arguments = {**_from_pretrained_arguments(model), **_attention(model)}
    quantised = quantisation(config) is not None
    if quantised:
        arguments["device_map"] = {"": device}
    with _loading("the weights", model):
        loaded, info = auto.from_pretrained(
            model.model,
            dtype=getattr(torch, dtype or model.dtype),
            use_safetensors=None if model.gguf_file else True,
            output_loading_info=True,
            **arguments,
        )
    _refuse_incomplete(model, loaded, info)
    if info["unexpected_keys"]:
        log.info("%s: not read: %s", model.model, some_of(sorted(info["unexpected_keys"])))
    _freeze_other_parts(loaded)
    return (loaded if quantised else loaded.to(device)).eval()


def empty_causal_lm(model: Model) -> Any:
    """The model in evaluation mode without the values of its parameters, which are float32 on the meta device.

    Its buffers have their values, and `requires_grad` is as `load_causal_lm` sets it.

    Raises:
        ModelError: as `inspect_model`.
    """
    import torch

    config = load_model_config(model)
    auto = _checked_class(model, config)
    inspected, _ = inspect_model(model)
    remote = model.trust_remote_code is not None
    with _loading("the architecture", model), parameters_on_meta():
        empty = auto.from_config(config, dtype=torch.float32, trust_remote_code=remote, **_attention(model))
    empty.generation_config = inspected.generation_config
    _freeze_other_parts(empty)
    return empty.eval()


def _attention(model: Model) -> dict[str, Any]:
    asked = model.attention if isinstance(model, Student) else None
    return {} if asked is None else {"attn_implementation": asked}


def inspect_model(model: Model) -> tuple[Any, list[str]]:
    """What loading would find, without the values of the weights: seconds for a model of any size.

    Returns:
        The model on the meta device, and the names of tensors in its files that it does not read.

    Raises:
        ModelError: as `load_causal_lm`; or its logits are made in a way that is not supported.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config = load_model_config(model)
    auto = _checked_class(model, config)
    if not Path(model.model).is_dir() or model.gguf_file or quantisation(config) is not None:
        with _loading("the architecture", model), torch.device("meta"):
            empty = auto.from_config(config, trust_remote_code=model.trust_remote_code is not None)
        check_architecture(empty)
        return empty, []
    with _loading("the weights", model):
        empty, info = auto.from_pretrained(
            model.model,
            device_map="meta",
            use_safetensors=True,
            output_loading_info=True,
            **_from_pretrained_arguments(model),
        )
    _refuse_incomplete(model, empty, info)
    check_architecture(empty)
    return empty, sorted(info["unexpected_keys"])


def empty_model(config: Any, name: str) -> Any:
    """The language model of a transformers configuration on the meta device: names and shapes of parameters, no values.

    Raises:
        ModelError: transformers has no causal language model of this configuration, or cannot build it.
    """
    import torch

    auto = _auto_class(config)
    if auto is None:
        raise ModelError(f"{name} ({config.model_type}) is not a causal language model")
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except Exception as error:  # each architecture has its own conditions
        raise ModelError(f"cannot build the architecture of {name}: {type(error).__name__}: {error}") from error


def refuse_unloadable(model: Model, config: Any) -> None:
    """Raises ModelError where a model's files are not to be read, or its weights are quantised and cannot be used."""
    _refuse_unsafe_files(model)
    refuse_quantised(model.model, config, model.dtype, trained=isinstance(model, Student))


def _checked_class(model: Model, config: Any) -> Any:
    refuse_unloadable(model, config)
    auto = _auto_class(config)
    if auto is None:
        raise ModelError(f"{model.model} ({config.model_type}) is not a causal language model")
    return auto


def load_sequence_classifier(model: Model) -> Any:
    """A sequence-classification model (a reward model) in evaluation mode on the CPU.

    Raises:
        ModelError: it cannot be loaded, has no safetensors, or its files lack weights that the model has (then it is no
            sequence-classification model: transformers would make its head up).
    """
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    refuse_unloadable(model, load_model_config(model))
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


def _refuse_unsafe_files(model: Model) -> None:
    """Raises ModelError where a folder's weights are pickled, outside of it, or only an adapter's."""
    folder = Path(model.model)
    if not folder.is_dir() or model.gguf_file:
        return
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{model.model} is an adapter (adapter_config.json), not a model: merge it into its base with peft's "
            "merge_and_unload and save_pretrained, and name that folder"
        )
    weight_files(folder)


def _refuse_incomplete(model: Model, loaded: Any, info: Mapping[str, Any]) -> None:
    """Raises ModelError where the files lack tensors that transformers fills with random numbers.

    Tied weights are not among `info`'s; integer and boolean buffers (positions, masks) and the frequencies of rotary
    embeddings, which older files have and newer ones do not, are computed and not learned.
    """
    made = {name for name, value in loaded.named_buffers() if not value.is_floating_point()}
    missing = sorted(name for name in info["missing_keys"] if name not in made and not name.endswith("inv_freq"))
    if missing:
        raise ModelError(
            f"{model.model}: the weights lack {len(missing)} tensors of {type(loaded).__name__}: {some_of(missing)}; "
            "transformers would fill them with random numbers. Download it again, or save it again from a whole model"
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
    said = [str(part.dtype).removeprefix("torch.") for part in (config, text_config(config))]
    return next((dtype for name in said for dtype in get_args(Dtype) if dtype == name), "float32")


def _freeze_other_parts(loaded: Any) -> None:
    """No gradients for what a text never passes: towers of images and sound, and layers that read them."""
    config = text_config(loaded.config)
    if config is not loaded.config:
        text = [*text_decoder(loaded).parameters(), *loaded.get_output_embeddings().parameters()]
        kept = {id(parameter) for parameter in text}
        for parameter in loaded.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)
    if config.model_type == "mllama_text_model":
        layers = text_decoder(loaded).layers
        for index in config.cross_attention_layers:
            layers[index].requires_grad_(False)
