"""Sources as documents: what is read, what is held out, and what is refused and how."""

import contextlib
import gzip
import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from jaxtrain.config import EvalConfig
from jaxtrain.data import reading
from jaxtrain.data.files import list_files
from jaxtrain.data.source import HuggingFace, Jsonl, Mixture, Parquet, Synthetic, Text, check_disjoint, check_tokenizers
from jaxtrain.errors import ConfigError, DataError

TEXTS = [f"document {i} ä\n" * (i + 1) for i in range(50)]


def read(source) -> list[bytes]:
    return [d.text for pieces in reading.shards(source) for piece in pieces for d in reading.documents(source, piece)]


def lines(texts, field="text") -> bytes:
    return "".join(json.dumps({"id": 1, field: t}) + "\n" for t in texts).encode()


# Files


def test_a_folder_a_glob_and_single_files_name_the_same_documents(tmp_path, corpus):
    expected = [corpus[name] for name in sorted(corpus)]
    folder = tmp_path / "corpus"
    assert read(Text(files=(str(folder),))) == expected
    assert read(Text(files=(f"{folder}/**/*.txt",))) == expected
    assert read(Text(files=tuple(str(folder / name) for name in corpus))) == expected
    assert read(Text(files=(f"{folder}/?/*.txt", str(folder / "a")))) == expected


def test_names_are_relative_to_the_folder_that_holds_all_patterns(tmp_path, corpus):
    names = [f.name for f in list_files((f"{tmp_path}/corpus/a/*.txt", f"{tmp_path}/corpus/b"))]
    assert names == sorted(name for name in corpus if name[0] in "ab")


def test_excluded_files_are_left_out(tmp_path, corpus):
    source = Text(files=(str(tmp_path / "corpus"),), exclude=("a/*", "*/0*.txt"))
    assert read(source) == [corpus[n] for n in sorted(corpus) if n[0] != "a" and n[2] != "0"]


def test_compressed_text_is_read_like_plain(tmp_path, corpus):
    folder = tmp_path / "packed"
    folder.mkdir()
    for i, (name, content) in enumerate(sorted(corpus.items())):
        packed, end = (gzip.compress(content), "gz") if i % 2 else (zstandard.compress(content), "zst")
        (folder / f"{name.replace('/', '-')}.{end}").write_bytes(packed)
    assert read(Text(files=(str(folder),))) == [corpus[name] for name in sorted(corpus)]


def test_zstandard_files_of_several_frames_are_read_to_the_end(tmp_path):
    (tmp_path / "x.zst").write_bytes(
        zstandard.compress(b"one ") + zstandard.compress(b"two " * 100_000) + zstandard.compress(b"3")
    )
    assert read(Text(files=(str(tmp_path),))) == [b"one " + b"two " * 100_000 + b"3"]


def test_a_name_with_brackets_is_a_file_and_no_glob(tmp_path):
    (tmp_path / "a[1].txt").write_bytes(b"x")
    assert read(Text(files=(str(tmp_path / "a[1].txt"),))) == [b"x"]


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full.txt").write_bytes(b"x")
    assert read(Text(files=(str(tmp_path),))) == [b"x"]


# JSONL and Parquet


@pytest.mark.parametrize(
    ("name", "pack"), [("x.jsonl", bytes), ("x.json.gz", gzip.compress), ("x.ndjson.zst", zstandard.compress)]
)
def test_jsonl_gives_the_field_of_every_line_however_it_is_packed(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(lines(TEXTS, "body") + b"\n"))
    assert read(Jsonl(files=(str(tmp_path),), field="body")) == [t.encode() for t in TEXTS]


@pytest.mark.parametrize("shard_bytes", [1, 7, 64, 1000, 10**6])
def test_jsonl_cut_into_ranges_loses_and_repeats_nothing(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(reading, "SMALLEST_SHARD", shard_bytes)
    content = lines(TEXTS[:12])
    (tmp_path / "x.jsonl").write_bytes(content)
    source = Jsonl(files=(str(tmp_path),))
    assert read(source) == [t.encode() for t in TEXTS[:12]]
    numbers = [d.number for pieces in reading.shards(source) for p in pieces for d in reading.documents(source, p)]
    assert [json.loads(content[n:].splitlines()[0])["text"] for n in numbers] == TEXTS[:12]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.string_view(),
        pyarrow.binary_view(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ],
    ids=str,
)
def test_parquet_gives_the_columns_rows_in_order(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(reading, "SMALLEST_SHARD", 300)
    values = [t.encode() for t in TEXTS] if "binary" in str(kind) else TEXTS
    table = pyarrow.table({"n": list(range(50)), "body": pyarrow.array(values).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    source = Parquet(files=(str(tmp_path),), column="body")
    assert read(source) == [t.encode() for t in TEXTS]
    assert len(reading.shards(source)) > 3
    assert [d.number for ps in reading.shards(source) for p in ps for d in reading.documents(source, p)] == list(
        range(50)
    )


# Held-out documents


def test_held_out_files_are_disjoint_complete_and_do_not_move_when_files_are_added(tmp_path, corpus):
    source = Text(files=(str(tmp_path / "corpus"),), holdout=0.25)
    train, out = ({f.name for f in reading.source_files(s)} for s in (source, source.heldout()))
    assert train | out == set(corpus) and not train & out and 2 < len(out) < 20
    (tmp_path / "corpus" / "new.txt").write_bytes(b"x")
    assert {f.name for f in reading.source_files(source.heldout())} - {"new.txt"} == out


@pytest.mark.parametrize(
    ("train", "heldout", "refused"),
    [
        (Text(files=("c",), holdout=0.2), Text(files=("c",), holdout=0.2, split="heldout"), False),
        (Text(files=("c",), holdout=0.1), Text(files=("c",), holdout=0.2, split="heldout"), True),
        (Text(files=("c",), holdout=0.3), Text(files=("c",), holdout=0.2, split="heldout"), False),
        (Text(files=("c/**/*.txt",), holdout=0.2), Text(files=("./c/a/*.txt",), holdout=0.2, split="heldout"), True),
        (Text(files=("c", "d"), holdout=0.2), Text(files=("c",), holdout=0.2, split="heldout"), True),
        (Text(files=("c",)), Text(files=("c/a.txt",), holdout=0.2, split="heldout"), True),
        (Text(files=("c/*.txt",)), Text(files=("c/val/*.txt",), holdout=0.2, split="heldout"), False),
        (Text(files=("c/train",)), Text(files=("c/val",), holdout=0.2, split="heldout"), False),
        (Text(files=("c",)), Text(files=("c",)), False),  # evaluated on what is trained on, and says so
        (Text(files=("c",), holdout=0.2), Jsonl(files=("c",), holdout=0.2, split="heldout"), True),
        (Jsonl(files=("c", "d"), holdout=0.2), Jsonl(files=("c",), holdout=0.2, split="heldout"), False),
        (Jsonl(files=("c", "d"), holdout=0.1), Jsonl(files=("c",), holdout=0.2, split="heldout"), True),
    ],
)
def test_held_out_documents_that_training_would_read_are_refused_by_the_patterns_alone(train, heldout, refused):
    mixed = Mixture(sources=(Synthetic(), train), weights=(1, 1))
    for source in (train, mixed):
        with pytest.raises(ConfigError, match="are trained on") if refused else contextlib.nullcontext():
            check_disjoint(source, heldout)


def test_an_id_means_one_text_in_training_and_evaluation():
    text, ids, other = Text(files=("c",), holdout=0.2), Synthetic(), HuggingFace(file="tok.json")
    for heldout in (text.heldout(), ids, Mixture(sources=(ids, text.heldout()), weights=(1, 1))):
        check_tokenizers(text, heldout)
    for heldout in (replace(text.heldout(), tokenizer=other), Mixture(sources=(ids, replace(text, tokenizer=other)), weights=(1, 1))):
        with pytest.raises(ConfigError, match="(?s)different tokenizers.*Bytes.* in training, HuggingFace.* in evaluation"):
            check_tokenizers(text, heldout)


def test_patterns_that_overlap_do_so_because_text_hashes_names_relative_to_them(tmp_path, corpus):
    """Why a part of the files is refused even with the same holdout: training reads some of what is held out there."""
    whole = Text(files=(str(tmp_path / "corpus"),), holdout=0.5)
    part = Text(files=(str(tmp_path / "corpus" / "a"),), holdout=0.5, split="heldout")
    train, out = ({f.path for f in reading.source_files(source)} for source in (whole, part))
    assert train & out


@pytest.mark.parametrize("kind", [Jsonl, Parquet])
def test_held_out_lines_and_rows_are_disjoint_complete_and_the_same_for_equal_texts(tmp_path, kind):
    texts = [f"text {i % 300}" for i in range(600)]
    if kind is Jsonl:
        (tmp_path / "x.jsonl").write_bytes(lines(texts))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    source = kind(files=(str(tmp_path),), holdout=0.2)
    train, out = read(source), read(source.heldout())
    assert sorted(train + out) == sorted(t.encode() for t in texts)
    assert not set(train) & set(out)
    # 300 coins of probability 0.2: five deviations of sqrt(300 * 0.2 * 0.8) = 7 around 60
    assert 25 < len(set(out)) < 95


# What is refused


def refusal(source) -> str:
    with pytest.raises(DataError) as caught:
        read(source)
    return str(caught.value)


def test_a_glob_without_files_is_refused_and_says_what_is_there(tmp_path, corpus):
    said = refusal(Text(files=(f"{tmp_path}/corpus/x/*.md",)))
    assert "no file matches" in said and "corpus holds a/, b/, c/" in said


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "no file matches" in refusal(Text(files=(str(tmp_path / "nothing"),)))


def test_excluding_every_file_is_refused(tmp_path, corpus):
    assert "leaves none of 40 files" in refusal(Text(files=(str(tmp_path / "corpus"),), exclude=("*",)))


def test_a_split_without_a_file_is_refused(tmp_path):
    (tmp_path / "only.txt").write_bytes(b"x")
    assert "none of 1 files falls into the heldout split" in refusal(
        Text(files=(str(tmp_path),), holdout=1e-9).heldout()
    )


@pytest.mark.parametrize(
    ("source", "name", "fix"),
    [(Text, "x.parquet", "Parquet(...)"), (Text, "x.jsonl.gz", "Jsonl(...)"), (Text, "x.bin", "Megatron(...)"),
     (Jsonl, "x.csv", "exclude"), (Parquet, "x.parquet.gz", "exclude"), (Jsonl, "noextension", "exclude")],
)  # fmt: skip
def test_an_extension_that_a_source_does_not_read_is_refused_with_the_one_that_does(tmp_path, source, name, fix):
    (tmp_path / name).write_bytes(b"x")
    said = refusal(source(files=(str(tmp_path),)))
    assert name in said and "rule  " in said and fix in said


@pytest.mark.parametrize(
    ("line", "what"),
    [(b"{broken", "is not JSON"), (b'{"text": "\xff"}', "is not JSON"), (b'["a"]', "is not a JSON object"),
     (b'{"text": 3}', "has no text"), (b"[" * 100_000, "is not JSON"), (b'{"txt": "a"}', "has no field 'text'")],
)  # fmt: skip
def test_a_bad_line_is_refused_by_file_and_number(tmp_path, monkeypatch, line, what):
    monkeypatch.setattr(reading, "SMALLEST_SHARD", 100)
    for name, pack in (("x.jsonl", bytes), ("x.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(lines(TEXTS[:9]) + line + b"\n" + lines(TEXTS[:3])))
        said = refusal(Jsonl(files=(str(tmp_path / name),)))
        assert f"{name}, line 10 {what}" in said


def test_a_missing_field_is_answered_with_the_closest(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"id": 1, "txt": "a"}\n')
    assert "did you mean 'txt'?" in refusal(Jsonl(files=(str(tmp_path),)))


def test_a_missing_column_is_answered_with_the_closest(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "txt": ["a"]}), tmp_path / "x.parquet")
    said = refusal(Parquet(files=(str(tmp_path),)))
    assert "has no column 'text'" in said and "did you mean 'txt'?" in said


def test_a_column_of_numbers_and_a_null_are_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a", None]}), tmp_path / "x.parquet")
    assert "holds int64" in refusal(Parquet(files=(str(tmp_path),), column="id"))
    assert "row 1: 'text' is null" in refusal(Parquet(files=(str(tmp_path),)))


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.zst", "x.parquet"])
@pytest.mark.parametrize("harm", ["cut", "garbled"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, harm):
    path = tmp_path / name
    if name == "x.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    else:
        text = "".join(TEXTS).encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else zstandard.compress(text))
    raw = path.read_bytes()
    path.write_bytes(raw[:-8] if harm == "cut" else b"NONE" + raw[4:-4] + b"NONE")
    said = refusal((Parquet if name == "x.parquet" else Text)(files=(str(tmp_path),)))
    assert f"{name} is damaged or cut short" in said


def test_an_unreadable_file_is_refused_by_name(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"x")
    source = Text(files=(str(tmp_path),))
    pieces = reading.shards(source)[0]
    (tmp_path / "x.txt").unlink()
    with pytest.raises(DataError, match="x.txt cannot be read"):
        list(reading.documents(source, pieces[0]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Text(files="corpus/*.txt"),
        lambda: Text(files=()),
        lambda: Text(files=("x",), holdout=1.5),
        lambda: Text(files=("x",), split="heldout"),
        lambda: replace(Text(files=("x",), holdout=0.1), split="held-out"),
        lambda: Synthetic(kind="walks"),
        lambda: Synthetic(vocab_size=1),
        lambda: Mixture(sources=(Synthetic(),), weights=(1, 2)),
        lambda: Mixture(sources=(Synthetic(),), weights=(0,)),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused_when_it_is_written(make):
    with pytest.raises(ConfigError):
        make()


def test_a_part_of_a_mixture_is_not_what_an_evaluation_reads():
    mixed = Mixture(sources=(Synthetic(), Synthetic(seed=1)), weights=(1, 1))
    assert EvalConfig(data=mixed).max_batches is None
    with pytest.raises(ConfigError, match="its first source's alone"):
        EvalConfig(data=mixed, max_batches=4)
