"""Rates of optimisers: numbers, or tensors that stay where a captured step reads them."""

from typing import Any

import torch
from torch import Tensor


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Give a parameter group of an optimiser its rate, a number or a tensor that stays."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def plain_state(optimizer: torch.optim.Optimizer, rate: float | None = None) -> dict[str, Any]:
    """Return the state of an optimiser with rates that are numbers, `rate` where it is known."""
    state = optimizer.state_dict()
    groups = []
    for group in state["param_groups"]:
        plain = {**group, "lr": float(group["lr"]) if rate is None else rate}
        groups.append(plain | ({"capturable": False} if "capturable" in group else {}))
    return {**state, "param_groups": groups}


def hold_rates(optimizer: torch.optim.Optimizer) -> None:
    """Make the rates of an optimiser tensors, which its fused kernels read on their device."""
    # Else each optimiser warns that it could be captured, when its first step is not.
    optimizer._warned_capturable_if_run_uncaptured = True
    for group in optimizer.param_groups:
        device = group["params"][0].device
        # On a CPU the number that a float would be.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        group["lr"] = torch.tensor(float(group["lr"]), dtype=dtype, device=device)
        if "capturable" in group:
            group["capturable"] = device.type == "cuda"


def release_rates(optimizer: torch.optim.Optimizer) -> None:
    """Make the rates numbers again."""
    for group in optimizer.param_groups:
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False
