"""Tables of choices: their keys and entries, and what goes before what."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuned
from pallas_kernels.linear_attention import plan as linear_attention

FORWARD = "linear_attention.forward"


def shapes(batch=8, time=4096, key_heads=1, heads=64, key=128, value=64):
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return array(batch, time, key_heads, key), array(batch, time, heads, value)


def test_a_key_rounds_batch_and_time_up_and_nothing_else():
    assert tuned.key(FORWARD, 3, 1000, H=24) == "linear_attention.forward B4 T1024 H24"
    assert tuned.key(FORWARD, 4, 1024, H=24) == "linear_attention.forward B4 T1024 H24"


def test_a_table_goes_before_the_rule_what_is_forced_before_the_table_and_an_argument_before_all(tmp_path, monkeypatch):
    q, v = shapes(key_heads=64)
    rule = linear_attention.config("forward", q, v)
    assert (rule.units, rule.stages, rule.splits) == (1, 3, None)
    table = tmp_path / "tuned.json"
    key = tuned.key(FORWARD, 8, 4096, Hk=64, H=64, K=128, V=64)
    table.write_text(json.dumps({jax.devices()[0].device_kind: {key: {"stages": 2, "ms": 0.5}}}))
    monkeypatch.setattr(linear_attention, "TABLE", table)
    assert linear_attention.config("forward", q, v).stages == 2
    assert linear_attention.config("forward", *shapes(batch=2, key_heads=64)).stages == 3
    with tuned.forcing(FORWARD, splits=4):
        forced = linear_attention.config("forward", q, v)
        assert (forced.stages, forced.splits) == (3, 4)
        assert linear_attention.config("forward", q, v, splits=2).splits == 2
        assert linear_attention.config("backward", q, v).splits is None
    with tuned.forcing(FORWARD, units=2), pytest.raises(ValueError, match="units: expected one of"):
        linear_attention.config("forward", q, v)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_candidates_fit_in_shared_memory_and_hold_the_rule(kernel):
    q, v = shapes()
    found = linear_attention.candidates(kernel, q, v)
    rule = linear_attention.config(kernel, q, v)
    assert len(found) == len(set(found)) and {config.units for config in found} == {1, 2}
    assert (rule.units, rule.stages) in {(config.units, config.stages) for config in found}
    for config in found:
        size = linear_attention.shared_bytes(kernel, q, v, config.units, config.stages)
        assert size <= linear_attention.SHARED_BYTES
    assert [config.splits for config in linear_attention.candidates(kernel, *shapes(time=64))] == [1] * (
        len(found) // 4
    )


def test_every_entry_of_the_shipped_tables_can_be_read():
    tables = list(pathlib.Path(tuned.__file__).parent.glob("*/tuned.json"))
    assert tables
    for table in tables:
        for entries in json.loads(table.read_text()).values():
            for key, entry in entries.items():
                assert key.split()[0].split(".")[0] == table.parent.name
                assert entry["ms"] > 0
                if table == linear_attention.TABLE:
                    linear_attention.Config(**{"units": 1, "stages": 2} | {k: x for k, x in entry.items() if k != "ms"})
