"""What `experiments.compile` reads out of a compiled program: products and exchanges, as often as they run."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from experiments.compile import hlo, text


def cost(function, *shapes, **kwargs):
    return hlo.cost(jax.jit(function, **kwargs).lower(*shapes).compile().as_text())


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_in_nested_loops_counts_as_often_as_it_runs():
    def twice(x, w):
        inner = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(lambda x, ws: (jax.lax.scan(inner, x, ws)[0], None), x, w)[0]

    found = cost(twice, f32(8, 32), f32(3, 5, 32, 32))
    assert found.flops == 3 * 5 * 2 * 8 * 32 * 32


def test_of_two_branches_the_dearer_counts():
    def branch(flag, x, w):
        return jax.lax.cond(flag, lambda: x @ w @ w, lambda: x @ w)

    found = cost(branch, jax.ShapeDtypeStruct((), jnp.bool_), f32(16, 64), f32(64, 64))
    assert found.flops == 2 * 2 * 16 * 64 * 64


def test_a_loop_as_long_as_the_data_says_counts_as_often_as_its_list_is_long():
    def some(count, pairs, x, w):
        body = lambda n, x: jnp.tanh(x @ w) + pairs[n, 0]
        return jax.lax.fori_loop(0, count, body, x)

    pairs = jax.ShapeDtypeStruct((7, 2), jnp.int32)
    found = cost(some, jax.ShapeDtypeStruct((), jnp.int32), pairs, f32(8, 32), f32(32, 32))
    assert found.flops == 7 * 2 * 8 * 32 * 32
    assert list(found.guessed.values()) == [7]


def test_what_a_flag_alone_keeps_going_is_not_counted():
    def once(flag, x, w):
        return jax.lax.while_loop(lambda c: c[0], lambda c: (False, jnp.tanh(c[1] @ w)), (flag, x))[1]

    found = cost(once, jax.ShapeDtypeStruct((), jnp.bool_), f32(8, 32), f32(32, 32))
    assert found.flops == 0 and list(found.guessed.values()) == [0]


def test_a_loop_reads_its_slice_of_the_stacked_weights_only():
    layers, width = 50, 64
    scan = lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    found = cost(scan, f32(8, width), f32(layers, width, width))
    weights = 4 * layers * width * width
    assert weights <= found.bytes < 5 * weights  # the whole stack in every turn would be 50 times as much


EXCHANGES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "a"), PartitionSpec(), 2 * 3 / 4),
    "all-gather": (lambda x: jax.lax.all_gather(x, "a", tiled=True), PartitionSpec(), 3),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "a", tiled=True), PartitionSpec("a"), 3 / 4),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "a", 0, 1, tiled=True), PartitionSpec("a"), 3 / 4),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "a", [(i, (i + 1) % 4) for i in range(4)]),
        PartitionSpec("a"),
        1,
    ),
}


@pytest.mark.parametrize("kind", EXCHANGES)
def test_an_exchange_counts_what_a_ring_sends_over_the_axis_it_runs_on(kind):
    function, out, factor = EXCHANGES[kind]
    mesh = jax.make_mesh((2, 4), ("b", "a"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("a"), out_specs=out, check_vma=False)
    found = cost(spread, f32(64, 128))
    (one,) = found.collectives.values()
    assert one.kind == kind
    assert one.sent == factor * 4 * 64 * 128 / 4
    assert len(one.group) == (2 if kind == "collective-permute" else 4)
    assert max(one.group) < 4  # the first group lies within the first row of the mesh


# As XLA writes a product with 24 heads for a TPU: the heads are a window of which one tap meets the input.
CONVOLUTION = """HloModule made

ENTRY %main (p0: bf16[2,1024,1,768], p1: bf16[768,24,64,1]) -> bf16[2,1024,24,64] {
  %p0 = bf16[2,1024,1,768]{3,1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[24,768,64]{2,0,1:T(8,128)(2,1)} parameter(1)
  %start = (bf16[24,768,64]{2,0,1:T(8,128)(2,1)S(1)}, bf16[24,768,64]{2,0,1:T(8,128)(2,1)}, u32[]) copy-start(%p1)
  %done = bf16[24,768,64]{2,0,1:T(8,128)(2,1)S(1)} copy-done(%start)
  %image = bf16[2,1024,768,1]{1,3,2,0:T(8,128)(2,1)S(1)} bitcast(%p0)
  %kernel = bf16[24,768,64,1]{1,3,2,0:T(8,128)(2,1)S(1)} bitcast(%done)
  ROOT %c = bf16[2,1024,24,64]{1,3,2,0:T(8,128)(2,1)} convolution(%image, %kernel), \
window={size=1x24 pad=0_0x23_23 rhs_reversal=0x1}, dim_labels=b0f1_1io0->b01f
}
""".replace("\\\n", "")


def test_a_tpus_convolution_counts_as_the_product_it_stands_for_and_vector_memory_is_free():
    found = hlo.cost(CONVOLUTION)
    assert found.flops == 2 * 2 * 1024 * 768 * 24 * 64
    assert found.bytes == 2 * 768 * 24 * 64 + 2 * 2 * 1024 * 24 * 64  # weights into vector memory, result out


# As XLA spreads a gather over a TPU's other work: it starts in one fusion, goes on in some, ends in another.
SPREAD = """HloModule made

%begin (p: bf16[8,128]) -> bf16[32,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  %g.1 = bf16[32,128]{1,0} all-gather(%p), channel_id=7, REST
  ROOT %s = bf16[32,128]{1,0} custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%go (q: bf16[8,128]) -> bf16[32,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  ROOT %g.2 = bf16[32,128]{1,0} all-gather(%q), channel_id=7, REST
}

ENTRY %main (x: bf16[8,128]) -> bf16[32,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %f.1 = bf16[32,128]{1,0} fusion(%x), kind=kCustom, calls=%begin
  ROOT %f.2 = bf16[32,128]{1,0} fusion(%x), kind=kCustom, calls=%go
}
""".replace("REST", "replica_groups=mesh['a'=4] {'a'}, backend_config={\"async_collective_fusion_config\":{}}")


def test_a_gather_spread_over_several_fusions_counts_once():
    (one,) = hlo.cost(SPREAD).collectives.values()
    assert (one.count, one.sent) == (1, 3 * 2 * 8 * 128)


KERNELS = """HloModule made

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %splash.1 = bf16[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  %splash.2 = bf16[8,128]{1,0} custom-call(%splash.1), custom_call_target="tpu_custom_call", SAYS
  ROOT %a.3 = bf16[8,128]{1,0} custom-call(%splash.2), custom_call_target="tpu_custom_call", metadata={op_name="scan/b"}
}
""".replace("SAYS", 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"7"}}}')


def test_kernels_have_the_name_of_their_call_or_of_their_instruction():
    found = hlo.cost(KERNELS)
    assert found.kernels == {"splash": 2, "b": 1} and found.flops == 7 and found.unsaid == 2


GROUPS = {
    "replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}": (0, 1, 2, 3),
    "replica_groups=mesh['data'=2,'fsdp'=4] {'data'}": (0, 4),
    "replica_groups=[4,2]<=[8]": (0, 1),
    "replica_groups=[4,2]<=[2,4]T(1,0)": (0, 4),
    "replica_groups={{0,3,5},{1,2,4}}": (0, 3, 5),
    "source_target_pairs={{2,3},{3,2}}": (2, 3),
    "dimensions={0}": (),
}


@pytest.mark.parametrize("written", GROUPS)
def test_every_way_to_write_groups_is_read(written):
    assert text.group(f"channel_id=1, {written}, use_global_device_ids=true") == GROUPS[written]
