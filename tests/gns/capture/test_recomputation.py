"""Recomputations inside backward repeat what their forward pass was: training goes on, sums stay right."""

import contextlib
import copy

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gns.monitor import GNSMonitor, GNSWarning
from gns.reasons import MIXED
from gns.taps import Tap
from tests.gns import small_models
from tests.gns.small_models import FAMILIES, tokens
from tests.reference.per_example import contributions, joint, trainable
from tests.reference.tolerances import close

WIDTH = 32  # of the small models: 4 rows of 8 tokens have as many places as a factor A has inputs


def dora(seed=0):
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(FAMILIES["llama"](use_cache=False), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.train()


def checkpointed(model, reentrant):
    if reentrant is not None:
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if reentrant:
            model.enable_input_require_grads()
    return model


def trained(model, sizes, monitor=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for k, n in enumerate(sizes):
        model(**tokens(n, t=8, seed=k)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)`:FutureWarning"
)
@pytest.mark.filterwarnings("ignore::gns.notices.GNSWarning")  # a layer that is taken for one used twice
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("sizes", [[4, 4, 3, 4], [3, 4, 2, 4], [4, 4, 4, 4]], ids=str)
def test_dora_whose_identity_looks_like_folded_rows(sizes, reentrant):
    """peft calls factor A on the identity of its inputs: [32, 32], as 4 rows of 8 tokens fold to 32."""
    assert 4 * 8 == WIDTH == small_models.SHAPE["hidden_size"]
    plain = trained(checkpointed(dora(), reentrant), sizes)
    model = checkpointed(dora(), reentrant)
    with GNSMonitor(model, on_error="raise") as monitor:
        trained(model, sizes)
    assert monitor.coverage().share == 1 and not monitor.coverage().unmeasured
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    at = copy.deepcopy(dora())
    trained(at, sizes[:-1])
    batch = tokens(sizes[-1], t=8, seed=len(sizes) - 1)
    total = (batch["labels"][:, 1:] != -100).sum()

    def of(i):
        kept = batch["labels"].clone()
        kept[torch.arange(len(kept)) != i] = -100
        n = (kept[:, 1:] != -100).sum()
        return lambda: at(**batch | {"labels": kept}).loss * (n / total) if n else 0 * at(**batch).loss

    m, q = joint(contributions(trainable(at), [of(i) for i in range(sizes[-1])]))
    last = monitor.history[-1]
    assert last.usable
    close([last.mean_sq_norm, last.sq_norm_of_mean], [m, q], dtype=torch.float32)


def ends_alike(make, loop, **options):
    """Whether a model ends a loop with the weights that it has unwatched, and that it ends at all."""
    made = []
    for watched in (False, True):
        torch.manual_seed(0)
        net = make()
        with GNSMonitor(net, on_error="raise", **options) if watched else contextlib.nullcontext():
            loop(net)
        made.append(net.parameters())
    return all(torch.equal(a, b) for a, b in zip(*made, strict=True))


class Twice(nn.Module):
    """A layer used twice, each use in a checkpoint of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        for _ in range(2):
            x = checkpoint(lambda y: torch.tanh(self.inner(y)), x, use_reentrant=False)
        return self.out(x)


@pytest.mark.filterwarnings("ignore:optimizer step 0:gns.notices.GNSWarning")  # its uses are not joined yet
def test_an_error_of_ours_leaves_recomputations_as_they_were(monkeypatch):
    torch.manual_seed(0)
    model = Twice()
    plain = copy.deepcopy(model)
    data = [torch.randn(4, 6) for _ in range(6)]

    def broken(*args):
        raise MemoryError("planted")

    def run(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for k, x in enumerate(data):
            if k == 3 and net is model:
                monkeypatch.setattr(Tap, "sq_norms", broken)
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    run(plain)
    with pytest.warns(GNSWarning, match="stands down.*planted"), GNSMonitor(model) as monitor:
        run(model)
    assert monitor.coverage().stopped == "MemoryError: planted"
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


class ActorCritic(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.trunk, self.actor, self.critic = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 1)
        self.reentrant = reentrant

    def forward(self, x):
        h = checkpoint(lambda y: torch.tanh(self.trunk(y)), x, use_reentrant=self.reentrant)
        return self.actor(h), self.critic(h.detach())


@pytest.mark.filterwarnings("ignore::gns.notices.GNSWarning")
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_step_that_closes_between_a_forward_and_its_backward(every):
    """Two optimizers on one forward pass: whether a step is measured changes under the second loss."""

    def loop(net):
        first = torch.optim.SGD(net.critic.parameters(), lr=0.01)
        second = torch.optim.SGD([*net.trunk.parameters(), *net.actor.parameters()], lr=0.01)
        for _ in range(6):
            policy, value = net(torch.randn(4, 5, dtype=torch.double))
            value.square().mean().backward()
            first.step()
            policy.square().sum(1).mean().backward()
            second.step()
            net.zero_grad()

    assert ends_alike(lambda: ActorCritic(reentrant=False).double(), loop, every=every)


class Folding(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(11, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.reentrant = reentrant

    def mlp(self, x):
        return torch.tanh(self.inner(x.reshape(-1, 5))).reshape(x.shape)

    def forward(self, input_ids):
        x = self.table(input_ids)
        x = self.mlp(x) if self.reentrant is None else checkpoint(self.mlp, x, use_reentrant=self.reentrant)
        return self.out(x)


@pytest.mark.filterwarnings("ignore::gns.notices.GNSWarning")
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("shapes", [[(4, 6), (3, 8)], [(3, 8), (4, 6)], [(4, 6), (4, 6)]], ids=str)
def test_batches_of_as_many_tokens_in_other_shapes(shapes, reentrant):
    """Under reentrant checkpointing nobody knows whose rows [24, 5] are; they were taken for the first's."""
    torch.manual_seed(0)
    model = Folding(reentrant).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with GNSMonitor(model, on_error="raise") as monitor:
        for _ in range(2):
            data = [torch.randint(0, 11, shape) for shape in shapes]
            at = copy.deepcopy(model)
            at.reentrant = None
            losses = [
                lambda r=x[i : i + 1], net=at: net(r).square().sum() for x in data for i in range(len(x))
            ]
            m, _ = joint(contributions(trainable(at), losses))
            sum(model(x).square().sum() for x in data).backward()
            optimizer.step()
            optimizer.zero_grad()
            step = monitor.latest
            if reentrant and len(set(shapes)) > 1:
                assert step.reason == MIXED
            else:
                assert step.usable and step.n_examples == sum(rows for rows, _ in shapes)
                close(step.mean_sq_norm, m, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore::gns.notices.GNSWarning")
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_loop_that_is_one_forward_pass_ahead(every, autocast):
    """Graphs of measured and other steps are pending together, of one shape: each is called again as it was.

    Its gradient does not need the weights, which a step changes in place: a single layer.
    """

    def loop(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        before = None
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = checkpoint(net, torch.randn(4, 5), use_reentrant=False)
            ahead = out.float().sum(1).square().sum()
            if before is not None:
                before.backward()
                optimizer.step()
                optimizer.zero_grad()
            before = ahead

    assert ends_alike(lambda: nn.Linear(5, 2), loop, every=every)


class Shared(nn.Module):
    """Two layers with one weight, whose uses meet; a part of the model is called by itself as well."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def part(self, x):
        return checkpoint(lambda y: self.second(torch.tanh(self.first(y))), x, use_reentrant=False)

    def forward(self, x):
        return self.out(self.part(x))


@pytest.mark.filterwarnings("ignore::gns.notices.GNSWarning")
@pytest.mark.parametrize("part_first", [True, False])
def test_a_part_of_the_model_that_is_called_by_itself(part_first):
    def loop(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(4):
            calls = [lambda: net(torch.randn(4, 6)), lambda: net.part(torch.randn(4, 6))]
            losses = [call().square().mean() for call in (calls[::-1] if part_first else calls)]
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert ends_alike(Shared, loop)
