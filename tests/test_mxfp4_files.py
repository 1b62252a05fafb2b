"""gpt-oss checkpoints with experts in MXFP4: read bit by bit, and computed as stock transformers dequantizes them.

The packer here is written from the specification; where stock is compared with, it expands the experts itself.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import made, model_of
from models import SMALL, Tiny
from quantized_files import difference, logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config

import hf_accel
from hf_accel import ExpertOffloadConfig, GPTQConfig, WeightOnlyConfig
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops import fp4
from hf_accel.ops.affine import Scheme, quantize
from hf_accel.quantization import QuantizedLinear
from hf_accel.quantization.files import experts as experts_files
from hf_accel.quantization.modules.experts import QuantizedExperts

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
HIDDEN, INNER, EXPERTS = 64, 96, 4
GPT_OSS = Tiny(
    "gpt_oss",
    SMALL
    | {"hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": 16}
    | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
)
FIRST = "model.layers.0.mlp.experts"
DESCRIPTION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}
KEPT = tempfile.TemporaryDirectory()


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks [experts, N, K / 32, 16] and scales [experts, N, K / 32] of weights [experts, N, K].

    A scale is the largest power of two not above the largest magnitude, over 4; a value the nearest of the sixteen.
    Every other zero is one with a sign, which says the same.
    """
    groups = weight.double().unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    patterns = (groups / exponents.exp2()[..., None]).unsqueeze(-1).sub(VALUES).abs().argmin(-1).to(torch.uint8)
    patterns[..., ::2] |= torch.where(patterns[..., ::2] == 0, 8, 0).to(torch.uint8)
    return patterns[..., ::2] | patterns[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the weights [experts, N, K] that blocks and scales stand for."""
    values = torch.stack((VALUES[(blocks & 15).long()], VALUES[(blocks >> 4).long()]), dim=-1).flatten(-2)
    return (values * (scales.double() - 127).exp2()[..., None]).flatten(-2)


@functools.cache
def _written() -> Path:
    folder = Path(KEPT.name) / "gpt_oss"
    model = model_of(GPT_OSS)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed(2 * tensor.transpose(1, 2))
        else:
            tensors[name] = tensor.clone()
    model.config.architectures = ["GptOssForCausalLM"]
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": DESCRIPTION}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written(folder: Path) -> Path:
    """Return a folder of its own with the checkpoint."""
    shutil.copytree(_written(), folder, dirs_exist_ok=True)
    return folder


def stock(dtype: torch.dtype = torch.float32, folder: Path | None = None) -> Any:
    """Return the model with its experts expanded by transformers."""
    options: dict[str, Any] = {"quantization_config": Mxfp4Config(dequantize=True), "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder or _written(), dtype=dtype, **options).eval()


def experts(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


def changed(folder: Path, change: Any) -> Path:
    """Return a copy of the checkpoint whose tensors were changed."""
    tensors = load_file(written(folder) / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def test_the_packer_here_is_what_stock_undoes() -> None:
    tensors = load_file(_written() / "model.safetensors")
    for part in ("gate_up_proj", "down_proj"):
        found = unpacked(tensors[f"{FIRST}.{part}_blocks"], tensors[f"{FIRST}.{part}_scales"])
        expected = getattr(experts(stock())[0], part)
        assert torch.equal(found.transpose(1, 2).float(), expected)


def test_every_bit_is_that_of_the_file_and_rows_of_gate_lie_first() -> None:
    tensors, model = load_file(_written() / "model.safetensors"), hf_accel.from_pretrained(_written())
    for index, module in enumerate(experts(model)):
        assert type(module) is QuantizedExperts
        prefix = f"model.layers.{index}.mlp.experts"
        for part, products in (("gate_up_proj", module.gate_up_proj), ("down_proj", module.down_proj)):
            stored = [tensors[f"{prefix}.{part}_{kind}"] for kind in ("blocks", "scales", "bias")]
            assert len(products) == EXPERTS
            for expert, product in enumerate(products):
                blocks, scales, bias = (tensor[expert] for tensor in stored)
                if part == "gate_up_proj":
                    blocks, scales, bias = (torch.cat((t[::2], t[1::2])) for t in (blocks, scales, bias))
                assert product.scheme.code_book == "fp4"
                found = product.packed.to_mxfp4()
                assert torch.equal(found[0], blocks.flatten(1))
                assert torch.equal(found[1], scales)
                assert torch.equal(product.bias, bias)
    assert bool((tensors[f"{FIRST}.down_proj_blocks"] & 15 == 8).any()), "zeros with a sign are among them"


def test_without_rounded_activations_it_is_the_stock_model() -> None:
    """Products in fp64 are computed on the values: everything but the native kernels is compared exactly."""
    ours, theirs = hf_accel.from_pretrained(_written(), dtype=torch.float64), stock(torch.float64)
    assert difference(logits(ours).double(), logits(theirs).double()) < 1e-6
    ids = torch.tensor([[0, 0, 5, 9, 11], [3, 8, 21, 4, 60]])
    mask = (ids > 0).long()
    one, two = (
        model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False) for model in (ours, theirs)
    )
    assert torch.equal(one, two)


def rounded(x: Tensor) -> Tensor:
    """Return activations [K] as products in few bits take them: 255 codes per 32 columns."""
    blocks = x.view(-1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    return ((blocks * (127 / largest)).round() * (largest / 127)).flatten()


def twin(module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return what stock's experts give, token by token, where activations are rounded before each product."""
    result = torch.zeros_like(hidden)
    for token, (chosen, shares) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            joint = rounded(hidden[token]) @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
            gate, up = joint[::2].clamp(max=module.limit), joint[1::2].clamp(-module.limit, module.limit)
            inner = (up + 1) * gate * torch.sigmoid(module.alpha * gate)
            result[token] += share * (rounded(inner) @ module.down_proj[expert] + module.down_proj_bias[expert])
    return result


@pytest.mark.native
def test_native_products_are_off_by_rounded_activations_alone() -> None:
    model, theirs = hf_accel.from_pretrained(_written()), stock()
    generator = torch.Generator().manual_seed(3)
    for ours, module in zip(experts(model), experts(theirs), strict=True):
        hidden = 2 * torch.randn(9, HIDDEN, generator=generator)
        ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(9)])
        weights = torch.rand(9, 2, generator=generator)
        with torch.no_grad():
            found, expected = ours(hidden, ids, weights), twin(module, hidden, ids, weights)
            plain = module(hidden, ids, weights)
        assert difference(found, expected) < 2e-3  # a last bit may send an activation to the next code
        assert difference(found, expected) < difference(found, plain) / 4
    assert difference(logits(model), logits(theirs)) < 0.1


def test_nothing_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    def expanded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a weight was expanded")

    for name in ("codes", "patterns"):
        monkeypatch.setattr(fp4, name, expanded)
    model = hf_accel.from_pretrained(_written())
    held = sum(product.nbytes for product in model.modules() if isinstance(product, QuantizedLinear))
    assert held == 2 * EXPERTS * (2 * INNER * HIDDEN + HIDDEN * INNER) * 17 // 32
    assert not any(parameter.dim() == 3 for parameter in model.parameters())


def test_the_dtype_asked_for_is_that_of_all_but_packed_weights() -> None:
    model = hf_accel.from_pretrained(_written(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {name.rpartition(".")[2]: b.dtype for name, b in experts(model)[0].named_buffers()} == {
        "codes": torch.uint8,
        "scales": torch.uint8,
    }
    assert difference(logits(model), logits(stock(torch.bfloat16))) < 0.2


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_saved_and_loaded_again_it_is_the_same_to_the_bit(shard: str, tmp_path: Path) -> None:
    model = hf_accel.from_pretrained(_written())
    hf_accel.save_pretrained(model, tmp_path, max_shard_size=shard)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "hf_accel"
    again = hf_accel.from_pretrained(tmp_path)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(hf_accel.UnsupportedModelError, match="packed experts"):
        hf_accel.save_pretrained(model, tmp_path / "other", format="compressed-tensors")


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_saved_in_mxfp4_the_tensors_are_those_that_were_read(shard: str, tmp_path: Path) -> None:
    model = hf_accel.from_pretrained(_written())
    hf_accel.save_pretrained(model, tmp_path, format="mxfp4", max_shard_size=shard)
    before = load_file(_written() / "model.safetensors")
    after: dict[str, Tensor] = {}
    for file in tmp_path.glob("model*.safetensors"):
        after |= load_file(file)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), logits(model))
    theirs, found = stock(), stock(folder=tmp_path)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_what_the_format_cannot_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = hf_accel.from_pretrained(_written())
    model.lm_head = QuantizedLinear(
        PackedWeight.pack(quantize(model.lm_head.weight, Scheme(8))), None, model.dtype
    )  # fmt: skip
    with pytest.raises(hf_accel.UnsupportedModelError, match="lm_head is packed, and only experts are there"):
        hf_accel.save_pretrained(model, tmp_path / "head", format="mxfp4")
    whole = hf_accel.optimize(made("gpt_oss"), WeightOnlyConfig(bits=8, head=None))
    for name, module in list(whole.named_modules()):
        if type(module) is QuantizedLinear and "experts" not in name:
            parent, _, leaf = name.rpartition(".")
            dense = torch.nn.Linear(module.in_features, module.out_features)
            whole.get_submodule(parent)._modules[leaf] = dense
    with pytest.raises(hf_accel.UnsupportedModelError, match="is in 8 bits of whole numbers"):
        hf_accel.save_pretrained(whole, tmp_path / "whole", format="mxfp4")
    model = hf_accel.from_pretrained(_written())
    experts(model)[1].is_transposed = False
    with pytest.raises(
        hf_accel.UnsupportedModelError, match=r"layers\.1\.mlp\.experts is of an architecture that has its"
    ):
        hf_accel.save_pretrained(model, tmp_path / "layout", format="mxfp4")
    assert not any(path.name == "config.json" for path in tmp_path.rglob("*"))


@pytest.mark.native
@pytest.mark.parametrize("config", [WeightOnlyConfig(bits=8, embeddings=8), GPTQConfig(bits=4, group_size=32)], ids=str)
def test_what_is_beside_the_experts_can_be_quantized(config: Any, tmp_path: Path) -> None:
    model = hf_accel.from_pretrained(_written())
    before, kept = (
        logits(model),
        [p.codes for module in experts(model) for p in module.modules() if hasattr(p, "codes")],
    )
    hf_accel.optimize(model, config)
    after = [p.codes for module in experts(model) for p in module.modules() if hasattr(p, "codes")]
    assert all(one is two for one, two in zip(kept, after, strict=True))
    assert {type(layer.self_attn.q_proj) for layer in model.model.layers} == {QuantizedLinear}
    assert model.lm_head.scheme.bits == 8
    assert 0 < difference(logits(model), before) < (0.3 if config.bits == 8 else 1)
    hf_accel.save_pretrained(model, tmp_path)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), logits(model))
    with pytest.raises(hf_accel.UnsupportedModelError, match="is packed, and only experts are there"):
        hf_accel.save_pretrained(model, tmp_path / "other", format="mxfp4")
    with pytest.raises(hf_accel.HfAccelError, match="quantized already"):
        hf_accel.optimize(hf_accel.from_pretrained(tmp_path), config)
    hf_accel.restore(model)
    assert torch.equal(logits(model), before)


def test_experts_that_were_packed_here_are_not_built_upon(tmp_path: Path) -> None:
    """Only of experts that are stored so is the rest as it was: others are part of a model that was quantized."""
    model = hf_accel.optimize(made("gpt_oss"), WeightOnlyConfig(bits=8, head=None))
    hf_accel.save_pretrained(model, tmp_path)
    with pytest.raises(hf_accel.UnsupportedModelError, match="quantized already"):
        hf_accel.optimize(hf_accel.from_pretrained(tmp_path), WeightOnlyConfig(bits=8))


@pytest.mark.native
def test_experts_in_a_file_compute_the_same(tmp_path: Path) -> None:
    model = hf_accel.from_pretrained(_written())
    expected = logits(model)
    hf_accel.optimize(model, ExpertOffloadConfig(share=0.6, folder=str(tmp_path)))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected), "some from memory"
    hf_accel.restore(model)
    assert torch.equal(logits(model), expected)


def test_copies_compute_the_same() -> None:
    model = hf_accel.from_pretrained(_written())
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def without(*suffixes: str) -> Any:
    return lambda tensors: [tensors.pop(f"{FIRST}.{suffix}") for suffix in suffixes]


def instead(suffix: str, change: Any) -> Any:
    return lambda tensors: tensors.update({f"{FIRST}.{suffix}": change(tensors[f"{FIRST}.{suffix}"])})


def spoilt(tensor: Tensor) -> Tensor:
    tensor[2, 7, 1] = 255
    return tensor


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("gate_up_proj_blocks", without("gate_up_proj_blocks")),
        ("gate_up_proj_scales", without("gate_up_proj_scales")),
        ("down_proj_blocks", without("down_proj_blocks", "down_proj_scales")),
        ("down_proj_bias", without("down_proj_bias")),
        ("down_proj_blocks", instead("down_proj_blocks", lambda t: t[1:])),
        ("gate_up_proj_blocks", instead("gate_up_proj_blocks", lambda t: t.flatten(2))),
        ("gate_up_proj_scales", instead("gate_up_proj_scales", lambda t: t[..., :1])),
        ("down_proj_scales", instead("down_proj_scales", lambda t: t.view(torch.int8))),
        ("down_proj_blocks", instead("down_proj_blocks", lambda t: t.float())),
        ("down_proj_scales: it holds NaN", instead("down_proj_scales", spoilt)),
        ("gate_up_proj_scales: it holds NaN", instead("gate_up_proj_scales", spoilt)),
        ("up_proj_blocks", lambda tensors: tensors.update({"lm_head.up_proj_blocks": torch.zeros(4)})),
    ],
)
def test_damaged_checkpoints_are_refused_by_the_name_of_the_tensor(named: str, change: Any, tmp_path: Path) -> None:
    with pytest.raises(hf_accel.CheckpointError) as error:
        hf_accel.from_pretrained(changed(tmp_path, change))
    assert named in str(error.value)
    assert "model.safetensors" in str(error.value)


def test_columns_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    config = json.loads((written(tmp_path) / "config.json").read_text()) | {"intermediate_size": 80}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if "gate_up_proj" in name:
                tensors[name] = tensors[name][:, :160].clone()

    tensors = load_file(tmp_path / "model.safetensors")
    narrow(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(hf_accel.CheckpointError, match="down_proj_blocks: groups of 32 do not divide its 80 columns"):
        hf_accel.from_pretrained(tmp_path)


def test_experts_that_cannot_be_described_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(module: Any) -> Any:
        raise ValueError("their tensors are others")

    monkeypatch.setattr(experts_files, "layout_of", unknown)
    with pytest.raises(hf_accel.CheckpointError, match="GptOssExperts cannot be served: their tensors are others"):
        hf_accel.from_pretrained(_written())


def test_a_checkpoint_whose_experts_are_plain_is_read_as_it_is(tmp_path: Path) -> None:
    """Some say that they are in MXFP4 and were expanded since."""
    theirs = stock()
    save_file({n: t.clone() for n, t in theirs.state_dict().items()}, written(tmp_path) / "model.safetensors")
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), logits(theirs))
