"""The table of docs/architectures.md: for each architecture which of its layers run natively, and why others do not.

Run as a program it walks the model types that it is given, or all, and writes their rows into the page; the text of
each must be stock's before its row is written.
"""

from __future__ import annotations

import copy
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "architectures.md"
if __name__ == "__main__":
    sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]

import torch  # noqa: E402
from architectures import CannotBuild, architectures, tiny  # noqa: E402
from comparison import assert_same_outcome, run  # noqa: E402
from models import padded, prompt  # noqa: E402
from speculating import FEW_TOKENS, always  # noqa: E402
from test_discovery_layers import counted  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

import hf_accel  # noqa: E402
from hf_accel.core.config import Config  # noqa: E402
from hf_accel.core.model.anatomy import Anatomy  # noqa: E402
from hf_accel.errors import HfAccelError  # noqa: E402
from hf_accel.layers.block import NativeLayer  # noqa: E402

REPEATING = torch.tensor([[3, 4, 5, 6, 3, 4, 5, 6, 3, 4]])
CALLS: dict[str, Callable[[Any], Any]] = {
    "greedy": lambda model: model.generate(prompt(1), max_new_tokens=16, do_sample=False),
    "sampled": lambda model: model.generate(prompt(2), max_new_tokens=12, do_sample=True, top_k=20),
    "left-padded": lambda model: model.generate(**padded([5, 11, 3]), max_new_tokens=14, do_sample=False),
}
DRAFTED: dict[str, Callable[[Any], Any]] = {
    "drafted": lambda model: model.generate(REPEATING, max_new_tokens=24, do_sample=False, suppress_tokens=FEW_TOKENS),
    "drafted, sampled": lambda model: model.generate(
        **padded([9, 3]), max_new_tokens=16, do_sample=True, suppress_tokens=FEW_TOKENS
    ),
}
ROW = re.compile(r"^\| `(.*?)` \| (\d+) \| (\d+) \| (\d+) \| (.*) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """How many layers of a tiny model run natively, as a whole or with their feed-forward module as it is, or not."""

    model_type: str
    whole: int
    half: int
    own: int
    reason: str

    def __str__(self) -> str:
        return f"| `{self.model_type}` | {self.whole} | {self.half} | {self.own} | {self.reason} |"


def causal() -> list[str]:
    """Return the model types of transformers' registries of causal and of image-text models."""
    names = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    kinds = {kind for name in names for kind in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", ())}
    return sorted(kinds & architectures().keys())


def walked(model_type: str) -> tuple[Row, list[str]]:
    """Return the row of an architecture, and how its text differs from stock's.

    Raises:
        CannotBuild: there is no tiny model of it that generates.
    """
    stock = tiny(model_type)
    if stock.config.is_encoder_decoder:
        raise CannotBuild("an encoder-decoder model")
    row = Row(model_type, 0, 0, 0, "")
    for blocks in ([hf_accel.DecoderBlockConfig()], []):
        model = copy.deepcopy(stock)
        try:
            hf_accel.optimize(model, [*blocks, hf_accel.KVCacheConfig(), hf_accel.DecodingConfig()])
            break
        except HfAccelError as error:
            row = Row(model_type, 0, 0, _count(stock), _reason(str(error)))
    else:
        return row, []
    with counted() as calls:
        found = _differences(stock, model, CALLS)
    if blocks:
        row = _row(model_type, model, calls)
    hf_accel.restore(model)
    try:
        steps: list[Config] = [*blocks, hf_accel.KVCacheConfig(), hf_accel.DecodingConfig(), always("lookup")]
        hf_accel.optimize(model, steps)
    except HfAccelError:  # drafts are refused
        return row, found
    return row, found + _differences(stock, model, DRAFTED)


def _differences(stock: Any, model: Any, calls: dict[str, Callable[[Any], Any]]) -> list[str]:
    found = []
    for name, call in calls.items():
        try:
            assert_same_outcome(run(call, stock), run(call, model))
        except AssertionError as difference:
            found.append(f"{name}: {difference}"[:300])
    return found


def _row(model_type: str, model: Any, calls: list[Any]) -> Row:
    """Return how many layers were among the native calls, whole or half."""
    steps = [module.step for module in model.modules() if isinstance(module, NativeLayer)]
    run = [step.block.form for step in steps if step.kernel in calls]
    halves = sum(form.feed_forward is not None for form in run)
    skipped = [skip.reason for skip in hf_accel.report(model).skipped if "runs as it is" in skip.reason]
    if len(run) < len(steps):
        skipped += ["its keys and values go to a cache of its own"] * (len(steps) - len(run))
    return Row(model_type, len(run) - halves, halves, len(skipped), _reason(skipped[0]) if skipped else "")


def _count(stock: Any) -> int:
    """Return how many layers a model has, as discovery counts them."""
    anatomy = Anatomy.of(stock)
    return len(anatomy.known) if anatomy.blocks or anatomy.known else 0


def _reason(sentence: str) -> str:
    """Return why a layer runs as it is, without which layer it is."""
    line = " ".join(sentence.split())
    for start in ("they run as they are: ", "runs as it is: ", "DecoderBlockConfig: "):
        line = line.rpartition(start)[2] if start in line else line
    return line.rstrip(".").replace("|", "/")[:160]


def rows(page: str) -> dict[str, Row]:
    """Return the rows of a page by model type."""
    return {kind: Row(kind, int(a), int(b), int(c), reason) for kind, a, b, c, reason in ROW.findall(page)}


def with_rows(page: str, found: dict[str, Row]) -> str:
    """Return a page with these rows, and what they sum up to."""
    head = page.partition("<!-- rows -->")[0]
    some = sum(row.whole > 0 for row in found.values())
    half = sum(row.whole == 0 < row.half for row in found.values())
    own = len(found) - some - half
    summed = (
        f"{len(found)} architectures: {some} with whole layers in one native call, {half} with the attention half of "
        f"layers, {own} whose layers run as they are."
    )
    head = re.sub(r"^\d+ architectures: .*$", summed, head, flags=re.MULTILINE)
    table = ["| model type | whole | attention half | as they are | why |", "|---|---|---|---|---|"]
    return head + "\n".join(["<!-- rows -->", "", *table, *map(str, (found[kind] for kind in sorted(found))), ""])


def main(kinds: list[str]) -> None:
    """Walk architectures and write their rows; what differs from stock is printed, and has no row."""

    def too_long(*given: Any) -> None:
        raise CannotBuild("it takes more than two minutes")

    signal.signal(signal.SIGALRM, too_long)
    for kind in kinds or causal():
        signal.alarm(120)
        try:
            row, differences = walked(kind)
        except CannotBuild as reason:
            print(f"{kind}: left out, {reason}", flush=True)
            continue
        except Exception as error:
            print(f"{kind}: {type(error).__name__}: {error}"[:600], flush=True)
            continue
        finally:
            signal.alarm(0)
        print(row, *differences, sep="\n    ", flush=True)
        if not differences:
            page = PAGE.read_text()
            PAGE.write_text(with_rows(page, rows(page) | {kind: row}))


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
