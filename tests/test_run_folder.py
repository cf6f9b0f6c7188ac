"""A run replaces and removes what is its own, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tiny_run
from rgft.errors import InputError
from rgft.run_folder import OURS, begin, clear, probe_writable, refuse_foreign, sweep
from rgft.spec import RunSpec
from rgft.train import run
from runs import record_of

SPEC = RunSpec(task="trec")
FOREIGN = (
    *("checkpoints/mine.pt", "adapter/mine.safetensors", "error_map.parquet", "error_map.png"),
    *("report.html", "model.safetensors", "model-00001-of-00002.safetensors", "config.json"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
)
RECORDS = ("", "mine", "[1]", '{"schema": "mine"}', '{"status": "ok"}', '{"schema": 1}')


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(output: Path, *, overwrite: bool) -> str:
    """The line with which a run is refused before anything is written."""
    with pytest.raises(InputError) as error:
        begin(SPEC, output, resume=False, overwrite=overwrite)
    (line,) = str(error.value).splitlines()
    return line


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_refuses_the_run(name: str, overwrite: bool, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    line = refused(tmp_path, overwrite=overwrite)
    assert f"holds {name.partition('/')[0]} but" in line
    assert "an empty or a new folder" in line
    assert path.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("text", RECORDS)
def test_foreign_record_refuses_the_run(text: str, overwrite: bool, tmp_path: Path) -> None:
    write(tmp_path / "run.json", text)
    assert "holds run.json but" in refused(tmp_path, overwrite=overwrite)
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == text


def test_link_that_leads_nowhere_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "report.html").symlink_to(tmp_path / "no-such")
    assert "holds report.html but" in refused(tmp_path, overwrite=True)


def test_what_a_run_would_not_touch_does_not_refuse_it(tmp_path: Path) -> None:
    for name in ("notes.txt", ".notes.tmp", "models/config.json", "train.jsonl"):
        write(tmp_path / name)
    assert begin(SPEC, tmp_path, resume=False, overwrite=False)["status"] == "running"
    with pytest.raises(InputError, match=r"holds train\.jsonl but"):
        refuse_foreign(tmp_path, ["train.jsonl"])


@pytest.mark.parametrize("inside", ["adapter", "checkpoints"])
def test_model_inside_what_would_be_removed(inside: str, tmp_path: Path) -> None:
    write(tmp_path / "run.json", '{"schema": 1, "status": "finished"}')
    (tmp_path / inside).mkdir()
    spec = RunSpec(task="trec", model=str(tmp_path / inside))
    with pytest.raises(InputError, match="holds the model"):
        begin(spec, tmp_path, resume=False, overwrite=True)


def test_only_our_unfinished_files_are_swept(tmp_path: Path) -> None:
    kept = [write(tmp_path / name) for name in (".notes.tmp", ".saving/a", ".rgft-notes", "a.tmp")]
    ours = [write(tmp_path / ".rgft-run.json.7.tmp"), write(tmp_path / ".rgft-saving.tmp" / "a")]
    probe_writable(tmp_path)
    sweep(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in ours)


def test_clear_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    kept = [write(tmp_path / name) for name in ("notes.txt", "data/train.jsonl", "weights.pt")]
    outside = write(tmp_path.parent / "outside" / "a")
    (tmp_path / "checkpoints").symlink_to(outside.parent)
    for name in (*FOREIGN[1:], "run.json"):
        write(tmp_path / name)
    clear(tmp_path)
    assert all(path.exists() for path in [*kept, outside])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"notes.txt", "data", "weights.pt", "checkpoints"}


@pytest.mark.parametrize("lr", [1e30, None])
def test_files_of_the_user_survive_a_run(
    lr: float | None, tiny_model: Path, tmp_path: Path
) -> None:
    """One that diverges, and one that ends."""
    data = tiny_run.build_data(tmp_path / "data", rows={"train": 32, "validation": 8})
    output = tmp_path / "o"
    names = ("notes.txt", ".notes.tmp", ".saving/notes.txt", "mine/config.json", "weights.pt")
    mine = [write(output / name) for name in names]
    given = {"model": str(tiny_model), "data": str(data), "settings": {"every": 6}, "lr": lr}
    spec = RunSpec(**given, epochs=2, batch_size=8, evaluations=2)  # type: ignore[arg-type]
    if lr is None:
        run(spec, output)
        run(spec, output, overwrite=True)
        assert record_of(output)["status"] == "finished"
    else:
        with pytest.raises(InputError, match="diverged"):
            run(spec, output)
        assert not [name for name in OURS if list(output.glob(name))]
    assert all(path.read_text(encoding="utf-8") == "mine" for path in mine)


def test_a_folder_can_be_used_again_after_a_run_that_diverged(
    tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    given = {"model": str(tiny_model), "data": str(small_data), "settings": {"every": 6}}
    spec = RunSpec(**given, epochs=2, batch_size=8, evaluations=1)  # type: ignore[arg-type]
    run(spec, tmp_path)
    with pytest.raises(InputError, match="diverged"):
        run(replace(spec, lr=1e30), tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []
    assert run(spec, tmp_path)["status"] == "finished"
