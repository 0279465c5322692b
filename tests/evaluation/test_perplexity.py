"""Sliding windows score each token once with enough context; figures by token, word and byte; the texts they are of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sbld.data.tokenizer import ByteTokenizer, load_tokenizer
from megatron_sbld.evaluation.perplexity import make_windows, resolve_stride, summarise
from megatron_sbld.evaluation.requests import Score
from megatron_sbld.evaluation.tasks import PerplexityTask
from megatron_sbld.evaluation.texts import Document, read_texts
from tests.evaluation.data_helpers import CharacterTokenizer

EOD = 0
BYTES = ByteTokenizer()


def document(length, start=1):
    return Document(tuple(range(start, start + length)), None, None)


@st.composite
def cases(draw):
    max_length = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    return lengths, max_length, draw(st.integers(1, max_length))


@given(cases())
def test_every_token_is_scored_once_within_the_context_and_with_what_the_stride_promises(case):
    lengths, max_length, stride = case
    documents = [document(length, 100 * number + 1) for number, length in enumerate(lengths)]
    windows = make_windows(documents, EOD, max_length, stride)
    scored = [token for window in windows for token in window.tokens[-window.num_targets :]]
    assert scored == [token for one in documents for token in one.tokens]
    for window in windows:
        assert len(window.tokens) - 1 <= max_length
        sequence = (EOD, *next(one.tokens for one in documents if window.tokens[-1] in one.tokens))
        end = sequence.index(window.tokens[-1]) + 1
        assert window.tokens == sequence[end - len(window.tokens) : end]  # one document, nothing left out
        context = len(window.tokens) - window.num_targets
        assert window.tokens[0] == EOD or context >= max_length - stride + 1
        assert len(window.tokens) - 1 == min(max_length, end - 1)  # as much context as fits


@given(st.integers(1, 60), st.integers(1, 12))
def test_a_stride_of_max_length_gives_the_windows_of_lm_evaluation_harness(length, max_length):
    """get_rolling_token_windows with context_len 1: inputs and targets of each window, written from its description."""
    tokens = list(range(1, length + 1))
    expected = []
    for begin in range(0, length, max_length):
        end = min(begin + max_length, length)
        inputs = [EOD, *tokens[: end - 1]] if begin == 0 else tokens[end - max_length - 1 : end - 1]
        expected.append((inputs, tokens[begin:end]))
    windows = make_windows([document(length)], EOD, max_length, max_length)
    assert [(list(w.tokens[:-1]), list(w.tokens[-w.num_targets :])) for w in windows] == expected


def test_strides_by_default_and_out_of_range():
    assert resolve_stride(None, 1024, "text") == 512
    assert resolve_stride(None, 1024, "wikitext") == 1024
    assert resolve_stride(None, 1, "text") == 1
    assert resolve_stride(7, 8, "wikitext") == 7
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"stride = {stride}; allowed: 1 to max_length = 8"):
            resolve_stride(stride, 8, "text")


def test_figures_of_known_scores():
    """Losses 6 and 2 over 4 and 2 tokens, 3 words and 10 bytes: 8/6 nats a token; residuals 2/3 and -2/3."""
    documents = [Document((1, 2, 3, 4), 2, 7), Document((5, 6), 1, 3)]
    windows = make_windows(documents, EOD, 4, 4)
    result = summarise(documents, windows, [Score(-6.0, False), Score(-2.0, False)])
    stderr = math.sqrt(2 * 2 * (2 / 3) ** 2) / 6
    assert result.loss == pytest.approx(8 / 6)
    assert result.loss_stderr == pytest.approx(stderr)
    assert result.token_perplexity == pytest.approx(math.exp(8 / 6))
    assert result.token_perplexity_stderr == pytest.approx(math.exp(8 / 6) * stderr)
    assert result.word_perplexity == pytest.approx(math.exp(8 / 3))
    assert result.word_perplexity_stderr == pytest.approx(math.exp(8 / 3) * 2 * stderr)
    assert result.bits_per_byte == pytest.approx(0.8 / math.log(2))
    assert result.bits_per_byte_stderr == pytest.approx(0.6 * stderr / math.log(2))
    assert (result.tokens, result.words, result.bytes, result.documents, result.windows) == (6, 3, 10, 2, 2)


def test_the_error_shrinks_with_the_root_of_the_windows_and_covers_the_truth():
    """Windows with independent losses: about 95 % of estimates lie within two errors of the true loss."""
    rng = np.random.default_rng(7)
    documents = [document(64)] * 50
    windows = make_windows(documents, EOD, 16, 16)
    inside = 0
    for _ in range(200):
        scores = [Score(-float(16 * (3 + rng.normal())), False) for _ in windows]
        result = summarise(documents, windows, scores)
        inside += abs(result.loss - 3) < 2 * result.loss_stderr
        assert result.loss_stderr == pytest.approx(1 / math.sqrt(200), rel=0.3)
    assert 180 <= inside <= 199


def test_a_single_window_has_no_error_and_unknown_text_no_figures_by_word():
    documents = [document(3)]
    result = summarise(documents, make_windows(documents, EOD, 8, 4), [Score(-3.0, False)])
    assert (result.loss, result.loss_stderr, result.token_perplexity_stderr) == (1.0, None, None)
    assert (result.word_perplexity, result.bits_per_byte, result.words, result.bytes) == (None,) * 4


# Texts


def test_a_file_is_one_document_or_is_cut_at_separators(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one two\n<|endoftext|>\nthréé\n<|endoftext|>\n \n")
    whole = read_texts([str(file)], BYTES)
    assert (len(whole.documents), whole.text_format, whole.files) == (1, "text", [str(file)])
    cut = read_texts([str(file)], BYTES, separator="<|endoftext|>").documents
    assert [(one.words, one.num_bytes) for one in cut] == [(2, 8), (1, 8)]
    assert cut[1].tokens == tuple("thréé\n".encode())


def test_folders_and_json_lines_are_read_with_the_rules_of_prepare(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "one"}) + "\n" + json.dumps({"body": "more of it"}) + "\n")
    found = read_texts([str(tmp_path)], BYTES, text_key="body").documents
    assert [bytes(one.tokens) for one in found] == [b"one", b"more of it", b"two"]


def test_wikitext_is_scored_detokenised_and_counted_raw(tmp_path):
    file = tmp_path / "wiki.raw"
    file.write_text(" \n = One = \n It 's 1 @,@ 300 . \n \n = Two = \n so \n")
    one, two = read_texts([str(file)], BYTES, "wikitext").documents
    assert bytes(one.tokens) == b" = One =\nIt's 1,300.\n"
    assert (one.words, one.num_bytes) == (3 + 6 + 2, len(" = One = \n It 's 1 @,@ 300 . \n "))
    assert bytes(two.tokens) == b" = Two =\nso\n"


@pytest.fixture
def prepared(tmp_path):
    """Text in two documents, and the data set that `prepare` writes of it."""
    from megatron_sbld.data.prepare import PrepareConfig, prepare

    file = tmp_path / "a.txt"
    file.write_text("one twö\n=\nthree four five\n")
    prepare(
        PrepareConfig(
            inputs=[str(file)], output=str(tmp_path / "set"), document_separator="=", valid_fraction=0, workers=1
        )
    )
    return str(file), str(tmp_path / "set_train")


def test_a_prepared_data_set_gives_the_documents_of_its_text(prepared):
    text, prefix = prepared
    of_text, of_set = read_texts([text], BYTES, separator="="), read_texts([prefix], BYTES)
    assert of_set.text_format == "dataset"
    assert sorted(of_set.documents, key=str) == sorted(of_text.documents, key=str)
    assert of_set.files == [f"{prefix}.bin", f"{prefix}.idx"]


def test_a_data_set_of_another_tokenizer_is_refused(prepared):
    with pytest.raises(ValueError, match=r"set_train was prepared with tokenizer 'byte', which encodes differently"):
        read_texts([prepared[1]], CharacterTokenizer())


def test_metadata_that_lack_the_tokenizer_are_named(prepared):
    file = Path(prepared[1].removesuffix("_train") + ".json")
    file.write_text(
        json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "tokenizer"})
    )
    with pytest.raises(ValueError, match=r"the metadata \(\.json\) of .*set_train lack 'tokenizer'"):
        read_texts([prepared[1]], BYTES)


def test_ids_that_are_no_text_have_tokens_alone(tmp_path):
    """A data set that Megatron-LM prepared, with documents of several sequences and half a character."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "set.bin"), dtype=np.uint16)
    builder.add_document(np.array([65, 0xC3, 66, 256], np.uint16), [2, 2])
    builder.add_document(np.array([67], np.uint16), [1])
    builder.finalize(str(tmp_path / "set.idx"))
    first, second = read_texts([str(tmp_path / "set")], BYTES).documents
    assert (first.tokens, first.words, first.num_bytes) == ((65, 0xC3, 66), None, None)
    assert (second.tokens, second.words, second.num_bytes) == ((67,), 1, 1)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "set.bin"), dtype=np.uint16)
    builder.add_document(np.array([65, 300], np.uint16), [2])
    builder.finalize(str(tmp_path / "set.idx"))
    with pytest.raises(ValueError, match=r"has the id 300; the model's tokenizer 'byte' has ids 0 to 258"):
        read_texts([str(tmp_path / "set")], BYTES)


def test_bad_input_is_refused_by_name(tmp_path, prepared):
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    for inputs, options, problem in [
        (["latin.txt"], {}, r"latin\.txt: line 1, byte offset 2: 0xef is not UTF-8"),
        (["latin.txt"], {"text_format": "wikitext"}, r"latin\.txt: line 1, byte offset 2: 0xef is not UTF-8"),
        (["blank.txt"], {}, r"blank\.txt: there is no text in it"),
        (["bad.jsonl"], {}, r"bad\.jsonl, line 1: no text under the key 'text'"),
        (["gone"], {}, r"gone' does not exist"),
        (["gone"], {"text_format": "dataset"}, r"gone\.idx does not exist"),
        (["a.txt", "set_train"], {}, "some are prefixes of data sets and some are not"),
        (
            ["a.txt"],
            {"text_format": "csv"},
            "format = 'csv' is not allowed: it must be one of auto, text, jsonl, wikitext, dataset",
        ),
        ([], {}, "at least one file"),
        (["set"], {}, "is a whole set; give one of its splits, .*set_valid or .*set_train"),
        (["set_train.bin"], {}, r"set_train\.bin: it holds the tokens of a data set; give the prefix, without \.bin"),
        (["set_train.idx"], {}, r"set_train\.idx: it is the index of a data set; give the prefix, without \.idx"),
        (["set_train"], {"separator": "x"}, "separator = 'x' has no effect with format = dataset"),
        (["set_train"], {"text_key": "x"}, "text_key = 'x' has no effect with format = dataset"),
        (["a.txt"], {"text_format": "wikitext", "separator": "x"}, "separator = 'x' has no effect"),
        (["a.txt"], {"text_format": "text", "text_key": "x"}, "text_key = 'x' has no effect"),
        (["a.jsonl"], {"text_format": "jsonl", "separator": "x"}, "separator = 'x' has no effect"),
        (["latin.txt"], {"separator": "x\n"}, "no line equals it"),
    ]:
        with pytest.raises(ValueError, match=problem):
            read_texts([str(tmp_path / name) for name in inputs], BYTES, **options)


def test_a_task_has_the_windows_of_each_model(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abcdefgh")
    task = PerplexityTask(str(file))
    short, long = (task.ask(BYTES, context) for context in (4, 8))
    assert [window.num_targets for window in short.requests] == [4, 2, 2]
    assert (short.options["stride"], short.options["format"], short.files) == (2, "text", [str(file)])
    assert [window.num_targets for window in long.requests] == [8]
    assert long.result([Score(-8.0, False)]).loss == 1.0


def test_the_validation_split_of_wikitext_in_gpt2s_tokens(shared_file):
    """Each token of the text once; disjoint windows by convention."""
    gpt2 = load_tokenizer(str(shared_file("gpt2-vocab.json").parent))
    asked = PerplexityTask(str(shared_file("wiki.valid.raw")), "wikitext").ask(gpt2, 1024)
    windows = asked.requests
    result = asked.result([Score(-float(window.num_targets), False) for window in windows])
    assert (asked.options["format"], asked.options["stride"]) == ("wikitext", 1024)
    assert (result.documents, result.words) == (60, 214_006)
    assert result.tokens == sum(window.num_targets for window in windows) == 237_481
    assert result.loss == pytest.approx(1.0)
