"""Real batches: shuffled epochs as a function of the position, views, and the target's outputs."""

import pytest
import torch

from krrst_fast.data.augment import ViewConfig, draw_views
from krrst_fast.distill.source import Epochs, Source
from krrst_fast.runs.seeding import generator

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)


class Means:
    """Represents views by the means of their channels, and notes what it was asked for."""

    def find(self, view):
        self.seen = view
        return torch.arange(len(view.index))

    def __call__(self, found, batch):
        assert torch.equal(found, torch.arange(len(batch)))
        return batch.float().mean((2, 3))


class Live:
    """Represents views by a function of the batch."""

    def __init__(self, run):
        self.run = run

    def find(self, view):
        return view.index.new_empty(len(view.index), 0)

    def __call__(self, found, batch):
        assert found.shape == (len(batch), 0)
        return self.run(batch)


def _source(batch_size: int, represent, dtype: torch.dtype = torch.float32) -> Source:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (11, 3, 6, 6), generator=draw, dtype=torch.uint8)
    return Source(
        images=images,
        mean=MEAN,
        std=STD,
        view=ViewConfig(padding=2),
        represent=represent,
        epochs=Epochs(len(images), seed=3),
        batch_size=batch_size,
        dtype=dtype,
    )


@pytest.mark.parametrize("count, length", [(7, 3), (7, 7), (7, 20), (1, 4), (10, 5)])
def test_each_epoch_holds_every_image_once(count, length):
    epochs = Epochs(count, seed=0)
    stream = torch.cat([epochs.take(step * length, length) for step in range(count)])
    for epoch in stream.split(count):
        assert sorted(epoch.tolist()) == list(range(count))


def test_the_stream_depends_on_seed_and_position_alone():
    whole = Epochs(13, seed=5).take(0, 100)
    for start, length in [(0, 1), (12, 2), (25, 30), (90, 10)]:
        assert torch.equal(Epochs(13, seed=5).take(start, length), whole[start : start + length])
    assert not torch.equal(whole, Epochs(13, seed=6).take(0, 100))
    assert not torch.equal(whole[:13], whole[13:26])


def test_a_batch_larger_than_the_store_holds_every_image_about_equally_often():
    counts = Epochs(7, seed=0).take(3, 25).bincount(minlength=7)
    assert counts.min() >= 3 and counts.max() <= 5


@pytest.mark.parametrize("batch_size, dtype", [(4, torch.float32), (25, torch.float64)])
def test_a_batch_is_the_views_written_out_with_the_targets_outputs(batch_size, dtype):
    represent = Means()
    source = _source(batch_size, represent, dtype)
    batch, y_real = source.draw(2, generator(0, "test"))

    index = source.epochs.take(2 * batch_size, batch_size)
    _, offset, flip = draw_views(index, source.view, generator(0, "test"))
    for name, value in (("index", index), ("offset", offset), ("flip", flip)):
        assert torch.equal(getattr(represent.seen, name), value)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for row, (i, (dy, dx), flipped) in enumerate(zip(index, offset.tolist(), flip)):
        padded = torch.nn.functional.pad(source.images[i], (2, 2, 2, 2))
        crop = padded[:, dy : dy + 6, dx : dx + 6]
        crop = crop.flip(2) if flipped else crop
        expected = ((crop / 255 - mean) / std).to(dtype)
        torch.testing.assert_close(batch[row], expected, rtol=1e-6, atol=1e-6)
    assert batch.dtype == y_real.dtype == dtype
    torch.testing.assert_close(y_real, batch.mean((2, 3)), rtol=1e-5, atol=1e-6)


def test_drawing_leaves_the_images_and_the_global_generator_alone():
    source = _source(4, Means())
    images, state = source.images.clone(), torch.get_rng_state()
    source.draw(0, generator(0, "test"))
    assert torch.equal(source.images, images) and torch.equal(torch.get_rng_state(), state)
