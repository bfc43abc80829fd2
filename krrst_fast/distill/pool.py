"""The pool: networks of different ages; each outer step trains one of them on the synthetic set.

At rest a network is in evaluation mode and asks for no gradients: its features can be taken as they
are, and a backward pass through it reaches its input and nothing else. Only `Slot.fit` trains.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from krrst_fast.distill.arithmetic import PLAIN, Arithmetic
from krrst_fast.distill.config import PoolConfig
from krrst_fast.distill.optimizers import plain_state, set_rate
from krrst_fast.errors import NonFiniteError
from krrst_fast.models import Network, build, place
from krrst_fast.models.functional import state_of
from krrst_fast.models.rate import stable_rate
from krrst_fast.runs.seeding import derive, seeded

DIVERGED = 100.0
"""A network has diverged once its loss is so many times that of outputs of zero, at least 1."""
MOST_HALVINGS = 10


class Trained(NamedTuple):
    """An SGD step whose outcome has not been read from the device."""

    slot: "Slot"
    loss: Tensor
    is_well: Tensor
    """Whether the loss is finite and not far too large: a bool on the device."""
    x_syn: Tensor
    y_syn: Tensor


class Slot:
    """A place in the pool and the network that is in it now.

    Attributes:
        number: Position in the pool.
        network: The network, at rest.
        age: The SGD steps it has had.
        generation: Number of networks that the slot has had before.
        full_lives: Networks of the slot that had all their steps since the last divergence in the
            pool.
    """

    def __init__(self, number: int, pool: "Pool") -> None:
        self.number = number
        self._pool = pool
        self.network, self.optimizer = pool.fresh(number, 0)
        self.age = 0
        self.generation = 0
        self.full_lives = 0

    def embed(self, x: Tensor) -> Tensor:
        """Compute features [B, D] of images [B, C, H, W] by the network at rest."""
        function = self._pool.at_rest
        return self.network.embed(x) if function is None else function(state_of(self.network), x)

    def fit(self, x_syn: Tensor, y_syn: Tensor) -> Tensor:
        """Make one full-batch SGD step on mean((W f(x_syn) - y_syn)^2), in training mode.

        Args:
            x_syn: Images [M, C, H, W], without gradient.
            y_syn: Targets [M, P], without gradient.

        Returns:
            The loss before the step, a scalar, which nothing has looked at yet.
        """
        loss = self.update(x_syn, y_syn)
        self.age += 1
        return loss

    def update(
        self, x_syn: Tensor, y_syn: Tensor, guard: Callable[[Tensor], None] = lambda loss: None
    ) -> Tensor:
        """Do what `fit` does on the device, and do not count it.

        Args:
            x_syn: As of `fit`.
            y_syn: As of `fit`.
            guard: Called with the loss before the network is changed.
        """
        with training(self.network, self.optimizer), self._drawing():
            self.optimizer.zero_grad(set_to_none=True)  # of an update that was broken off
            loss = self._backward(x_syn, y_syn)
            guard(loss)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _backward(self, x_syn: Tensor, y_syn: Tensor) -> Tensor:
        """Compute the loss, and the gradients of what is trained."""
        function = self._pool.training_loss
        if function is not None:
            return function.backward(state_of(self.network), x_syn, y_syn)
        loss = nn.functional.mse_loss(self.network(x_syn), y_syn)
        loss.backward()
        return loss.detach()

    def _drawing(self) -> AbstractContextManager[None]:
        """Give dropout its own random numbers at each step, the same in a run that was resumed."""
        if not self.network.draws:
            return nullcontext()
        names = ("fit", self.number, self.generation, self.age)
        return seeded(derive(self._pool.seed, *names), self._pool.device)


def is_well(loss: Tensor, y_syn: Tensor) -> Tensor:
    """Return whether the loss of a network is finite and not far too large: a bool, unread."""
    # NaN compares as false. 1: what a fresh network gives is about 1.
    return loss <= DIVERGED * (y_syn.square().mean() + 1)


@contextmanager
def training(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put the network into training mode, with gradients of what is trained, and back."""
    network.train()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    try:
        yield
    finally:
        network.eval().requires_grad_(False)


class Pool:
    """`config.size` slots and the rule that renews them.

    Args:
        config: The settings.
        image_size: Height and width of the images.
        channels: Channels of the images.
        num_outputs: P, the width of the targets.
        seed: Seed from which the seed of each network is derived.
        device: Device of the networks.
        dtype: Dtype of the parameters.
        arithmetic: How the networks compute.
    """

    def __init__(
        self,
        config: PoolConfig,
        *,
        image_size: int,
        num_outputs: int,
        channels: int = 3,
        seed: int = 0,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        arithmetic: Arithmetic = PLAIN,
    ) -> None:
        self.config = config
        self._shape = {"image_size": image_size, "num_outputs": num_outputs, "channels": channels}
        self.seed, self.device, self._dtype = seed, device, dtype
        self.lr = config.lr
        self._in_place = False
        self.settles_late = device.type == "cuda"
        """Whether a step does not wait for its outcome."""
        self.unsettled: Trained | None = None
        self.slots = [Slot(number, self) for number in range(config.size)]
        # Shared by all networks, so that each is compiled once.
        self.at_rest = arithmetic.at_rest(self.slots[0].network, head=False)
        self.training_loss = arithmetic.training(self.slots[0].network)

    def fresh(self, number: int, generation: int) -> tuple[Network, torch.optim.Optimizer]:
        """Return untrained network number `generation` of a slot, and its optimiser."""
        seed = derive(self.seed, "network", number, generation)
        network = place(
            build(self.config.model, **self._shape, seed=seed), self.device, self._dtype
        )
        # What the network's own code has frozen stays as it is.
        trained = [p for p in network.parameters() if p.requires_grad]
        network.eval().requires_grad_(False)
        return network, self.make_optimizer(trained)

    def make_optimizer(self, trained: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return what trains the parameters of a network; a subclass may take another optimiser."""
        return torch.optim.SGD(
            trained,
            lr=self.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
            fused=True,
        )

    def lower_rate(self, x_syn: Tensor) -> None:
        """Give all networks, which are untrained, a rate that their heads can bear on `x_syn`.

        It is the one of the settings where that is low enough; else a warning says both.
        """
        rate = stable_rate(
            self.slots[0].network,
            x_syn.detach(),
            num_outputs=self._shape["num_outputs"],
            rate=self.config.lr,
            momentum=self.config.momentum,
        )
        if rate < self.lr:
            warnings.warn(
                f"distill: with {self._shape['num_outputs']} outputs of "
                f"{self.slots[0].network.feature_dim} features pool.lr {self.config.lr:g} is more "
                f"than half of what the head can bear; it is {rate:g} in this run",
                stacklevel=2,
            )
            self._set_rate(rate)

    def _set_rate(self, rate: float) -> None:
        self.lr = rate
        for slot in self.slots:
            for group in slot.optimizer.param_groups:
                set_rate(group, rate)

    def starting_ages(self, generator: torch.Generator) -> list[int]:
        """Draw for each slot the number of SGD steps of its start, in [1, T)."""
        size = (self.config.size,)
        return torch.randint(1, self.config.online_steps, size, generator=generator).tolist()

    def draw(self, generator: torch.Generator) -> Slot:
        """Draw a slot uniformly."""
        return self.slots[int(torch.randint(len(self.slots), (), generator=generator))]

    def advance(self, slot: Slot, x_syn: Tensor, y_syn: Tensor) -> None:
        """Make one SGD step of the slot's network, or renew it if it has had all its steps."""
        self.settle()
        if self.is_due(slot):
            self.renew(slot)
        else:
            self.fit(slot, x_syn, y_syn)

    def is_due(self, slot: Slot) -> bool:
        """Return whether the slot gets a fresh network where others get an SGD step.

        By the released code's rule it is renewed at every visit once it was full.
        """
        spent = self.config.reset == "released" and slot.generation > 0
        return spent or slot.age >= self.config.online_steps

    def renew(self, slot: Slot) -> None:
        """Give the slot its next network, untrained."""
        slot.full_lives += slot.age >= self.config.online_steps
        slot.generation += 1
        self._restart(slot)

    def fit(self, slot: Slot, x_syn: Tensor, y_syn: Tensor) -> None:
        """Make one SGD step of the slot's network; if it diverges, start it again.

        On a GPU that is done by the next `settle`.

        Raises:
            NonFiniteError: The images or targets hold NaN or infinity, or no rate is low enough.
        """
        self.settle()
        loss = slot.fit(x_syn, y_syn)
        self.unsettled = Trained(slot, loss, is_well(loss, y_syn), x_syn, y_syn)
        if not self.settles_late:
            self.settle()

    def settle(self) -> None:
        """Read how the last SGD step went; if its network diverged, start it again.

        Nothing depends on when it is called, if it is before the pool or its networks are used. The
        later it is, the less the host waits for the device, and the device for the host.

        Raises:
            NonFiniteError: As of `fit`.
        """
        last, self.unsettled = self.unsettled, None
        if last is not None and not last.is_well:
            message = f"the network's own loss is {last.loss.item()}; lower pool.lr"
            self.start_again(last.slot, NonFiniteError(message), last.x_syn, last.y_syn)

    def start_again(
        self, slot: Slot, error: NonFiniteError, *given: Tensor, also: Sequence[Slot] = ()
    ) -> None:
        """Give a slot an untrained network after its training diverged.

        The rate is one that the head can bear (`lower_rate`); the layers below may still need a
        lower one. It is halved for the whole pool, and only when a network diverged, which then
        starts again. A rate that was right for as many networks as there are slots stays: else a
        long run, where some network diverges now and then, would end with no rate at all. There the
        slot gets its next network, as the same one would go the same way at the same rate.

        Args:
            slot: The slot.
            error: What told of it; raised if the network is not to blame: an untrained one, or
                `given` is not finite; or if no rate is low enough.
            given: What the network or its loss was computed from.
            also: Slots that diverged at the same rate, which start again with it.
        """
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in given)
        if not finite or slot.age == 0:
            raise error
        stood = sum(other.full_lives for other in self.slots)
        if stood < len(self.slots):
            if self.lr <= self.config.lr / 2**MOST_HALVINGS:
                text = str(error)
                hint = "" if "pool.lr" in text else "; the network has diverged: lower pool.lr"
                raise NonFiniteError(f"{text}{hint}") from error
            self.lr /= 2
            now = f"it starts again, and the whole pool's rate is now {self.lr:g}"
        else:
            for one in (slot, *also):
                one.generation += 1
            now = (
                "the next network takes its place, and the pool's rate stays "
                f"{self.lr:g}: {stood} networks had all their steps at it"
            )
        with_it = "".join(f" and {one.number}" for one in also)
        warnings.warn(
            f"distill: pool network {slot.number}{with_it} diverged after {slot.age} SGD steps on "
            f"{len(given[0])} images; {now} (pool.lr is {self.config.lr:g})",
            stacklevel=3,
        )
        for other in self.slots:
            other.full_lives = 0
        self._set_rate(self.lr)
        for one in (slot, *also):
            self._restart(one)

    def _restart(self, slot: Slot) -> None:
        """Give a slot the untrained network of its generation."""
        network, optimizer = self.fresh(slot.number, slot.generation)
        if self._in_place:
            slot.network.load_state_dict(network.state_dict())
            for kept in slot.optimizer.state.values():
                kept["momentum_buffer"].zero_()
        else:
            slot.network, slot.optimizer = network, optimizer
        slot.age = 0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Write networks that are renewed over those before them, as long as this lasts.

        Momentum that is zero stands for none, as a fresh optimiser has it: that changes no bit.

        Raises:
            TypeError: The optimisers are not SGD.
        """
        for slot in self.slots:
            if not isinstance(slot.optimizer, torch.optim.SGD):
                raise TypeError("Pool.in_place: the optimisers must be SGD")
            for group in slot.optimizer.param_groups:
                for parameter in group["params"]:
                    state = slot.optimizer.state[parameter]
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
        self._in_place = True
        try:
            yield
        finally:
            self._in_place = False

    def state_dict(self) -> list[dict[str, Any]]:
        """Return everything that changes, slot by slot."""
        self.settle()
        return [
            {
                "age": slot.age,
                "generation": slot.generation,
                "full_lives": slot.full_lives,
                "network": dict(slot.network.state_dict()),
                "optimizer": plain_state(slot.optimizer, self.lr),
            }
            for slot in self.slots
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take up what `state_dict` gave."""
        self.unsettled = None
        for slot, saved in zip(self.slots, state, strict=True):
            slot.age, slot.generation = saved["age"], saved["generation"]
            slot.full_lives = saved.get("full_lives", 0)  # checkpoints of earlier versions lack it
            slot.network.load_state_dict(saved["network"])
            # The optimizer would keep the very tensors of the dict, and change them.
            slot.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        self.lr = self.slots[0].optimizer.param_groups[0]["lr"]
