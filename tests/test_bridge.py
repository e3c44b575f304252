"""Where measurement and theory meet: a real LoRA layer at initialisation against the laws of `theory`.

The layer is `peft`'s, on a frozen linear base; factor A has orthonormal rows and factor B is zero, so only
B has a gradient, s·g·(A x)ᵀ. Each optimizer step of learning rate 0 is one data set. False-alarm rate of the
family: see `theory.verdict`.
"""

import math

import numpy as np
import peft
import pytest
import torch
from scipy import stats

from gns.estimate import estimate
from gns.monitor import GNSMonitor
from theory.laws import LemmaLaw, lora_null_factor, signal_b_simple
from theory.verdict import Estimate, alarm_level


class Base(torch.nn.Module):
    """One frozen linear layer that predicts zero."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.linear = torch.nn.Linear(d_in, d_out, bias=False, dtype=torch.float64)
        torch.nn.init.zeros_(self.linear.weight)

    def forward(self, x):
        return self.linear(x)


def lora_at_initialisation(basis, d_out):
    """A `peft` LoRA layer whose factor A has the rows of `basis`, [r, d_in]."""
    r, d_in = basis.shape
    model = peft.get_peft_model(
        Base(d_in, d_out), peft.LoraConfig(r=r, lora_alpha=r, target_modules=["linear"])
    )
    with torch.no_grad():
        model.base_model.model.linear.lora_A["default"].weight = torch.nn.Parameter(basis.clone())
    return model.double()


def orthonormal(d, r, generator):
    """[d, r] with orthonormal columns."""
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=generator))[0]


def measure(model, data_sets):
    """One step of learning rate 0 a data set (x, y), loss ½ mean |f(x) − y|²."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with GNSMonitor(model, weights="equal", on_error="raise") as monitor:
        for x, y in data_sets:
            optimizer.zero_grad()
            (0.5 * (model(x) - y).square().sum(-1).mean()).backward()
            optimizer.step()
        return monitor.history


def lemma_plugins(r, n, d_out, count, seed, d_in=24):
    """The measured plug-in of `count` data sets of the lemma's model: x̃ = Ux, y = ±1 independent, A = Uᵀ."""
    generator = torch.Generator().manual_seed(seed)
    u = orthonormal(d_in, r, generator)
    model = lora_at_initialisation(u.T, d_out)

    def data():
        for _ in range(count):
            x = torch.randn(n, r, dtype=torch.float64, generator=generator) @ u.T
            yield x, 2.0 * torch.randint(0, 2, (n, d_out), generator=generator).double() - 1

    steps = measure(model, data())
    assert all(s.reason is None and s.n_examples == n for s in steps)
    assert all(s.groups["A"].mean_sq_norm == 0 for s in steps)
    return np.array([s.b_simple_plugin for s in steps])


@pytest.mark.parametrize("r, n", [(8, 20), (16, 12)])
def test_the_measured_plug_in_follows_the_f_law_of_lemma_4_1(r, n):
    found = lemma_plugins(r, n, d_out=1, count=1500, seed=r)
    law = LemmaLaw(r, n)
    assert stats.kstest(found, law.cdf).pvalue > alarm_level()
    mean = Estimate(found.mean(), found.std(ddof=1) / math.sqrt(len(found)), len(found))
    assert mean.agrees(law.mean)
    wrong = LemmaLaw(r / 2, n)  # control: a law of another rank must be rejected at this sample size
    assert stats.kstest(found, wrong.cdf).pvalue < alarm_level()


def test_with_several_outputs_the_mean_follows_the_law_of_all_dimensions_of_b():
    r, d_out, n = 4, 3, 400
    found = lemma_plugins(r, n, d_out, count=400, seed=3)
    mean = Estimate(found.mean(), found.std(ddof=1) / math.sqrt(len(found)), len(found))
    # asymptotic in N: at N = 400 the law is off by O(1/N), far below the standard error
    assert mean.se > 2 * mean.value / n
    assert mean.agrees(n * lora_null_factor(r, d_out))
    assert not mean.agrees(n * lora_null_factor(r, 1))  # control: the lemma's own r − 2


def test_with_signal_the_unbiased_noise_scale_follows_the_signal_law():
    r, n, snr, count = 8, 16, 0.5, 1500
    generator = torch.Generator().manual_seed(1)
    u = orthonormal(24, r, generator)
    w = torch.randn(r, dtype=torch.float64, generator=generator)
    w *= math.sqrt(snr) / w.norm()

    def data():
        for _ in range(count):
            x = torch.randn(n, r, dtype=torch.float64, generator=generator)
            yield x @ u.T, (x @ w)[:, None] + torch.randn(n, 1, dtype=torch.float64, generator=generator)

    steps = measure(lora_at_initialisation(u.T, 1), data())
    truth = signal_b_simple(r, snr)
    assert truth == r * (1 + 1 / snr) + 1
    found = estimate(steps, level=1 - alarm_level())
    assert found.status == "measured" and found.low < truth < found.high
    assert found.high < 1.5 * found.low  # tight enough to mean something
    assert not found.low < r * (1 + 1 / snr) * 2 < found.high  # control
    assert not found.low < r < found.high  # control: the zero-signal reading of the lemma at this n
    plugin = np.mean([s.b_simple_plugin for s in steps])
    assert plugin < n * 1.5 < truth  # a step's plug-in saturates at the step's n
