"""Train the very small mixture of experts that the tests of routing use, on text every machine has.

As `train_demo_model.py`, whose tokenizer and text it shares. Which experts a token is sent to is learned, so that text
has the locality of routing that random weights lack. A small loss keeps experts from dying out (Fedus et al. 2022,
arXiv:2101.03961), for each layer by itself; how much of the routing the busiest experts carry is printed at the end.

    python examples/train_mixture_model.py --out my-mixture-model --minutes 20
"""

import math
import sysconfig
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch.nn.functional import cross_entropy
from train_demo_model import (
    IGNORED_TARGET,
    MAX_CONTEXT_TOKENS,
    Loss,
    encode,
    held_out_loss,
    read_sources,
    split_held_out,
    train,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers import Qwen3MoeConfig as MixtureConfig
from transformers import Qwen3MoeForCausalLM as Mixture
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from transformers.utils.logging import disable_progress_bar

from hf_accel.assets import demo_path

EXPERTS, ACTIVE = 16, 4
MOST_ROUTING = 0.9  # Of which the concentration is told.
ROUTED_TOKENS = 512


def new_model(tokenizer: PreTrainedTokenizerFast) -> Mixture:
    """Untrained: L=3, E=64, H=2, G=1, D=32, 16 experts of inner size 32, 4 of them active; 0.4 M weights."""
    return Mixture(
        MixtureConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            num_experts=EXPERTS,
            num_experts_per_tok=ACTIVE,
            norm_topk_prob=True,
            max_position_embeddings=MAX_CONTEXT_TOKENS,
            initializer_range=0.06,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def begin_with_words(model: Mixture, known: torch.Tensor) -> None:
    """Give `model` the token embeddings `known` `(V, 192)` in the directions in which they differ most.

    They are a third of its weights, and learning them anew takes most of a short run.
    """
    table = model.get_input_embeddings().weight
    centred = known.float() - known.float().mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[: table.shape[1]]
    begun = centred @ directions.T
    table.copy_(begun * (model.config.initializer_range / begun.std()))


def balanced_loss(balance: float) -> Loss:
    """The loss of a text, and `balance` times what uneven routing costs, which is 1 where all experts are as busy."""

    def loss(model: Mixture, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=inputs, use_cache=False, output_router_logits=True)
        text = cross_entropy(output.logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET)
        uneven = [load_balancing_loss_func((logits,), EXPERTS, ACTIVE) for logits in output.router_logits]
        return text + balance * torch.stack(uneven).mean()

    return loss


@torch.inference_mode()
def routing(model: Mixture, ids: torch.Tensor, max_tokens: int) -> torch.Tensor:
    """How many tokens of `ids` each expert is given, `(L, experts)`, most first."""
    counts = torch.zeros(model.config.num_hidden_layers, EXPERTS, dtype=torch.long)
    for window in ids[:max_tokens].split(ROUTED_TOKENS):
        logits = model(input_ids=window[None], use_cache=False, output_router_logits=True).router_logits
        chosen = torch.stack([scores.topk(ACTIVE).indices.flatten() for scores in logits])
        counts.scatter_add_(1, chosen, torch.ones_like(chosen))
    return counts.sort(descending=True).values


def needed(counts: torch.Tensor, share: float) -> int:
    """How many of the busiest experts carry a `share` of the routing counted in `counts` `(experts)`, most first."""
    return int((counts.cumsum(0) < math.ceil(share * counts.sum().item())).sum()) + 1


def main(
    out: Annotated[Path, typer.Option(help="Folder that gets the model; its tokenizer is that of the demo model.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="Training time; loading and evaluation come on top.")] = 20.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Train this many steps instead of for a time.")] = None,
    balance: Annotated[float, typer.Option(min=0.0, help="Weight of the loss that balances experts.")] = 0.0003,
    seed: Annotated[int, typer.Option(help="Seed of the first weights and of the windows.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    text: Annotated[Path | None, typer.Option(help="Folder of .py files; the standard library if not given.")] = None,
    held_out_tokens: Annotated[int, typer.Option(min=2, help="Evaluate on at most this many tokens.")] = 100_000,
) -> None:
    """Train the mixture and print its loss and the concentration of its routing on files it has not seen."""
    console = Console()
    disable_progress_bar()  # Of loading and saving, which take no time here.
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(demo_path(), local_files_only=True)
    training, held_out = split_held_out(read_sources(text or Path(sysconfig.get_paths()["stdlib"])))
    ids, unseen = encode(tokenizer, training), encode(tokenizer, held_out)
    console.print(f"{len(training)} files, {sum(map(len, training)):,} characters, {len(ids):,} tokens to train on")

    model = new_model(tokenizer)
    demo = AutoModelForCausalLM.from_pretrained(demo_path(), local_files_only=True)
    begin_with_words(model, demo.get_input_embeddings().weight)
    checkpoint = out.with_name(out.name + ".checkpoint.pt")
    out.mkdir(parents=True, exist_ok=True)
    state = train(model, ids, minutes, steps, seed, checkpoint, balanced_loss(balance))

    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.bfloat16().save_pretrained(out)
    loss, counted = held_out_loss(out, unseen, held_out_tokens)
    checkpoint.unlink()
    console.print(f"{state.step:,} steps, {state.tokens:,} tokens in {state.seconds / 60:.1f} minutes")
    console.print(f"{sum(path.stat().st_size for path in out.iterdir()):,} bytes in {out}")
    console.print(f"held out: {loss:.4f} nats per token over {counted:,} tokens of {len(held_out)} files")
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
    for layer, counts in enumerate(routing(saved, unseen, held_out_tokens)):
        number = needed(counts, MOST_ROUTING)
        shares = ", ".join(f"{100 * count / counts.sum():.1f}" for count in counts.tolist())
        console.print(
            f"layer {layer}: {number} of {EXPERTS} experts carry {MOST_ROUTING:.0%} of the routing ({shares} %)"
        )


if __name__ == "__main__":
    typer.run(main)
