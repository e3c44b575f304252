"""Answers by greedy generation, many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.tasks.items import Item, prompt_ids
from gns.data import pad_id

AT_ONCE = 32  # prompts of a run, whichever engine asks


@torch.inference_mode()
def answers(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Continue each item's prompt by the likeliest token at every step, to the end token at the latest.

    The prompt is encoded exactly as it was for training. A plain loop, not `generate`: that adds what the
    model's `generation_config` holds (a repetition penalty, another end token), and greedy would mean another
    thing for every model.

    Args:
        model: causal language model that keeps a cache and takes `position_ids`; put back into its mode
            afterwards.
        tokenizer: of the model.
        items: what to answer; only their prompts are seen.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts at once; prompts of similar length go together.

    Returns:
        The text of each answer, in the order of the items, without special tokens.
    """
    prompts = [prompt_ids(item, tokenizer) for item in items]
    by_length = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    found = [""] * len(items)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(items), batch_size):
            chosen = by_length[start : start + batch_size]
            ids, mask = _left_padded([prompts[i] for i in chosen], pad_id(tokenizer))
            new = _greedy(model, ids.to(device), mask.to(device), tokenizer.eos_token_id, max_new_tokens)
            for i, answer in zip(chosen, new.tolist(), strict=True):
                found[i] = _text(answer, tokenizer)
    finally:
        model.train(was_training)
    return found


def _left_padded(prompts: Sequence[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """([B, T] token ids, [B, T] attention mask), each prompt at the right edge."""
    width = max(map(len, prompts))
    ids = [[fill] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _greedy(model: nn.Module, ids: Tensor, mask: Tensor, end: int | None, most: int) -> Tensor:
    """[B, at most `most`] new tokens; after its end token a row holds anything."""
    cache, new = None, []
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(most):
        # a padded token's position is of no account, but must be a legal one
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
        new.append(ids)
        done |= ids[:, 0] == (-1 if end is None else end)
        if done.all():
            break
    return torch.cat(new, 1)


def _text(ids: list[int], tokenizer: Any) -> str:
    """Decode up to the end token."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)
