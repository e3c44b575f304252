"""Answers by greedy generation, many prompts at once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.tasks.items import Item, prompt_ids
from gns.finetuning.data import pad_id

AT_ONCE = 32  # prompts of a run, whichever engine asks
FIRST = 32  # new tokens after which answers that have no end yet go on by themselves


@torch.inference_mode()
def answers(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    max_new_tokens: int,
    batch_size: int,
    together: int = 1,
) -> list[str]:
    """Continue each item's prompt by the likeliest token at every step, to the end token at the latest.

    The prompt is encoded exactly as it was for training. A plain loop, not `generate`: that adds what the
    model's `generation_config` holds (a repetition penalty, another end token), and greedy would mean another
    thing for every model. Answers that come to no end would keep all others of their batch waiting: after 32,
    64, 128, … new tokens those that are not at their end are gathered into batches of their own.

    Args:
        model: causal language model that keeps a cache and takes `position_ids`; put back into its mode
            afterwards.
        tokenizer: of the model.
        items: what to answer; only their prompts are seen.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts at once, a multiple of `together`; prompts of similar length go together.
        together: so many items in a row, of one prompt, are always in one batch, in their order.

    Returns:
        The text of each answer, in the order of the items, without special tokens.

    Raises:
        ValueError: `batch_size` is no multiple of `together`.
    """
    if batch_size % together:
        raise ValueError(f"batch_size is {batch_size}; it must be a multiple of together, {together}")
    prompts = [prompt_ids(item, tokenizer) for item in items]
    waiting = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    new: list[list[int]] = [[] for _ in items]
    end, device = tokenizer.eos_token_id, next(model.parameters()).device
    was_training, have = model.training, 0
    model.eval()
    try:
        while waiting and have < max_new_tokens:
            more = min(have or FIRST, max_new_tokens - have)
            for start in range(0, len(waiting), batch_size):
                chosen = waiting[start : start + batch_size]
                ids, mask = _left_padded([prompts[i] + new[i] for i in chosen], pad_id(tokenizer))
                done = torch.tensor([end in new[i] for i in chosen], device=device)
                made = _greedy(model, ids.to(device), mask.to(device), end, more, done)
                for i, tokens in zip(chosen, made.tolist(), strict=True):
                    new[i] += tokens
            have += more
            groups = (waiting[i : i + together] for i in range(0, len(waiting), together))
            waiting = [i for group in groups if any(end not in new[i] for i in group) for i in group]
    finally:
        model.train(was_training)
    return [_text(tokens, tokenizer) for tokens in new]


def _left_padded(prompts: Sequence[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """([B, T] token ids, [B, T] attention mask), each prompt at the right edge."""
    width = max(map(len, prompts))
    ids = [[fill] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _greedy(model: nn.Module, ids: Tensor, mask: Tensor, end: int | None, most: int, done: Tensor) -> Tensor:
    """[B, at most `most`] new tokens, fewer if all are done; after its end token a row holds anything."""
    cache, new = None, []
    last = {"logits_to_keep": 1} if _can_keep_the_last(model) else {}
    for _ in range(most):
        # a padded token's position is of no account, but must be a legal one
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last,
        )
        cache = out.past_key_values
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
        new.append(ids)
        done = done | (ids[:, 0] == (-1 if end is None else end))
        if done.all():
            break
    return torch.cat(new, 1)


def _can_keep_the_last(model: nn.Module) -> bool:
    """Whether logits can be had of the last position alone: of all they may be gigabytes."""
    taken = inspect.signature(model.forward).parameters.values()
    return any(each.name == "logits_to_keep" or each.kind is each.VAR_KEYWORD for each in taken) and any(
        "logits_to_keep" in inspect.signature(module.forward).parameters
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    )


def _text(ids: list[int], tokenizer: Any) -> str:
    """Decode up to the end token."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)
