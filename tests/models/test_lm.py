"""The language model: stack against loop, decoding against forward, packing, remat, refusals, learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.recurrent.mamba2 import Mamba2
from seqmix.models import LM
from seqmix.models.blocks import gated_mlp
from seqmix.parts.norms import rms_norm
from tests.models.least_mixers import Chooser, Decay, Noisy, Reader, TwoSided, Writer


def small(**kwargs):
    base = dict(vocab=19, d_model=16, n_layers=4, mixers=(Decay(), Decay(rate=0.3)), mlp_hidden=(24, 0))
    return LM(**(base | dict(compute_dtype="float32", loss_chunk=5, vocab_pad_to=8) | kwargs))


def setup(model, batch=2, time=12):
    params = param.materialise(model.params(), jax.random.key(0))
    return params, jax.random.randint(jax.random.key(1), (batch, time), 0, model.vocab)


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def test_scan_equals_loop():
    model = small()
    params, tokens = setup(model)
    hidden, aux = model.forward(params, tokens, capture=("block_outputs", "mixer_outputs"))
    x, sizes, blocks = params["embedding"]["table"][tokens], [], []
    for n in range(2):
        for i, mixer in enumerate(model.period):
            p = jax.tree.map(lambda a, n=n: a[n], params["layers"][str(i)])
            y, seen = mixer.forward(p["mixer"], rms_norm(x, p["mixer_norm"]["scale"], eps=1e-5))
            x = x + y
            if i == 0:
                x = x + gated_mlp(p["mlp"], rms_norm(x, p["mlp_norm"]["scale"], eps=1e-5))
            sizes.append(seen["size"])
            blocks.append(x)
    close(hidden, rms_norm(x, params["final_norm"]["scale"], eps=1e-5))
    close(aux["capture/block_outputs"], jnp.stack(blocks))
    close(aux["size"], np.mean(sizes))
    close(aux["loss/size"], 0.01 * np.mean(sizes))
    assert aux["capture/mixer_outputs"].shape == (4, 2, 12, 16)
    assert aux["update/layers/1/mixer/mean"].shape == (2, 16)


@pytest.mark.parametrize("mixers", [(Decay(), Decay(rate=0.3)), (Writer(), Reader())], ids=["plain", "shared"])
def test_prefill_and_steps_equal_forward(mixers):
    model = small(mixers=mixers)
    params, tokens = setup(model)
    want, _ = model.forward(params, tokens)
    state = model.init_state(params, 2, 12, jnp.float32)
    got, state = model.prefill(params, tokens[:, :5], state)
    parts = [got]
    for t in range(5, 12):
        hidden, state = model.step(params, tokens[:, t : t + 1], state)
        parts.append(hidden)
    close(jnp.concatenate(parts, 1), want)


def test_packed_equals_separate():
    model = small()
    params, tokens = setup(model, batch=1)
    ids = jnp.array([[1] * 7 + [2] * 5])
    packed, _ = model.forward(params, tokens, segment_ids=ids)
    close(packed[:, :7], model.forward(params, tokens[:, :7])[0])
    close(packed[:, 7:], model.forward(params, tokens[:, 7:])[0])


NEIGHBOURS = (Decay(), Decay(), Decay(rate=0.3), Noisy(), Noisy(), Noisy())


@pytest.mark.parametrize("change", [dict(remat="full"), dict(remat="dots"), dict(unroll=True)], ids=str)
@pytest.mark.parametrize("fields", [{}, dict(mixers=NEIGHBOURS, n_layers=12, mlp_hidden=(24, 24, 0, 8, 8, 0))])
def test_how_the_layers_are_run_changes_nothing(change, fields):
    """Nor does it that equal neighbours are then a loop."""
    model = small(**fields)
    params, tokens = setup(model)
    params["layers"] = jax.tree.map(
        lambda w: w + 0.1 * jnp.arange(1, w.size + 1).reshape(w.shape) / w.size, params["layers"]
    )

    def grads(m):
        def loss(p):
            rng = jax.random.key(3)
            hidden, aux = m.forward(p, tokens, rng=rng, capture=("block_outputs", "mixer_outputs"))
            return m.loss(p, tokens, tokens, jnp.ones((2, 12)), rng=rng)[0], (hidden, aux)

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    jax.tree.map(close, grads(model), grads(dataclasses.replace(model, **change)))


def test_equal_neighbours_are_a_loop_where_remat_keeps_no_weights():
    runs = lambda **fields: small(**dict(n_layers=6, mixers=NEIGHBOURS, mlp_hidden=0) | fields)._runs()
    assert runs(remat="full") == [[0, 1], [2], [3, 4, 5]]
    assert runs(remat="full", mlp_hidden=(8, 24, 0, 0, 0, 8)) == [[0], [1], [2], [3, 4], [5]]
    assert runs() == [[0], [1], [2], [3], [4], [5]]
    shares = small(mixers=(Writer(), Decay(), Decay(), Reader()), remat="full", mlp_hidden=0)
    assert shares._runs() == [[0], [1], [2], [3]]


def test_loss_is_the_mean_nll_and_its_terms():
    model = small(tie_embeddings=False)
    params, tokens = setup(model)
    mask = jnp.ones((2, 12)).at[0, 3:].set(0)
    loss, metrics = model.loss(params, tokens, tokens, mask)
    hidden, aux = model.forward(params, tokens)
    logp = jax.nn.log_softmax(model.logits(params, hidden))
    assert logp.shape[-1] == 24 and model.logits(params, hidden[:, -1]).shape == (2, 24)
    nll = -jnp.sum(jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0] * mask)
    close(metrics["nll_sum"], nll)
    assert metrics["tokens"] == mask.sum()
    close(loss, nll / mask.sum() + metrics["z_loss"] + aux["loss/size"])


def test_shared_travels_between_layers():
    model = small(mixers=(Writer(), Reader()))
    params, tokens = setup(model)
    assert not np.allclose(model.forward(params, tokens)[0], small().forward(params, tokens)[0])


def test_output_projections_start_small():
    wide = dict(d_model=64, mlp_hidden=0, n_layers=16, mixers=(Decay(),))
    scaled, plain = (setup(small(**wide, scale_residual_init=s))[0]["layers"]["0"]["mixer"] for s in (1, 0))
    close(scaled["out"], plain["out"] / 4)
    close(scaled["in"], plain["in"])


def test_parts_sum_to_the_count():
    model = small(tie_embeddings=False)
    parts = model.parts()
    assert sum(parts.values()) == model.count()
    assert parts["Decay"] == 4 * 2 * 16 * 16 and parts["mlp"] == 2 * 3 * 16 * 24
    assert parts["embedding"] == parts["head"] == 24 * 16 and parts["norms"] == 7 * 16
    assert model.flops(2, 3) == 6 * (4 * 4 * 256 + 2 * 6 * 16 * 24 + 2 * 16 * 24)


def test_chunkless_flops_do_not_depend_on_the_chunk():
    mamba, wide = (LM(vocab=64, d_model=32, n_layers=2, mixers=(Mamba2(head_dim=16, chunk=c),)) for c in (16, 128))
    assert mamba.flops(2, 256) < wide.flops(2, 256)
    assert mamba.chunkless_flops(2, 256) == wide.chunkless_flops(2, 256) == mamba.flops(512, 1)
    dense = LM(vocab=64, d_model=32, n_layers=2, mixers=(Attention(heads=2),))
    assert dense.chunkless_flops(2, 256) == dense.flops(2, 256)  # its state grows


@pytest.mark.parametrize(
    "bad, word",
    [
        (dict(n_layers=5), "n_layers"),
        (dict(mixers=()), "mixers"),
        (dict(mixers=(TwoSided(), Decay())), "TwoSided"),
        (dict(mixers=(Chooser(), Decay())), "Chooser"),
        (dict(mixers=(Decay(d_model=8), Decay())), "d_model"),
        (dict(mlp_hidden=(1, 2, 3)), "mlp_hidden"),
        (dict(remat="some"), "remat"),
        (dict(compute_dtype="int32"), "compute_dtype"),
        (dict(compute_dtype="float33"), "compute_dtype"),
        (dict(vocab=0), "vocab"),
        (dict(d_model="16"), "d_model: expected a positive integer, got '16'"),
        (dict(d_model=16.0), "d_model: expected a positive integer, got 16.0"),
        (dict(n_layers=None), "n_layers: expected a positive integer, got None"),
        (dict(mixers=Decay()), "mixers: expected a tuple of mixers, got Decay"),
        (dict(mixers=("decay",)), "mixers: expected a tuple of mixers, got str"),
        (dict(mlp_hidden=-4), "mlp_hidden: expected an integer of at least 0, or a tuple of them, got -4"),
        (dict(mlp_hidden=(4, "4")), "mlp_hidden: .*'4'"),
        (dict(mixers=(Decay(), Attention(heads=3))), "mixers.1: Attention.d_model: .*heads=3, got 16"),
    ],
)
def test_refusals_name_the_field(bad, word):
    with pytest.raises(ValueError, match=word):
        small(**bad)


def test_calls_refuse_what_they_cannot_do():
    model = small()
    params, tokens = setup(model)
    with pytest.raises(ValueError, match="capture"):
        model.forward(params, tokens, capture=("scores",))
    with pytest.raises(ValueError, match="segment_ids"):
        model.forward(params, tokens, segment_ids=tokens[:, 1:])
    with pytest.raises(ValueError, match="tokens"):
        model.step(params, tokens, model.init_state(params, 2, 12))
    with pytest.raises(ValueError, match="tokens: expected an array, got list"):
        model.forward(params, [[1, 2]])
    with pytest.raises(ValueError, match="tokens: expected integers, got float32"):
        model.forward(params, tokens.astype(jnp.float32))


def test_a_missing_weight_is_named():
    model = small()
    params, tokens = setup(model)
    state = model.init_state(params, 2, 12)
    lacking = params | {
        "layers": {**params["layers"], "0": {k: v for k, v in params["layers"]["0"].items() if k != "mlp"}}
    }
    calls = [
        lambda p: model.forward(p, tokens),
        lambda p: model.init_state(p, 2, 12),
        lambda p: model.prefill(p, tokens, state),
        lambda p: model.step(p, tokens[:, :1], state),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="^params: expected the weights of LM, found no layers/0/mlp/"):
            call(lacking)
        with pytest.raises(ValueError, match="^params: expected the weights of LM, found no embedding/table$"):
            call({})
    for given, got in (({}, "dict"), (None, "NoneType"), ({"layers": ()}, "layers of 0")):
        with pytest.raises(ValueError, match=f"^state: expected what LM.init_state gives, .* got {got}$"):
            model.step(params, tokens[:, :1], given)


def test_it_learns():
    model = small(compute_dtype="bfloat16", remat="full", n_layers=2)
    params, _ = setup(model)
    tokens = jnp.tile(jnp.arange(6), 3)[None]
    mask = jnp.ones((1, 17))

    @jax.jit
    def train(params):
        grad = jax.value_and_grad(lambda p: model.loss(p, tokens[:, :-1], tokens[:, 1:], mask)[0])
        loss, grads = grad(params)
        return loss, jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

    losses = []
    for _ in range(60):
        loss, params = train(params)
        losses.append(float(loss))
    assert losses[0] > 2.5 and losses[-1] < 1.0
