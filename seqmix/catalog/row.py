"""What the catalogue says of one mechanism."""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One mechanism. Sizes in `small` are even, so that two-way sharding divides them."""

    name: str  # short, lower case: what a command line calls it
    target: str  # "module:Class"; the module lies in seqmix/mixers/<group>
    title: str  # of the paper
    paper: str  # arXiv id
    small: dict  # fields of an instance that compiles fast, several chunks in 14 tokens
    variants: tuple[dict, ...] = ()  # fields over `small`, each tested as well
    medium: dict | None = None  # fields of an instance in which matmuls dominate, to check `flops`
    medium_seq: int = 64  # its sequence length: one chunk or block
    state: str = ""  # `state_size(context)` without the variants, in the class's own fields; "": does not decode
    checked: tuple[str, ...] = ()  # "package: function" of docs/peer_checks.md, "(op)" after it for its op alone

    @property
    def class_name(self) -> str:
        return self.target.partition(":")[2]

    @property
    def group(self) -> str:
        """The folder of mixers/: dense, recurrent, ..."""
        return self.target.partition(":")[0].split(".")[2]

    def load(self) -> type:
        """The mixer's class."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)
