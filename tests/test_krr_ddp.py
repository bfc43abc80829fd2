"""krr_mse under DistributedDataParallel: two processes, the gradient of one over both batches."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from krrst_fast import krr_mse
from tests.helpers import assert_equal

GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()
DIMENSIONS = 6
WORKER = """
import datetime, sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tests.test_krr_ddp import Outer, backbone, batch, outer_loss, syn

folder, rank = sys.argv[1], int(sys.argv[2])
limit = datetime.timedelta(seconds=60)
distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit
)
model = DistributedDataParallel(backbone(seed=rank))  # takes over the weights of rank 0
outer_loss(model, *syn(), *batch(rank)).backward()
step = DistributedDataParallel(Outer(seed=rank))
step(*batch(rank)).backward()
found = [[x.grad for x in module.parameters()] for module in (model, step)]
torch.save(found, f"{folder}/rank{rank}.pt")
distributed.barrier()
distributed.destroy_process_group()
"""


def backbone(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Linear(DIMENSIONS, 16), nn.Tanh(), nn.Linear(16, 11)
    return nn.Sequential(*layers).double()


def syn() -> tuple[Tensor, Tensor]:
    """Synthetic images [7, D] and their targets [7, 3]."""
    generator = torch.Generator().manual_seed(10)
    x, y = (torch.randn(7, n, dtype=torch.float64, generator=generator) for n in (DIMENSIONS, 3))
    return x, y


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """The real images [9, D] and targets [9, 3] of one process."""
    generator = torch.Generator().manual_seed(20 + rank)
    x, y = (torch.randn(9, n, dtype=torch.float64, generator=generator) for n in (DIMENSIONS, 3))
    return x, y


def outer_loss(
    model: nn.Module,
    x_syn: Tensor,
    y_syn: Tensor,
    x_real: Tensor,
    y_real: Tensor,
    ridge: float | Tensor = 1e-3,
) -> Tensor:
    """Synthetic and real features both come from the model."""
    f_syn, f_real = model(torch.cat((x_syn, x_real))).split((len(x_syn), len(x_real)))
    return krr_mse(f_syn, y_syn, f_real, y_real, ridge=ridge, detach_ridge=False, bias=1.0)


class Outer(nn.Module):
    """All that an outer step may learn: images, targets, the ridge, and the network too."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = backbone(seed)
        self.x_syn, self.y_syn = (nn.Parameter(x) for x in syn())
        self.log_ridge = nn.Parameter(torch.tensor(-6.0, dtype=torch.float64))

    def forward(self, x_real: Tensor, y_real: Tensor) -> Tensor:
        ridge = self.log_ridge.exp()
        return outer_loss(self.model, self.x_syn, self.y_syn, x_real, y_real, ridge)


def run_two(folder: Path) -> list[list[list[Tensor]]]:
    """The gradients that each of two processes finds."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    if "lo" in [name for _, name in socket.if_nameindex()]:
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the name of the machine resolves to
    processes = []
    try:
        for rank in range(2):
            command = [sys.executable, "-c", WORKER, str(folder), str(rank)]
            with open(folder / f"log{rank}", "w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            processes.append(process)
        deadline = time.monotonic() + 120
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > deadline:
                break  # the other would wait for it
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"log{rank}").read_text() for rank in range(2))
    assert [process.returncode for process in processes] == [0, 0], logs
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.skipif(not GLOO, reason="torch has no gloo")
def test_two_processes_find_the_gradient_of_one(tmp_path: Path) -> None:
    model, step = backbone(seed=0), Outer(seed=0)
    for rank in range(2):
        (outer_loss(model, *syn(), *batch(rank)) / 2).backward()
        (step(*batch(rank)) / 2).backward()
    for found in run_two(tmp_path):
        for module, gradients in zip((model, step), found):
            for (name, parameter), gradient in zip(module.named_parameters(), gradients):
                assert parameter.grad.abs().max() > 0, name
                assert_equal(gradient, parameter.grad, 1e-10, name)
