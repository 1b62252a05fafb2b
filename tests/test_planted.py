"""A test file turns red by a mistake in what it is about; those that plant their own mistakes are not in this table."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_affine
import test_architecture
import test_attention
import test_cache
import test_cached_rows
import test_calibration
import test_changes
import test_cli
import test_coded_layers
import test_compressed_tensors
import test_contract
import test_docs
import test_errors
import test_eviction_ops
import test_frozen_surroundings
import test_frozen_values
import test_generate
import test_generate_inputs
import test_goals
import test_governor
import test_held_states
import test_kv_calls
import test_kv_errors
import test_kv_faults
import test_kv_layers
import test_kv_matrix
import test_lookup
import test_models
import test_persistence
import test_plan_values
import test_planted_defects as calls
import test_prefix_tenants
import test_prefixes
import test_progress
import test_quantization
import test_quantization_refusals
import test_quantized_damage
import test_quantized_few_bits
import test_quantized_peft
import test_quantized_persistence
import test_retrieval
import test_siblings
import test_speculation
import test_speculation_cache
import test_speculation_calls
import test_speculation_errors
import test_speculation_limits
import test_speculation_rounding as drafts
import test_spill
import test_spill_fuzz
import test_undisturbed
import test_widen
import torch
from comparison import optimised
from hypothesis import Phase
from models import stock
from planting import Defect, Patch, Test, instead, is_red, machine, nothing, result
from test_generation_space import SHORT, STRATEGIES, walk

import hf_accel
from hf_accel import KVCacheConfig, SpeculativeConfig, WeightOnlyConfig
from hf_accel.cache.codec import Codec
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.tiered import TieredLayer
from hf_accel.cache.prefix.store import PrefixStore
from hf_accel.cache.tiers.tiers import Tiers
from hf_accel.core.journal import Journal
from hf_accel.core.model import undisturbed, watching
from hf_accel.core.steps.plan import Plan
from hf_accel.decoding.draws import Draws
from hf_accel.layers import siblings
from hf_accel.layers.block import BlockStep
from hf_accel.measure import difference
from hf_accel.measure.quality import QualityReference
from hf_accel.measure.subjects import retrieval, widen
from hf_accel.ops import affine, cached
from hf_accel.quantization import patcher
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.patcher import packed_bytes
from hf_accel.speculative.acceptance import Acceptance
from hf_accel.speculative.drafters.suffixes import SuffixIndex

# as in the tests of adapters
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def always(*args: Any, **options: Any) -> bool:
    return True


def undone_but_for_the_first(patch: Patch) -> None:
    undo = Journal.undo
    patch.setattr(Journal, "undo", lambda self, down_to=0: undo(self, max(down_to, 1)))


def one_tenant(patch: Patch) -> None:
    match = PrefixStore.match
    patch.setattr(PrefixStore, "match", lambda self, tenant, *rest: match(self, "a", *rest))


def classes_as_they_are(patch: Patch) -> None:
    """Copies and pickles are of our classes."""
    swap = Journal.swap_class

    def wrong(self: Journal, instance: Any, cls: type) -> None:
        own = {name: value for name, value in vars(cls).items() if name not in ("__reduce_ex__", "__dict__")}
        swap(self, instance, type(cls.__name__, cls.__bases__, own))

    patch.setattr(Journal, "swap_class", wrong)


def without_digests(patch: Patch) -> None:
    patch.setattr(test_spill_fuzz.Layout, "digests", test_spill_fuzz.never)


def unchecked(config: type) -> Defect:
    """Return the defect that any value is taken for a field."""
    return instead(config, "__post_init__", nothing)


def attention_without_mask(patch: Patch) -> None:
    attention = test_attention.grouped_attention
    patch.setattr(test_attention, "grouped_attention", lambda q, k, v, mask, scale: attention(q, k, v, None, scale))


@contextmanager
def _silent(*args: Any, **options: Any) -> Iterator[Callable[[], None]]:
    yield lambda: None


@torch.no_grad()
def zeroed(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.zero_()
    return model


def source(text: str) -> Defect:
    """Return the defect that every file reads `text`."""

    def plant(patch: Patch) -> None:
        tree = ast.parse(text)
        patch.setattr(test_architecture, "tree_of", lambda path: tree)
        patch.setattr(test_architecture, "nodes_of", lambda path: list(ast.walk(tree)))
        patch.setattr(Path, "read_text", lambda path: text)

    return plant


def named(name: str) -> Defect:
    rules = test_architecture.RULES
    rule = test_architecture.names_that_say_nothing
    return lambda patch: patch.setitem(rules, rule, [test_architecture.PACKAGE / "core" / name])


def house_rule(rule: Any) -> Test:
    return lambda: test_architecture.test_no_file_breaks_the_rule(rule)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "a write that is not undone": (undone_but_for_the_first, test_contract.test_a_life_from_optimize_to_restore),
    "rows see their padding": (calls.native_layer_without_mask, test_contract.test_a_life_from_optimize_to_restore),
    "copies of our classes": (classes_as_they_are, test_contract.test_a_life_from_optimize_to_restore),
    "pickles of our classes": (classes_as_they_are, test_persistence.test_a_loaded_copy_can_be_optimised_again),
    "a restore that does nothing": (
        instead(hf_accel, "restore", nothing),
        test_errors.test_restore_of_a_stock_model,
    ),
    "weights that say nothing": (
        result(test_models, "build", zeroed),
        test_models.test_text_depends_on_its_context,
    ),
    "any field of a cache": (unchecked(KVCacheConfig), test_kv_errors.test_fields_that_make_no_sense),
    "any field of drafts": (unchecked(SpeculativeConfig), test_speculation_errors.test_fields_that_make_no_sense),
    "any field of weights": (
        unchecked(WeightOnlyConfig),
        test_quantization_refusals.test_configs_that_do_not_fit_are_refused,
    ),
    "blocks in the order of yesterday": (
        result(Tiers, "read", lambda blocks: reversed(list(blocks))),
        test_kv_calls.test_every_call_in_every_store,
    ),
    "blocks that nobody checks": (without_digests, test_spill.test_every_read_is_checked),
    "files that nobody checks": (without_digests, test_kv_faults.test_a_file_that_is_overwritten),
    "rows of other bytes": (
        result(cached, "encode", lambda rows: rows.roll(1, -1)),
        test_cached_rows.test_rows_are_the_textbooks,
    ),
    "a draft too many": (drafts.one_draft_too_many, test_speculation.test_every_drafter),
    "a draft too many over codes": (drafts.one_draft_too_many, test_kv_matrix.test_every_combination),
    "drafts that were rejected": (
        drafts.rejected_tokens_kept,
        test_speculation_limits.test_windows_that_only_the_attention_knows,
    ),
    "no product is slow": (
        result(test_goals, "slower_products", lambda found: []),
        test_goals.test_a_slow_product_is_found,
    ),
    "products unlike the package's": (
        result(QuantizedLinear, "product", lambda y: y * 1.2),
        test_compressed_tensors.test_the_package_computes_the_same_function,
    ),
    "products unlike their twin's": (
        result(QuantizedLinear, "product", lambda y: y * 1.05),
        test_quantized_peft.test_an_adapter_on_a_quantized_model,
    ),
    "attention over handles": (
        result(test_held_states, "grouped_attention_forward", lambda found: (found[0] * 1.1, *found[1:])),
        test_held_states.test_attention_equals_stock_over_the_tensors,
    ),
    "plans of anything": (instead(Plan, "from_json", nothing), test_plan_values.test_texts_that_are_no_plan),
    "a loader without a word": (
        instead(hf_accel, "from_pretrained", nothing),
        test_quantized_damage.test_missing_files_are_named,
    ),
    "a loader of other weights": (
        result(hf_accel, "from_pretrained", zeroed),
        test_quantized_persistence.test_four_bits_come_back_bit_for_bit,
    ),
    "texts that never differ": (
        instead(difference, "first_difference", nothing),
        test_cli.test_first_difference_is_the_earliest,
    ),
    "a shape without a row": (
        instead(test_docs, "SHAPES", {"no-shape": {}}),
        test_docs.test_shapes_are_in_the_reference,
    ),
    "stale weights": (instead(BlockStep, "is_current", always), test_changes.test_changed_weights_are_used),
    "stale attributes": (instead(watching.Watch, "is_same", always), test_frozen_values.test_some_changes_of_a_layer),
    "stale functions": (
        instead(watching.Surroundings, "look", always),
        test_frozen_surroundings.test_classes_and_functions_are_watched,
    ),
    "stale products": (instead(siblings.Group, "is_joined", always), test_siblings.test_load_state_dict),
    "draws that are made twice": (calls.two_draws, test_generate.test_equal_to_stock),
    "scores that are logits": (calls.raw_logits_as_scores, test_generate.test_equal_to_stock),
    "a token accepted too many": (drafts.one_draft_too_many, test_generate.test_equal_to_stock_speculating),
    "positions that stand still": (
        calls.positions_that_stand_still,
        test_generate_inputs.test_positions_of_the_callers,
    ),
    "scores of another step": (
        drafts.scores_of_another_step,
        test_speculation_calls.test_scores_logits_and_the_cache_are_returned,
    ),
    "the generator left where it was": (
        instead(Draws, "finish", nothing),
        test_speculation_cache.test_draws_are_those_of_plain_sampling_in_any_order,
    ),
    "beams that stay": (instead(GrowingLayer, "reorder_cache", nothing), machine(test_cache.Twins)),
    "windows that forget too much": (calls.window_off_by_one, machine(test_cache.SlidingTwins)),
    "codes that are not written": (instead(Codec, "write", nothing), machine(test_coded_layers.Twins)),
    "beams of tiers that stay": (instead(TieredLayer, "reorder_cache", nothing), machine(test_kv_layers.Twins)),
    "tenants who share": (one_tenant, test_prefix_tenants.test_tenants_and_roots_find_nothing_of_each_other),
    "tenants who share, against lists": (one_tenant, machine(test_prefixes.Twins)),
    "attention without its mask": (attention_without_mask, test_attention.test_equal_to_the_textbook),
    "codes of other columns": (
        result(affine, "quantize_groups", lambda found: (found[0].roll(1, -1), *found[1:])),
        test_affine.test_equals_a_textbook_in_plain_loops,
    ),
    "scores of other positions": (
        result(test_eviction_ops, "snapkv_scores", lambda scores: scores.flip(-1)),
        test_eviction_ops.test_snapkv_equals_a_textbook,
    ),
    "products a little too large": (
        result(QuantizedLinear, "product", lambda y: y * 1.05),
        test_quantization.test_logits_are_those_of_the_dequantized_weights,
    ),
    "a plan that takes 3 bits for 2": (
        instead(patcher, "packed_bytes", lambda scheme, *of: packed_bytes(replace(scheme, bits=scheme.bits & ~1), *of)),
        test_quantized_few_bits.test_the_plan_promises_the_bytes_that_come,
    ),
    "half of the divergence": (
        result(QualityReference, "compare", lambda quality: replace(quality, kl=quality.kl / 2)),
        test_calibration.test_quality_is_what_the_textbook_says,
    ),
    "drafts that begin late": (
        result(SuffixIndex, "propose", lambda found: (found[0][1:], found[1])),
        test_lookup.test_the_longest_match_wins,
    ),
    "beliefs too low": (
        result(Acceptance, "chance", lambda chance: 0.9 * chance),
        test_governor.test_a_belief_begins_at_its_prior_and_follows_what_is_seen,
    ),
    "trials that stay": (
        instead(undisturbed._State, "put_back", nothing),
        test_undisturbed.test_every_place_is_put_back_even_after_an_error,
    ),
    "a bar that nobody sees": (
        instead(test_progress, "shown", _silent),
        test_progress.test_long_work_shows_how_far_it_is,
    ),
    "half of an answer": (
        result(retrieval, "_answers", lambda rows: [row[:2] for row in rows]),
        test_retrieval.test_counts_of_each_depth,
    ),
    "weights left out": (instead(widen, "_copy", nothing), test_widen.test_one_size_wider_is_the_same_function),
    "a long file": (source("\n" * 500), house_rule(test_architecture.too_many_lines)),
    "a name that says nothing": (named("utils.py"), house_rule(test_architecture.names_that_say_nothing)),
    "an assert": (source("assert 1"), house_rule(test_architecture.prints_asserts_and_bare_excepts)),
    "a print": (source("print(1)"), house_rule(test_architecture.prints_asserts_and_bare_excepts)),
    "a swallowed error": (
        source("try:\n    x\nexcept ValueError:\n    pass"),
        house_rule(test_architecture.prints_asserts_and_bare_excepts),
    ),
    "a model type": (source("m.model_type == 'llama'"), house_rule(test_architecture.comparisons_of_architectures)),
    "a function without a word": (
        source('"""A module."""\ndef f(): ...'),
        house_rule(test_architecture.missing_docstrings),
    ),
}


def models(name: str) -> tuple[Any, Any]:
    return stock(name), optimised(stock(name))


def drafts_of(name: str) -> Any:
    return drafts.shared(name, "model")


@pytest.fixture
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what tests are given, by name; folders are made anew for each case."""
    folder = lambda: tmp_path_factory.mktemp("planted")  # noqa: E731
    return {"models": models, "speculating": drafts_of, "tmp_path": folder}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, fixtures: dict[str, Any], monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, **fixtures)


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_nothing_is_seen_where_nothing_is_planted(title: str, fixtures: dict[str, Any]) -> None:
    assert not is_red(PLANTED[title][1], **fixtures)


@pytest.mark.native
@pytest.mark.parametrize("defect,name", calls.DEFECTS.items(), ids=map(calls.title, calls.DEFECTS))
def test_short_walks_or_calls_see_what_long_walks_see(defect: Defect, name: str, monkeypatch: Patch) -> None:
    """What the default run has of calls: a few of every strategy on four models, and those that somebody wrote down."""

    def walks() -> None:
        for strategy in STRATEGIES:
            walk(strategy, name, SHORT, phases=[Phase.generate])

    pair = stock(name), optimised(stock(name))
    with monkeypatch.context() as patch:
        defect(patch)
        written = (test_generate.test_equal_to_stock, test_generate_inputs.test_model_keywords_reach_every_forward)
        assert is_red(walks) or any(is_red(test, models=lambda _: pair) for test in written)


# their own tests plant mistakes, or `test_planted_in_use.py` or `walks/test_planted_saving.py` does
OWN = [
    "acceptance", "attention", "frozen_values", "generation_space", "house", "in_use", "kv_eviction", "planner",
    "prefix_changes", "prefix_ownership", "quantized_fuzz", "quantized_saving", "speculation_ropes",
    "speculation_rounding", "spill_fuzz", "tiers", "wrappers",
]  # fmt: skip
# what they test runs in processes of their own, where nothing can be planted from here (`emulated` plants in its C)
UNPROVEN = ["emulated", "spill_processes"]


def test_every_test_file_has_a_planted_defect_or_is_known_to_have_none() -> None:
    here = Path(__file__).parent
    tables = [path for path in here.rglob("test_planted*.py") if "PLANTED: dict" in path.read_text()]
    proven = {name for table in tables for name in re.findall(r"^import test_(\w+)", table.read_text(), re.MULTILINE)}
    files = {path.stem.removeprefix("test_") for path in here.rglob("test_*.py") if path.parent.name != "walks"}
    files = {name for name in files if not name.startswith("planted")}
    assert files - proven - set(OWN) == set(UNPROVEN)
