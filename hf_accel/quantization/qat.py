"""Quantization-aware training: products compute with rounded weights while any training loop trains them.

`optimize(model, QATConfig(...))` puts `FakeQuantizedLinear` modules in place, `convert_qat` packs what was trained.
Memory beside the original: 9 bytes per trained weight on the model (in fp32, gradient, the code of the start), and the
optimizer's states, for AdamW 8 more. Time: each step rounds every weight once more than plain training does.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.kernels import native
from hf_accel.quantization.config import ProductsConfig
from hf_accel.quantization.learned import LearnedCodes
from hf_accel.quantization.modules.fake_linear import FakeQuantizedLinear
from hf_accel.quantization.modules.linear import linear_weight
from hf_accel.quantization.patcher import is_finite, quantization_method, scale_dtype
from hf_accel.quantization.starting import STARTS
from hf_accel.quantization.targets import Target, targets

SECTION = "qat"
SECTIONS[SECTION] = "quantization-aware training"


@dataclass(frozen=True, kw_only=True)
class QATConfig(ProductsConfig):
    """Linear products that are trained as they will be deployed: in 8, 4, 3 or 2 bits.

    Everything else of the model has `requires_grad` taken away; whoever wants norms or embeddings trained, too, gives
    it back, and keeps copies of them: `restore` puts back only what this step replaced.

    bits, group_size, symmetric, layers: see WeightOnlyConfig.
    head: bits of the output head (8 or 4), where it is not tied to the embeddings; None, the default, leaves it alone.
    learn_scales: scales are trained with the weights (Esser et al. 2020, LSQ); zeros never are.
    start: where training starts from: "gptq", on the text of `optimize(calibration=...)` or some that the model writes,
        or "nearest".
    refine_steps: gradient steps per layer behind solving, for the start "gptq"; see GPTQConfig.
    """

    learn_scales: bool = True
    start: str = "gptq"
    refine_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.learn_scales) is not bool:
            raise ConfigError(f"QATConfig.learn_scales is True or False; {self.learn_scales!r} was given.")
        if self.start not in STARTS:
            raise ConfigError(f"QATConfig.start is one of {', '.join(STARTS)}; {self.start!r} was given.")
        self.check_integer("refine_steps", 0)


class QATPatcher(Patcher[QATConfig], config=QATConfig):
    stage = Stage.WEIGHTS
    fidelity = Fidelity.LOSSY
    occupies = "weights"
    is_fitted_to_text = True
    is_trainable = True

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy = setting.anatomy
        if method := quantization_method(anatomy.model):
            return [f"the model is quantized already ({method}); train the original weights instead."]
        if anatomy.dtype not in native.DTYPES:
            return [f"weights of {anatomy.dtype} are not quantized; load the model in bfloat16, float16 or float32."]
        if hasattr(anatomy.model, "peft_config"):
            return ["the model has adapters; merge them before, or add them afterwards by hf_accel.get_qat_peft_model."]
        names = [path for path, _ in anatomy.model.named_modules()]
        found = [
            f"the layer pattern {pattern!r} matches no module of the model."
            for pattern, _ in self.config.pairs
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
        chosen, _ = self._chosen(setting)
        if not chosen:
            found.append("the model has no linear product that could be trained in few bits.")
        head, table = anatomy.model.get_output_embeddings(), anatomy.model.get_input_embeddings()
        if self.config.head is not None and head is not None and getattr(head, "weight", None) is table.weight:
            found.append("the head is tied to the embeddings, which are not trained in few bits; leave head out.")
        for target in chosen:
            if not is_finite(target.module, setting):
                found.append(f"the weight of {target.path} holds NaN or infinity.")
        return found

    def patch(self, setting: Setting, host: Host) -> Change:
        anatomy, journal = setting.anatomy, host.journal
        chosen, skipped = self._chosen(setting)
        starts = STARTS[self.config.start](setting, chosen, self.config, self.config.refine_steps)
        if missing := [target.path for target in chosen if target.path not in starts]:
            raise UnsupportedModelError(f"The start {self.config.start!r} says nothing of {', '.join(missing[:3])}.")
        replaced: dict[str, FakeQuantizedLinear] = {}
        for target in chosen:
            original, start = target.module, starts[target.path]
            module = FakeQuantizedLinear(
                linear_weight(original),
                original.bias,
                start,
                scale_dtype=scale_dtype(start.scheme, anatomy.dtype),
                learn_scales=self.config.learn_scales,
            )
            replaced[target.path] = module.train(original.training)
        own = {id(parameter) for module in replaced.values() for parameter in module.parameters()}
        for target in chosen:
            journal.swap_module(target.parent, target.name, replaced[target.path])
        for parameter in anatomy.model.parameters():
            if id(parameter) not in own:
                journal.freeze(parameter)
        host.report.sections[SECTION] = LearnedCodes.of(replaced)
        counts: dict[str, int] = {}
        for module in replaced.values():
            counts[f"{module.scheme.bits} bits"] = counts.get(f"{module.scheme.bits} bits", 0) + 1
        listed = ", ".join(f"{count} products in {kind}" for kind, count in counts.items())
        return Change(
            f"{listed} for training, started from {self.config.start!r}; hf_accel.convert_qat deploys them",
            extra_bytes=0 if journal.originals == "drop" else sum(5 * m.weight.numel() for m in replaced.values()),
            skipped=tuple(skipped),
            weight_bytes=anatomy.weight_bytes,
        )

    def _chosen(self, setting: Setting) -> tuple[list[Target], list[str]]:
        found, skipped = targets(setting.anatomy, self.config)
        if experts := [target.path for target in found if target.scheme is None]:
            skipped.append(f"experts in 3-D parameters are not trained in few bits: {', '.join(experts)}")
        return [target for target in found if target.scheme is not None], skipped
