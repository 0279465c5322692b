"""Reading LAMBADA: two formats, the target, and bad input by file and line."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sbld.evaluation.passages import _split, read_passages

TOKENS = "`` go , '' she said , and he went"
TEXT = '"go," she said, and he went'


def written(tmp_path, content, name="passages.txt"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def only(read):
    ((passage,), _) = read
    return passage.context, passage.target


def test_plain_text_is_detokenised_and_raw_on_request(tmp_path):
    path = written(tmp_path, f"{TOKENS}\n")
    assert only(read_passages(path)) == ('"go," she said, and he', " went")
    assert only(read_passages(path, detokenise=False)) == ("`` go , '' she said , and he", " went")
    assert read_passages(path)[1] == "text"


def test_json_lines_are_taken_as_they_are_and_detokenised_on_request(tmp_path):
    path = written(tmp_path, json.dumps({"text": TOKENS, "id": 3}) + "\n", "passages.jsonl")
    assert only(read_passages(path)) == ("`` go , '' she said , and he", " went")
    assert only(read_passages(path, detokenise=True)) == ('"go," she said, and he', " went")
    assert read_passages(path)[1] == "jsonl"


@pytest.mark.parametrize(
    ("name", "found"), [("a.jsonl", "jsonl"), ("a.NDJSON", "jsonl"), ("a.txt", "jsonl"), ("A.JSON", "jsonl")]
)
def test_the_format_is_found_by_name_or_content(tmp_path, name, found):
    assert read_passages(written(tmp_path, json.dumps({"text": TEXT}), name))[1] == found


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress)])
def test_compressed_passages_are_unpacked(tmp_path, suffix, compress):
    for name, content in (("a.txt", f"{TOKENS}\n"), ("a.jsonl", json.dumps({"text": TOKENS}))):
        packed = compress(content.encode())
        plain = read_passages(written(tmp_path, content, name))
        assert read_passages(written(tmp_path, packed, f"{name}.{suffix}")) == plain
        with pytest.raises(ValueError, match=rf"{name}\.{suffix}: damaged \.{suffix} file"):
            read_passages(written(tmp_path, packed[:-10], f"{name}.{suffix}"))


def test_a_format_that_is_given_wins_over_name_and_content(tmp_path):
    path = written(tmp_path, json.dumps({"text": TEXT}), "a.jsonl")
    assert only(read_passages(path, "text", detokenise=False))[1] == ' went"}'
    with pytest.raises(ValueError, match="format = 'csv' is not allowed: it must be one of auto, text, jsonl"):
        read_passages(path, "csv")


def test_windows_line_ends_a_byte_order_mark_and_a_missing_last_line_end_are_no_text(tmp_path):
    passages, _ = read_passages(written(tmp_path, b"\xef\xbb\xbfone two\r\nthree four"))
    assert [(p.line, p.context, p.target) for p in passages] == [(1, "one", " two"), (2, "three", " four")]


def test_a_quote_that_detokenising_puts_to_the_last_word_is_told(tmp_path):
    passages, _ = read_passages(written(tmp_path, "he called out , `` jared\nhe called jared\n"))
    assert [(p.target, p.is_glued) for p in passages] == [(' "jared', True), (" jared", False)]


def test_several_spaces_before_the_last_word_belong_to_the_target(tmp_path):
    path = written(tmp_path, json.dumps({"text": "one two \n  three"}), "a.jsonl")
    assert only(read_passages(path)) == ("one two", " \n  three")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("one two\n\nthree four\n", r"passages\.txt:2: an empty passage"),
        ("one two\n   \n", r":2: an empty passage"),
        ("one two\nthree\n", r":2: a passage of one word, 'three'"),
        ("one two \n", r":1: white space at the end"),
        (b"one two\nna\xefve word\n", r":2: not UTF-8: byte 0xef at byte 3 of the line"),
        ("one two\n".encode("utf-16"), r"passages\.txt: it is UTF-16; UTF-8 is needed"),
        ("one two\n".encode("utf-16-le"), r"passages\.txt: it looks like UTF-16"),
        ("one two\nthree \0\n", r":2: a NUL character; the file may be UTF-16"),
        (b"\x28\xb5\x2f\xfd\x04", r"passages\.txt: it is compressed with Zstandard"),
        ('{"text": "one two"}\n{"text": "one\n', r":2: not JSON"),
        ('{"text": "one two"}\n["one two"]\n', r":2: needs an object .* it is list"),
        ('{"text": "one two"}\n{"passage": "a b", "id": 1}\n', r":2: no key \"text\"; it has 'passage', 'id'"),
        ('{"text": "one two"}\n{"text": 3}\n', r':2: "text" must be a string; it is int'),
        ('{"text": "one two"}\n{"text": "\\ud83d x"}\n', r":2: .*half of a surrogate pair"),
        ('{"text": "one two"}\n{"text": ""}\n', r":2: an empty passage"),
        ('{"text": "one two"}\n\n', r":2: an empty passage"),
        ('{"text": "one two"}\n{"text": "one two\\n"}\n', r":2: white space at the end"),
        ("", r"the file is empty"),
        ("\n \n", r"the file is empty"),
    ],
)
def test_bad_input_is_refused_by_file_and_line(tmp_path, content, problem):
    with pytest.raises(ValueError, match=problem):
        read_passages(written(tmp_path, content))


@pytest.mark.parametrize("content", ['[{"text": "one two"}]', '{\n"text": "one two"\n}'])
def test_json_that_is_not_one_object_a_line_is_told_by_name(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.json: it is one JSON (array|value over several lines); JSON lines"):
        read_passages(written(tmp_path, content, "a.json"))
    with pytest.raises(ValueError, match="a pipe or a device"):
        read_passages("/dev/null")


def test_an_object_is_found_with_white_space_in_it_too(tmp_path):
    assert only(read_passages(written(tmp_path, '{ "text": "one two"}\n'))) == ("one", " two")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.txt: no such file"):
        read_passages(str(tmp_path / "gone.txt"))


def test_of_many_problems_the_first_are_shown_and_all_counted(tmp_path):
    with pytest.raises(ValueError, match=r"9 lines are not passages") as error:
        read_passages(written(tmp_path, "one two\n" + "word\n" * 9))
    assert str(error.value).count("one word") == 5
    assert str(error.value).endswith("and 4 more")


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40).map(lambda text: f"a{text} z"))
def test_context_and_target_make_the_passage_and_the_target_is_what_follows_the_last_space(text):
    passage = _split(1, text)
    assert passage.context + passage.target == text
    assert passage.target.lstrip() == text.split(" ")[-1]
    assert passage.context == passage.context.rstrip() != ""


@pytest.mark.parametrize("detokenise", [True, False])
def test_the_development_split_is_read_whole(shared_file, detokenise):
    path = str(shared_file("lambada_development_plain_text.txt"))
    passages, _ = read_passages(path, detokenise=detokenise)
    assert len(passages) == 4869
    assert sum(passage.is_glued for passage in passages) == (38 if detokenise else 0)
    assert [passage.target for passage in passages[:2]] == [" cake", " rowan"]
