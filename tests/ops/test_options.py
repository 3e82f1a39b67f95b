"""Options that ops share: what is no number, bool, size or dict is refused in one line, by name, before it is used."""

import jax
import numpy as np
import pytest

from seqmix import ops
from seqmix.core import shapes
from seqmix.ops import dispatch, masks
from seqmix.ops.topk_blocks import pooled_scores

X = np.zeros((1, 8, 2, 4), np.float32)
BETA, LEVELS, TAPS = X[..., 0], np.zeros((1, 8, 2, 5), np.float32), np.zeros((3, 2, 4), np.float32)
LSE, SEEN, CAUSAL = np.zeros((1, 2, 8), np.float32), np.zeros((1, 8, 8), bool), masks.Causal()
IDS = np.ones((1, 8), np.int32)

CALLS = {
    "linear_attention": lambda **options: ops.linear_attention(X, X, X, **options),
    "delta_rule": lambda **options: ops.delta_rule(X, X, X, BETA, **options),
    "diagonal_plus_rank_one": lambda **options: ops.diagonal_plus_rank_one(X, X, X, X, X, **options),
    "log_linear_attention": lambda **options: ops.log_linear_attention(X, X, X, LEVELS, **options),
    "log_linear_delta_rule": lambda **options: ops.log_linear_delta_rule(X, X, X, BETA, LEVELS, **options),
    "linear_scan": lambda **options: ops.linear_scan(X, X, **options),
    "short_conv": lambda **options: ops.short_conv(X, TAPS, **options),
    "attention": lambda **options: ops.attention(X, X, X, **options),
    "block_sparse_attention": lambda **options: ops.block_sparse_attention(X, X, X, **{"mask": CAUSAL} | options),
    "topk_block_attention": lambda **options: ops.topk_block_attention(X, X, X, count=1, **options),
    "block_weights": lambda **options: ops.block_weights(X, X, LSE, SEEN, **{"scale": 1.0} | options),
    "pooled_scores": lambda **options: pooled_scores(X, X, **options),
    "Window": lambda **options: masks.Window(3, **options),
    "Neighbourhood": lambda **options: masks.Neighbourhood((2, 2), 1, **options),
}
SCALED = "linear_attention", "delta_rule", "diagonal_plus_rank_one", "log_linear_attention", "log_linear_delta_rule"
SOFTMAX = "attention", "block_sparse_attention", "topk_block_attention", "block_weights"
BOOLS = {
    "linear_attention": ("normalize", "causal", "return_state"),
    "linear_scan": ("reverse",),
    "short_conv": ("twice",),
    "attention": ("causal", "return_lse"),
    "block_sparse_attention": ("return_lse",),
    "topk_block_attention": ("return_lse",),
    "block_weights": ("by_keys",),
    "pooled_scores": ("per_head",),
    "Window": ("causal",),
    "Neighbourhood": ("causal",),
}


def refused(start, call, **options):
    with pytest.raises(ValueError) as error:
        call(**options)
    assert str(error.value).startswith(start) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize("op", SCALED + SOFTMAX)
def test_a_scale_is_one_finite_number(op):
    for scale in ("x", True, np.True_, np.array(True), float("nan"), 1j, np.ones(3), [1.0], 1e39, 10**400):
        refused("scale: expected a finite number", CALLS[op], scale=scale)
    if op in (*SCALED, "block_weights"):  # of the others None is the default
        refused("scale: expected a finite number", CALLS[op], scale=None)


@pytest.mark.parametrize("op", ["linear_attention", "log_linear_attention"])
def test_a_scale_may_be_traced(op):
    assert jax.eval_shape(lambda s: CALLS[op](scale=s)[0], 0.5).shape == X.shape
    with pytest.raises(ValueError, match=r"^scale: expected one number, got a traced float32 of shape \(2,\)"):
        jax.eval_shape(lambda s: CALLS[op](scale=s), np.ones(2, np.float32))


@pytest.mark.parametrize("op", BOOLS)
def test_bools_are_no_words_and_no_numbers(op):
    for name in BOOLS[op]:
        for value in ("no", "False", 0, 1, None, np.array(True)):
            refused(f"{name}: expected True or False", CALLS[op], **{name: value})


def test_numpys_bools_are_bools():
    assert shapes.boolean("x", np.True_) is True and shapes.boolean("x", np.bool_(0)) is False
    plain = jax.eval_shape(lambda: CALLS["linear_attention"](causal=False))
    assert jax.eval_shape(lambda: CALLS["linear_attention"](causal=np.False_)) == plain


@pytest.mark.parametrize("op", ["attention", "block_sparse_attention", "topk_block_attention"])
def test_data_are_a_dict_of_what_the_mask_takes(op):
    for data in ([1], "x", X):
        refused("data: expected a dict of arrays by name, got ", CALLS[op], mask=CAUSAL, data=data)
    refused("data: expected nothing, which the mask takes, got 'ids'", CALLS[op], mask=CAUSAL, data={"ids": IDS})
    known = dict.fromkeys(("segment_ids", "kv_segment_ids"), IDS)
    refused(
        "data: expected segment_ids, kv_segment_ids, which the mask takes, got 'ids'",
        CALLS[op],
        **{"mask": masks.Segments(), "data": known | {"ids": IDS}},
    )
    refused("mask: expected a mask of ops.masks, got str", CALLS[op], mask="causal")


@pytest.mark.parametrize("op", ["block_sparse_attention", "topk_block_attention"])
def test_sizes_are_integers_of_any_kind(op):
    want = jax.eval_shape(lambda: CALLS[op](sizes=(8, 8)))
    assert jax.eval_shape(lambda: CALLS[op](sizes=(np.int64(8), np.int32(8)))) == want
    refused("sizes: expected an integer >= 1, got 8.0", CALLS[op], sizes=(8.0, 8))


def test_no_heads_and_no_tokens_are_refused():
    cases = {"q: expected at least one head, got H=0": (0, 1, 8), "k: expected a number of heads": (2, 0, 8)}
    cases |= {"q, k: expected at least one query and one key, got T=0": (2, 1, 0)}
    for start, (heads, key_heads, time) in cases.items():
        q, k = np.zeros((1, time, heads, 4), np.float32), np.zeros((1, time, key_heads, 4), np.float32)
        lse, seen = np.zeros((1, heads, time), np.float32), np.zeros((1, time, time), bool)
        refused(start, lambda **given: ops.block_weights(*given.values(), scale=1.0), q=q, k=k, lse=lse, seen=seen)
        refused(start, pooled_scores, q=q, k=k)
        refused(start, ops.topk_block_attention, q=q, k=k, v=k, count=1)


def test_names_that_mixers_go_by_are_those_of_the_ops():
    selective = lambda **options: ops.selective_scan(BETA, BETA, BETA[0, :2], BETA, BETA, **options)
    calls = CALLS | {"selective_scan": selective}
    for op, names in dispatch.NAMES.items():
        refused(f"implementation: expected one of {', '.join(names)} for {op}, got 'x'", calls[op], implementation="x")


def test_refusals_of_topk_block_attention_name_it():
    call = CALLS["topk_block_attention"]
    refused("implementation: topk_block_attention cannot run 'tpu': ", call, implementation="tpu")
    refused(
        "implementation: expected one of gpu, tpu, chunked, reference for topk_block_attention",
        call,
        implementation="x",
    )
    refused("blocks: topk_block_attention takes no such argument", call, blocks=IDS)


def test_what_is_no_array_is_refused():
    refused("state: expected an array, got int", CALLS["log_linear_attention"], state=(1, 2))
    refused("activation: expected a function or None, got 'silu'", CALLS["short_conv"], activation="silu")
    refused("left: expected an array, got NoneType", ops.diagonal_plus_rank_one, q=X, k=X, v=X, left=None, right=X)
    refused("B: expected an array, got list", ops.selective_scan, u=BETA, dt=BETA, A=TAPS[0], B=[1], C=BETA)
    refused("state: expected three arrays (m, num, den), got int", ops.logsumexp_scan, scores=BETA, values=X, state=3)
    refused("parts: expected pairs (y, lse), got 1", ops.merge, parts=[1])
    refused("weight: expected an array, got list", ops.short_conv, x=X, weight=[1.0])
