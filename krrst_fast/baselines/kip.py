"""KIP: kernel inducing points (Nguyen, Chen and Lee 2021, arXiv 2011.00050)."""

import copy
from typing import Any

import torch
from torch import Tensor

from krrst_fast.baselines.label_regression import LabelTask
from krrst_fast.baselines.regression_config import KIPConfig
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.distill.step import require_finite
from krrst_fast.errors import NonFiniteError, NotPositiveDefiniteError
from krrst_fast.ops.krr import krr_mse
from krrst_fast.runs.environment import solving_device
from krrst_fast.runs.seeding import generator


class KIP:
    """Images from whose pixels kernel ridge regression predicts the labels of real images.

    A step is the mean squared error of the prediction on a batch of real images, with the
    arc-cosine kernel of degree 1, and Adam on the images, and on their labels where these are
    learnt.

    Args:
        config: The settings.

    Attributes:
        step: The steps done.
        images: [M, C, H, W], a leaf, in the order of their classes.
        targets: [M, classes], a leaf where they are learnt.

    Raises:
        DataError: The store cannot be read, is not labelled, or a class has too few images.
        ConfigError: There is no such device.
    """

    method = "kip"

    def __init__(self, config: KIPConfig) -> None:
        self.config, self.step = config, 0
        self._task = LabelTask(config, method=self.method)
        self.images = self._task.first_images.clone().requires_grad_(True)
        self.targets = self._task.first_targets.clone().requires_grad_(config.learn_labels)
        leaves = [self.images, self.targets] if config.learn_labels else [self.images]
        self._optimizer = torch.optim.Adam(leaves, lr=config.lr, fused=True)
        # No view is drawn but the plain one.
        self._draw = generator(config.seed, "steps")

    def advance(self) -> dict[str, float]:
        """Take a step: the gradient of the error on a batch, and Adam with it.

        Returns:
            `loss`, the mean squared error before the step.

        Raises:
            NonFiniteError: The loss or a gradient is NaN or infinite.
            NotPositiveDefiniteError: The kernel matrix cannot be factored.
        """
        images, targets = self._task.source.draw(self.step, self._draw)
        try:
            loss = self.error(images, targets)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            require_finite(loss, self.images.grad, self.targets.grad)
        except (NonFiniteError, NotPositiveDefiniteError) as error:
            raise type(error)(
                f"kip: step {self.step + 1}: {error}; try a lower rate than {self.config.lr:g}"
            ) from error
        self._optimizer.step()
        self.step += 1
        return {"loss": float(loss.detach())}

    def error(self, images: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean squared error of the prediction for normalised real images, a scalar.

        Args:
            images: [B, C, H, W].
            targets: Their centred one-hot labels [B, classes].
        """
        device = solving_device(self.images.device)
        return krr_mse(
            self.images.flatten(1).to(device),
            self.targets.to(device),
            images.flatten(1).to(device),
            targets.to(device),
            ridge=self.config.ridge,
            ridge_of="mean_diagonal",
            detach_ridge=False,
            kernel="arccos",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors; `load_state_dict` goes on with the same bits."""
        return {
            "step": self.step,
            "images": self.images.detach(),
            "targets": self.targets.detach(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.step = state["step"]
        with torch.no_grad():
            self.images.copy_(state["images"])
            self.targets.copy_(state["targets"])
        # The optimizer would keep the very tensors of the dict, and change them.
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def result(self) -> DistilledSet:
        """Return the images as they are, with one-hot or with learnt soft labels."""
        return self._task.as_set(self.images, self.targets)
