"""Tokenizers in GGUF files: the ids are compared before anything is written, and what no table names is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_files import build, of_kind, write
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_accel import CheckpointError, UnsupportedModelError, export_gguf
from hf_accel.assets import demo_path
from hf_accel.quantization.gguf import splitting, vocabulary
from hf_accel.quantization.gguf.loading import load_gguf
from hf_accel.quantization.gguf.reader import GgufFile
from hf_accel.quantization.gguf.splitting import GPT2, SPACE, SPLITTINGS, ScoreTwin, twin
from hf_accel.quantization.gguf.vocabulary import SAMPLE, describe

TEXT = [
    SAMPLE,
    Path(vocabulary.__file__).read_text(encoding="utf-8"),
    Path(splitting.__file__).read_text(encoding="utf-8"),
]
ROWS = 640


def demo() -> Any:
    return AutoTokenizer.from_pretrained(demo_path())


def trained(pre: Any, vocabulary_size: int = 600, **options: Any) -> Any:
    """Return a byte-level tokenizer trained on a little text."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def split_by(*patterns: str, ignore_merges: bool = False) -> Any:
    steps = [pre_tokenizers.Split(splitting.Regex(pattern), "isolated") for pattern in patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return trained(pre_tokenizers.Sequence(steps), ignore_merges=ignore_merges)


def sentencepiece(prefix: bool = True) -> Any:
    """Return a tokenizer of SentencePiece's kind: all pairs that make a token are merges, in the order of their
    tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *"abcdefghilmnorstuwxy.,"]
    made = [
        "he",
        "th",
        "in",
        "er",
        "an",
        SPACE + "th",
        SPACE + "the",
        "the",
        "qu",
        SPACE + "an",
        "on",
        "re",
        "nd",
        "and",
        SPACE + "and",
    ]
    tokens += [token for token in made if set(token) <= {*"".join(tokens[259:])}]
    known = set(tokens[259:])
    merges = [(t[:at], t[at:]) for t in tokens[259:] for at in range(1, len(t)) if t[:at] in known and t[at:] in known]
    model = models.BPE(
        {t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_the_demo_model_s_tokenizer_reads_the_same_ids_from_the_file(tmp_path: Path) -> None:
    model = build("llama")
    model.resize_token_embeddings(1540)
    export_gguf(model, tmp_path / "x.gguf", demo())
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    text = "".join(TEXT)
    assert (
        again(text)["input_ids"] == demo()(text)["input_ids"] == twin(GgufFile(tmp_path / "x.gguf").metadata).ids(text)
    )
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD1539]"
    assert again.decode(again(SAMPLE)["input_ids"]) == SAMPLE


def test_a_vocabulary_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    model = build("llama")
    model.resize_token_embeddings(1536)
    export_gguf(model, tmp_path / "x.gguf", demo())
    content = (tmp_path / "x.gguf").read_bytes()
    start = content.index(b"tokenizer.ggml.tokens")
    for length in range(start + 30, start + 9000, 701):
        (tmp_path / "x.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut short"):
            GgufFile(tmp_path / "x.gguf")


def test_a_text_ends_at_the_end_of_a_turn_too(tmp_path: Path) -> None:
    def ends(writer: gguf.GGUFWriter) -> None:
        writer.add_eos_token_id(5)
        writer.add_eot_token_id(9)

    write(tmp_path / "x.gguf", "llama", build("llama"), of_kind("Q8_0"), describe=ends)
    model = load_gguf(tmp_path / "x.gguf").model
    assert model.generation_config.eos_token_id == [5, 9]


@pytest.mark.parametrize("name", SPLITTINGS)
def test_every_way_of_splitting_has_its_name(name: str) -> None:
    known = SPLITTINGS[name]
    found = describe(split_by(*known.patterns, ignore_merges=known.ignores_merges), ROWS)
    assert found["tokenizer.ggml.pre"] == name
    if name == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        assert describe(trained(pre_tokenizers.Sequence(steps)), ROWS)["tokenizer.ggml.pre"] == name


def test_the_patterns_are_those_by_which_transformers_reads_the_names() -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    for name in ("llama-bpe", "qwen2", "tekken"):
        assert SPLITTINGS[name].patterns == (mapping.GGUF_PRE_TOKENIZER_SPLITS[name],)


@pytest.mark.parametrize("prefix", [True, False])
def test_merges_become_scores_that_merge_alike(prefix: bool) -> None:
    tokenizer = sentencepiece(prefix)
    found = describe(tokenizer, 320)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert found["tokenizer.ggml.add_bos_token"]
    assert isinstance(twin(found), ScoreTwin)
    text = " ".join(TEXT)
    assert twin(found).ids(text) == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def crossing_lines() -> Any:
    """The demo model's way to split, with a token that goes across a line end."""
    description = json.loads(demo().backend_tokenizer.to_str())
    vocab, merges = description["model"]["vocab"], description["model"]["merges"]
    last = max(vocab, key=vocab.get)
    vocab["\u010a\u0120"] = vocab.pop(last)
    description["model"]["merges"] = [m for m in merges if "".join(m) != last and last not in m] + [
        ["\u010a", "\u0120"]
    ]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))


def lower_case() -> Any:
    tokenizer = demo()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_both_ends_and_more() -> Any:
    tokenizer = split_by(GPT2)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def without_a_pair() -> Any:
    """Merges that lack one pair that makes a token: scores would merge it."""
    description = json.loads(sentencepiece().backend_tokenizer.to_str())
    description["model"]["merges"] = [
        m for m in description["model"]["merges"] if m != [SPACE + "t", "he"] and m != ["t", "he"]
    ]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), bos_token="<s>", unk_token="<unk>"
    )


REFUSED: dict[str, tuple[Any, int, str]] = {
    "a pattern of its own": (lambda: split_by(r"\d+|\D+"), ROWS, "no table names"),
    "merges that are ignored": (lambda: split_by(GPT2, ignore_merges=True), ROWS, "no table names"),
    "a prefix": (lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)), ROWS, "no table names"),
    "lines that tokens cross": (crossing_lines, 1536, "no table names"),
    "lower case": (lower_case, 1536, "Lowercase"),
    "more tokens than rows": (demo, 1000, "1000 rows"),
    "ends": (with_both_ends_and_more, ROWS, "other tokens around a text"),
    "a pair less": (without_a_pair, 320, "are no pair of it"),
    "words": (lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))), 9, "WordLevel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_a_file_cannot_say_is_refused_before_a_byte_is_written(case: str, tmp_path: Path) -> None:
    make, rows, reason = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=reason):
        describe(make(), rows)
    model = build("llama")
    model.resize_token_embeddings(rows)
    with pytest.raises(UnsupportedModelError):
        export_gguf(model, tmp_path / "x.gguf", make())
    assert not list(tmp_path.iterdir())


def test_other_ids_are_seen_though_the_name_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "name_of", lambda found: "llama-bpe")
    with pytest.raises(UnsupportedModelError, match="gives other ids"):
        describe(demo(), 1536)
