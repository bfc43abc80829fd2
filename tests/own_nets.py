"""Networks as a user would write them, good and bad: the file that test_own_networks copies."""

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, image_size, num_outputs, channels):
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, num_outputs))
        self.conv = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def embed(self, x):
        return self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3)))

    def forward(self, x):
        return 2 * self.head(self.embed(x))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return F.log_softmax(self.fc(self.body(self.conv(x))), 1)


def sequential():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 7))


class Outer:
    class Inner(Net):
        pass


class Embeds(Plain):
    """No num_outputs: a linear layer is put on the features."""

    def embed(self, x):
        return self.conv(x)


class Frozen(Net):
    def __init__(self, image_size, num_outputs, channels):
        super().__init__(image_size, num_outputs, channels)
        self.conv.requires_grad_(False)


class Cube(Net):
    """A parameter of five dimensions."""

    def __init__(self, image_size, num_outputs, channels):
        super().__init__(image_size, num_outputs, channels)
        self.scale = nn.Parameter(torch.ones(1, 1, 1, 1, 1))


class Tokens(Embeds):
    def embed(self, x):
        return self.conv(x).flatten(2)


class Scalar(Embeds):
    def embed(self, x):
        return self.conv(x).mean()


class Pair(Embeds):
    def embed(self, x):
        return self.conv(x), x


class Half(Embeds):
    def embed(self, x):
        return self.conv(x).half()


class Random(Embeds):
    def embed(self, x):
        return F.dropout(self.conv(x))


class Detached(Embeds):
    def embed(self, x):
        return self.conv(x.detach())


class Two(Embeds):
    def embed(self, x, mask):
        return self.conv(x) * mask


class Wide(Net):
    def forward(self, x):
        return self.embed(x)


class NoForward(nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.fc = nn.Linear(3, num_outputs)

    def embed(self, x):
        return x.mean((2, 3))


class Layer(Plain):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 3, 1)


class Needs(Plain):
    def __init__(self, width):
        super().__init__()


class Breaks(Plain):
    def __init__(self):
        raise RuntimeError("no such\nweights")


class Empty(nn.Module):
    def embed(self, x):
        return x


class Unused(Plain):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(2, 2)


class AllFrozen(Embeds):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)

    def embed(self, x):
        return x


ONE = Net(8, 5, 3)
NUMBER = 3
_counter = iter(range(1000))


def same(num_outputs=5):
    return ONE


def drifting():
    network = Embeds()
    network.conv.weight.data.fill_(next(_counter))
    return network


def text():
    return "a network"
