"""GGUF files that are damaged, incomplete or strange: an error that names file and tensor, or stock's path with the
reason."""

from __future__ import annotations

import builtins
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import SIZES, build, metadata, of_kind, write
from models import Tiny, prompt, randomize
from transformers import AutoConfig, AutoModelForCausalLM

import hf_accel
from hf_accel.errors import CheckpointError, ConfigError, MissingDependencyError
from hf_accel.quantization.gguf.loading import load_gguf
from hf_accel.quantization.gguf.package import gguf_package

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    write(path, "llama", build("llama"), of_kind("Q4_0", table="F16"))
    return path.read_bytes()


def test_a_file_cut_short_anywhere_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for length in [0, 3, 4, 20, *range(24, 2500, 97), *range(2500, len(content), 1777), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"x\.gguf.*(cut short|cannot be read|does not begin)"):
            load_gguf(path)


def test_changed_bytes_of_the_header_are_an_error_or_change_nothing_but_names(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    rng = np.random.default_rng(0)
    failed = 0
    for at in rng.integers(0, 2500, 60):
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(changed))
        try:
            load_gguf(path)
        except CheckpointError:
            failed += 1
    assert failed > 15


def without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def beside(tensors: Tensors) -> None:
    tensors["blk.0.attn_q_norm.weight"] = np.ones(32, np.float32)


def narrower(tensors: Tensors) -> None:
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"][:-1]


def infinite(tensors: Tensors) -> None:
    tensors["blk.1.ffn_up.weight"][3, 40] = np.inf


TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing": (without("blk.1.ffn_up.weight"), "lacks the tensor blk.1.ffn_up.weight"),
    "norm missing": (without("output_norm.weight"), "lacks the tensor output_norm.weight"),
    "table missing": (without("token_embd.weight"), "lacks the tensor token_embd.weight"),
    "left over": (beside, "blk.0.attn_q_norm.weight belongs to no part"),
    "another shape": (narrower, "blk.1.ffn_up.weight: its shape is (95, 64)"),
    "no numbers": (infinite, "blk.1.ffn_up.weight is damaged"),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_the_metadata_are_named(case: str, tmp_path: Path) -> None:
    change, message = TENSORS[case]
    write(tmp_path / "x.gguf", "llama", build("llama"), of_kind("Q4_0"), change)
    with pytest.raises(CheckpointError) as error:
        load_gguf(tmp_path / "x.gguf")
    assert message in str(error.value)
    assert "x.gguf" in str(error.value) or case == "no numbers"


def patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) >= 1
    return content.replace(old, new, 1)


def of_type(content: bytes, name: str, number: int) -> bytes:
    at = content.index(name.encode()) + len(name) + 4 + 16
    return content[:at] + struct.pack("<I", number) + content[at + 4 :]


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "no GGUF": (lambda c: b"GGML" + c[4:], "does not begin with GGUF"),
    "version": (lambda c: c[:4] + struct.pack("<I", 9) + c[8:], "of version 9"),
    "byte order": (lambda c: c[:4] + struct.pack(">I", 3) + c[8:], "another byte order"),
    "type": (lambda c: of_type(c, "blk.0.ffn_up.weight", 99), "is of type 99"),
    "type without blocks": (lambda c: of_type(c, "blk.0.ffn_up.weight", 15), "Q8_K"),
    "architecture": (lambda c: patched(c, b"\x05" + b"\0" * 7 + b"llama", b"\x05" + b"\0" * 7 + b"lemma"), "'lemma'"),
    "key": (lambda c: patched(c, b"llama.block_count", b"llama.block_cuont"), "lack llama.block_count"),
    "scaling": (lambda c: c, "scaled by 'yarn'"),
    "parts": (lambda c: c, "one of 3 parts"),
}


@pytest.mark.parametrize("case", BYTES)
def test_what_nobody_reads_is_refused_with_the_reason(case: str, content: bytes, tmp_path: Path) -> None:
    change, message = BYTES[case]
    path = tmp_path / "x.gguf"

    def describe(writer: gguf.GGUFWriter) -> None:
        if case == "scaling":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        if case == "parts":
            writer.add_uint16("split.count", 3)

    if case in ("scaling", "parts"):
        write(path, "llama", build("llama"), of_kind("Q4_0", table="F16"), describe=describe)
    else:
        path.write_bytes(change(content))
    with pytest.raises(CheckpointError) as error:
        load_gguf(path)
    assert message in str(error.value)


def test_an_architecture_without_a_row_is_loaded_by_stock_with_the_reason(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"num_key_value_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("stablelm", **sizes)).eval()
    randomize(model, Tiny("stablelm", sizes))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STABLELM, 2)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "stablelm")
    metadata(writer, model.config)
    writer.add_layer_norm_eps(1e-5)
    writer.add_name("x")
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{table.get_name(stem)}.{suffix}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = load_gguf(tmp_path / "x.gguf")
    assert "'stablelm' is not known here: stock transformers loaded it" in found.expanded
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf").eval()
    assert torch.equal(found.model(prompt()).logits, stock(prompt()).logits)
    loaded = hf_accel.load(tmp_path / "x.gguf", [hf_accel.DecodingConfig()])
    assert "stock transformers loaded it" in hf_accel.report(loaded).applied[0].summary


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_options_that_a_file_cannot_serve_are_refused(content: bytes, tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "x.gguf", content)
    with pytest.raises(ConfigError, match="packed and mapped as it is"):
        hf_accel.load(path, [], cache=True)
    with pytest.raises(ConfigError, match="memory_budget_bytes=1000"):
        hf_accel.load(path, [], memory_budget_bytes=1000)
    assert hf_accel.load(path, [], memory_budget_bytes=10**8) is not None


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = builtins.__import__

    def missing(name: str, *given: Any, **options: Any) -> Any:
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return right(name, *given, **options)

    monkeypatch.setattr("importlib.import_module", lambda name: missing(name))
    with pytest.raises(MissingDependencyError, match=r"hf-accel\[gguf\]"):
        gguf_package()
    with pytest.raises(MissingDependencyError):
        hf_accel.export_gguf(build("llama"), tmp_path / "x.gguf")
