"""The text: Python's own help topics, cut into tokens, and the batches of one epoch.

Everything here is a pure function of its arguments, so a run that resumes sees the batches that a
run never interrupted would have seen.
"""

from __future__ import annotations

import collections
import hashlib
import re
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

TOKEN = re.compile(r" ?\w+| ?[^\w\s]+|\s+")
UNKNOWN = 0


@dataclass(frozen=True)
class Corpus:
    """The text as token numbers.

    Attributes:
        tokens: int32, one per token, each below `vocabulary`.
        vocabulary: how many different tokens there are, the unknown one among them.
        digest: of the text itself, which differs between Python versions.
    """

    tokens: NDArray[np.int32]
    vocabulary: int
    digest: str


def read_corpus(vocabulary: int) -> Corpus:
    """Tokenizes the help topics, keeping the `vocabulary - 1` most frequent tokens."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    words = TOKEN.findall(text)
    # Ties in frequency are broken by the word, so that numbering never depends on hashing.
    ranked = sorted(collections.Counter(words).items(), key=lambda item: (-item[1], item[0]))
    numbers = {word: number for number, (word, _) in enumerate(ranked[: vocabulary - 1], start=1)}
    tokens = np.fromiter((numbers.get(word, UNKNOWN) for word in words), np.int32, len(words))
    return Corpus(tokens, vocabulary, hashlib.sha256(text.encode()).hexdigest()[:16])


def count_windows(corpus: Corpus, length: int) -> int:
    """How many windows of `length` tokens, each with its next token, the text holds."""
    return (len(corpus.tokens) - 1) // length


@dataclass(frozen=True)
class Batches:
    """What an epoch reads.

    Attributes:
        corpus: the text.
        length: tokens of a window.
        windows: windows of a batch.
        per_epoch: how many batches, drawn without repetition, an epoch has.
    """

    corpus: Corpus
    length: int
    windows: int
    per_epoch: int

    def of_epoch(self, key: jax.Array, start: int) -> Iterator[NDArray[np.int32]]:
        """Yields the batches of the epoch that `key` shuffles, from number `start` on.

        Yields:
            int32 [windows, length + 1]: the tokens to read, and shifted by one, those to predict.
        """
        order = np.asarray(jax.random.permutation(key, count_windows(self.corpus, self.length)))
        for batch in range(start, self.per_epoch):
            chosen = order[batch * self.windows : (batch + 1) * self.windows]
            yield self.corpus.tokens[chosen[:, None] * self.length + np.arange(self.length + 1)]
