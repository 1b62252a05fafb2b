"""Checkpoints of GPTQ, AutoRound and AWQ that are damaged, contradict themselves or are of unknown layouts."""

from __future__ import annotations

import copy
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import UP, Written, described, shuffled
from quantized_files import logits, wide
from safetensors.torch import load_file, save_file
from test_gptq_files import AUTOROUND, AWQ
from test_quantized_fuzz import VALUES, changed, outcome, paths

import hf_accel
from hf_accel.ops.affine import Affine, Scheme
from hf_accel.quantization.files.checkpoint import Checkpoint
from hf_accel.quantization.files.formats import to_tensors
from hf_accel.quantization.files.integrity import stamp
from hf_accel.quantization.files.layout import Source
from hf_accel.quantization.files.pack_quantized import PackQuantized

Q = "model.layers.0.self_attn.q_proj"
FILE = "model.safetensors"
KEPT = tempfile.TemporaryDirectory()


def refused(folder: Path, *named: str) -> str:
    with pytest.raises(hf_accel.CheckpointError) as error:
        hf_accel.from_pretrained(folder)
    for text in named:
        assert text in str(error.value)
    return str(error.value)


def cut(suffix: str, rows: int | None, columns: int | None) -> Any:
    name = f"{UP}.{suffix}"
    return lambda tensors: tensors.update({name: tensors[name][:rows, :columns].clone()})


def filled(suffix: str, value: float) -> Any:
    return lambda tensors: tensors[f"{UP}.{suffix}"].fill_(value)


@pytest.mark.parametrize(
    "suffix, change",
    [
        ("qweight", lambda t: t.pop(f"{UP}.qweight")),
        ("qzeros", lambda t: t.pop(f"{UP}.qzeros")),
        ("scales", lambda t: t.pop(f"{UP}.scales")),
        ("qweight", cut("qweight", -1, None)),
        ("qweight", cut("qweight", None, -32)),
        ("qzeros", cut("qzeros", None, -1)),
        ("scales", cut("scales", -1, None)),
        ("qweight", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].short()})),
        ("qzeros", lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"].float()})),
        ("scales", lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].int()})),
        ("scales", filled("scales", float("nan"))),
        ("scales", filled("scales", float("inf"))),
        ("qzeros", filled("qzeros", 0)),
        ("qzeros", lambda t: t[f"{UP}.qzeros"][0].fill_(-2004318072)),  # 8 in one group, 7 in the others
        ("g_idx", filled("g_idx", 2)),
        ("g_idx", filled("g_idx", -3)),
        ("g_idx", filled("g_idx", 0)),
        ("g_idx", lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"][:-1].clone()})),
        ("g_idx", lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"].float()})),
        ("bias", lambda t: t.update({f"{UP}.bias": torch.ones(96)})),
        ("other", lambda t: t.update({f"{UP}.other": torch.ones(96)})),
    ],
)
def test_wrong_tensors_are_named_with_their_file(suffix: str, change: Any, tmp_path: Path) -> None:
    written = rewritten(tmp_path)
    written.edit(change)
    refused(tmp_path, f"{UP}.{suffix}", str(tmp_path / FILE))


@functools.cache
def whole() -> Written:
    """A folder of version 1 that nothing is wrong with."""
    return Written(Path(KEPT.name), "v1", described())


def rewritten(folder: Path) -> Written:
    """A copy of it to damage."""
    written = copy.copy(whole())
    written.tensors = {name: tensor.clone() for name, tensor in written.tensors.items()}
    written.folder = shutil.copytree(written.folder, folder, dirs_exist_ok=True)
    return written


@pytest.mark.parametrize("layout, description", [("awq", AWQ), ("gemv", AWQ | {"version": "gemv"})])
@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_wrong_tensors_of_awq(suffix: str, layout: str, description: dict[str, Any], tmp_path: Path) -> None:
    written = Written(tmp_path, layout, description)
    written.edit(cut(suffix, -1, None))
    refused(tmp_path, f"{UP}.{suffix}", str(tmp_path / FILE))


@pytest.mark.parametrize("kept", [0, 500, 0.6, 0.999])
def test_truncated_files(kept: float, tmp_path: Path) -> None:
    rewritten(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    refused(tmp_path, f"{FILE} is damaged, truncated")


UNKNOWN: list[tuple[str, dict[str, Any]]] = [
    ("'gptq_p'", described(checkpoint_format="gptq_p")),
    ("'gptq_p'", described(format="gptq_p")),
    ("'marlin'", described(is_marlin_format=True)),
    ("'marlin'", described(checkpoint_format="marlin")),
    ("'bitblas'", described(checkpoint_format="bitblas")),
    ("7", described(checkpoint_format=7)),
    ("both the GPTQ layout 'gptq' and 'gptq_v2'", described(checkpoint_format="gptq", format="gptq_v2")),
    ("5 bits", described(5)),
    ("'4' bits", described("4")),  # type: ignore[arg-type]
    ("None bits", {"quant_method": "gptq"}),
    ("groups of 0", described(group=0)),
    ("'int16'", described(pack_dtype="int16")),
    ("sym='yes'", described(sym="yes")),
    ("dynamic", described(dynamic=[1])),
    ("dynamic", described(dynamic={"a": 4})),
    ("regular expression", described(dynamic={"+:(": {"bits": 4}})),
    ("6 bits", described(dynamic={".*": {"bits": 6}})),
    ("'auto_round:fp8_static'", AUTOROUND | {"packing_format": "auto_round:fp8_static"}),
    ("'auto_round:exllamav2'", AUTOROUND | {"backend": "auto_round:exllamav2"}),
    ("'mx_fp'", AUTOROUND | {"packing_format": "auto_round", "data_type": "mx_fp"}),
    ("8 bits", AUTOROUND | {"packing_format": "auto_round", "act_bits": 8}),
    ("rotated", AUTOROUND | {"packing_format": "auto_round", "rotation_config": {"a": 1}}),
    ("extra_config", AUTOROUND | {"packing_format": "auto_round", "extra_config": [1]}),
    ("AWQ weights of 3 bits", AUTOROUND | {"packing_format": "auto_round:auto_awq", "bits": 3}),
    ("'marlin'", AWQ | {"version": "marlin"}),
    ("AWQ weights of 8 bits", AWQ | {"bits": 8}),
    ("'hqq'", {"quant_method": "hqq"}),
    ("None", {"bits": 4}),
]


@pytest.mark.parametrize("named, description", UNKNOWN)
def test_unknown_labels_are_refused_by_name(named: str, description: dict[str, Any], tmp_path: Path) -> None:
    wide(num_hidden_layers=1).config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"quantization_config": description}))
    assert "config.json describes" in refused(tmp_path, named)


DESCRIPTIONS = {
    "v1": described(dynamic={".*down_proj": {"bits": 4}}, checkpoint_format="gptq", lm_head=False),
    "v2": AUTOROUND | {"packing_format": "auto_round", "extra_config": {".*down_proj": {"bits": 4}}},
    "awq": AWQ,
}


@pytest.mark.parametrize("layout", DESCRIPTIONS)
def test_descriptions_with_values_of_wrong_types(layout: str, tmp_path: Path) -> None:
    """An error of ours, or the same logits; never another error, and never other logits."""
    written = Written(tmp_path, layout, DESCRIPTIONS[layout])
    expected = logits(hf_accel.from_pretrained(tmp_path))
    assert len(written.weights) == 7
    content = json.loads((tmp_path / "config.json").read_text())
    places = list(paths(content["quantization_config"], ("quantization_config",)))
    cases = [(place, value) for place in places for value in VALUES]
    for place, value in random.Random(3).sample(cases, 40):
        (tmp_path / "config.json").write_text(json.dumps(changed(content, place, value)))
        assert outcome(tmp_path, expected) == "", (place, value)


def test_groups_that_kernels_do_not_have(tmp_path: Path) -> None:
    Written(tmp_path, "v1", described(group=16), group=16)
    refused(tmp_path, "groups of 16 columns", Q)


def test_an_order_that_only_a_missing_index_tells(tmp_path: Path) -> None:
    Written(tmp_path, "v1", described(desc_act=True), index=shuffled(32), has_index=False)
    refused(tmp_path, f"{Q}.g_idx", "missing")
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"]["meta"] = {"static_groups": True}  # solved in an order, stored in none
    (tmp_path / "config.json").write_text(json.dumps(content))
    hf_accel.from_pretrained(tmp_path)


def test_symmetric_by_its_label_and_not_by_its_zeros(tmp_path: Path) -> None:
    Written(tmp_path, "v1", described(), symmetric=False)
    refused(tmp_path, f"{Q}.qzeros", "label says that it is symmetric", "zeros from 0 to 15")


@pytest.mark.parametrize("label, version", [("gptq", 2), ("gptq_v2", 1)])
def test_not_symmetric_by_its_label_and_symmetric_by_the_other_version(
    label: str, version: int, tmp_path: Path
) -> None:
    Written(tmp_path, f"v{version}", described(sym=False, checkpoint_format=label))
    refused(tmp_path, f"{Q}.qzeros", "cannot be decided")


@pytest.mark.parametrize("first_is_symmetric", [True, False])
def test_a_label_that_lies_is_not_trusted_for_other_products(first_is_symmetric: bool, tmp_path: Path) -> None:
    """One product is symmetric and shows version 2; the label of version 1 is all there is to tell of the others."""
    symmetric = Q if first_is_symmetric else "model.layers.0.mlp.down_proj"
    description = described(sym=False, dynamic={rf"{symmetric}$".replace(".", r"\."): {"sym": True}})
    written = Written(tmp_path, "v2", description, symmetric=False)
    written.edit(lambda tensors: tensors[f"{symmetric}.qzeros"].fill_(-2004318072))
    refused(tmp_path, "qzeros", symmetric, "Correct the label")


def test_zeros_that_their_packer_destroyed(tmp_path: Path) -> None:
    """Numbers below zero, joined by OR, set every bit above them: what old packers made of a zero of 0."""
    written = Written(tmp_path, "v1", described(sym=False), symmetric=False)

    def destroyed(tensors: dict[str, Any]) -> None:
        words = []
        for row in tensors[f"{Q}.qzeros"].tolist():
            words.append([])
            for word in row:
                zeros = [((word + 0x11111111) >> 4 * field) & 15 for field in range(8)]
                joined = 0
                for field, zero in enumerate(zeros):
                    joined |= (zero - 1) << 4 * field
                joined &= 0xFFFFFFFF
                words[-1].append(joined - (1 << 32) if joined >> 31 else joined)
        tensors[f"{Q}.qzeros"] = torch.tensor(words, dtype=torch.int32)

    written.edit(destroyed)
    refused(tmp_path, f"{Q}.qzeros", "cannot be mended")


def test_two_descriptions_that_contradict_each_other(tmp_path: Path) -> None:
    rewritten(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps(described(sym=False)))
    refused(tmp_path, "sym=True", "sym=False", "quantize_config.json")
    (tmp_path / "quantize_config.json").write_text("{")
    refused(tmp_path, "quantize_config.json is damaged")


def test_packed_products_that_the_rules_exclude(tmp_path: Path) -> None:
    Written(tmp_path, "v1", described(dynamic={"-:.*q_proj": {}}))
    refused(tmp_path, f"{Q}.qweight", "says that it is not quantized")


@pytest.mark.parametrize("columns", [10, 20])
def test_three_bits_whose_layout_cannot_be_told(columns: int, tmp_path: Path) -> None:
    """Columns that take as many words in ten codes each as in the dense stream; ours are known by their stamp."""
    codes = torch.randint(-4, 4, (20, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    weight = Affine(codes, torch.ones(20, 1), None, Scheme(3))
    tensors = {f"a.{suffix}": tensor for suffix, tensor in to_tensors(weight, torch.float32).items()}
    save_file(tensors, tmp_path / FILE)
    layout = PackQuantized(Scheme(3))
    with pytest.raises(hf_accel.CheckpointError, match=r"a\.weight_packed: .*nothing says which it is"):
        layout.read(Source(Checkpoint(tmp_path, "model"), "a"), 20, columns)
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, metadata=stamp({}, tensors))
    found = layout.read(Source(Checkpoint(tmp_path, "model"), "a"), 20, columns).weight
    assert torch.equal(found.codes, codes)
