"""Random generators: the same draws inside, nothing moved outside, and unused devices left alone."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gns.probing import randomness
from gns.probing.randomness import RandomState, mixed, seeded


def draws() -> tuple[list[float], list[float], float]:
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


class Device:
    """Stands for torch.cuda: generators that count."""

    def __init__(self, *, used: bool):
        self.used, self.states, self.seeds = used, [torch.tensor([7]), torch.tensor([8])], []

    def is_initialized(self) -> bool:
        return self.used

    def get_rng_state_all(self) -> list[torch.Tensor]:
        assert self.used, "asking would start it"
        return [s.clone() for s in self.states]

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        self.states = [s.clone() for s in states]

    def manual_seed_all(self, seed: int) -> None:
        self.seeds.append(seed)
        self.states = [torch.tensor([seed]) for _ in self.states]


def test_same_seed_same_draws_and_nothing_moved_outside():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    wanted = draws()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    found = []
    for seed in (5, 5, 6):
        with seeded(seed):
            found.append(draws())
    assert draws() == wanted
    torch.rand(1), np.random.rand(1), random.random()  # where they stand before does not matter
    with seeded(5):
        found.append(draws())
    first, second, other, later = found
    assert first == second == later and all(a != b for a, b in zip(first, other, strict=True))


def test_put_back_after_an_exception():
    torch.manual_seed(2)
    before = RandomState.now()
    with pytest.raises(KeyboardInterrupt), seeded(3):
        draws()
        raise KeyboardInterrupt
    assert RandomState.now().same(before)


@pytest.mark.parametrize("name", ["torch", "numpy", "python"])
def test_same_tells_a_draw(name):
    before = RandomState.now()
    {"torch": lambda: torch.rand(1), "numpy": lambda: np.random.rand(1), "python": random.random}[name]()
    assert not RandomState.now().same(before)


def test_the_seed_that_waits_for_an_unused_device_stays(monkeypatch):
    """`torch.manual_seed` queues a seed for CUDA's first use; a reading before that must not replace it."""
    if torch.cuda.is_initialized():
        pytest.skip("CUDA was used in this process")
    torch.manual_seed(11)
    queued = [torch.cuda._lazy_seed_tracker.manual_seed_all_cb[0]]
    with seeded(5):
        draws()
    assert [torch.cuda._lazy_seed_tracker.manual_seed_all_cb[0]] == queued
    torch.manual_seed(12)  # the control: it does replace it
    assert [torch.cuda._lazy_seed_tracker.manual_seed_all_cb[0]] != queued


@pytest.mark.parametrize("used", [True, False])
def test_used_devices_alone_are_seeded_and_put_back(monkeypatch, used):
    device = Device(used=used)
    monkeypatch.setattr(randomness, "torch", Torch(cuda=device, xpu=Device(used=False)))
    with seeded(5) as at:
        assert device.seeds == [5] * used
        assert [len(states) for _, states in at.devices] == [2] * used
    assert [int(s) for s in device.states] == [7, 8]


@pytest.mark.parametrize("kind", ["mtia", "npu"])
def test_devices_of_all_kinds_are_seeded_and_put_back(monkeypatch, kind):
    """What `torch.manual_seed` seeds, those of a vendor's own module among them: dropout draws from it."""
    device, names = Device(used=True), SimpleNamespace(_get_privateuse1_backend_name=lambda: "npu")
    monkeypatch.setattr(randomness, "torch", Torch(_C=names, **{kind: device}))
    with seeded(5):
        assert device.seeds == [5]
    assert [int(s) for s in device.states] == [7, 8]


def test_a_vendors_module_that_cannot_be_put_back_is_left_alone(monkeypatch):
    names, bare = SimpleNamespace(_get_privateuse1_backend_name=lambda: "npu"), SimpleNamespace()
    monkeypatch.setattr(randomness, "torch", Torch(_C=names, npu=bare))
    with seeded(5) as at:
        assert at.devices == ()


@pytest.mark.parametrize("forked", [False, True])
def test_apples_generator_is_seeded_and_put_back(monkeypatch, forked):
    state = {"at": torch.tensor([4])}
    mps = SimpleNamespace(
        get_rng_state=lambda: state["at"].clone(),
        set_rng_state=lambda s: state.update(at=s),
        manual_seed=lambda seed: state.update(at=torch.tensor([seed])),
        _is_in_bad_fork=lambda: forked,
    )
    backends = SimpleNamespace(mps=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(
        randomness,
        "torch",
        Torch(mps=mps, backends=backends, cuda=Device(used=False), xpu=Device(used=False)),
    )
    with seeded(9) as at:
        assert int(state["at"]) == (4 if forked else 9)
        if not forked:
            state["at"] = torch.tensor([10])
            assert not RandomState.now().same(at)
    assert int(state["at"]) == 4


class Torch:
    """torch with some modules replaced."""

    def __init__(self, **replaced):
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(torch, name)


def test_seeds_are_mixed_to_32_bits():
    assert mixed(1, 2) == mixed(1, 2) != mixed(2, 1)
    assert 0 <= mixed(2**63 - 1) < 2**32
