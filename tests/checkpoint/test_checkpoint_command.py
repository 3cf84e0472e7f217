"""`jaxtrain checkpoint`: what each verb prints and returns, and files that other libraries read."""

import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtrain.checkpoint import digest, files, manifest, verify
from jaxtrain.checkpoint.command import main
from jaxtrain.checkpoint.export import export
from jaxtrain.errors import CheckpointError, ConfigError

STATE = {"step": jnp.int32(1), "params": {"w": jnp.arange(6000.0).reshape(2, 3000), "b": jnp.zeros(3, jnp.bfloat16)}}


@pytest.fixture
def run_dir(opened, folder):
    """Step 1: STATE. Step 2: w[1, 2] is 0.25 more, b is gone, c is new, `step` has another dtype."""
    checkpoints = opened()
    params = {"w": STATE["params"]["w"].at[1, 2].add(0.25), "c": jnp.ones(2)}
    for step, state in ((1, STATE), (2, {"step": jnp.uint32(2), "params": params})):
        checkpoints.save(step, state, config={"batch": 8}, data={"examples": 64}, letters={"params": {"w": "DF"}})
    checkpoints.wait()
    return folder.parent


def lines(capsys) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_list_shows_every_checkpoint_and_what_is_unfinished(run_dir, folder, capsys):
    (folder / "3.saving").mkdir()
    assert main(["list", str(run_dir)]) == 0
    head, *rows = lines(capsys)
    assert head == ["step", "GB", "arrays", "digest", "saved"]
    assert [row[0] for row in rows] == ["1", "2", "unfinished"] and rows[0][3] == digest(STATE)[:16]
    (folder / "4").mkdir()  # as a copy that was cut short leaves it
    assert main(["list", f"{run_dir}@2"]) == 0
    assert [row[0] for row in lines(capsys)] == ["step", "2", "damaged", "unfinished"]


def test_show_says_what_the_manifest_says(run_dir, capsys):
    assert main(["show", f"{run_dir}@1"]) == 0
    shown = lines(capsys)
    assert ["step", "1"] in shown and ["config", '{"batch":', "8}"] in shown and ["digest", digest(STATE)] in shown
    content = manifest.read(run_dir / "checkpoints" / "1").arrays["params/w"].content
    assert ["params/w", "float32", "2x3000", "DF", content] in shown


def test_hash_is_the_digest_of_the_state(run_dir, capsys):
    assert main(["hash", f"{run_dir}@1"]) == 0
    assert capsys.readouterr().out == f"{digest(STATE)}\n"


def test_verify_returns_one_and_names_what_is_damaged(run_dir, folder, capsys):
    assert main(["verify", str(folder / "1")]) == 0
    needle = np.asarray(STATE["params"]["w"]).tobytes()
    path = next(path for path in (folder / "1").rglob("*") if path.is_file() and needle in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(needle, needle[:-1] + b"\7"))
    capsys.readouterr()
    assert main(["verify", f"{run_dir}@1"]) == 1
    said = capsys.readouterr().out
    assert path.name in said and "array  params/w does not have the content" in said and "params/b" not in said


def test_verify_reads_every_checkpoint_of_a_run_and_says_once_why_arrays_cannot_be_read(run_dir, folder, capsys):
    assert main(["verify", str(run_dir)]) == 0
    assert capsys.readouterr().out == "step 1 is whole\nstep 2 is whole\n"
    with open(folder / "1" / "state" / "_METADATA", "a") as file:
        file.write("x")
    assert main(["verify", str(run_dir)]) == 1
    first, file, array, last = capsys.readouterr().out.splitlines()
    assert (first, last) == ("step 1 is damaged", "step 2 is whole")
    assert file.startswith("  file   state/_METADATA has ") and array.startswith("  array  all 3 cannot be read: ")
    assert main(["verify", f"{run_dir}@2"]) == 0


def test_a_checkpoint_whose_manifest_is_gone_is_damaged_to_every_verb(run_dir, folder, capsys):
    (folder / "2" / "manifest.json").unlink()
    assert main(["verify", str(run_dir)]) == 1
    assert capsys.readouterr().out == "step 1 is whole\nstep 2 is damaged\n  file   manifest.json is missing\n"
    assert main(["list", str(run_dir)]) == 0
    assert lines(capsys)[-1] == ["damaged", "2"]
    (folder / "1" / "manifest.json").unlink()
    assert main(["verify", f"{run_dir}@1"]) == 1
    with pytest.raises(CheckpointError, match="no checkpoint") as error:
        main(["list", str(run_dir)])
    assert error.value.got == "damaged 1, damaged 2"


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_not_called_damaged(run_dir, folder, capsys, monkeypatch):
    def damage(path):
        files.delete(path)
        return ["file   state is missing"]

    monkeypatch.setattr(verify, "damage", damage)
    assert main(["verify", f"{run_dir}@1"]) == 0
    assert capsys.readouterr().out == "step 1 was deleted meanwhile\n"


def test_where_there_is_no_checkpoint_the_fix_names_one(run_dir, folder):
    (run_dir.parent / "begun" / "checkpoints" / "5.saving").mkdir(parents=True)
    for verb in ("list", "show", "verify"):
        for name, got, fix in (
            ("run@7", "steps 1, 2", f"{run_dir}@2"),
            ("begun", "unfinished 5.saving", f"these have some: {run_dir}"),
            ("nowhere", "none", f"these have some: {run_dir}"),
            (".", "none", f"these have some: {run_dir}"),
        ):
            with pytest.raises(CheckpointError, match="no checkpoint") as error:
                main([verb, str(run_dir.parent / name)])
            assert error.value.got == got and error.value.fix.endswith(fix)


@pytest.mark.parametrize("words", ["export one", "verify one two", "list one --all"])
def test_words_that_a_verb_does_not_take_are_answered_in_our_form(words):
    with pytest.raises(ConfigError, match=f"`jaxtrain checkpoint {words}` cannot be run") as error:
        main(words.split())
    assert error.value.got.startswith(("Missing from", "Unrecognized options"))
    assert error.value.fix.startswith(f"jaxtrain checkpoint {words.split()[0]} --help")


@pytest.mark.parametrize(
    ("words", "what"),
    [("list", "a RUN_DIR"), ("show", "a RUN_DIR"), ("diff one", "two of"), ("export --out x", "a RUN_DIR"), ("diff", "two of")],
)
def test_a_verb_without_its_folders_says_what_it_needs(words, what):
    with pytest.raises(ConfigError, match=f"jaxtrain checkpoint {words.split()[0]} needs {what}") as error:
        main(words.split())
    assert "RUN_DIR[@STEP]" in error.value.rule and "runs/quickstart" in error.value.fix


def test_diff_compares_array_by_array(run_dir, capsys):
    assert main(["diff", f"{run_dir}@1", f"{run_dir}@1"]) == 0
    assert ["3", "of", "3", "arrays", "are", "equal"] in lines(capsys)
    assert main(["diff", f"{run_dir}@1", f"{run_dir}@2"]) == 1
    rows = {row[0]: " ".join(row[1:]) for row in lines(capsys)}
    assert rows["params/w"] == "max |a - b| = 0.25" and rows["step"] == "int32[] and uint32[]"
    assert rows["params/b"].endswith("only in " + rows["params/b"].split()[-1]) and rows["params/b"].endswith("/1")
    assert rows["params/c"].endswith("/2")


def test_exported_parameters_are_read_by_safetensors(run_dir, tmp_path, capsys):
    assert main(["export", f"{run_dir}@1", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'model.safetensors'}\n"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: str(x.dtype) for name, x in tensors.items()} == {"w": "float32", "b": "bfloat16"}
    np.testing.assert_array_equal(tensors["w"], STATE["params"]["w"])
    with pytest.raises(CheckpointError, match="(?s)holds a model already.*fix   another --out"):
        main(["export", f"{run_dir}@1", "--out", str(tmp_path / "out")])


def test_an_export_is_as_open_as_the_umask_says(run_dir, folder, tmp_path):
    before = os.umask(0o027)
    try:
        paths = export(folder / "1", tmp_path / "out", shard_bytes=1)
    finally:
        os.umask(before)
    assert len(paths) == 3 and {path.stat().st_mode & 0o777 for path in paths} == {0o640}


def test_an_export_onto_a_full_disk_is_an_error_and_leaves_nothing_in_the_way(run_dir, folder, tmp_path, monkeypatch):
    def save_file(tensors, path, metadata):
        if path.exists() or "00002" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(b"first")

    monkeypatch.setattr("jaxtrain.checkpoint.export.save_file", save_file)
    with pytest.raises(CheckpointError, match="(?s)cannot write into.*No space left on device.*fix"):
        export(folder / "1", tmp_path / "out", shard_bytes=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_large_exports_are_cut_into_files_with_an_index(opened, folder, tmp_path):
    params = {"embed": jnp.ones((4, 25)), "blocks": {"q": jnp.arange(100.0), "k": jnp.zeros((0, 2))}, "head": jnp.ones(50)}
    checkpoints = opened()
    checkpoints.save(1, {"params": params}, config={}, data={})
    checkpoints.wait()
    paths = export(folder / "1", tmp_path, shard_bytes=600)
    index = json.loads(paths[-1].read_text())
    tensors = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert [path.name for path in paths] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"
    ]  # fmt: skip
    assert set(tensors) == {"embed", "blocks.q", "blocks.k", "head"} and index["metadata"]["total_size"] == 1000
    np.testing.assert_array_equal(tensors["blocks.q"], params["blocks"]["q"])


def test_an_unknown_verb_is_answered_with_the_closest(capsys):
    with pytest.raises(ConfigError, match="did you mean 'verify'"):
        main(["verfy"])
    assert main(["--help"]) == 0 and "verify" in capsys.readouterr().out
