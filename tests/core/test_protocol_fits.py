"""The odd mechanisms: does each fit the protocol of core/mixer.py?

Cross-attention and a bidirectional grid are in tests/toys.py and go through all of conformance; here are the rest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.loop import _write
from seqmix.core import param
from seqmix.models import LM
from tests.core.odd_mixers import Follow, Learner, Routed, ScoreConv, Select, Threshold, Trilinear
from tests.toys import Cross, Grid, Leaky

X = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)


def make(mixer):
    draw = jax.jit(lambda key: param.materialise(mixer.params(), key))
    return draw(jax.random.key(0, impl="unsafe_rbg"))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def split_equals_forward(mixer, params):
    want, _ = jax.jit(mixer.forward)(params, X)
    prefill, step = jax.jit(mixer.prefill), jax.jit(mixer.step)
    y, state = prefill(params, X[:, :3], mixer.init_state(params, 2, 6))
    got = [y]
    for t in range(3, 6):
        y, state = step(params, X[:, t : t + 1], state)
        got.append(y)
    close(jnp.concatenate(got, axis=1), want)


def packed_equals_separate(mixer, params):
    forward = jax.jit(mixer.forward)
    packed, _ = forward(params, X, segment_ids=np.array([[1, 1, 1, 2, 2, 2]] * 2))
    close(packed[:, 3:], forward(params, X[:, 3:])[0])


def test_an_encoder_decoder_trains_through_the_memory_and_decodes_without_it():
    encoder, own, cross = Grid(d_model=4), Leaky(d_model=4), Cross(d_model=4)
    params = [make(m) for m in (encoder, own, cross)]
    image = X[:, ::-1]

    def forward(params):
        memory = encoder.forward(params[0], image, grid=(2, 3))[0]
        h = X + own.forward(params[1], X)[0]
        return h + cross.forward(params[2], h, memory=memory)[0], memory

    pull = jax.value_and_grad(lambda p: (jnp.sum(jnp.sin(forward(p)[0])), forward(p)), has_aux=True)
    (_, (want, memory)), grads = jax.jit(pull)(params)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves((grads[0], grads[2])))
    states = own.init_state(params[1], 2, 6), cross.init_state(params[2], 2, 6, memory=memory)

    @jax.jit
    def step(x, states):
        y, first = own.step(params[1], x, states[0])
        h = x + y
        y, second = cross.step(params[2], h, states[1])
        return h + y, (first, second)

    for t in range(6):
        y, states = step(X[:, t : t + 1], states)
        close(y, want[:, t : t + 1])


def test_a_memory_learned_at_test_time_starts_from_weights():
    mixer = Learner(d_model=4)
    params = make(mixer)
    split_equals_forward(mixer, params)
    packed_equals_separate(mixer, params)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(mixer.forward(p, X)[0] ** 2)))(params)
    assert np.any(grads["start"] != 0)


def test_a_convolution_over_scores_keeps_queries_and_is_linear_in_its_values():
    mixer = ScoreConv(d_model=4)
    params = make(mixer)
    split_equals_forward(mixer, params)
    packed_equals_separate(mixer, params)


def test_trilinear_scores_are_linear_in_the_first_value():
    mixer = Trilinear(d_model=4)
    params = make(mixer)
    values, context = mixer.project(params, X)
    matrix = mixer.mixing_matrix(params, X)
    mixed = jnp.einsum("bgts,bsgv->btgv", matrix, values)
    close(mixer.merge(params, context, mixed), mixer.forward(params, X)[0])
    with pytest.raises(ValueError, match="Trilinear does not decode"):
        mixer.init_state(params, 2, 6)


def test_a_choice_travels_between_layers_in_training_and_decoding():
    model = LM(vocab=5, d_model=4, n_layers=4, mixers=(Select(), Follow()), compute_dtype="float32")
    params, tokens = make(model), np.array([[0, 3, 1, 4, 2, 2], [1, 0, 2, 3, 4, 0]])
    want, _ = jax.jit(model.forward)(params, tokens)
    got, state = jax.jit(model.prefill)(params, tokens[:, :3], model.init_state(params, 2, 6))
    step, parts = jax.jit(model.step), [got]
    for t in range(3, 6):
        got, state = step(params, tokens[:, t : t + 1], state)
        parts.append(got)
    close(jnp.concatenate(parts, axis=1), want)


def test_centroids_are_written_by_the_train_step():
    with pytest.raises(ValueError, match="Routed, which selects over time"):
        LM(vocab=5, d_model=4, n_layers=2, mixers=(Routed(),))
    model = LM(vocab=5, d_model=4, n_layers=4, mixers=(Leaky(), Routed(balanced=False)))
    params = make(model)
    loss, metrics = jax.jit(model.loss)(
        params, jnp.ones((1, 6), jnp.int32), jnp.ones((1, 6), jnp.int32), jnp.ones((1, 6))
    )
    assert np.isfinite(loss) and metrics["used"].shape == ()
    before, after = (p["layers"]["1"]["mixer"] for p in (params, _write(params, metrics)))
    assert before["centroids"].shape == (2, 2, 4) == after["centroids"].shape
    assert np.all(np.any(before["centroids"] != after["centroids"], axis=(1, 2)))
    np.testing.assert_array_equal(before["v"], after["v"])


def test_calibration_comes_with_the_call_and_noise_with_a_key():
    mixer = Threshold(d_model=4)
    params = make(mixer)
    run = lambda limit, rng=None: mixer.forward(params, X, thresholds=jnp.array([limit]), rng=rng)
    assert run(-1e9)[1]["kept"] == pytest.approx(7 / 12) and not run(1e9)[0].any()
    np.testing.assert_array_equal(run(0.0)[0], run(0.0)[0])
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(run(0.0, keys[0])[0], run(0.0, keys[0])[0])
    assert np.any(run(0.0, keys[0])[0] != run(0.0, keys[1])[0])
    with pytest.raises(ValueError, match="thresholds: Threshold needs this input"):
        mixer.forward(params, X)
