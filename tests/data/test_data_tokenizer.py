"""Tokenizers: lossless, counted in bytes, trained, and refused with a reason."""

import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxtrain.data import tokenizer as module
from jaxtrain.data.source import Bytes, HuggingFace
from jaxtrain.data.tokenizer import UndecodableText, open_tokenizer, train_bpe
from jaxtrain.errors import ConfigError, DataError

TEXT = "the größer 数据 is\n\n  not <|endoftext|> 42 'quoted'\t🎈 e\u0301\r\n"


def encoded(tokenizer, *texts):
    """The ids of each text."""
    ids = [[] for _ in texts]
    for index, array in tokenizer.encode_documents(texts):
        ids[index] += array.tolist()
    return ids


def both(bpe):
    return [open_tokenizer(Bytes()), open_tokenizer(bpe)]


def test_text_is_decoded_as_it_was(bpe):
    for tokenizer in both(bpe):
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        assert encoded(tokenizer, b"", TEXT.encode(), b"a") == [[], tokenizer.encode(TEXT), tokenizer.encode("a")]


def test_bytes_take_anything():
    tokenizer = open_tokenizer(Bytes())
    everything = bytes(range(256))
    assert encoded(tokenizer, everything, b"") == [list(everything), []]
    assert (tokenizer.vocab_size, tokenizer.end) == (257, 256)


def test_the_end_of_document_written_in_a_text_is_text(bpe):
    for tokenizer in both(bpe):
        assert tokenizer.end not in tokenizer.encode("a<|endoftext|>b")


def test_the_bytes_of_a_texts_tokens_sum_to_the_texts(bpe):
    for tokenizer in both(bpe):
        sizes = tokenizer.token_bytes()
        assert sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int32 and sizes[tokenizer.end] == 0
        assert sizes[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())


def test_bytes_of_sentencepiece_tokens_are_counted(tmp_path):
    pieces = [
        ("<unk>", 0.0),
        ("<|endoftext|>", 0.0),
        *((f"<0x{i:02X}>", -9.0) for i in range(256)),
        ("▁the", -1.0),
        ("▁", -2.0),
        ("ö", -2.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(HuggingFace(file=str(tmp_path / "tokenizer.json")))
    ids = opened.encode(" the ö数")
    assert len(ids) == 6 and opened.token_bytes()[ids].tolist() == [4, 1, 2, 1, 1, 1]


def test_bytes_are_not_guessed_where_tokens_do_not_tell(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(HuggingFace(file=str(tmp_path / "tokenizer.json"))).token_bytes() is None


def test_a_long_document_is_encoded_in_parts_to_the_same_ids(bpe, monkeypatch):
    text = "".join(f"line {i} of the data\n" for i in range(200))
    (whole,) = encoded(open_tokenizer(bpe), text.encode())
    monkeypatch.setattr(module, "LONGEST_TEXT", 300)
    for together in (1, 700, 10**6):
        monkeypatch.setattr(module, "TOGETHER", together)
        assert encoded(open_tokenizer(bpe), b"a", text.encode(), b"a")[1] == whole
    unbroken = "x" * 1000
    assert open_tokenizer(bpe).decode(encoded(open_tokenizer(bpe), unbroken.encode())[0]) == unbroken


class Counted:
    """A tokenizer whose encodings are counted: of how much text they are at once."""

    def __init__(self, tokenizer):
        self._tokenizer, self.alive, self.most = tokenizer, 0, 0

    def encode_batch_fast(self, texts, **how):
        self.alive += sum(map(len, texts))
        self.most = max(self.most, self.alive)
        return [Encoding(self, text, e) for text, e in zip(texts, self._tokenizer.encode_batch_fast(texts, **how))]


class Encoding:
    def __init__(self, owner, text, encoding):
        self.ids = encoding.ids
        weakref.finalize(self, lambda: setattr(owner, "alive", owner.alive - len(text)))


def test_encodings_of_a_few_parts_are_alive_at_once_however_long_the_documents_are(bpe, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_TEXT", 300)
    monkeypatch.setattr(module, "TOGETHER", 1000)
    tokenizer = open_tokenizer(bpe)
    tokenizer._tokenizer = counted = Counted(tokenizer._tokenizer)
    sizes = [len(ids) for ids in encoded(tokenizer, b"the data\n" * 3000, b"a", b"x" * 5000)]
    assert min(sizes) > 0 and 600 < counted.most <= 1000


def test_cutting_a_text_copies_every_character_once(monkeypatch):
    class Watched(str):
        def __getitem__(self, where):
            copied.append(len(part := str(self)[where]))
            return part

    monkeypatch.setattr(module, "LONGEST_TEXT", 300)
    copied, text = [], "the data\n" * 1000
    assert "".join(module._parts(Watched(text))) == text and sum(copied) == len(text)


def test_text_that_is_not_utf8_is_refused_or_replaced(bpe):
    with pytest.raises(UndecodableText) as caught:
        encoded(open_tokenizer(bpe), b"fine", b"ab\xff")
    assert (caught.value.index, caught.value.offset) == (1, 2)
    lenient = open_tokenizer(replace(bpe, errors="replace"))
    assert lenient.decode(encoded(lenient, b"ab\xffc")[0]) == "ab\ufffdc"


def test_padding_and_truncation_of_the_file_are_not_applied(bpe, tmp_path):
    tokenizer = Tokenizer.from_file(bpe.file)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "t.json"))
    assert open_tokenizer(HuggingFace(file=str(tmp_path / "t.json"))).encode(TEXT) == open_tokenizer(bpe).encode(TEXT)


def test_training_gives_the_vocabulary_asked_for_and_shorter_text(bpe):
    tokenizer = open_tokenizer(bpe)
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("the data is not quoted")) < len("the data is not quoted") / 2


def test_training_does_not_replace_a_tokenizer(bpe):
    with pytest.raises(ConfigError, match="exists"):
        train_bpe(["a"], bpe, 300)


@pytest.mark.parametrize(("size", "kind"), [(256, ConfigError), (5000, DataError)])
def test_a_vocabulary_that_cannot_be_trained_is_refused_and_leaves_no_file(tmp_path, size, kind):
    value = HuggingFace(file=str(tmp_path / "t.json"))
    with pytest.raises(kind, match="too small"):
        train_bpe(["the cat sat"], value, size)
    assert not list(tmp_path.iterdir())


def test_two_files_with_one_content_have_one_key(bpe, tmp_path):
    shutil.copy(bpe.file, tmp_path / "copy.json")
    assert open_tokenizer(bpe).key == open_tokenizer(HuggingFace(file=str(tmp_path / "copy.json"))).key
    assert open_tokenizer(bpe).key != open_tokenizer(replace(bpe, errors="replace")).key


def test_a_missing_or_broken_tokenizer_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        open_tokenizer(HuggingFace(file=str(tmp_path / "none.json")))
    for content in ("not json", json.dumps({"model": 3})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match="is not a tokenizer.json"):
            open_tokenizer(HuggingFace(file=str(tmp_path / "bad.json")))


def test_an_unknown_end_of_document_is_answered_with_the_closest(bpe):
    with pytest.raises(ConfigError, match=r"did you mean '<\|endoftext\|>'"):
        open_tokenizer(replace(bpe, end_of_document="<|end|>"))
