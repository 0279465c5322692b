import gc
import gzip
import itertools
import json
import lzma
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sbld.data import prepare as prepare_module
from megatron_sbld.data.dataset_files import read_metadata, set_files
from megatron_sbld.data.prepare import PrepareConfig, prepare, split_documents, verify_dataset
from megatron_sbld.data.tokenizer import load_tokenizer

EOD = 256


def run(tmp_path, *inputs, **fields):
    config = {"inputs": [str(path) for path in inputs], "output": str(tmp_path / "out"), "workers": 1}
    return prepare(PrepareConfig(**{**config, **fields}))


def texts_of(prefix):
    """The documents of a byte-level set, as text, each without its end-of-document token."""
    dataset = IndexedDataset(prefix)
    documents = [np.array(dataset[index]) for index in range(len(dataset))]
    assert all(document[-1] == EOD and EOD not in document[:-1] for document in documents)
    return [bytes(document[:-1].astype(np.uint8)).decode() for document in documents]


def train_texts(tmp_path, *inputs, **fields):
    return texts_of(run(tmp_path, *inputs, valid_fraction=0, **fields).splits["train"].prefix)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def corpus(tmp_path):
    """40 documents in one file, of different lengths."""
    texts = [f"Document {i}: naïve 日本語\n" + "line\n" * (i % 7) for i in range(40)]
    return write(tmp_path / "corpus.txt", "<|endoftext|>\n".join(texts)), texts


def in_child(function):
    """Exit code of `function` in a forked process: negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        gc.disable()  # objects of earlier tests may have threads that a fork does not copy
        try:
            function()
        except BaseException as error:
            print(error)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_documents_are_separated_and_their_text_is_kept_to_the_byte(tmp_path):
    path = write(
        tmp_path / "a.txt", "one\r\n  two\n<|endoftext|>\nnaïve 日本語 🙂\n<|endoftext|>\r\nlast<|endoftext|> no end"
    )
    assert train_texts(tmp_path, path) == ["one\r\n  two\n", "naïve 日本語 🙂\n", "last<|endoftext|> no end"]


def test_another_separator_or_none_can_be_chosen(tmp_path):
    path = write(tmp_path / "a.txt", "one\n===\ntwo\n<|endoftext|>\n")
    assert train_texts(tmp_path, path, document_separator="===") == ["one\n", "two\n<|endoftext|>\n"]
    assert train_texts(tmp_path, path, document_separator=None, overwrite=True) == [path.read_text()]


def test_a_folder_is_read_recursively_in_order_of_names_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".hidden.txt", ".git/x.txt", "__x__.txt"):
        write(tmp_path / "in" / name, name)
    assert train_texts(tmp_path, tmp_path / "in") == ["__x__.txt", "b.txt", "a/z.txt", "a/b/c.txt"]


def test_include_selects_files_of_folders_also_under_their_compressed_names(tmp_path):
    write(tmp_path / "in/a.py", "a")
    write(tmp_path / "in/b.txt", "b")
    write(tmp_path / "in/c.py.gz", gzip.compress(b"c"))
    assert train_texts(tmp_path, tmp_path / "in", include=["*.py"]) == ["a", "c"]


def test_json_lines_give_one_document_a_line(tmp_path):
    lines = [
        {"text": "one\n<|endoftext|>\n"},
        {"text": "Ω\ud83d\ude42".encode("utf-16", "surrogatepass").decode("utf-16")},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert train_texts(tmp_path, path) == ["one\n<|endoftext|>\n", "Ω🙂"]


def test_the_key_and_the_format_of_json_lines_can_be_chosen(tmp_path):
    path = write(tmp_path / "a.data", '{"content": "x", "text": 1}\n')
    assert train_texts(tmp_path, path, input_format="jsonl", text_key="content") == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1]", "line 2: no text under the key 'text'.*list"),
        ('{"content": "x"}', r"line 2: no text under the key 'text' \(text_key\); the line has \['content'\]"),
        ('{"text": 3}', "line 2: no text"),
        ('{"text": "\\ud800"}', "line 2: half of a surrogate pair"),
    ],
)
def test_a_damaged_json_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, path)
    assert not list(tmp_path.glob("*out*"))


def test_compressed_files_are_unpacked(tmp_path):
    inputs = [
        write(tmp_path / "a.txt.xz", lzma.compress("naïve\n".encode())),
        write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "json"}\n')),
    ]
    assert train_texts(tmp_path, *inputs) == ["naïve\n", "json"]


@pytest.mark.parametrize(("suffix", "compress"), [("xz", lzma.compress), ("gz", gzip.compress)])
def test_a_damaged_archive_is_refused_by_name(tmp_path, suffix, compress):
    whole = compress(os.urandom(5000).hex().encode())
    for content in (whole[:-40], b"no archive", whole[:100] + b"\0" * 100 + whole[200:]):
        path = write(tmp_path / f"a.{suffix}", content)
        with pytest.raises(ValueError, match=rf"a\.{suffix}: damaged \.{suffix} file"):
            run(tmp_path, path, valid_fraction=0)


def test_files_that_are_no_text_are_skipped_counted_and_named(tmp_path):
    write(tmp_path / "in/a.txt", "text")
    write(tmp_path / "in/b.bin", b"text first\n<|endoftext|>\n" * 9999 + b"\xff\xfe")
    write(tmp_path / "in/c.bin", b"\0" * 10)
    write(tmp_path / "in/d.jsonl", b'{"text": "x"}\n\xff')
    result = run(tmp_path, tmp_path / "in", valid_fraction=0)
    assert texts_of(result.splits["train"].prefix) == ["text"]
    assert [Path(skip.path).name for skip in result.skipped] == ["b.bin", "c.bin", "d.jsonl"]
    assert "3 files skipped" in result.summary()
    assert f"b.bin: line 19999, byte offset {25 * 9999}: 0xff is not UTF-8" in result.summary()
    assert "c.bin: line 1, byte offset 0: a NUL character" in result.summary()
    assert "d.jsonl: line 2, byte offset 14: 0xff is not UTF-8" in result.summary()
    assert len(read_metadata(str(tmp_path / "out_train"))["skipped"]) == 3


def test_a_file_that_is_named_twice_is_read_once_and_reported(tmp_path):
    path = write(tmp_path / "in/a.txt", "text")
    (tmp_path / "in/link.txt").symlink_to(path)
    result = run(tmp_path, path, tmp_path / "in", valid_fraction=0)
    assert result.splits["train"].documents == 1
    assert ["the same file as" in skip.reason for skip in result.skipped] == [True, True]


def test_empty_files_and_documents_are_left_out_and_counted(tmp_path):
    inputs = [
        write(tmp_path / "empty.txt", ""),
        write(tmp_path / "a.txt", "x\n<|endoftext|>\n \n<|endoftext|>\ny\n<|endoftext|>\n"),
    ]
    result = run(tmp_path, *inputs, valid_fraction=0)
    assert texts_of(result.splits["train"].prefix) == ["x\n", "y\n"]
    assert result.empty_documents == 2
    with pytest.raises(ValueError, match="no document with text"):
        run(tmp_path, inputs[0], output=str(tmp_path / "none"))


LONG = "".join(f"line {i} é\n" for i in range(100)) + "word " * 50 + "\n" + "é" * 120 + "\nlast\n"


@pytest.mark.parametrize("characters", [1 << 20, 110])  # read of a line at once
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_long_documents_are_cut_when_asked_to_and_none_is_longer(tmp_path, monkeypatch, name, characters):
    monkeypatch.setattr("megatron_sbld.data.documents._LINE_CHARACTERS", characters)
    content = json.dumps({"text": LONG}) if name == "a.jsonl" else LONG
    path = write(tmp_path / name, gzip.compress(content.encode()) if name.endswith(".gz") else content)
    pieces = train_texts(tmp_path, path, max_document_bytes=101)
    assert "".join(pieces) == LONG
    assert all(len(piece.encode()) <= 101 for piece in pieces)
    for piece, then in itertools.pairwise(pieces):
        # At line ends, in long lines between words, in long words between characters.
        assert piece.endswith("\n") or (piece[-1], then[0]) in {(" ", "w"), (" ", "\n"), ("é", "é")}
    assert pieces[-1].endswith("é\nlast\n")
    assert max(len(piece.encode()) for piece in pieces) > 90


def test_a_line_end_that_is_read_in_two_parts_is_no_empty_line(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_sbld.data.documents._LINE_CHARACTERS", 20)
    path = write(tmp_path / "a.txt", "x" * 19 + "\r\ny\r\n\r\nz\r\n")
    pieces = train_texts(tmp_path, path, document_separator="", max_document_bytes=19)
    assert pieces == ["x" * 19, "\r\ny\r\n", "z\r\n"]


def test_a_separator_is_a_whole_line_also_where_long_lines_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_sbld.data.documents._LINE_CHARACTERS", 20)
    text = "x" * 21 + "<|endoftext|>\ny\n<|endoftext|>\nz"
    pieces = train_texts(tmp_path, write(tmp_path / "a.txt", text), max_document_bytes=20)
    assert pieces == ["x" * 20, "x<|endoftext|>\ny\n", "z"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("c4.json.gz", gzip.compress(b'{"text": "a", "url": "u"}\n{"text": "b"}\n', mtime=0), ["a", "b"]),
        ("A.JSON", b'\xef\xbb\xbf{"text": "a"}\n', ["a"]),
        ("A.JSONL", b'{"text": "a"}\n', ["a"]),
        ("A.JSONL.GZ", gzip.compress(b'\n{"text": "a"}\n', mtime=0), ["a"]),
        ("a.txt", b'{"text": "a"}\n', ["a"]),
        ("a", b'  {"url": "%s", "text": "a"}\n' % (b"x" * 100_000), ["a"]),
    ],
)
def test_json_lines_are_found_whatever_they_are_called(tmp_path, name, content, expected):
    result = run(tmp_path, write(tmp_path / "in" / name, content), valid_fraction=0)
    assert texts_of(result.splits["train"].prefix) == expected
    assert re.search(
        r"1 files taken for JSON lines \((\.json|\.json\.gz|\.jsonl|\.jsonl\.gz|\.txt|no ending)\)\n", result.summary()
    )


@pytest.mark.parametrize("text", ['{"title": "no text"}\n', '[{"text": "a"}]\n', "{not JSON}\n", "[1]\n", "plain\n"])
def test_what_begins_with_other_json_is_text_and_is_said_to_be(tmp_path, text):
    result = run(tmp_path, write(tmp_path / "a.txt", text), valid_fraction=0)
    assert texts_of(result.splits["train"].prefix) == [text]
    begins = "1 files taken for text that begins with JSON (.txt), braces and keys included; input_format = jsonl"
    assert (begins in result.summary()) == ('"t' in text)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"text": "a"}, {"text": "b"}]', "it is one JSON array; JSON lines are needed"),
        (b'[\n  {"text": "a"},\n  {"text": "b"}\n]\n', "it is one JSON value over several lines"),
        (b'{\n  "text": "a"\n}\n', "it is one JSON value over several lines"),
        (b'{"title": "a"}\n', r"no text under the key 'text' \(text_key\); the line has \['title'\]"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.JSON.gz"])
def test_json_that_is_not_one_object_a_line_is_told_by_name(tmp_path, name, content, reason):
    path = write(tmp_path / "in" / name, gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=f"{name}: {reason}"):
        run(tmp_path, path, valid_fraction=0)
    write(tmp_path / "in/b.txt", "text")
    result = run(tmp_path, tmp_path / "in", valid_fraction=0)
    assert re.search(rf"1 files skipped:\n  .*{name}: {reason}", result.summary())
    assert train_texts(tmp_path, path, input_format="text", overwrite=True) == [content.decode()]


OTHER_FILES = [
    ("a.txt", b"one\ntwo \xe9\n", "line 2, byte offset 8: 0xe9 is not UTF-8"),
    ("a.txt", b"one\n" + "é".encode()[:1], "line 2, byte offset 4: 0xc3 is not UTF-8"),
    ("a.txt", b"x" * (1 << 20) + b"\n\0", f"line 2, byte offset {(1 << 20) + 1}: a NUL character"),
    ("a.txt.gz", gzip.compress(b"one\n\xff", mtime=0), "line 2, byte offset 4 of the unpacked text: 0xff is not UTF-8"),
    ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', "line 2, byte offset 26: 0xff is not UTF-8"),
    ("a.txt", "one\n".encode("utf-16"), "it is UTF-16; UTF-8 is needed"),
    ("a.txt", "\ufeffone\n".encode("utf-32-be"), "it is UTF-32; UTF-8 is needed"),
    ("a.txt", "one two\n".encode("utf-16-be"), "it looks like UTF-16"),
    ("a.txt.xz", lzma.compress("one two\n".encode("utf-32-le")), "it looks like UTF-32"),
    ("a.jsonl", '{"text": "one"}\n'.encode("utf-16"), "it is UTF-16"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "it is compressed with Zstandard; unpack it"),
    ("a.txt", gzip.compress(b"one", mtime=0), "it is compressed with gzip, which its name does not say"),
]


@pytest.mark.parametrize(("name", "content", "reason"), OTHER_FILES)
def test_a_named_file_that_is_no_text_is_refused_with_the_place_or_its_kind(tmp_path, name, content, reason):
    path = write(tmp_path / "in" / name, content)
    good = write(tmp_path / "good.txt", "good\n")
    for inputs in ([path], [good, path], [tmp_path / "in", path]):
        with pytest.raises(ValueError, match=f"{name}: {reason}"):
            run(tmp_path, *inputs, valid_fraction=0)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(("name", "content", "reason"), OTHER_FILES)
def test_the_reason_is_told_where_a_folder_has_no_other_file(tmp_path, name, content, reason):
    write(tmp_path / "in" / name, content)
    with pytest.raises(ValueError, match=rf"no document with text in them\n1 files skipped:\n  .*{name}: {reason}"):
        run(tmp_path, tmp_path / "in")


@pytest.mark.parametrize("option", [None, 65536, 30])
def test_what_is_advised_for_a_single_document_helps(tmp_path, option):
    path = write(tmp_path / "a.txt", "only one line\n")
    with pytest.raises(ValueError, match="a single document of 14 bytes") as error:
        run(tmp_path, path, max_document_bytes=option)
    advised = re.search(r"max_document_bytes, for instance (\d+)\)", str(error.value))
    assert run(tmp_path, path, max_document_bytes=int(advised[1])).splits["train"].documents >= 1


def test_a_pipe_is_refused_because_files_are_read_twice(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe' is a pipe or a device; files are read twice"):
        run(tmp_path, tmp_path / "pipe")


def test_the_metadata_says_what_the_set_holds(tmp_path, corpus):
    path, texts = corpus
    result = run(tmp_path, path, seed=7)
    metadata = read_metadata(result.splits["valid"].prefix)
    assert metadata["tokenizer"]["fingerprint"] == load_tokenizer("byte").fingerprint()
    assert metadata["dtype"] == "uint16"
    assert (metadata["seed"], metadata["valid_fraction"], metadata["files"]) == (7, 0.05, 1)
    splits = metadata["splits"]
    assert splits["train"]["documents"] + splits["valid"]["documents"] == len(texts)
    assert splits["train"]["text_bytes"] + splits["valid"]["text_bytes"] == len("".join(texts).encode())
    for split, sizes in splits.items():
        assert sizes["tokens"] == verify_dataset(result.splits[split].prefix).tokens
        assert sizes["tokens"] == sizes["text_bytes"] + sizes["documents"]


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("megatron_sbld.data.encode._BATCH_CHARACTERS", 50)
    for workers in (1, 2):
        run(tmp_path, corpus[0], workers=workers, output=str(tmp_path / f"w{workers}"))
    for one, two in zip(set_files(str(tmp_path / "w1")), set_files(str(tmp_path / "w2")), strict=True):
        assert Path(one).read_bytes() == Path(two).read_bytes()


def test_every_document_is_in_one_split_and_keeps_its_order(tmp_path, corpus):
    result = run(tmp_path, corpus[0], valid_fraction=0.3)
    train, valid = (texts_of(result.splits[split].prefix) for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(corpus[1])
    assert train == [text for text in corpus[1] if text in train]
    assert 4 <= len(valid) <= 20


def test_the_split_is_pinned_and_documents_added_later_move_no_other():
    few, many = split_documents(50, 0.1, seed=1), split_documents(5000, 0.1, seed=1)
    assert (few == many[:50]).all()
    assert np.flatnonzero(few).tolist() == [3, 5, 24, 27, 43]
    assert 430 < many.sum() < 570
    assert (split_documents(5000, 0.1, seed=2) != many).any()


@pytest.mark.parametrize("fraction", [1e-9, 0.999999999])
@pytest.mark.parametrize("documents", [2, 3])
def test_both_splits_get_a_document(documents, fraction):
    assert 0 < split_documents(documents, fraction, seed=3).sum() < documents


def test_a_single_document_is_not_split_and_the_error_says_what_to_do(tmp_path):
    path = write(tmp_path / "a.txt", "only one\n")
    with pytest.raises(
        ValueError, match=r"max_document_bytes, for instance 4\).*document_separator.*valid_fraction = 0"
    ):
        run(tmp_path, path)
    assert not list(tmp_path.glob("*out*"))


def test_without_a_validation_fraction_no_validation_set_is_left(tmp_path, corpus):
    run(tmp_path, corpus[0])
    result = run(tmp_path, corpus[0], valid_fraction=0, overwrite=True)
    assert list(result.splits) == ["train"]
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.json", "out_train.bin", "out_train.idx"]


def test_an_existing_set_is_refused_unless_overwriting(tmp_path, corpus):
    run(tmp_path, corpus[0])
    before = (tmp_path / "out_train.bin").read_bytes()
    with pytest.raises(ValueError, match=r"out_train\.bin exists"):
        run(tmp_path, corpus[0], seed=99)
    assert (tmp_path / "out_train.bin").read_bytes() == before
    run(tmp_path, corpus[0], seed=99, overwrite=True)
    assert (tmp_path / "out_train.bin").read_bytes() != before


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["out.json", "out_train.bin", "out_valid.idx", ".out.partial/out.json"])
@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_an_output_never_overwrites_an_input(tmp_path, name, link):
    """Named, in a folder, and under another name."""
    corpus = write(tmp_path / ("corpus.json" if link else name), '{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if link:
        link(corpus, tmp_path / name)
    before = contents(tmp_path)
    folders = [] if name.startswith(".") else [tmp_path, write(tmp_path / "in/other.txt", "a")]
    for inputs in ([corpus], [os.path.relpath(tmp_path / name)], *([folder] for folder in folders)):
        with pytest.raises(ValueError, match=r"output: .*(is an input|is not a file of a data set)"):
            run(tmp_path, *inputs, overwrite=True, input_format="jsonl" if inputs[0] == corpus else "auto")
    (tmp_path / "in/other.txt").unlink(missing_ok=True)
    assert contents(tmp_path) == before


def test_a_set_is_replaced_whatever_name_its_folder_is_read_under(tmp_path, corpus):
    (tmp_path.parent / f"{tmp_path.name}.link").symlink_to(tmp_path)
    first = run(tmp_path, tmp_path)
    linked = tmp_path.parent / f"{tmp_path.name}.link"
    assert run(tmp_path, linked, overwrite=True).splits == first.splits


def test_the_tokenizer_is_not_overwritten(tmp_path, corpus):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "out.json"))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"out\.json exists and is not a file of a data set"):
        run(tmp_path, corpus[0], tokenizer=str(tmp_path / "out.json"), overwrite=True)
    assert contents(tmp_path) == before


def test_an_output_inside_the_input_folder_is_not_read_the_next_time(tmp_path, corpus):
    first = run(tmp_path, tmp_path)
    second = run(tmp_path, tmp_path, overwrite=True)
    assert second.splits == first.splits
    assert not second.skipped


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": []}, "inputs: at least one"),
        ({"inputs": ["/nowhere/x"]}, "inputs: '/nowhere/x' does not exist"),
        ({"valid_fraction": 1.0}, r"valid_fraction = 1.0 is not allowed: it must be a number in \[0, 1\)"),
        ({"seed": -1}, "seed = -1"),
        ({"workers": 0}, "workers = 0"),
        ({"max_document_bytes": 3}, "max_document_bytes = 3 is not allowed: it must be an integer of at least 4"),
        ({"document_separator": "\n\n"}, "no line equals it"),
        ({"input_format": "text", "text_key": "body"}, "text_key = 'body' has no effect with input_format = text"),
        ({"include": ["*.no"]}, r"no file matches \['\*.no'\]"),
        ({"tokenizer": "nothing"}, "tokenizer 'nothing'"),
    ],
)
def test_mistakes_in_the_config_are_refused_by_name(tmp_path, corpus, fields, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tmp_path, **fields)


def test_a_file_that_changes_while_it_is_read_is_an_error_and_leaves_nothing(tmp_path, corpus, monkeypatch):
    surveyed = prepare_module.survey

    def survey_then_change(*args):
        found = surveyed(*args)
        corpus[0].write_text("other\n")
        return found

    monkeypatch.setattr(prepare_module, "survey", survey_then_change)
    with pytest.raises(ValueError, match=r"corpus\.txt changed while it was read: 1 documents instead of 40"):
        run(tmp_path, corpus[0])
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, corpus, capfd):
    big = write(tmp_path / "big.txt", "x" * 100_000 + "\n<|endoftext|>\n" + "y" * 100_000)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        run(tmp_path, big)

    assert in_child(limited) == 1
    assert "File too large; what was written of it is removed" in capfd.readouterr().out
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("moved", range(5))
def test_killed_while_files_are_moved_no_half_set_passes_for_a_whole_one(tmp_path, corpus, monkeypatch, moved):
    run(tmp_path, corpus[0], seed=1)
    replace, calls = os.replace, []

    def killing_replace(source, target):
        if len(calls) == moved:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(target)
        replace(source, target)

    def child():
        monkeypatch.setattr(os, "replace", killing_replace)
        run(tmp_path, corpus[0], seed=2, overwrite=True)

    assert in_child(child) == -signal.SIGKILL
    for split, index_moved_by in (("train", 3), ("valid", 4)):
        prefix = str(tmp_path / f"out_{split}")
        if moved < index_moved_by:
            with pytest.raises(ValueError, match="does not exist"):
                verify_dataset(prefix)
        else:
            verify_dataset(prefix)
    assert read_metadata(str(tmp_path / "out_train")) is None
    run(tmp_path, corpus[0], seed=2, overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("*out*")) == sorted(
        Path(name).name for name in set_files(str(tmp_path / "out"))
    )


KILLED_RUN = """
if __name__ == "__main__":
    import os, signal, sys
    from megatron_sbld.data import encode
    from megatron_sbld.data.dataset_files import DatasetWriter
    from megatron_sbld.data.prepare import PrepareConfig, prepare

    added, add = [], DatasetWriter.add

    def killing_add(self, split, ids):
        add(self, split, ids)
        added.append(split)
        if len(added) == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    DatasetWriter.add = killing_add
    encode._BATCH_CHARACTERS = 50
    prepare(PrepareConfig(inputs=[sys.argv[1]], output=sys.argv[2], workers=2))
"""


@pytest.mark.slow
def test_killed_while_tokenizing_leaves_no_set_no_worker_and_no_obstacle(tmp_path, corpus):
    script = write(tmp_path / "killed.py", KILLED_RUN)
    command = [sys.executable, str(script), str(corpus[0]), str(tmp_path / "out")]
    process = subprocess.Popen(command, start_new_session=True)
    assert process.wait(300) == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("*out*")] == [".out.partial"]
    deadline = time.monotonic() + 120
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, "a worker outlived the killed process"
        time.sleep(0.05)
    run(tmp_path, corpus[0])
    assert not (tmp_path / ".out.partial").exists()


def group_is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_file_names_that_are_no_utf8_do_not_stop_the_report(tmp_path):
    folder = write(tmp_path / "in/a.txt", "text").parent
    with open(os.fsencode(folder) + b"/\xff.bin", "wb") as stream:
        stream.write(b"\xff")
    summary = run(tmp_path, folder, valid_fraction=0).summary()
    assert "1 files skipped" in summary.encode("utf-8").decode("utf-8")


def test_gpt2_tokens_of_a_real_text_decode_to_the_text(tmp_path, shared_file):
    data = shared_file("gpt2-vocab.json").parent
    text = (data / "wiki.valid.raw").read_text()[:200_000]
    path = write(tmp_path / "a.txt", text)
    result = run(tmp_path, path, tokenizer=str(data), valid_fraction=0, document_separator=None)
    tokens = IndexedDataset(result.splits["train"].prefix)
    document = np.array(tokens[0])
    assert document[-1] == 50256
    assert document.dtype == np.uint16
    assert load_tokenizer(str(data)).decode(document.tolist()) == text
