"""Text to token ids and back: raw bytes, or a JSON file of the `tokenizers` library."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

# How published vocabularies name the token between documents.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class Bytes:
    """Ids 0..255 are the bytes; 256 pad, 257 bos, 258 eos, 259 reserved."""

    vocab = 260
    eos = 258
    fingerprint = "bytes: 256 + pad bos eos reserved"

    def encode(self, text):
        """Ids of a text."""
        return list(text.encode("utf-8", "surrogateescape"))

    def encode_documents(self, documents):
        """An array of ids for each of these documents (bytes of UTF-8)."""
        return [np.frombuffer(document, np.uint8) for document in documents]

    def decode_bytes(self, ids):
        """The bytes that ids stand for; special ones have none."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()


class FromJson:
    """A tokenizer of the `tokenizers` library; `eos` separates documents."""

    def __init__(self, path):
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"data.tokenizer: {path}: {error.strerror}") from None
        try:
            import tokenizers
        except ImportError:
            raise ValueError("data.tokenizer: a JSON file needs: pip install 'seqmix[text]'") from None
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"data.tokenizer: {path} is not a tokenizer's JSON: {error}") from None
        # A document that spells a special token is text.
        self._inner.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(content).hexdigest()
        known = self._inner.get_vocab(with_added_tokens=True)
        self.vocab = max(known.values()) + 1
        self.eos = next((known[name] for name in END_OF_TEXT if name in known), None)
        if self.eos is None:
            names = ", ".join(END_OF_TEXT)
            raise ValueError(f"data.tokenizer: expected one of the tokens {names} in {path}, got none")
        self._special = {id for id, token in self._inner.get_added_tokens_decoder().items() if token.special}
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(content).get("decoder"))
        self._known = {}

    def encode(self, text):
        """Ids of a text."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_documents(self, documents):
        """An array of ids for each of these documents (bytes of UTF-8)."""
        texts = [document.decode() for document in documents]
        done = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(item.ids, np.uint32) for item in done]

    def decode_bytes(self, ids):
        """The bytes that ids stand for; special ones have none."""
        return b"".join(self._bytes(int(id)) for id in ids)

    def _bytes(self, id):
        if id not in self._known:
            self._known[id] = self._spell(id)
        return self._known[id]

    def _spell(self, id):
        token = self._inner.id_to_token(id)
        if token is None or id in self._special:
            return b""
        if self._byte_level and all(letter in BYTE_LETTERS for letter in token):
            return bytes(BYTE_LETTERS[letter] for letter in token)
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):  # byte fallback
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()  # the mark of a space in SentencePiece


def _byte_letters():
    """The letter that byte-level BPE writes for each byte (GPT-2): its own if visible, else one from 256."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(256 + index): byte for index, byte in enumerate(hidden)}


BYTE_LETTERS = _byte_letters()


def load(spec):
    """The tokenizer of a config: "bytes" or a path. Raises ValueError in one line when there is none."""
    return Bytes() if spec == "bytes" else FromJson(spec)
