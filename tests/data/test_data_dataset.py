"""Datasets: every batch against the files themselves, whatever process reads it."""

from dataclasses import replace

import numpy as np
import pytest

from jaxtrain.data.dataset import open_dataset
from jaxtrain.data.source import HuggingFace, Jsonl, Megatron, Mixture, Synthetic, Text
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.protocols import BATCH_FIELDS


@pytest.fixture
def source(tmp_path, corpus) -> Text:
    return Text(files=(str(tmp_path / "corpus"),))


@pytest.fixture
def opened(tmp_path):
    def make(source, **options):
        options = {"seq_len": 32, "batch": 8, "seed": 0, "vocab_size": 512, "cache_dir": tmp_path / "cache"} | options
        return open_dataset(source, **options)

    return make


def stream_of(corpus) -> np.ndarray:
    return np.concatenate([[*corpus[name], 256] for name in sorted(corpus)])


def windows(batch) -> list[tuple]:
    return [
        (*tokens, targets[-1])
        for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True)
    ]


def all_rows(data, steps) -> dict[str, np.ndarray]:
    batches = [data.rows(step, np.arange(data.batch)) for step in range(steps)]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in BATCH_FIELDS}


def test_an_epoch_is_every_window_of_the_files_once(source, corpus, opened):
    data = opened(source, batch=1)
    stream = stream_of(corpus)
    expected = [tuple(stream[i : i + 33].tolist()) for i in range(0, len(stream) - 32, 32)]
    assert data.num_examples == len(expected) == data.num_steps
    batches = all_rows(data, data.num_examples)
    assert sorted(windows(batches)) == sorted(expected) and windows(batches) != expected


def test_rows_do_not_depend_on_which_process_reads_them(source, opened):
    data, again = opened(source), opened(source)
    for step in (0, 3, 1000):
        whole = data.rows(step, np.arange(8))
        for split in (np.arange(8).reshape(2, 4), np.array([[7], [0]]), np.arange(8).reshape(4, 2, order="F")):
            for rows in split:
                part = again.rows(step, rows)
                assert all(np.array_equal(part[name], whole[name][rows]) for name in BATCH_FIELDS)
    assert all(values.shape == (0, 32) for values in data.rows(0, np.arange(0)).values())


def test_the_batch_size_does_not_change_the_order(source, opened):
    small, large = opened(source, batch=2), opened(source, batch=8)
    assert [name for step in range(4) for name in small.ids(step)] == large.ids(0)


def test_the_seed_changes_the_order_and_nothing_else(source, opened):
    a, b = opened(source, seed=0), opened(source, seed=1)
    assert a.ids(0) != b.ids(0)
    assert a.position(5) == b.position(5)


def test_held_out_text_is_read_exactly_once_and_the_rest_of_the_last_batch_is_padding(source, corpus, opened):
    data = opened(replace(source, holdout=0.3).heldout(), shuffle=False, batch=5)
    raw = list(data.documents())
    assert 0 < len(raw) < 40 and set(raw) < set(corpus.values())
    batches = all_rows(data, data.num_steps)
    counted = batches["targets"][batches["weights"] > 0]
    assert counted.tolist() == [i for text in raw for i in [*text[1:], 256]]
    assert data.num_examples % 5 and not batches["segments"][data.num_examples :].any()
    assert not any(values.any() for values in data.rows(data.num_steps, np.arange(5)).values())
    assert data.ids(data.num_steps) == ["padding"] * 5


def test_held_out_text_shorter_than_one_example_is_padded(tmp_path, opened):
    (tmp_path / "x.txt").write_bytes(b"hello")
    data = opened(Text(files=(str(tmp_path / "x.txt"),)), shuffle=False)
    batch = data.rows(0, np.arange(2))
    assert data.num_steps == 1 and batch["weights"].sum() == 5
    assert batch["tokens"][0, :6].tolist() == [*b"hello", 256]


def test_segments_and_weights_follow_the_files(source, corpus, opened):
    data = opened(source, shuffle=False, batch=4)
    stream, owner = stream_of(corpus), np.repeat(np.arange(40), [len(corpus[n]) + 1 for n in sorted(corpus)])
    batches = all_rows(data, 6)
    for i in range(24):
        mine = owner[i * 32 : i * 32 + 33]
        assert np.array_equal(batches["tokens"][i], stream[i * 32 : i * 32 + 32])
        assert np.array_equal(batches["segments"][i], mine[:-1] - mine[0] + 1)
        assert np.array_equal(batches["weights"][i], mine[:-1] == mine[1:])
        assert np.array_equal(batches["positions"][i], [k - np.argmax(mine == mine[k]) for k in range(32)])


def test_ids_name_the_document_and_the_token_that_an_example_begins_at(source, corpus, opened):
    data = opened(source)
    batch = data.rows(2, np.arange(8))
    for name, tokens in zip(data.ids(2), batch["tokens"], strict=True):
        file, _, offset = name.rpartition("+")
        text = [*corpus[file], 256][int(offset) :][:32]
        assert tokens[: len(text)].tolist() == text


def test_a_mixture_reads_each_source_in_proportion(tmp_path, source, opened):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "%s"}\n' % (b"#" * 500))
    data = opened(Mixture(sources=(source, Jsonl(files=(f"{tmp_path}/x.jsonl",))), weights=(3, 1)))
    batches = all_rows(data, 4)
    from_jsonl = (batches["tokens"][:, 0] == ord("#")).sum()
    assert from_jsonl == 8
    assert sum(name.startswith("1:x.jsonl@0+") for name in data.ids(0)) == 2
    assert data.position(4) | {"fingerprint": ""} == {
        "step": 4, "examples": 32, "seen": [24, 8], "epochs": [24 / data._sizes[0], 8 / 15], "fingerprint": "",
    }  # fmt: skip
    assert len(list(data.documents())) == 41


def test_a_mixture_read_in_order_is_one_source_after_another(tmp_path, source, opened):
    sources = (source, Synthetic(num_documents=1, document=65))
    data = opened(Mixture(sources=sources, weights=(1, 9)), shuffle=False, batch=1)
    assert [name.split(":")[0] for step in range(data.num_steps) for name in data.ids(step)] == ["0"] * data._sizes[
        0
    ] + ["1"] * 2


def test_the_position_tells_other_data_apart(tmp_path, source, opened):
    prints = [
        opened(s, **o).position(0)["fingerprint"] for s, o in ((source, {}), (source, {}), (source, {"seq_len": 16}))
    ]
    prints.append(opened(replace(source, exclude=("a/*",))).position(0)["fingerprint"])
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_bytes_per_token_cover_the_models_vocabulary(source, opened, bpe):
    sizes = opened(source, vocab_size=300).token_bytes
    assert sizes.shape == (300,) and sizes[:256].all() and not sizes[256:].any()
    data = opened(replace(source, tokenizer=bpe), shuffle=False)
    batches = all_rows(data, data.num_steps)
    counted = batches["targets"][batches["weights"] > 0]
    first = [data.tokenizer.encode(text.decode())[0] for text in data.documents()]
    assert data.token_bytes[counted].sum() + data.token_bytes[first].sum() == sum(map(len, data.documents()))
    assert opened(Synthetic()).token_bytes is None and opened(Synthetic()).tokenizer is None


def test_a_corpus_of_several_shards_is_one_stream(source, corpus, opened, monkeypatch, tmp_path):
    whole = opened(source)
    monkeypatch.setattr("jaxtrain.data.reading.SMALLEST_SHARD", 100)
    many = opened(source, cache_dir=tmp_path / "many")
    assert len(many._streams[0]._arrays) > 20
    for step in range(whole.num_steps):
        a, b = whole.rows(step, np.arange(8)), many.rows(step, np.arange(8))
        assert all(np.array_equal(a[name], b[name]) for name in BATCH_FIELDS)


# What is refused


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_before_anything_is_tokenised(tmp_path, source, opened):
    with pytest.raises(ConfigError, match="vocab_size = 256 is smaller") as caught:
        opened(source, vocab_size=256)
    assert "384" in caught.value.fix and not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match="smaller"):
        opened(Synthetic(vocab_size=1024))


def test_a_corpus_shorter_than_one_example_is_refused(source, corpus, opened):
    total = sum(map(len, corpus.values())) + 40
    assert opened(source, seq_len=total - 1).num_examples == 1
    with pytest.raises(DataError, match="shorter than one example") as caught:
        opened(source, seq_len=total)
    assert f"{total} tokens" in caught.value.got


def test_a_corpus_without_text_is_refused(tmp_path, opened):
    (tmp_path / "x.txt").touch()
    for shuffle in (True, False):
        with pytest.raises(DataError, match="shorter than one example"):
            opened(Text(files=(str(tmp_path / "x.txt"),)), shuffle=shuffle)


def test_sources_with_different_tokenizers_do_not_mix(source, opened, bpe):
    with pytest.raises(ConfigError, match="different tokenizers"):
        opened(Mixture(sources=(source, replace(source, tokenizer=bpe)), weights=(1, 1)))


@pytest.mark.parametrize("bad", [700, -3])
def test_an_id_that_the_model_lacks_is_refused_with_its_example(tmp_path, opened, bad):
    ids = np.zeros(330, np.int32)
    ids[100] = bad
    ids.tofile(tmp_path / "a.bin")
    header = b"MMIDIDX\x00\x00" + b"".join(n.to_bytes(8, "little") for n in (1,)) + b"\x04"
    numbers = [np.array([1, 2], "<u8"), np.array([330], "<i4"), np.array([0], "<i8"), np.array([0, 1], "<i8")]
    (tmp_path / "a.idx").write_bytes(header + b"".join(n.tobytes() for n in numbers))
    data = opened(Megatron(files=(f"{tmp_path}/a",)), shuffle=False)
    with pytest.raises(DataError, match=r"example a#0\+96 holds an id"):
        data.rows(0, np.arange(8))


def test_ids_without_text_have_no_documents(opened):
    with pytest.raises(DataError, match="holds ids and no text"):
        next(opened(Synthetic()).documents())


def test_a_missing_tokenizer_names_the_command_that_makes_one(source, opened):
    with pytest.raises(ConfigError) as caught:
        opened(replace(source, tokenizer=HuggingFace(file="none.json")))
    assert "train-tokenizer" in caught.value.fix
