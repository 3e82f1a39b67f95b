"""Generation from a trained run: by seed, greedy against forward, and one line for every mistake."""

import numpy as np
import pytest

from tests.runs import launch


def test_generate_is_deterministic_by_seed(unbroken, capfd):
    from experiments import generate

    args = (f"--workdir={unbroken[0]}", "--prompt=the state", "--max-tokens=24", "--top-k=40", "--top-p=0.9")
    made = []
    for seed in (1, 1, 2):
        assert generate.main([*args, f"--seed={seed}"]) == 0
        made.append(capfd.readouterr().out)
    assert made[0] == made[1] != made[2]
    assert made[0].startswith("the state") and made[0].endswith("\n")


def test_generate_answers_a_typo_in_one_line(unbroken):
    done = launch("generate", f"--workdir={unbroken[0]}", "--promt=x", check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --promt: unknown flag, did you mean --prompt?\n"


@pytest.mark.parametrize("bad", ["--temperature=0", "--max-tokens=0", "--top-p=1.5", "--top-k=-1", "--tokens=3"])
def test_generate_refuses_in_one_line(unbroken, bad, capsys):
    from experiments import generate

    assert generate.main([f"--workdir={unbroken[0]}", bad]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith(f"error: {bad.split('=')[0]}: ")


def test_greedy_is_the_argmax_of_forward(unbroken):
    import jax.numpy as jnp

    from experiments import generate

    cfg, params = generate.load(unbroken[0], print)
    prompt = list(b"the state of a")
    made = generate.sample(cfg.model, params, prompt, max_tokens=10, greedy=True)
    tokens = np.asarray([prompt + made], np.int32)
    hidden, _ = cfg.model.forward(params, tokens)
    logits = cfg.model.logits(params, hidden)[0, :, : cfg.model.vocab]
    assert jnp.argmax(logits, -1)[len(prompt) - 1 : -1].tolist() == made
