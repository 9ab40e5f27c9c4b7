"""A model read a part at a time and written a tensor at a time, for engines of which no process holds the whole."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayfuse.config import Model
from rayfuse.models.folder import save_model
from rayfuse.models.loading import empty_causal_lm, load_causal_lm, model_folder
from rayfuse.models.shards import FLOATS, Kind, Shards, in_order, write_shard
from rayfuse.models.weight_files import INDEX, SINGLE

log = logging.getLogger(__name__)
FILE_BYTES = 5 * 10**9
"""Weights of one exported file, at most (a larger tensor has a file of its own)."""


class StreamedModel:
    """A causal language model in evaluation mode whose float32 parameters get their values when they are asked for.

    Where transformers would convert the weights that it reads (experts that it stacks, GGUF), the model is loaded as a
    whole at once, and written as a whole.

    Attributes:
        model: the transformers model; its parameters are on the meta device until `fill` was called on their module.
        streams: whether it is read and written in parts.
    """

    def __init__(self, source: Model) -> None:
        """Read configuration and headers.

        Raises:
            ModelError: the model cannot be loaded.
        """
        self.shards: Shards | None = None
        self.stored: dict[nn.Parameter, str] = {}
        self.places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        self.read_as: dict[str, str] = {}
        if source.gguf_file is None:
            local = source.model_copy(update={"model": str(model_folder(source, source.model)), "revision": None})
            self.model = empty_causal_lm(local)
            self._find(Shards.open(Path(local.model)))
        if self.shards is None:
            log.warning(
                "every worker loads all of %s at once: its files hold the weights in another form", source.model
            )
            self.model = load_causal_lm(source, dtype="float32")
        self.streams = self.shards is not None

    def _find(self, shards: Shards) -> None:
        """Find each parameter and buffer among the tensors of the files; without effect where one is not there."""
        if _converted(self.model):
            return
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
            module, _, key = name.rpartition(".")
            self.places.setdefault(parameter, []).append((self.model.get_submodule(module), key))
        for parameter, aliases in names.items():
            found = [name for name in aliases if name in shards.kinds and shards.kinds[name].dtype in FLOATS]
            if not found or shards.kinds[found[0]].shape != tuple(parameter.shape):
                return
            self.stored[parameter] = found[0]
            self.read_as |= dict.fromkeys(aliases, found[0])
        buffers = self.model.state_dict().keys() - {name for aliases in names.values() for name in aliases}
        if not buffers <= shards.kinds.keys():
            return
        for name in buffers:
            self.model.get_buffer(name).copy_(shards.tensor(name))
        self.shards = shards

    def fill(self, module: nn.Module, device: torch.device) -> None:
        """Give the parameters of `module` that are without values theirs, in float32 on `device`."""
        for parameter in list(module.parameters()):
            if self.shards is None or parameter not in self.stored or not parameter.is_meta:
                continue
            value = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            value.copy_(self.shards.tensor(self.stored[parameter]))  # never the file's own memory
            filled = nn.Parameter(value, requires_grad=parameter.requires_grad)
            for owner, key in self.places[parameter]:
                owner._parameters[key] = filled

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter by its name, as it is in the files, or in the model that was loaded whole."""
        parameter = self.read_as.get(name)
        if self.shards is None or parameter is None:
            return self.model.get_parameter(name).detach().cpu()
        return self.shards.tensor(parameter).float()

    def write(self, folder: Path, tensor_of: Callable[[str], torch.Tensor], kinds: dict[str, Kind], rank: int) -> None:
        """Write configuration and weights into `folder`, on rank 0; all ranks call it.

        Args:
            folder: where to.
            tensor_of: the whole tensor by its name, on the CPU (collective: all ranks ask for the same in turn).
            kinds: dtype and shape of each tensor, without the second names of tied weights.
            rank: of this worker.
        """
        if not self.streams:
            weights = {}
            for name in kinds:
                tensor = tensor_of(name)
                if rank == 0:
                    weights[name] = tensor
            if rank == 0:
                save_model(self.model, weights, folder)
            return
        if rank == 0:
            save_model(self.model, {}, folder)
        files = _files(kinds)
        for file, part in files.items():
            if rank == 0:
                write_shard(folder / file, part, tensor_of)
            else:
                for name in in_order(part):
                    tensor_of(name)
        if rank == 0 and len(files) > 1:
            weight_map = {name: file for file, part in files.items() for name in part}
            total = sum(kind.size for kind in kinds.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _converted(model: Any) -> bool:
    """Whether transformers computes the model's weights from those in its files (more than another name)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model, add_legacy=False))


def _files(kinds: dict[str, Kind]) -> dict[str, dict[str, Kind]]:
    """The tensors of each file, in the order of their names."""
    parts: list[dict[str, Kind]] = [{}]
    size = 0
    for name, kind in kinds.items():
        if parts[-1] and size + kind.size > FILE_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = kind
        size += kind.size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, start=1)}
