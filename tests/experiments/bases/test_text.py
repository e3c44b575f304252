import dataclasses

import pytest

from experiments.bases import BASES
from experiments.bases.text import text, token_stream, train_tokenizer
from gns import corpus
from gns.corpus import Document
from tests.experiments.bases.tiny import TINY

MATH = dataclasses.replace(TINY, primer=6, single_digits=True)


def test_text_too_short(documents):
    with pytest.raises(ValueError, match=r"base tiny: the text gave .* vocab_size=5000; more text"):
        train_tokenizer(documents, dataclasses.replace(TINY, vocab_size=5_000))


def test_every_digit_is_a_token(documents):
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda my ny xi omikron pi rho " * 5
    documents = [*documents, Document("c", words + "".join(f"x = 1234 + {i}\n" for i in range(99)))]
    single = train_tokenizer(documents, MATH)
    assert single.convert_ids_to_tokens(single("1234 + 56")["input_ids"])[1:5] == list("1234")
    assert not [token for token in single.get_vocab() if len(token) > 1 and any(map(str.isdigit, token))]
    joined = train_tokenizer(documents, dataclasses.replace(MATH, single_digits=False))
    assert [token for token in joined.get_vocab() if len(token) > 1 and token.isdigit()]
    for source in ("a 12\n\n  34é5", " 7", "x = 10_000.5e3\n"):
        assert single.decode(single(source)["input_ids"], skip_special_tokens=True) == source


def test_a_stream_closes_every_document(documents, tokenizer):
    stream = token_stream(tokenizer, documents)
    assert (stream == tokenizer.eos_token_id).sum() == (stream == tokenizer.bos_token_id).sum() == 2
    assert stream[0] == tokenizer.bos_token_id and stream[-1] == tokenizer.eos_token_id


def test_the_primer_is_beside_the_library_where_a_row_asks_for_it(documents, monkeypatch):
    monkeypatch.setattr(corpus, "documents", lambda part: documents)
    assert text(BASES["1m"], "base") == {"stdlib": documents}
    found = text(MATH, "base")
    assert len(found["primer"]) == 6
    assert {document.text for document in found["primer"]}.isdisjoint(
        document.text for document in text(MATH, "held_out")["primer"]
    )
