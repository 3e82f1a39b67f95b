"""What a mixer cannot take is refused in one line that names it, before anything compiles."""

import dataclasses
import typing

import jax
import numpy as np
import pytest

from tests.conformance.cases import BATCH, over


def refuses(word, call, *args, **kwargs):
    """The call raises a ValueError of one line with this word; no array is computed, so a trace is enough."""
    with pytest.raises(ValueError, match=word) as raised:
        jax.eval_shape(lambda: call(*args, **kwargs))
    assert "\n" not in str(raised.value)


@over()
def test_undeclared_inputs_are_refused(case):
    m, params, x = case.mixer, case.params(np.float32), case.x(np.float32)
    inputs = case.inputs(np.float32) | case.static
    refuses("temperature", m.forward, params, x, temperature=1.0, **inputs)
    if m.decodes:
        state = case.init_state(params, case.time, np.float32)
        refuses("temperature", m.init_state, params, BATCH, 4, temperature=1.0, **inputs)
        refuses("temperature", m.prefill, params, x, state, temperature=1.0)
        refuses("temperature", m.step, params, x[:, :1], state, temperature=1.0)
    if m.linear_in_v:
        refuses("temperature", m.project, params, x, temperature=1.0, **inputs)
        refuses("temperature", m.mixing_matrix, params, x, temperature=1.0, **inputs)


@over(lambda m: "memory" in m.takes or "grid" in m.takes)
def test_inputs_that_are_needed_are_missed(case):
    refuses(case.mixer.takes[0], case.mixer.forward, case.params(np.float32), case.x(np.float32))


@over()
def test_wrong_shapes_and_dtypes_are_named(case):
    m, params, x = case.mixer, case.params(np.float32), case.x(np.float32)
    ids = np.ones(x.shape[:2], np.int32)
    calls = [lambda x, **kw: m.forward(params, x, **kw, **case.inputs(np.float32), **case.static)]
    if m.decodes:
        state = case.init_state(params, case.time, np.float32)
        calls.append(lambda x, **kw: m.prefill(params, x, state, **kw))
    for call in calls:
        refuses(f"x: .*{m.d_model}", call, x[..., 1:])
        refuses("x: ", call, x[0])
        refuses("x: .*int32", call, x.astype(np.int32))
        refuses("positions: ", call, x, positions=ids[:, 1:])
        refuses("segment_ids: ", call, x, segment_ids=ids[:, 1:])
        refuses("segment_ids: ", call, x, segment_ids=x[..., 0])


@over()
def test_lists_are_no_arrays(case):
    m, params, x = case.mixer, case.params(np.float32), case.x(np.float32)
    ids = [[1] * x.shape[1]] * x.shape[0]
    call = lambda x, **kw: m.forward(params, x, **kw, **case.inputs(np.float32), **case.static)
    refuses("^x: expected an array .*list", call, x.tolist())
    refuses("^segment_ids: expected an array .*list", call, x, segment_ids=ids)
    refuses("^positions: expected an array .*list", call, x, positions=ids)


@over()
def test_a_missing_weight_is_named(case):
    m, params, x = case.mixer, case.params(np.float32), case.x(np.float32)
    inputs, word = case.inputs(np.float32) | case.static, f"^params: expected the weights of {type(m).__name__}, found "
    for name in params:
        lacking = {key: value for key, value in params.items() if key != name}
        refuses(f"{word}no {name}", m.forward, lacking, x, **inputs)
    refuses(f"^params: .* {type(m).__name__}, got the declaration of ", m.forward, m.params(), x, **inputs)
    refuses("^params: .* and no others, got spare", m.forward, params | {"spare": x}, x, **inputs)
    listed = jax.tree.map(lambda w: [1.0], params)
    refuses("^params: .* arrays, got list as ", m.forward, listed, x, **inputs)
    for none in ({}, None):
        refuses(word, m.forward, none, x, **inputs)
        if m.decodes:
            state = case.init_state(params, case.time, np.float32)
            refuses(word, m.prefill, none, x, state)
            refuses(word, m.step, none, x[:, :1], state)
        if m.linear_in_v:
            refuses(word, m.project, none, x, **inputs)
            refuses(word, m.mixing_matrix, none, x, **inputs)


@over(lambda m: m.decodes)
def test_a_state_of_another_call_is_refused(case):
    m, params, x = case.mixer, case.params(np.float32), case.x(np.float32)
    state = case.init_state(params, case.time, np.float32)
    refuses("^x: expected shape .* step of .* prefill takes more", m.step, params, x, state)
    for call, tokens in ((m.step, x[:, :1]), (m.prefill, x)):
        refuses("^state.*: expected an array .*init_state, got none", call, params, tokens, None)
        refuses("^state.*: expected an array .*init_state, got ", call, params, tokens, {})
        refuses("^state.*: expected 1 rows, as x has", call, params, tokens[:1], state)


@over()
def test_a_width_of_another_type_is_named(case):
    for width in ("8", 8.0, None):
        refuses("d_model: expected an integer", lambda w=width: type(case.mixer)(**case.row.small | {"d_model": w}))


WRONG = {float: ("x", float("nan"), True), bool: ("no", 1), int: ("8", True), str: (3, True)}


@over()
def test_a_field_of_another_kind_is_named_when_built(case):
    build, name = type(case.mixer), type(case.mixer).__name__
    for field in dataclasses.fields(build):
        kind = (typing.get_args(field.type) or (field.type,))[0]
        for value in (*WRONG.get(kind, ("x",)), [1]):
            refuses(f"^{name}.*{field.name}", lambda v=value, f=field: build(**case.row.small | {f.name: v}))
        if field.name == "implementation":
            wrong = case.row.small | {"implementation": "chunkd"}
            refuses(f"^{name}.implementation: .*chunked", lambda v=wrong: build(**v))


@over()
def test_a_width_must_be_given(case):
    fields = case.row.small | {"d_model": 0}
    refuses("d_model", lambda: type(case.mixer)(**fields).forward({}, case.x(np.float32)))


@over()
def test_denied_methods_name_the_mixer(case):
    m, params, x = case.mixer, case.params(np.float32), case.x(np.float32)
    name = type(m).__name__
    if not m.decodes:
        refuses(name, m.init_state, params, BATCH, 4)
        refuses(name, m.prefill, params, x, {})
        refuses(name, m.step, params, x[:, :1], {})
        refuses(name, m.state_axes)
        refuses(name, m.state_size, 4)
    if not m.linear_in_v:
        refuses(name, m.project, params, x)
        refuses(name, m.merge, params, {}, x[:, :, None])
        refuses(name, m.mixing_matrix, params, x)
    if not m.packable:
        ids = np.ones(x.shape[:2], np.int32)
        refuses(name, m.forward, params, x, segment_ids=ids, **case.inputs(np.float32), **case.static)


@over()
def test_equal_mixers_are_one_key(case):
    """So that a mixer can be a static argument of jax.jit."""
    again = type(case.mixer)(**{f.name: getattr(case.mixer, f.name) for f in dataclasses.fields(case.mixer)})
    assert again == case.mixer and hash(again) == hash(case.mixer)
