"""Modules without the values of their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are made inside have their parameters on the meta device, and their buffers where they make them.

    Under `torch.device("meta")` the buffers would be lost, which no file holds: the frequencies of rotary embeddings.
    """
    from torch import nn

    register = nn.Module.register_parameter

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # a tied one stays the same object
            # Replaced before the module fills it with random numbers, which then costs nothing.
            empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = empty

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
