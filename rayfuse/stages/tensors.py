"""Arrays of a batch as tensors on the student's device."""

from __future__ import annotations

import numpy as np
import torch


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor of the same dtype, on the CPU without a copy.

    To a GPU it goes through pinned memory, in the order of the GPU's own work: the host goes on at once.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
