"""Makes tests/goldens/gpt2_tiny.npz with transformers on torch.

pip install '.[test,parity]' && python tests/make_goldens.py

What the default suite and scripts/verify.py compare with, where there is no torch: a
random model's weights, its logits, hidden states, loss and gradients, a greedy
continuation, and ten updates by torch's AdamW.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

from gpt2_jax.commands.verify import CFG, OPTIM
from gpt2_jax.training.optim import OptimConfig, schedule

PATH = Path(__file__).parent / "goldens/gpt2_tiny.npz"
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
STEPS = 10


def random_model(seed: int = 0, **fields):
    """A transformers GPT-2 without dropout, whose biases and norms aren't 0 and 1.

    Its weights are ten times GPT-2's own initial ones: a small model would else be
    nearly linear, whatever its activation.
    """
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        **{
            **dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
            **dict(bos_token_id=0, eos_token_id=0, initializer_range=0.2),
            **fields,
        }
    )
    config._attn_implementation = "eager"
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def loss_of(model, tokens: np.ndarray):
    """Mean cross-entropy of int tokens [B, T + 1]."""
    ids = torch.from_numpy(tokens)
    logits = model(ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), ids[:, 1:].ravel()
    )


def train(model, batches, cfg: OptimConfig) -> tuple[list[float], list[float]]:
    """An AdamW update a batch, in place: losses, and gradient norms before clipping."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": cfg.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(cfg.b1, cfg.b2),
        eps=cfg.eps,
    )
    losses, norms = [], []
    rate = schedule(cfg, len(batches))
    for i, tokens in enumerate(batches):
        adamw.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = float(rate(i))
        adamw.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


def main() -> None:
    rng = np.random.default_rng(0)
    model = random_model(**{name: getattr(CFG, name) for name in SIZES})
    tokens = rng.integers(1, CFG.vocab_size, (2, CFG.n_positions))
    batches = rng.integers(1, CFG.vocab_size, (STEPS, 4, 17))
    with torch.no_grad():
        out = model(torch.from_numpy(tokens), output_hidden_states=True)
    greedy = model.generate(
        torch.from_numpy(tokens[:1, :4]),
        attention_mask=torch.ones(1, 4, dtype=torch.long),
        max_new_tokens=28,
        do_sample=False,
        pad_token_id=0,
    )
    arrays = {
        "tokens": tokens,
        "batches": batches,
        "logits": out.logits.numpy(),
        "hidden": np.stack([h.numpy() for h in out.hidden_states[1:]]),
        "greedy": greedy[0, 4:].numpy(),
    }
    for name, p in model.transformer.named_parameters():
        arrays[f"weights/{name}"] = p.detach().numpy().copy()
    loss = loss_of(model, batches[0])
    loss.backward()
    for name, p in model.transformer.named_parameters():
        arrays[f"gradients/{name}"] = p.grad.numpy().copy()
    losses, norms = train(model, batches, OPTIM)
    for name, p in model.transformer.named_parameters():
        arrays[f"trained/{name}"] = p.detach().numpy()
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, losses=losses, norms=norms, **arrays)
    print(f"wrote {PATH}, {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
