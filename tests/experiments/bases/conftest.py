"""A text for the tiny base, and its tokens."""

import pytest

from experiments.bases.text import token_stream, train_tokenizer
from gns.corpus import Document
from tests.experiments.bases.tiny import TINY


@pytest.fixture(scope="session")
def documents():
    words = [f"def name_{i % 7}(value):\n    return value + {i}\n\n" for i in range(200)]
    return [Document("a.py", "".join(words[:150])), Document("b.py", "".join(words[150:]))]


@pytest.fixture(scope="session")
def tokenizer(documents):
    return train_tokenizer(documents, TINY)


@pytest.fixture(scope="session")
def stream(documents, tokenizer):
    return token_stream(tokenizer, documents)
