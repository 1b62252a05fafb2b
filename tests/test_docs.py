"""Documentation is true: every Python block and example runs, every public name and config is described."""

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_accel
from hf_accel.cli.doctor import EXTRAS
from hf_accel.core.steps.patcher import Patcher
from hf_accel.kernels.native import ISAS
from hf_accel.measure import SHAPES
from hf_accel.quantization import candidates

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = (
    "quickstart.py",
    "pipeline.py",
    "streaming.py",
    "compare_speed.py",
    "quantize.py",
    "convert_gqa.py",
    "uptrain.py",
    "speculation.py",
    "measure_speculation.py",
    "long_context.py",
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def blocks(page: Path) -> list[tuple[int, str]]:
    """Python blocks of a page with the line each begins in."""
    text = page.read_text()
    return [(text[: match.start()].count("\n") + 2, match.group(1)) for match in BLOCK.finditer(text)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Goals only round weights: no text is written to solve them on.

    One thread: tiny models gain nothing from more, and on a busy machine waiting for a second core takes far longer.
    """
    monkeypatch.setattr(candidates, "MOST_WRITING_S", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run_in_order_in_one_namespace(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, source in blocks(page):
        # the padding makes a traceback name the line of the page
        exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)


def test_pages_have_blocks_to_run() -> None:
    assert {page.name for page in PAGES if blocks(page)} >= {
        "README.md",
        "concepts.md",
        "configs.md",
        "how-it-works.md",
        "quantization.md",
        "speculation.md",
        "reference.md",
        "troubleshooting.md",
        "uptraining.md",
        "qat.md",
        "gqa.md",
        "gptq.md",
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """In this interpreter: starting another one for each costs more than all of them; one does, below."""
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert_shows(name, capfd.readouterr().out)


def assert_shows(name: str, shown: str) -> None:
    assert shown.strip()
    if name == "quickstart.py":
        assert "the same tokens as stock: True" in shown
    if name in {"quantize.py", "convert_gqa.py"}:
        assert "the same tokens after loading: True" in shown
    if name == "compare_speed.py":
        assert "tokens: the same" in shown


def test_an_example_runs_in_an_interpreter_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert_shows("quickstart.py", done.stdout)


@pytest.mark.parametrize("page", [*PAGES, ROOT / ".github" / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links to #{anchor}, which {linked.name} does not have"


@pytest.mark.parametrize("name", hf_accel.__all__)
def test_public_name_is_in_the_reference(name: str) -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()
    assert re.search(rf"^\| `{name}\b", reference, re.MULTILINE), f"add a row for {name} to docs/reference.md"


def test_reference_has_no_names_that_do_not_exist() -> None:
    tables = (ROOT / "docs" / "reference.md").read_text().partition("## Measuring")[0]
    documented = set(re.findall(r"^\| `(\w+)", tables, re.MULTILINE))
    assert documented == set(hf_accel.__all__)


@pytest.mark.parametrize("config", [c for c in Patcher.registry if c.__module__.startswith("hf_accel")])
def test_config_has_one_row(config: type) -> None:
    page = (ROOT / "docs" / "configs.md").read_text()
    first_table = page.partition("## Fields")[0]
    rows = re.findall(rf"^\| `{config.__name__}\(", first_table, re.MULTILINE)
    assert len(rows) == 1, f"docs/configs.md has {len(rows)} rows for {config.__name__}; it needs one"


def test_shapes_are_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()
    assert all(f"`{name}`" in reference for name in SHAPES)


def test_instruction_sets_are_described() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Changing the instruction set")[2]
    assert all(name in page for name in ISAS)


def test_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        extra: tuple(re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in requirements)
        for extra, requirements in project["optional-dependencies"].items()
    }
    assert declared == EXTRAS


def test_extras_that_are_named_exist() -> None:
    # pip only warns about an unknown extra, and then installs too little
    pages = "".join(page.read_text() for page in [*PAGES, ROOT / ".github" / "workflows" / "tests.yml"])
    named = set(re.findall(r"(?:\.|hf-accel)\[(\w+)\]", pages))
    assert "test" in named
    assert named <= EXTRAS.keys()


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == hf_accel.__version__
    assert f"## {hf_accel.__version__}" in (ROOT / "docs" / "changelog.md").read_text()


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    [extraction] = re.findall(r"^test_command=\$\((.*)\)$", script, re.MULTILINE)
    found = subprocess.run(
        ["bash", "-c", extraction], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.strip()
    assert found.endswith(".venv/bin/python -m pytest")
    assert f"```sh\n{found}\n```" in (ROOT / "README.md").read_text()


def test_workflow_runs_the_same_script() -> None:
    assert "- run: .ci/run" in (ROOT / ".github" / "workflows" / "tests.yml").read_text()


def test_issue_templates_have_the_fields_that_are_required() -> None:
    yaml = pytest.importorskip("yaml")  # comes with transformers
    for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys(), path.name
        assert all({"type", "id", "attributes"} <= part.keys() for part in form["body"]), path.name
        json.dumps(form)
