"""Tokenizers give back the bytes they took, and name what a file of theirs lacks."""

import builtins
import json

import numpy as np
import pytest

from experiments import tokenizer

TEXT = "h\u00e9llo w\u00f6rld, \u65e5\u672c\n\tdef f(x): return x  # \U0001f600\n"


def trained(path, *, byte_level=True, special=("<|endoftext|>",)):
    """A small BPE, at the byte level or in the manner of SentencePiece with byte fallback."""
    tokenizers = pytest.importorskip("tokenizers")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=not byte_level))
    if byte_level:
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet, words = tokenizers.pre_tokenizers.ByteLevel.alphabet(), list(special)
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
        alphabet, words = [], [*special, *fallback]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=words, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["def f(x): return x\n"] * 20, trainer)
    content = json.loads(made.to_str())
    if not byte_level:  # bytes are tokens like others, not special ones
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    path.write_text(json.dumps(content))
    return path


def test_bytes_round_trip():
    made = tokenizer.load("bytes")
    ids = made.encode(TEXT)
    assert ids == list(TEXT.encode()) and made.decode_bytes(ids) == TEXT.encode()
    assert made.decode_bytes([104, made.eos, 256, 105]) == b"hi"
    assert made.vocab == 260 and 256 <= made.eos < made.vocab
    assert made.encode_documents([b"ab", b"c"])[0].tolist() == [97, 98]


@pytest.mark.parametrize("byte_level", [True, False])
def test_json_round_trip(tmp_path, byte_level):
    made = tokenizer.load(str(trained(tmp_path / "t.json", byte_level=byte_level)))
    ids = made.encode(TEXT)
    assert made.decode_bytes(ids) == TEXT.encode()
    assert b"".join(made.decode_bytes([id]) for id in ids) == TEXT.encode()
    assert made.decode_bytes([made.eos]) == b""
    assert max(ids) < made.vocab and made.eos not in ids
    assert np.array_equal(made.encode_documents([TEXT.encode()])[0], ids)


def test_a_special_token_in_the_text_is_text(tmp_path):
    made = tokenizer.load(str(trained(tmp_path / "t.json")))
    ids = made.encode("a <|endoftext|> b")
    assert made.eos not in ids and made.decode_bytes(ids) == b"a <|endoftext|> b"
    assert made.eos not in made.encode_documents([b"a <|endoftext|> b"])[0]


def test_fingerprint_is_of_the_content(tmp_path):
    first = tokenizer.load(str(trained(tmp_path / "a.json"))).fingerprint
    (tmp_path / "b.json").write_bytes((tmp_path / "a.json").read_bytes())
    assert tokenizer.load(str(tmp_path / "b.json")).fingerprint == first
    other = tokenizer.load(str(trained(tmp_path / "c.json", special=("</s>",)))).fingerprint
    assert len({first, other, tokenizer.load("bytes").fingerprint}) == 3


def test_a_corpus_in_tokens(tmp_path):
    from experiments import data
    from experiments.config import Data

    path = trained(tmp_path / "t.json")
    (tmp_path / "x.txt").write_text(TEXT * 40)
    cfg = Data(path=str(tmp_path / "x.txt"), tokenizer=str(path), seq_len=8, batch_size=2, val_fraction=0.3)
    loaded = data.load(cfg, 1000)
    made = tokenizer.load(str(path))
    targets = np.concatenate([b["targets"][b["mask"] == 1] for b in loaded.val_batches()])
    assert np.sum(targets == made.eos) == 1
    assert len(made.decode_bytes(targets)) == round(loaded.bytes_per_token * targets.size)
    with pytest.raises(ValueError, match="ids beyond the vocabulary: model.vocab is 100"):
        data.load(cfg, 100)


@pytest.mark.parametrize(
    "content, message",
    [(None, "No such file"), (b"{}", "is not a tokenizer's JSON"), (b"\0", "is not a tokenizer's JSON")],
)
def test_bad_files_are_refused(tmp_path, content, message):
    pytest.importorskip("tokenizers")
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^data\.tokenizer: ") as caught:
        tokenizer.load(str(path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_end_of_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of the tokens .*endoftext"):
        tokenizer.load(str(trained(tmp_path / "t.json", special=("<pad>",))))


def test_the_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "t.json").write_text("{}")
    real = builtins.__import__

    def fail(name, *rest, **named):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ValueError, match=r"seqmix\[text\]"):
        tokenizer.load(str(tmp_path / "t.json"))
