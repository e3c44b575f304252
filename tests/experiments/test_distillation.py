"""Both losses against numpy; who is no teacher."""

import numpy as np
import pytest
import torch

from experiments.configs import RunError
from experiments.distillation import Pair, losses, same_tokenizer
from gns.finetuning.data import NO_LOSS, Row, encode_texts
from tests.gns import tiny


def test_both_losses_against_numpy(seed):
    mine, theirs = torch.randn(2, 5, 7), 3 * torch.randn(2, 5, 7)
    labels = torch.randint(7, (2, 5))
    labels[0, 2:4] = NO_LOSS
    found = losses(mine, theirs, labels)
    divergence = text = 0.0
    for b in range(2):
        for t in range(1, 5):
            if labels[b, t] == NO_LOSS:
                continue
            q, p = (np.exp(x[b, t - 1].double().numpy()) for x in (mine, theirs))
            q, p = q / q.sum(), p / p.sum()
            divergence += (p * np.log(p / q)).sum()
            text -= np.log(q[labels[b, t]])
    assert float(found.divergence) == pytest.approx(divergence, rel=1e-5)
    assert float(found.text) == pytest.approx(text, rel=1e-5)
    alike = losses(mine, mine + 4, labels)
    assert float(alike.divergence) == pytest.approx(0, abs=1e-5)


def test_a_teacher_with_another_tokenizer_is_named():
    mine = tiny.tokenizer()
    same_tokenizer(mine, tiny.tokenizer(), ("a", "b"))
    other = tiny.tokenizer()
    other.add_tokens(["<odd>"])
    with pytest.raises(RunError, match="teacher b has another tokenizer than base a: 1 of 320 .* '<odd>'"):
        same_tokenizer(mine, other, ("a", "b"))


def test_vocabularies_padded_to_different_lengths_are_no_obstacle():
    tokenizer, student, teacher = tiny.tokenizer(), tiny.llama(), tiny.llama(1)
    teacher.resize_token_embeddings(352, mean_resizing=False)
    rows = list(encode_texts(tiny.sentences(5), tokenizer, max_length=40, source="test").rows)
    pair = Pair(student, teacher, tokenizer, torch.device("cpu"))
    with torch.no_grad():
        found, tokens = pair.sums(rows)
    assert tokens == sum(len(row.labels) - 1 for row in rows) and float(found.divergence) > 0
    means = pair.measured(rows, 2)
    assert means["divergence"] == pytest.approx(float(found.divergence) / tokens, rel=1e-4)
    assert means["text"] == pytest.approx(float(found.text) / tokens, rel=1e-4)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_masked_tokens_have_no_loss():
    pair = Pair(tiny.llama(), tiny.llama(1), tiny.tokenizer(), torch.device("cpu"))
    row = Row([2, 5, 9, 7], [NO_LOSS, NO_LOSS, 9, 7])
    found, tokens = pair.sums([row])
    longer, more = pair.sums([row, Row([2, 5, 9, 7, 3], [NO_LOSS] * 5)])
    assert tokens == more == 2
    assert longer.text.item() == pytest.approx(found.text.item(), rel=1e-5)
