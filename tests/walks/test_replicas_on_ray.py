"""Replicas on a Ray cluster of two workers on this machine: texts, deaths in the middle, data sets, shared pages."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel import ConfigError, ReplicaError, WeightOnlyConfig
from hf_accel.assets import demo_path
from hf_accel.core.steps.plan import Plan
from hf_accel.measure import shape_config
from hf_accel.replicas import ModelRecipe, generate, handle, run

ROOT = Path(__file__).parents[2]
PLAN = Plan.of([hf_accel.DecodingConfig(), hf_accel.DecoderBlockConfig()])
RECIPE = ModelRecipe(demo_path(), PLAN)
TEXTS = [f"def f{number}(a, b):\n" for number in range(12)]
pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    """A cluster of two CPUs, which is shut down whatever happens."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = (
        f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"  # workers import what is here
    )
    torch.set_num_threads(1)
    ray = pytest.importorskip("ray")  # `ray` of the markers says why
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """What the model alone writes after each text."""
    model, tokenizer = RECIPE.make()
    found = {}
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=60)[0, ids.shape[1] :]
        found[text] = tokenizer.decode(new, skip_special_tokens=True)
    return found


def processes(replicas: Any) -> list[int]:
    return [each["pid"] for each in replicas.report()["replicas"]]


def killed_in_the_middle(replicas: Any) -> threading.Thread:
    """End one of the replicas without a warning, as soon as it works."""
    [doomed, *_] = processes(replicas)

    def kill() -> None:
        time.sleep(0.3)
        os.kill(doomed, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_a_life_with_a_death_in_the_middle(alone: dict[str, str]) -> None:
    with run(RECIPE, replicas=2, health_check_s=1) as replicas:
        first = replicas.report()
        assert [each["threads"] for each in first["replicas"]] == [1, 1]
        assert replicas.generate(TEXTS, max_new_tokens=60) == [alone[text] for text in TEXTS]
        assert "".join(replicas.stream(TEXTS[0], max_new_tokens=60)) == alone[TEXTS[0]]
        ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        assert torch.equal(
            replicas.generate(ids, max_new_tokens=4), RECIPE.make().model.generate(ids, max_new_tokens=4)
        )
        with pytest.raises(ValueError, match="max_new_tokens"):
            replicas.generate("x", max_new_tokens=-1)
        for is_async in (False, True):
            before = set(processes(replicas))
            killing = killed_in_the_middle(replicas)
            many = TEXTS * 3
            if is_async:
                found = asyncio.run(replicas.generate_async(many, max_new_tokens=60))
            else:
                found = replicas.generate(many, max_new_tokens=60)
            killing.join()
            assert found == [alone[text] for text in many]
            deadline = time.monotonic() + 60
            while len(now := set(processes(replicas))) < 2 and time.monotonic() < deadline:
                time.sleep(0.5)
            assert len(now - before) == 1  # another has taken its place
        with pytest.raises(ConfigError, match="already"):
            run(RECIPE, replicas=1)


def test_a_stream_goes_on_after_a_death(alone: dict[str, str]) -> None:
    model, tokenizer = RECIPE.make()
    ids = tokenizer(TEXTS[1], return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=400)[0, ids.shape[1] :]
    with run(RECIPE, replicas=2, health_check_s=1) as replicas:
        found = []
        for piece in replicas.stream(TEXTS[1], max_new_tokens=400):
            found.append(piece)
            if len(found) == 1:  # whichever of them writes
                for pid in processes(replicas):
                    os.kill(pid, signal.SIGKILL)
        assert "".join(found) == tokenizer.decode(new, skip_special_tokens=True)


def test_without_sending_again_a_death_loses_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the handle is for: Ray Serve alone answers an accepted request of a dead replica with an error."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(handle.Tries, "__exit__", lambda *args: False)
    with run(RECIPE, replicas=2, health_check_s=1) as replicas:
        killed_in_the_middle(replicas)
        with pytest.raises(ray.exceptions.RayActorError):
            replicas.generate(TEXTS * 3, max_new_tokens=60)


def fatal() -> tuple[Any, Any]:
    """A model whose accelerator fails at one text."""
    model, tokenizer = RECIPE.make()
    write = model.generate

    def generate(*args: Any, **options: Any) -> Any:
        if options.get("max_new_tokens") == 13:
            raise torch.AcceleratorError("planted")
        return write(*args, **options)

    model.generate = generate
    return model, tokenizer


def test_a_request_that_ends_every_replica_is_refused_and_the_others_are_answered(alone: dict[str, str]) -> None:
    with run(ModelRecipe(fatal), replicas=2, tries=2, health_check_s=1) as replicas:
        with pytest.raises(ReplicaError, match="2 replicas died with this request"):
            replicas.generate("x", max_new_tokens=13)
        assert replicas.generate(TEXTS[:3], max_new_tokens=60) == [alone[text] for text in TEXTS[:3]]


def nothing() -> tuple[Any, Any]:
    raise OSError("planted: no such model")


def test_replicas_that_cannot_start_are_an_error_with_its_reason() -> None:
    with pytest.raises(ReplicaError, match=r"could not be started.*planted: no such model"):
        run(ModelRecipe(nothing), replicas=1)
    with pytest.raises(ConfigError, match="3 replicas of 1 CPUs need 3; the cluster has 2"):
        run(RECIPE, replicas=3)


class Mortal:
    """A model whose process dies once, in the middle of a batch."""

    def __init__(self, mark: Path) -> None:
        model, self.tokenizer = RECIPE.make()
        self.model, self.write, self.mark = model, model.generate, mark
        model.generate = self.generate

    def generate(self, *args: Any, **options: Any) -> Any:
        found = self.write(*args, **options)
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return found
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_data_set_is_written_whole_after_a_death(ray: Any, tmp_path: Path, alone: dict[str, str]) -> None:
    mark = tmp_path / "died"

    def source() -> tuple[Any, Any]:
        mortal = Mortal(mark)
        return mortal.model, mortal.tokenizer

    rows: list[Any] = [{"id": number, "prompt": text} for number, text in enumerate(TEXTS)]
    rows[5]["prompt"] = ""
    options = {"workers": 2, "batch_size": 2, "errors": "column", "max_new_tokens": 60}
    found = generate(ray.data.from_items(rows), ModelRecipe(source), **options).take_all()
    assert mark.exists()
    assert [row["id"] for row in found] == list(range(12))
    assert [row["text"] for row in found] == [None if number == 5 else alone[t] for number, t in enumerate(TEXTS)]
    assert ["A row holds ''" in (row["error"] or "") for row in found] == [number == 5 for number in range(12)]


def test_replicas_share_the_pages_of_packed_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = shape_config("smollm-135m", 12)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_path()).save_pretrained(folder)
    four = [WeightOnlyConfig(bits=4), hf_accel.DecodingConfig()]
    ModelRecipe(folder, four).make()  # keeps the pack
    [pack] = tmp_path.glob("*.hf_accel/*.pack")
    with run(ModelRecipe(folder, four), replicas=2) as replicas:
        replicas.generate([[1, 2, 3]], max_new_tokens=2)
        replicas.generate(["x"] * 6, max_new_tokens=2)
        for pid in processes(replicas):
            maps = Path(f"/proc/{pid}/smaps").read_text()
            found = re.search(rf"{pack}\n((?:[A-Za-z_]+: .*\n)+)", maps)
            assert found is not None
            kilobytes = {name: int(value) for name, value in re.findall(r"(\w+): +(\d+) kB", found[1])}
            private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
            assert kilobytes["Rss"] > pack.stat().st_size / 1024 / 3  # of the embeddings few rows are read
            assert private < 0.1 * kilobytes["Rss"], kilobytes


def test_two_processes_of_accelerate_share_out_prompts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(ROOT / "examples" / "replicas_accelerate.py"), str(tmp_path / "found.json")],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes, 7 prompts, each written once" in done.stdout
    assert "the same texts as one process: True" in done.stdout


def test_the_page_runs(tmp_path: Path) -> None:
    """Blocks that need Ray are fenced as `py`, so that the default run, which has no Ray, leaves them to this."""
    page = (ROOT / "docs" / "replicas.md").read_text()
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True, text=True, timeout=400, env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'text': " in done.stdout
