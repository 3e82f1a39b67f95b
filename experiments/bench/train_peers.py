"""A training step of the PyTorch peer: fla's 1.39B Gated DeltaNet, by itself, so that its memory is its own.

`python -m experiments.bench.train_peers ROWS TOKENS` prints a line of JSON. bf16 autocast over float32 weights, fused
AdamW, gradients clipped at 1, nothing recomputed. Needs torch, transformers and flash-linear-attention; never a
dependency.
"""

import json
import statistics
import subprocess
import sys
import time

LABEL = "fla_gated_deltanet"
WARM, STEPS = 6, 10


def row(batch, seq) -> dict:
    """The peer's row, from a process of its own; raises RuntimeError with its last line if it fails."""
    words = [sys.executable, "-m", "experiments.bench.train_peers", str(batch), str(seq)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(batch, seq) -> dict:
    """Times the step here."""
    import torch
    from fla.models import GatedDeltaNetConfig
    from transformers import AutoModelForCausalLM

    sizes = dict(hidden_size=2048, num_hidden_layers=21, num_heads=6, head_dim=256, vocab_size=32000)
    model = AutoModelForCausalLM.from_config(GatedDeltaNetConfig(use_cache=False, **sizes)).cuda().float().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(32000, (batch, seq), device="cuda")
    took = []
    for _ in range(WARM + STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
    seconds, peak = statistics.median(took[WARM:]), torch.cuda.max_memory_allocated()
    return {
        "config": LABEL,
        "batch": batch,
        "seq_len": seq,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "step_ms": 1e3 * seconds,
        "tokens_per_second": batch * seq / seconds,
        "peak_bytes": peak,
        "program_gib": peak / 2**30,
        "loss": loss.item(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
