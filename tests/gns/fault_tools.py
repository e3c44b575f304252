"""What the fault tests share: a small model, its data, one backward pass per example."""

from __future__ import annotations

import torch
from torch import nn

from gns.monitor import GNSWarning
from tests.reference.per_example import contributions, joint, trainable
from tests.reference.tolerances import close


def mlp():
    torch.manual_seed(20_260_212)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def draw(n=6, seed=1, dtype=torch.float64):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(model, x):
    return model(x).square().sum(-1).mean()


def truth(model, x, names=None):
    """(m, q) of what trains now, one backward pass per example."""
    one = lambda i: loss_of(model, x[i : i + 1]) / len(x)  # noqa: E731
    return joint(contributions(trainable(model), [lambda i=i: one(i) for i in range(len(x))]), names)


def agree(step, expected, rtol=None):
    assert step.reason is None
    close([step.mean_sq_norm, step.sq_norm_of_mean], expected, rtol=rtol, what=f"step {step.step}: (m, q)")


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr)


def go(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()


def warned(said, text):
    return [w for w in said if isinstance(w.message, GNSWarning) and text in str(w.message)]


class Boom(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise KeyError("the user's own")
