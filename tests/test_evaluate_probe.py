"""Probes against closed forms and scikit-learn; the draw of labels; batches; fine-tuning."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from torch import Tensor, nn

from krrst_fast.errors import DataError, NonFiniteError
from krrst_fast.evaluate.config import ProbeConfig
from krrst_fast.evaluate.labelled import draw_labelled
from krrst_fast.evaluate.probe import (
    accuracy,
    embed,
    probe_accuracy,
    ridge_scores,
    sgd_scores,
)
from krrst_fast.evaluate.sgd import batches, descend
from krrst_fast.runs.seeding import generator


def clusters(count: int, classes: int, dim: int, gap: float) -> tuple[Tensor, Tensor]:
    """Gaussian clusters whose centres are `gap` apart: features [count, dim], labels [count]."""
    draw = generator(0, "clusters")
    labels = torch.arange(count) % classes
    centres = torch.linalg.qr(torch.randn(dim, classes, generator=draw))[0].T * gap
    return centres[labels] + torch.randn(count, dim, generator=draw), labels


@pytest.mark.parametrize("count, dim", [(20, 97), (200, 31), (31, 31)])
def test_ridge_scores_equal_the_numpy_closed_form(count: int, dim: int) -> None:
    train, labels = clusters(count, 5, dim, 3.0)
    test, _ = clusters(57, 5, dim, 3.0)
    got = ridge_scores(train, labels, test, 5, ridge=0.03)

    x, t, y = (value.double().numpy() for value in (train, test, torch.eye(5)[labels]))
    centre, prior = x.mean(0), y.mean(0)
    k = (x - centre) @ (x - centre).T
    alpha = np.linalg.solve(k + 0.03 * np.diag(k).mean() * np.eye(count), y - prior)
    want = (t - centre) @ (x - centre).T @ alpha + prior
    assert np.abs(got.numpy() - want).max() < 1e-4 * np.abs(want).max()


def test_ridge_probe_names_the_classes_scikit_learn_names() -> None:
    train, labels = clusters(60, 4, 50, 2.0)
    test, _ = clusters(300, 4, 50, 2.0)
    centred = train - train.mean(0)
    absolute = 0.1 * centred.square().sum(1).mean().item()
    peer = RidgeClassifier(alpha=absolute).fit(train.numpy(), labels.numpy())
    ours = ridge_scores(train, labels, test, 4, ridge=0.1)
    # scikit-learn codes labels as -1 and 1, so its scores are 2 s - 1.
    assert np.abs((2 * ours - 1).numpy() - peer.decision_function(test.numpy())).max() < 1e-4
    assert (ours.argmax(1).numpy() == peer.predict(test.numpy())).all()


def test_ridge_probe_does_not_depend_on_scale_or_shift() -> None:
    train, labels = clusters(20, 10, 40, 4.0)
    test, _ = clusters(50, 10, 40, 4.0)
    plain = ridge_scores(train, labels, test, 10, ridge=0.1)
    moved = ridge_scores(1000 * train + 7, labels, 1000 * test + 7, 10, ridge=0.1)
    assert (plain - moved).abs().max() < 1e-4


def test_sgd_probe_reaches_the_closed_forms_accuracy_on_separable_data() -> None:
    train, labels = clusters(400, 5, 20, 6.0)
    test, test_labels = clusters(999, 5, 20, 6.0)
    given = (train, labels, test, test_labels, 5)
    closed = probe_accuracy(*given, ProbeConfig(solver="ridge"), seed=0)
    ticks: list[int] = []
    config = ProbeConfig(solver="sgd", steps=300, batch_size=64)
    sgd = probe_accuracy(*given, config, seed=0, tick=lambda: ticks.append(1))
    assert closed > 99
    assert abs(sgd - closed) < 0.5
    assert len(ticks) == 300


def test_sgd_probe_approaches_the_minimum_of_the_cross_entropy() -> None:
    train, labels = clusters(60, 3, 5, 1.0)
    config = ProbeConfig(steps=1500, batch_size=60, lr=0.2)
    scores = sgd_scores(train, labels, train, 3, config, seed=0)
    reached = nn.functional.cross_entropy(scores, labels).item()

    layer = nn.Linear(5, 3).double()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(train.double()), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert reached == pytest.approx(closure().item(), abs=1e-4)


def test_accuracy_is_in_per_cent() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    assert accuracy(scores, torch.tensor([0, 1, 1])) == pytest.approx(200 / 3)


def test_labelled_images_are_drawn_evenly_and_by_seed() -> None:
    labels = torch.arange(90) % 3
    first = draw_labelled(labels, 3, 7, seed=0, where="store")
    assert labels[first].bincount().tolist() == [7, 7, 7]
    assert (first.diff() > 0).all()
    assert torch.equal(first, draw_labelled(labels, 3, 7, seed=0, where="store"))
    assert not torch.equal(first, draw_labelled(labels, 3, 7, seed=1, where="store"))
    assert torch.equal(draw_labelled(labels, 3, "all", seed=0, where="store"), torch.arange(90))


def test_too_few_labels_of_a_class() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1])
    only_two = (
        "digits: class 1 has only 2 labelled training images, and labels 3 needs 3 of each class"
    )
    with pytest.raises(DataError, match=only_two):
        draw_labelled(labels, 2, 3, seed=0, where="digits")


@pytest.mark.parametrize("count, batch_size", [(7, 3), (30, 256), (1, 1), (13, 13)])
def test_batches_are_of_one_size_and_even(count: int, batch_size: int) -> None:
    drawn = list(batches(count, batch_size, 40, generator(3)))
    assert len(drawn) == 40
    assert {len(index) for index in drawn} == {min(count, batch_size)}
    times = torch.cat(drawn).bincount(minlength=count)
    assert times.max() - times.min() <= 1


def test_descend_is_sgd_with_cosine_decay() -> None:
    """Ten steps on a quadratic, against the update rule written out."""
    x = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    order = [torch.tensor([0])] * 10
    last = descend(
        [x],
        lambda index: (x**2).sum() / 2,
        order,
        steps=10,
        lr=0.3,
        momentum=0.8,
        weight_decay=0.1,
        cosine=True,
        what="test",
    )
    w, v, loss = np.array([2.0, -1.0]), np.zeros(2), 0.0
    for step in range(10):
        loss = (w**2).sum() / 2
        v = 0.8 * v + w + 0.1 * w
        w = w - 0.3 * (1 + np.cos(np.pi * step / 10)) / 2 * v
    assert np.abs(x.detach().numpy() - w).max() < 1e-12
    assert last == pytest.approx(loss)


def test_diverged_training_is_one_clear_line() -> None:
    x = torch.ones(1, requires_grad=True)
    order = [torch.tensor([0])] * 60
    with pytest.raises(NonFiniteError, match="pretrain: the loss is .* lower the rate"):
        descend([x], lambda index: (x**4).sum(), order, steps=60, lr=10.0, what="pretrain")


class _Mean(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def embed(self, x: Tensor) -> Tensor:
        return self.factor * x.mean((2, 3))


def test_embed_normalises_and_keeps_the_order() -> None:
    images = torch.arange(600).view(600, 1, 1, 1).expand(600, 3, 2, 2) % 256
    index = torch.arange(599, -1, -2)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    got = embed(_Mean(1.0), images.to(torch.uint8).contiguous(), index, mean=mean, std=std)
    want = ((index % 256)[:, None] / 255 - torch.tensor(mean)) / torch.tensor(std)
    assert (got - want).abs().max() < 1e-6


def test_features_that_are_not_finite_are_refused() -> None:
    images = torch.ones(4, 3, 2, 2, dtype=torch.uint8)
    unit = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    with pytest.raises(NonFiniteError, match="the features hold NaN or infinity"):
        embed(_Mean(float("nan")), images, torch.arange(4), **unit)
