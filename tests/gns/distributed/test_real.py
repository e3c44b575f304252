"""A LoRA Llama under DDP, accelerate and the Trainer: the readings are those of one process."""

from __future__ import annotations

import pytest
import torch

from tests.gns.distributed import real
from tests.gns.small_models import lora
from tests.reference.per_example import contributions, joint, trainable
from tests.reference.tolerances import close


def twin(size, accumulate, clip=None):
    """Each step's (n, tokens, Σa², m, q); a rank's loss is its tokens' mean, and ranks are averaged."""
    model = lora("llama", torch.float64)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    out = []
    for step in range(real.STEPS):
        losses, weights, count = [], [], 0
        for rank in range(size):
            for micro in range(accumulate):
                batch = real.batch(step, rank, micro)
                counts = (batch["labels"][:, 1:] != -100).sum(1)
                count += int(counts.sum())
                for i, t in enumerate(counts.tolist()):
                    share = t / int(counts.sum()) / size / accumulate
                    row = {k: v[i : i + 1] for k, v in batch.items()}
                    weights.append(share)
                    losses.append(
                        lambda row=row, a=share, t=t: model(**row).loss * a if t else _nothing(model)
                    )
        cs = contributions(parameters, losses)
        out.append([len(cs), count, sum(w * w for w in weights), *joint(cs)])
        for name, p in parameters.items():
            p.grad = sum(c[name] for c in cs)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        optimizer.step()
    return out


def _nothing(model):
    """A row without labels: its loss would be 0/0."""
    return sum(p.sum() for p in trainable(model).values()) * 0


def check(found, expected):
    for each in found:
        assert each["share"] == [1.0, 28, None] and not each["warnings"]
        assert all(reason is None for _, _, reason, *_ in each["steps"])
        close([[n, *rest] for _, n, _, *rest in each["steps"]], expected, rtol=1e-6)  # its norms are float32


def test_lora_ddp(found):
    check(found, twin(len(found), accumulate=1))


def test_lora_fsdp(found):
    check(found, twin(len(found), accumulate=1))


def test_lora_accelerate(found):
    check(found, twin(len(found), accumulate=2, clip=0.05))


def test_lora_trainer(found):
    """The same rows in one process, in batches as large as those of all ranks together."""
    alone = real.train_with_trainer(3 * len(found))
    assert len(alone["steps"]) == real.STEPS and alone["logged"] == found[0]["logged"] > 0
    for each in found:
        assert each["share"] == [1.0, 28, None] and each["unit"] == alone["unit"]
        for one, all_ranks in zip(alone["steps"], each["steps"], strict=True):
            assert one[:4] == all_ranks[:4] and one[2] is None
            close(all_ranks[4:], one[4:], torch.float32)


@pytest.mark.parametrize("scenario", ["lora_ddp", "lora_fsdp", "lora_accelerate", "lora_trainer"])
def test_every_rank_holds_the_same(ranks, scenario):
    assert all(rank[scenario]["steps"] == ranks[0][scenario]["steps"] for rank in ranks)
