"""What the methods that learn labelled images by gradient descent have in common."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from krrst_fast.baselines.labelled import RealClasses
from krrst_fast.baselines.matching_config import Family, MatchingConfig
from krrst_fast.baselines.siamese import Augmentation, draw_augmentation
from krrst_fast.data.store import open_store
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import ConfigError, NonFiniteError
from krrst_fast.models import Network, build, check, place
from krrst_fast.runs.environment import pick_device
from krrst_fast.runs.seeding import derive, generator, seeded


class ImageLearner(ABC):
    """Labelled synthetic images that SGD moves; a subclass says by which gradient.

    All random draws are functions of the seed and the step, so a resumed run makes the same ones.

    Args:
        config: The settings.
        method: What the set says that it was made by.
        augment: Families of the siamese augmentation; none for no augmentation.

    Attributes:
        step: The steps done.
        images: [M, C, H, W], a leaf, in the order of their classes.
        labels: int64 [M].

    Raises:
        DataError: The store cannot be read, is not labelled, or a class has too few images.
        ConfigError: There is no such device, or the networks have batch norm.
    """

    def __init__(
        self, config: MatchingConfig, *, method: str, augment: Sequence[Family] = ()
    ) -> None:
        self.config, self.method, self._augment = config, method, tuple(augment)
        self.device = pick_device(config.device)
        self.real = RealClasses(open_store(config.store), self.device)
        self.step = 0
        first = self.real.first_images(
            config.images_per_class,
            real=config.init_images == "real",
            generator=generator(config.seed, "initial"),
        )
        self.images = first.clone().requires_grad_(True)
        self.labels = self.real.labels_of_set(config.images_per_class).to(self.device)
        self.optimizer = torch.optim.SGD([self.images], lr=config.lr, momentum=config.momentum)
        self._check_network()

    def advance(self) -> dict[str, float]:
        """Take a step: a new gradient of the images, and SGD with it.

        Returns:
            `loss`, the mean over classes of the distance that is made smaller.

        Raises:
            NonFiniteError: The loss or its gradient is NaN or infinite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        with seeded(derive(self.config.seed, "draws", self.step), self.device):
            network = self.network()
            for label in range(self.real.count):
                # Class by class, so that one class's activations are in memory at a time.
                distance = self.distance(network, label, *self.pair(label))
                distance.backward(inputs=[self.images])
                total += distance.detach()
        loss = total / self.real.count
        self._require_finite(loss)
        self.optimizer.step()
        self.step += 1
        return {"loss": loss.item()}

    def _require_finite(self, loss: Tensor) -> None:
        gradient = self.images.grad
        assert gradient is not None
        if not (torch.isfinite(loss) & torch.isfinite(gradient).all()):
            text = f"the loss is {loss.item()}"
            more = ", and its gradient holds NaN or infinity" if torch.isfinite(loss) else ""
            raise NonFiniteError(
                f"{self.method}: step {self.step + 1}: {text}{more}; try a lower rate than "
                f"{self.config.lr:g}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors that `load_state_dict` goes on from, bit by bit."""
        return {
            "step": self.step,
            "images": self.images.detach(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.step = state["step"]
        with torch.no_grad():
            self.images.copy_(state["images"])
        # The optimizer would keep the very tensors of the dict, and change them.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def result(self) -> DistilledSet:
        """Return the images as they are, with one-hot targets."""
        return self.real.as_set(self.images, self.labels, method=self.method)

    def network(self) -> Network:
        """Return the network of this step; each step has a fresh one."""
        return self.fresh_network(self.step)

    @abstractmethod
    def distance(self, network: Network, label: int, synthetic: Tensor, real: Tensor) -> Tensor:
        """Return what is to become small, with a graph to the synthetic images of the class.

        Args:
            network: That of the step.
            label: The class.
            synthetic: Images [m, C, H, W].
            real: Images of the class [B, C, H, W].
        """

    def images_of(self, label: int) -> Tensor:
        """Return the synthetic images of a class [images_per_class, C, H, W], with their graph."""
        each = self.config.images_per_class
        return self.images[label * each : (label + 1) * each]

    def pair(self, label: int) -> tuple[Tensor, Tensor]:
        """Return synthetic and real images of a class for this step, augmented alike."""
        draw = generator(self.config.seed, self.method, self.step, label)
        real = self.real.batch(label, self.config.batch_size, draw)
        if not self._augment:
            return self.images_of(label), real
        augmentation = self.draw_augmentation(draw)
        return augmentation(self.images_of(label)), augmentation(real)

    def draw_augmentation(self, draw: torch.Generator, count: int = 1) -> Augmentation:
        """Draw an augmentation, of all images alike or of `count` images each."""
        size = self.images.shape[-1]
        return draw_augmentation(self._augment, draw, size=size, count=count)

    def fresh_network(self, number: int) -> Network:
        """Return untrained network `number`, in training mode, with a head of the classes."""
        network = build(
            self.config.model,
            image_size=self.images.shape[-1],
            num_outputs=self.real.count,
            seed=derive(self.config.seed, "network", number),
            channels=self.images.shape[1],
        )
        return place(network, self.device).train()

    def _check_network(self) -> None:
        """Raise ConfigError where networks cannot be trained, or see more than one image at a time.

        Statistics of a batch of one class say more of the class than of the images.
        """
        check(
            self.config.model,
            image_size=self.images.shape[-1],
            num_outputs=self.real.count,
            channels=self.images.shape[1],
            device=self.device,
        )
        modules = self.fresh_network(0).modules()
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
            raise ConfigError(
                f"{self.method}: the batches are of one class each, so the model must be without "
                "batch norm, as a convnet with norm instance or none is; got "
                f"{self.config.model.kind} with batch norm"
            )
