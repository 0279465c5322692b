import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from megatron_sbld.data.tokenizer import EOD_NAMES, ByteTokenizer, load_tokenizer

TEXTS = [
    "Hello world",
    "naïve façade",
    "日本語 Ω 🙂\r\n\ttab",
    "",
    "  two  spaces \n\n end ",
    "a\x00b",
    "e\u0301 \u2028 x",
]


@pytest.fixture(scope="module")
def gpt2_folder(shared_file) -> Path:
    return shared_file("gpt2-vocab.json").parent


@pytest.fixture(scope="module")
def gpt2(gpt2_folder):
    return load_tokenizer(str(gpt2_folder))


def write_tokenizer_json(path, *, vocab=("a", "b", "ab", "</s>"), **fields):
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [("a", "b")]))
    backend.save(str(path))
    content = json.loads(path.read_text())
    content.update(fields)
    path.write_text(json.dumps(content))
    return path


def test_byte_tokenizer_has_the_ids_of_megatrons_byte_level_tokenizer():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad, tokenizer.bos) == (259, 256, 257, 258)
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


def test_byte_decode_leaves_special_ids_out_and_replaces_half_a_character():
    assert ByteTokenizer().decode([104, 256, 105, 257, 0xC3]) == "hi\ufffd"


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_round_trips(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_has_its_known_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.eod, gpt2.vocab_size) == (50256, 50257)
    assert gpt2.decode([15496, 50256, 995]) == "Hello world"


def test_text_never_turns_into_a_control_token(gpt2):
    assert gpt2.eod not in gpt2.encode("before<|endoftext|>after")
    assert gpt2.decode(gpt2.encode("before<|endoftext|>after")) == "before<|endoftext|>after"


def test_encoding_long_text_in_pieces_changes_no_token(gpt2, monkeypatch):
    rng = random.Random(0)
    words = ["the", "it's", "'s", " ", "\n", "\n\n", "  ", "Ω", "日本", "12", "...", "\u00a0", "\x1c", "\t", "🙂"]
    for _ in range(200):
        text = "".join(rng.choice([" ", "", " "]) + rng.choice(words) for _ in range(60))
        whole = gpt2._backend.encode(text, add_special_tokens=False).ids
        monkeypatch.setattr("megatron_sbld.data.tokenizer._PIECE_CHARACTERS", rng.randint(1, 20))
        assert gpt2.encode(text) == whole


def test_the_same_tokenizer_in_another_format_has_the_same_fingerprint(gpt2, tmp_path):
    gpt2._backend.save(str(tmp_path / "tokenizer.json"))
    other = load_tokenizer(str(tmp_path))
    assert other.fingerprint() == gpt2.fingerprint()
    assert other.encode("Hello world") == [15496, 995]


def test_fingerprints_do_not_change_between_runs_and_tell_tokenizers_apart(gpt2, tmp_path):
    assert ByteTokenizer().fingerprint().startswith("a6f16e16adac1033")
    assert gpt2.fingerprint().startswith("0b05aba0ed5227a6")
    other = load_tokenizer(str(write_tokenizer_json(tmp_path / "tokenizer.json")))
    assert len({other.fingerprint(), gpt2.fingerprint(), ByteTokenizer().fingerprint()}) == 3


def test_batches_are_encoded_like_single_texts(gpt2):
    assert gpt2.encode_batch(TEXTS) == [gpt2.encode(text) for text in TEXTS]


def test_truncation_and_padding_stored_in_a_tokenizer_json_are_switched_off(tmp_path):
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "a"}
    path = write_tokenizer_json(tmp_path / "tokenizer.json", truncation=truncation, padding=padding)
    assert load_tokenizer(str(path)).encode("abab" * 4) == [2] * 8


def test_a_vocabulary_with_gaps_counts_to_its_largest_id(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "</s>": 40}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).vocab_size == 41


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder; allowed: byte"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_an_empty_folder_is_refused_with_the_names_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json, vocab.json with merges.txt, gpt2-vocab.json"):
        load_tokenizer(str(tmp_path))


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("[1]")
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(ValueError, match="is not a byte-level BPE"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_of_document_token_is_refused_with_the_names_looked_for(tmp_path):
    path = write_tokenizer_json(tmp_path / "tokenizer.json", vocab=("a", "b", "ab"))
    with pytest.raises(ValueError) as error:
        load_tokenizer(str(path))
    assert all(name in str(error.value) for name in EOD_NAMES)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    path.unlink()
    with pytest.raises(ValueError, match="no end-of-document token"):
        load_tokenizer(str(tmp_path))
