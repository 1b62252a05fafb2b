"""Configurations of kernels: found once per kind of device and shape, kept in a file that may be damaged."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hf_accel.kernels.triton import obstacle, tuning

CPU = torch.device("cpu")
FIRST, SECOND = {"BLOCK": 16, "num_warps": 2}, {"BLOCK": 32, "num_warps": 4}


def found(shape: tuple[int, ...] = (1, 2)) -> tuning.Config | None:
    return tuning.tune("linear", CPU, torch.bfloat16, shape, [FIRST, SECOND], lambda config: 1.0 / config["BLOCK"])


def at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_ACCEL_CACHE", str(folder))
    tuning.forget()
    return tuning.file_of(CPU)


def test_the_fastest_is_kept_for_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = at(tmp_path / "new", monkeypatch)
    assert tuning.chosen("linear", CPU, torch.bfloat16, (1, 2), FIRST) == FIRST
    assert found() == SECOND
    assert tuning.chosen("linear", CPU, torch.bfloat16, (1, 2), FIRST) == SECOND
    assert tuning.chosen("linear", CPU, torch.float16, (1, 2), FIRST) == FIRST
    tuning.forget()  # as another process
    assert tuning.chosen("linear", CPU, torch.bfloat16, (1, 2), FIRST) == SECOND

    def never(config: tuning.Config) -> float:
        raise AssertionError("what is known is not timed again")

    assert tuning.tune("linear", CPU, torch.bfloat16, (1, 2), [FIRST], never) == SECOND
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_candidates_that_fail_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(tmp_path, monkeypatch)

    def seconds(config: tuning.Config) -> float:
        if config is SECOND:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    assert tuning.tune("linear", CPU, "bf16", (3,), [FIRST, SECOND], seconds) == FIRST
    assert tuning.tune("linear", CPU, "bf16", (4,), [SECOND], seconds) is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 1}', '{"version": 0, "found": {}}', '{"version": 1, "found": {"a": 3}}',
                '{"version": 1, "found": {"linear/bfloat16/1/2": {"BLOCK": "x"}}}', "\x00\xff"],
)  # fmt: skip
def test_a_damaged_file_is_as_none_and_is_replaced(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = at(tmp_path, monkeypatch)
    path.write_text(content)
    assert tuning.chosen("linear", CPU, torch.bfloat16, (1, 2), FIRST) == FIRST
    assert found() == SECOND
    assert json.loads(path.read_text())["found"] == {"linear/bfloat16/1/2": SECOND}


def test_a_finding_with_other_names_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = at(tmp_path, monkeypatch)
    path.write_text(json.dumps({"version": 1, "found": {"linear/bfloat16/1/2": {"SIZE": 3}}}))
    assert tuning.chosen("linear", CPU, torch.bfloat16, (1, 2), FIRST) == FIRST


def test_findings_of_others_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = at(tmp_path, monkeypatch)
    found((1,))
    other = json.loads(path.read_text())
    other["found"]["packed/bfloat16/9"] = FIRST
    path.write_text(json.dumps(other))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(found, [(n,) for n in range(8)]))
    assert len(json.loads(path.read_text())["found"]) == 9


def test_a_folder_that_cannot_be_written_costs_the_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    at(tmp_path / "file" / "below", monkeypatch)
    assert found() == SECOND
    assert tuning.chosen("linear", CPU, torch.bfloat16, (1, 2), FIRST) == SECOND


def test_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ACCEL_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert tuning.folder() == Path("~/.cache/hf_accel/tuning").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert tuning.folder() == Path("/x/hf_accel/tuning")
    monkeypatch.setenv("HF_HOME", "/h")
    assert tuning.folder() == Path("/h/hf_accel/tuning")
    monkeypatch.setenv("HF_ACCEL_CACHE", "/a")
    assert tuning.folder() == Path("/a")


def test_nothing_is_timed_in_a_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert found() is None
    assert tuning.chosen("linear", CPU, torch.bfloat16, (1, 2), FIRST) == FIRST


def test_why_kernels_cannot_run() -> None:
    assert obstacle(CPU) == "kernels in Triton are for GPUs, the tensors are on cpu"
