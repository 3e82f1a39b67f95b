"""A byte-level BPE tokenizer trained on documents, and documents cut where encoding may cut them."""

from experiments import inputs, textfiles

SAMPLE = 2**28  # bytes of documents that a tokenizer is trained on, at most
PIECE = 2**24
LEAST, MOST = 257, 2**20  # of a vocabulary: the bytes and one special token; what no table holds any more
END = "<|endoftext|>"


def pieces(document):
    """A document of bytes in pieces of PIECE at most, cut after a line where there is one. A tokenizer may
    join what stands on both sides of a cut, so only documents of more than PIECE bytes are cut.
    """
    parts = []
    while len(document) > PIECE:
        cut = document.rfind(b"\n", 0, PIECE) + 1 or PIECE
        while document[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
        parts.append(document[:cut])
        document = document[cut:]
    return [*parts, document] if document else parts


def train(tasks, field, vocab, skip_bad=False):
    """The JSON (bytes) of a tokenizer of at most `vocab` tokens, trained on up to SAMPLE bytes, an equal part of
    each task's beginning. Text is cut into words as GPT-2's is; the one special token is <|endoftext|>.
    """
    try:
        import tokenizers
    except ImportError:
        raise ValueError("--train-bpe: needs: pip install 'seqmix[text]'") from None
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_sample(tasks, field, skip_bad), trainer)
    return made.to_str().encode()


def _sample(tasks, field, skip_bad):
    share = max(SAMPLE // max(len(tasks), 1), 1)
    for task in tasks:
        room = share
        for document, _ in inputs.documents(task, field):
            if isinstance(document, textfiles.Bad):
                if skip_bad:
                    continue
                raise ValueError(f"{document}; --skip-bad leaves such out")
            for piece in pieces(document[: room + 4]):
                yield piece.decode(errors="ignore")
            room -= len(document)
            if room <= 0:
                break
