"""Eight devices give what one gives, forward and gradients: fsdp=2 x model=2 x context=2, or data=2 where a mixer has
no form for time that is cut.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from seqmix.core import param, sharding
from tests.conformance.cases import close, close_trees, mixed_ids, over
from tests.quick import QUICK


@over()
def test_eight_devices_equal_one(case, x64):
    ids, x, w, inputs = mixed_ids(case), case.x(), case.x(seed=3), case.inputs()
    want = case.pull(case.params(), x, ids, inputs, w)
    context = 1 if case.mixer.context_form == "none" or case.time % 2 else 2
    mesh = sharding.make_mesh(data=2 // context, fsdp=2, context=context, model=2)

    def lay(array):
        axes = ("batch", "time", None)[: array.ndim]
        return jax.device_put(array, NamedSharding(mesh, sharding.spec(axes, array.shape, mesh)))

    with sharding.use_mesh(mesh):
        params = jax.device_put(case.params(), param.shardings(case.mixer.params(), mesh))
        cut = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(params)]
        assert min(cut) <= (0.25 if "heads" in str(case.mixer.params()) else 0.5)
        args = jax.tree.map(lay, (x, ids, inputs, w))
        got = jax.jit(case.pull_of(case.mixer), compiler_options=QUICK)(params, *args)
    close(got[0], want[0])
    close_trees(got[1], want[1])
    close(got[2], want[2])
    assert len(got[0].sharding.device_set) == 8 and not jnp.isnan(got[0]).any()
