"""`hf-accel bench`: stock and optimised in alternation on any model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from hf_accel.cli.models import (
    AsJson,
    Bits,
    Device,
    Dtype,
    DtypeName,
    GoalName,
    GroupSize,
    OptionalModelName,
    Threads,
    check_device,
    few_bits,
    load_model,
    make_plan,
    untimed_plan,
    use_threads,
)
from hf_accel.cli.output import progress, results, write_json
from hf_accel.cli.suite import SUITES, run_suite
from hf_accel.cli.tables import footer, speed_table
from hf_accel.errors import ConfigError
from hf_accel.measure import SHAPES, Workload, run_bench
from hf_accel.quantization.building import build_packed
from hf_accel.speculative import SpeculativeConfig

OF_SUITES = frozenset({"model", "suite", "out", "budget", "device", "threads", "as_json"})


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def bench(
    context: typer.Context,
    model: OptionalModelName = None,
    dtype: DtypeName = Dtype.bfloat16,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens per row.")] = 128,
    new: Annotated[int, typer.Option(min=2, help="New tokens per row.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Rows generated together.")] = 1,
    left_padding: Annotated[bool, typer.Option("--left-padding", help="Rows of different length.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this probability mass.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Divide the logits by this first.")] = None,
    goal: GoalName = "exact",
    bits: Bits = None,
    group_size: GroupSize = None,
    speculative: Annotated[
        str | None,
        typer.Option(
            metavar="DRAFTER",
            help="Draft by lookup, self, layer_skip, model or auto, beside the goal's other steps. What that gains "
            "depends on the text: it takes a trained model, and even there random prompts show little of it.",
        ),
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="With --speculative model or auto: the model that drafts.")
    ] = None,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="Of a shape: build it in --bits from the start, where full precision does not fit; without --bits "
            "its experts in MXFP4. What is measured then is all exact steps on top of that.",
        ),
    ] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Of a shape: so many of its layers only.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each state, in alternation.")] = 5,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"A list of measurements instead ({', '.join(SUITES)}), of the shape MODEL (llama-8b) on --device: "
            "tests, decoding, few bits, batches, long caches, drafts, each beside stock or its floor.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --suite: the JSON file to write and to go on from; a table for people lies beside it."),
    ] = None,
    budget: Annotated[
        float, typer.Option(min=1, help="With --suite: seconds after which nothing more is begun.")
    ] = 540.0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure MODEL as it is and optimised, in alternation in one process: prefill, decode, memory, same tokens."""
    if suite is not None:
        given = [name for name in context.params if name not in OF_SUITES and _is_given(context, name)]
        if given:
            raise ConfigError(f"--suite says itself what it measures; leave out --{given[0].replace('_', '-')}.")
        use_threads(threads)
        check_device(device)
        run_suite(suite, model or "llama-8b", device, out, budget, as_json=as_json)
        return
    if model is None:
        raise ConfigError(f"Give the MODEL to measure: a folder, a hub id, or a shape ({', '.join(SHAPES)}).")
    if out is not None or _is_given(context, "budget"):
        raise ConfigError("--out and --budget belong to --suite; without it, --json writes the result.")
    workload = Workload(
        prompt_tokens=prompt,
        new_tokens=new,
        batch=batch,
        has_left_padding=left_padding,
        samples=sample,
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        rounds=rounds,
    )
    configs = [] if packed else few_bits(bits, group_size)
    if draft_model is not None and speculative not in ("model", "auto"):
        raise ConfigError("--draft-model belongs to --speculative model or auto; give both.")
    if speculative == "model" and draft_model is None:
        raise ConfigError("--speculative model needs the model that drafts; give --draft-model as well.")
    if packed and model not in SHAPES:
        raise ConfigError(f"--packed belongs to a shape ({', '.join(SHAPES)}); {model!r} is loaded as it is.")
    if packed and device != "cpu":
        raise ConfigError(f"--packed builds on the CPU; --device {device} was given. Leave it out.")
    if layers is not None and model not in SHAPES:
        raise ConfigError(f"--layers belongs to a shape ({', '.join(SHAPES)}); {model!r} has the layers it has.")
    configs += [] if speculative is None else [SpeculativeConfig(drafter=speculative)]
    use_threads(threads)
    loaded: PreTrainedModel
    if packed:
        with progress(f"building {model} packed"):
            loaded = build_packed(model, dtype.torch, bits=bits, group_size=group_size, layers=layers)
    else:
        loaded = load_model(model, dtype.torch, device, layers)
    drafting = None if draft_model is None else load_model(draft_model, dtype.torch, device)
    plan = untimed_plan(loaded, configs, drafting) if packed else make_plan(loaded, goal, configs, drafting)
    with progress("stock and optimised in alternation", 2 * rounds) as step:
        result = run_bench(loaded, plan, workload, name=model, progress=step)
    if as_json:
        write_json(result.to_dict())
        return
    results.print(speed_table(result))
    if result.difference is None:
        results.print("The generated tokens are the same.", style="green")
    else:
        results.print(f"The generated tokens differ. {result.difference}.", style="yellow", highlight=False)
    results.print(footer(result), highlight=False, soft_wrap=True)
    results.print(str(result.report), markup=False, highlight=False, soft_wrap=True)
