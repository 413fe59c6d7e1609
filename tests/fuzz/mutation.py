"""Inputs that are almost valid: they get past the first check, and on to the code behind it."""

import random
from collections.abc import Callable, Sequence

_WORDS = (
    *(
        b"\x00",
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\xff\xfe",
        b"\xc3\x28",
        b"\xed\xa0\x80",
        b"\t",
    ),
    *(
        b"-1",
        b"0",
        b"1e999",
        b"9" * 400,
        b"NaN",
        b"Infinity",
        b"null",
        b"true",
        b'""',
        b"[]",
        b"{}",
    ),
    *(
        b'"\\ud800"',
        b"[" * 3_000,
        b'{"a":' * 1_500,
        b"%00",
        b"%",
        b"%2f",
        b"..",
        b"//",
        b"*",
        b"\\",
    ),
)

Change = Callable[[random.Random, bytearray], None]


def _flip(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 20)]


def _end(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _repeat(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    piece = bytes(data[start : start + rng.randrange(1, 40)])
    data[start:start] = piece * rng.choice((1, 1, 2, 200))


def _insert(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.choice(_WORDS)


def _replace(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    data[start : start + rng.randrange(1, 12)] = rng.choice(_WORDS)


_CHANGES: Sequence[Change] = (_flip, _cut, _end, _repeat, _insert, _replace)


class Mutator:
    """Makes inputs from the valid ones of ``corpus``. The same seed makes the same inputs."""

    def __init__(self, seed: int, corpus: Sequence[bytes]) -> None:
        self.rng = random.Random(seed)
        self._corpus = corpus

    def __call__(self) -> bytes:
        """One input, with up to four changes. One in twenty has none."""
        rng = self.rng
        data = bytearray(rng.choice(self._corpus))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 4)) if rng.random() > 0.05 else 0):
            if rng.random() < 0.05:  # the beginning of one, the end of another
                other = rng.choice(self._corpus)
                data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other)) :]
            elif data:
                rng.choice(_CHANGES)(rng, data)
        return bytes(data)
