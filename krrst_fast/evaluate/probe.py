"""Linear probes: frozen features, and a linear classifier on them."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from krrst_fast.data.augment import plain_views
from krrst_fast.errors import NonFiniteError
from krrst_fast.evaluate.config import ProbeConfig
from krrst_fast.evaluate.sgd import batches, descend
from krrst_fast.models import Network
from krrst_fast.ops.fit import krr_fit
from krrst_fast.ops.solver import DEFAULT, Solver
from krrst_fast.runs.environment import solving_device
from krrst_fast.runs.seeding import generator

_EMBED_BATCH = 512
LBFGS_STEPS = 1000
"""At most; L-BFGS ends before where the gradient vanishes."""
NEIGHBOURS = 20
TEMPERATURE = 0.07


class Embeds(Protocol):
    """A network with features."""

    def embed(self, x: Tensor) -> Tensor:
        """Return features [B, D] of images [B, 3, H, W]."""
        ...


def embed(
    net: Embeds,
    images: Tensor,
    index: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """Compute features [len(index), D] of the uint8 `images` [N, 3, H, W], un-augmented.

    The images are on the device of the network, and so are the features.

    Raises:
        NonFiniteError: A feature is NaN or infinite.
    """
    features = in_chunks(net.embed, images, index, mean=mean, std=std)
    if not bool(torch.isfinite(features).all()):
        raise NonFiniteError("the features hold NaN or infinity, so there is nothing to fit")
    return features


def embed_both(
    net: Network,
    images: Tensor,
    index: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """Compute features [len(index), D] and outputs [len(index), P], as `embed`."""
    width = 0

    def joined(x: Tensor) -> Tensor:
        nonlocal width
        features, outputs = net.both(x)
        width = features.shape[1]
        return torch.cat([features, outputs], 1)

    both = in_chunks(joined, images, index, mean=mean, std=std)
    if not bool(torch.isfinite(both).all()):
        raise NonFiniteError("the features hold NaN or infinity, so there is nothing to fit")
    return both[:, :width].contiguous(), both[:, width:].contiguous()


def in_chunks(
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    index: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """Compute `function` of the un-augmented images as in `embed`: [len(index), ...]."""
    parts = []
    with torch.no_grad():
        for rows in index.split(_EMBED_BATCH):
            parts.append(function(plain_views(images, rows.to(images.device), mean, std)))
    return torch.cat(parts)


def probe_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: int,
    config: ProbeConfig,
    *,
    seed: int,
    solver: Solver = DEFAULT,
    tick: Callable[[], object] | None = None,
) -> float:
    """Return the accuracy in per cent on `test` of a linear classifier fitted on `train`.

    Args:
        train: Features to fit [N, D].
        train_labels: Labels of these [N].
        test: Features to classify [T, D].
        test_labels: Labels of these [T].
        classes: Number of classes.
        config: Kind of probe and its settings.
        seed: Seed of the batch order ("sgd").
        solver: How the closed form is solved ("ridge").
        tick: Function to call after every SGD step, or once with another solver.

    Raises:
        NonFiniteError: The training of the classifier diverged.
    """
    if config.solver == "sgd":
        scores = sgd_scores(train, train_labels, test, classes, config, seed=seed, tick=tick)
        return accuracy(scores, test_labels)
    if config.solver == "lbfgs":
        scores = logistic_scores(train, train_labels, test, classes, config.penalty)
    else:
        solving = solving_device(train.device)
        scores = ridge_scores(
            train.to(solving),
            train_labels.to(solving),
            test.to(solving),
            classes,
            config.ridge,
            solver,
        ).to(train.device)
    if tick is not None:
        tick()
    return accuracy(scores, test_labels)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the per cent of rows of `scores` [T, classes] with the largest entry at the label."""
    return 100 * int((scores.argmax(1) == labels).sum()) / len(labels)


def ridge_scores(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    classes: int,
    ridge: float,
    solver: Solver = DEFAULT,
) -> Tensor:
    """Fit ridge regression to one-hot labels, intercept not penalised; return scores [T, classes].

    Features are centred by the training mean and not scaled one by one: a standard deviation of
    a feature over twenty images is mostly noise. `ridge` is a multiple of the mean diagonal of the
    centred gram, which makes the scores independent of the overall scale of the features.
    """
    centre = train.mean(0)
    one_hot = F.one_hot(labels, classes).to(train.dtype)
    prior = one_hot.mean(0)
    fit = krr_fit(
        train - centre, one_hot - prior, ridge=ridge, ridge_of="mean_diagonal", solver=solver
    )
    return fit.predict(test - centre) + prior


def sgd_scores(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    classes: int,
    config: ProbeConfig,
    *,
    seed: int,
    tick: Callable[[], object] | None = None,
) -> Tensor:
    """Train a linear layer by cross-entropy from zero weights; return scores [T, classes]."""
    weight = torch.zeros(classes, train.shape[1], device=train.device, requires_grad=True)
    bias = torch.zeros(classes, device=train.device, requires_grad=True)

    def loss_of(index: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(train[index], weight, bias), labels[index])

    descend(
        [weight, bias],
        loss_of,
        batches(len(train), config.batch_size, config.steps, generator(seed, "probe")),
        steps=config.steps,
        lr=config.lr,
        cosine=True,
        what="probe",
        tick=tick,
    )
    with torch.no_grad():
        return F.linear(test, weight, bias)


def logistic_scores(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, penalty: float
) -> Tensor:
    """Fit logistic regression by L-BFGS, intercept not penalised; return scores [T, classes].

    The features are standardised by mean and standard deviation of `train`, and one that is
    constant there is left at 0. Minimised is the sum of the cross-entropies + penalty / 2 |W|^2,
    the objective of scikit-learn's LogisticRegression(C=1 / penalty), from zero weights: there is
    one minimum, and nothing random.
    """
    centre, scale = train.mean(0), train.std(0, correction=0)
    # What rounding leaves of a constant is not its deviation.
    varies = scale > 1e-6 * train.abs().amax(0)
    scale = torch.where(varies, scale, torch.inf)
    x, count = (train - centre) / scale, len(train)
    weight = torch.zeros(classes, x.shape[1], device=x.device, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=LBFGS_STEPS,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels)
        # Of the mean, so that the tolerances do not depend on how many labels there are.
        loss = loss + penalty / (2 * count) * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return F.linear((test - centre) / scale, weight, bias)


def knn_scores(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Return votes [T, classes] of the 20 nearest rows of `train`, or of all where it has fewer.

    Nearness is the cosine s of the features, and a neighbour's vote weighs exp(s / 0.07), as in
    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR
    2018, and in the evaluation of DINO (Caron et al., ICCV 2021).
    """
    known, one_hot = F.normalize(train, dim=1), F.one_hot(labels, classes).to(train.dtype)
    votes = []
    for rows in F.normalize(test, dim=1).split(_EMBED_BATCH):
        near = (rows @ known.T).topk(min(NEIGHBOURS, len(train)), dim=1)
        weights = (near.values / TEMPERATURE).exp()
        votes.append((weights[:, :, None] * one_hot[near.indices]).sum(1))
    return torch.cat(votes)
