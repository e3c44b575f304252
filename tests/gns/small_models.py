"""Small models of real families with LoRA, and one training loop for all tests that need one."""

import contextlib
import warnings

import peft
import torch
import transformers

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def _llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **options}))


def _qwen3(**options):
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**SHAPE, **options}, head_dim=8))


def _gemma3(**options):
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**SHAPE, **options}, head_dim=8))


def _gpt2(num_hidden_layers=2, **options):
    shape = dict(vocab_size=61, n_embd=32, n_layer=num_hidden_layers, n_head=4, n_positions=64)
    others = dict(bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = transformers.GPT2Config(**{**shape, **others, "loss_type": "ForCausalLM", **options})
    return transformers.GPT2LMHeadModel(config)


FAMILIES = {"llama": _llama, "qwen3": _qwen3, "gemma3": _gemma3, "gpt2": _gpt2}


def lora(family, dtype=torch.float32, *, seed=0, dropout=0.0, warm=True, r=4):
    """A LoRA model; `warm` gives factor B random values, so that factor A has a gradient."""
    torch.manual_seed(seed)
    gpt2 = family == "gpt2"
    targets = ["c_attn", "c_proj", "c_fc"] if gpt2 else "all-linear"
    config = peft.LoraConfig(
        r=r,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=gpt2,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for an attribute it renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = peft.get_peft_model(FAMILIES[family](), config)
    if warm:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return model.to(dtype)


def tokens(n, t=17, seed=0):
    """A batch with padding and one row without any label: input ids, attention mask, labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (n, t), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, 9:], labels[0, 9:] = 0, -100
    if n > 2:
        labels[2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model, *, steps=20, accumulate=2, autocast=None, clip=0.05, make=torch.optim.AdamW):
    """Train as users do; batches differ in size within a step and over steps."""
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        for micro in range(accumulate):
            batch = tokens(3 + (step + micro) % 3, seed=100 * step + micro)
            context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
            with context:
                loss = model(**batch).loss / accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]
