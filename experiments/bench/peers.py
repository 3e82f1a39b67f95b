"""The PyTorch peers of the recurrent ops: fla and mamba_ssm, on the inputs that ours get. Never a dependency."""

import functools

import numpy as np

from experiments.bench.timing import torch_ms


def calls(name):
    """{label: function of the op's inputs as torch tensors}."""
    if name == "scan":
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

        made = {"fla chunk_hgrn": chunk_hgrn, "fla fused_recurrent_hgrn": fused_recurrent_hgrn}
        return {label: functools.partial(_first, call) for label, call in made.items()}
    if name == "ssd":
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        return {"mamba_ssm chunk 256": lambda *inputs: mamba_chunk_scan_combined(*inputs, 256)}
    import fla.ops.common.chunk_o
    from fla.ops.gla import chunk_gla
    from fla.ops.retention import chunk_retention
    from fla.ops.simple_gla import chunk_simple_gla

    # fla refuses its scalar-gated backward pass on Hopper with this Triton, which compiles it wrong; its time is
    # asked for, and its error is printed beside it.
    fla.ops.common.chunk_o.TRITON_ABOVE_3_7_1 = True
    call = {"gla": chunk_gla, "simple_gla": chunk_simple_gla, "retnet": chunk_retention}[name]
    return {f"fla {call.__name__}": functools.partial(_first, call)}


def _first(call, *inputs):
    return call(*inputs)[0]


def times(name, draw, b, t):
    """{label: times} of the peers at a shape."""
    import jax
    import torch

    like = jax.eval_shape(lambda: draw(jax.random.key(0), b, t))
    inputs = [_random(name, index, x, torch) for index, x in enumerate(like)]
    found = {}
    for label, call in calls(name).items():
        forward = functools.partial(call, *inputs)
        cotangent = torch.randn_like(forward())
        both = functools.partial(_both, torch, forward, inputs, cotangent)
        with torch.no_grad():
            fwd = torch_ms(forward)
        found[label] = {"fwd_ms": fwd, "fwd_bwd_ms": torch_ms(both)}
    torch.cuda.empty_cache()
    return found


def _both(torch, forward, inputs, cotangent):
    return torch.autograd.grad(forward(), inputs, cotangent)


def _random(name, index, like, torch):
    """A random input like one of ours: gates are logarithms, time steps positive, A negative."""
    import torch.nn.functional as F

    kind = torch.float32 if like.dtype == np.float32 else torch.bfloat16
    x = torch.randn(*like.shape, device="cuda", dtype=torch.float32)
    if name == "ssd" and index in (1, 2):
        x = F.softplus(x - 4) if index == 1 else -torch.exp(torch.rand_like(x))
    elif (name, index) in (("scan", 1), ("simple_gla", 3), ("gla", 3)):
        x = F.logsigmoid(x) / (16 if name == "gla" else 1)
    return x.to(kind).requires_grad_()


def results(name, inputs, cotangent):
    """{label: (y, gradients)} of the peers on given arrays, as float32 numpy."""
    import torch

    def given(x):
        kind = torch.float32 if x.dtype == np.float32 else torch.bfloat16
        return torch.tensor(np.asarray(x, np.float32), device="cuda", dtype=kind)

    tensors = [given(x).requires_grad_() for x in inputs]
    found = {}
    for label, call in calls(name).items():
        y = call(*tensors)
        gradients = torch.autograd.grad(y, tensors, given(cotangent))
        found[label] = tuple(_numpy(x) for x in (y, gradients))
    return found


def _numpy(x):
    if isinstance(x, tuple):
        return tuple(_numpy(one) for one in x)
    return x.detach().float().cpu().numpy()
