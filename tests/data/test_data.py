import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config, DataConfig, ModelConfig, TrainingConfig
from megatron_sbld.data.batches import PretrainingSampler, TrainingData, build_datasets
from megatron_sbld.data.blend import check_data, find_data, parse_blend
from megatron_sbld.data.dataset_files import DatasetWriter
from megatron_sbld.data.prepare import PrepareConfig, prepare
from megatron_sbld.data.tokenizer import ByteTokenizer
from tests.harness import model_parallel, run_distributed

EOD = 256
TOKENIZER = ByteTokenizer()


def prepared(folder, name, texts, overwrite=False):
    """Prefix of a byte-level set of `texts`."""
    source = folder / f"{name}.txt"
    source.write_text("\n<|endoftext|>\n".join(texts))
    config = PrepareConfig(inputs=[str(source)], output=str(folder / name), valid_fraction=0, workers=1)
    return prepare(dataclasses.replace(config, overwrite=overwrite)).splits["train"].prefix


def written(folder, name, *documents, dtype=np.int32):
    """Prefix of a set of these ids without metadata, as Megatron-LM's preprocess_data.py leaves it."""
    with DatasetWriter(str(folder / name), ("train",), dtype, overwrite=True) as writer:
        for document in documents:
            writer.add("train", np.array(document))
        writer.commit({})
    (folder / f"{name}.json").unlink()
    return str(folder / f"{name}_train")


def run_config(folder, train, valid=(), *, seq_length=16, global_batch_size=4, train_iters=6, eval_iters=2, **data):
    data = {"data_cache_path": str(folder / "cache"), **data}
    return Config(
        model=ModelConfig(seq_length=seq_length),
        data=DataConfig(train_data_path=list(train), valid_data_path=list(valid), **data),
        training=TrainingConfig(global_batch_size=global_batch_size, train_iters=train_iters, eval_iters=eval_iters),
    )


def datasets(config, train_samples=24, valid_samples=8):
    cache_path = config.data.data_cache_path
    return build_datasets(
        config,
        TOKENIZER,
        find_data(config),
        train_samples=train_samples,
        valid_samples=valid_samples,
        cache_path=cache_path,
    )


@pytest.fixture
def texts():
    return [f"document {i} " + "naïve text " * (i % 5) for i in range(30)]


@pytest.fixture
def corpus(tmp_path, texts):
    return prepared(tmp_path, "corpus", texts)


def rows(total, consumed, micro_batch_size, replicas):
    """All replicas' rows in the order of the steps."""
    samplers = [
        PretrainingSampler(
            total_samples=total,
            consumed_samples=consumed,
            micro_batch_size=micro_batch_size,
            replica=replica,
            replicas=replicas,
        )
        for replica in range(replicas)
    ]
    return [row for step in zip(*samplers, strict=True) for microbatch in step for row in microbatch]


@pytest.mark.parametrize(("micro_batch_size", "replicas"), [(1, 1), (3, 1), (1, 2), (3, 2), (2, 3), (6, 4)])
def test_all_replicas_together_read_the_samples_in_order(micro_batch_size, replicas):
    assert rows(48, 0, micro_batch_size, replicas) == list(range(48))


def test_an_incomplete_last_step_is_left_out_on_every_replica():
    assert rows(23, 0, 2, 2) == list(range(20))
    assert rows(3, 0, 2, 2) == []


def test_a_ramp_of_the_batch_size_and_another_number_of_replicas_continue_the_same_order():
    read = rows(24, 0, 2, 1)[:6] + rows(24, 6, 2, 3)[:12] + rows(24, 18, 1, 2)
    assert read == list(range(24))


def test_rows_are_those_of_megatron_lms_sampler():
    sampler = PretrainingSampler(total_samples=50, consumed_samples=8, micro_batch_size=3, replica=1, replicas=2)
    assert list(islice(sampler, 2)) == [[11, 12, 13], [17, 18, 19]]
    assert len(sampler) == 7


@pytest.mark.usefixtures("one_rank")
def test_unshuffled_samples_are_the_documents_in_a_row(tmp_path, corpus, texts):
    train, valid = datasets(run_config(tmp_path, [corpus]))
    assert valid is None
    place = np.argsort(train.shuffle_index)
    read = torch.cat([train[int(place[sample])]["tokens"] for sample in range(len(place))]).tolist()
    documents = [[*TOKENIZER.encode(text + "\n"), EOD] for text in texts]
    documents[-1] = [*TOKENIZER.encode(texts[-1]), EOD]
    expected = [token for index in train.document_index for token in documents[index]]
    assert read == expected[: len(read)]
    assert len(expected) - len(read) <= 16


@pytest.mark.usefixtures("one_rank")
def test_a_batch_has_shifted_labels_positions_and_a_full_loss_mask(tmp_path, corpus):
    config = run_config(tmp_path, [corpus])
    batch = next(TrainingData(config, TOKENIZER, find_data(config), RunLength(config.training), 0).train_batches(1))
    assert sorted(batch) == ["labels", "loss_mask", "position_ids", "tokens"]
    assert all(tensor.shape == (1, 16) for tensor in batch.values())
    assert batch["tokens"].dtype == batch["labels"].dtype == batch["position_ids"].dtype == torch.int64
    assert batch["loss_mask"].dtype == torch.float32
    assert (batch["loss_mask"] == 1).all()
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert batch["position_ids"].tolist() == [list(range(16))]


@pytest.mark.usefixtures("one_rank")
def test_document_boundaries_are_honoured_when_asked_for(tmp_path):
    documents = prepared(tmp_path, "short", ["abc", "defg", "hi"] * 20)
    config = run_config(tmp_path, [documents], eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)
    batch = next(TrainingData(config, TOKENIZER, find_data(config), RunLength(config.training), 0).train_batches(1))
    tokens = batch["tokens"][0].tolist()
    document = np.cumsum([0] + [token == EOD for token in tokens[:-1]])
    start = [int(np.flatnonzero(document == number)[0]) for number in document]
    assert document[-1] >= 2
    assert batch["loss_mask"][0].tolist() == [float(token != EOD) for token in tokens]
    assert batch["position_ids"][0].tolist() == [i - start[i] for i in range(16)]
    allowed = (document[:, None] == document[None, :]) & (np.arange(16)[:, None] >= np.arange(16)[None, :])
    assert batch["attention_mask"].shape == (1, 1, 16, 16)
    assert (batch["attention_mask"][0, 0].numpy() == ~allowed).all()


def all_tokens(config, consumed_samples, num_microbatches):
    data = TrainingData(config, TOKENIZER, find_data(config), RunLength(config.training), consumed_samples)
    return [batch["tokens"].tolist() for batch in data.train_batches(num_microbatches)]


@pytest.mark.usefixtures("one_rank")
def test_a_resumed_run_reads_what_the_uninterrupted_one_would_have(tmp_path, corpus):
    config = run_config(tmp_path, [corpus])
    whole = all_tokens(config, 0, 24)
    assert all_tokens(config, 8, 16) == whole[8:]
    assert whole[:8] != whole[8:16]
    assert (
        all_tokens(dataclasses.replace(config, training=dataclasses.replace(config.training, seed=5)), 0, 24) != whole
    )


@pytest.mark.usefixtures("one_rank")
def test_worker_processes_change_nothing(tmp_path, corpus):
    config = run_config(tmp_path, [corpus])
    ahead = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=2))
    assert all_tokens(ahead, 4, 12) == all_tokens(config, 4, 12)


@pytest.mark.usefixtures("one_rank")
def test_reading_leaves_the_global_random_state_alone(tmp_path, corpus):
    """Else dropout after a resume, or after a validation, would differ from the uninterrupted run's."""
    before = torch.get_rng_state()
    config = run_config(tmp_path, [corpus], [corpus])
    data = TrainingData(config, TOKENIZER, find_data(config), RunLength(config.training), 0)
    list(data.train_batches(2))
    list(data.valid_batches(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("one_rank")
def test_every_validation_sees_the_same_samples(tmp_path, corpus):
    config = run_config(tmp_path, [corpus], [corpus])
    data = TrainingData(config, TOKENIZER, find_data(config), RunLength(config.training), 0)
    first, second = (torch.cat([batch["tokens"] for batch in data.valid_batches(8)]) for _ in range(2))
    assert torch.equal(first, second)
    assert len(first.unique(dim=0)) > 4


@pytest.mark.usefixtures("one_rank")
def test_reading_past_the_end_or_without_a_validation_set_is_an_error_with_its_reason(tmp_path, corpus):
    config = run_config(tmp_path, [corpus])
    data = TrainingData(config, TOKENIZER, find_data(config), RunLength(config.training), 0)
    with pytest.raises(RuntimeError, match="training data are used up"):
        list(data.train_batches(10_000))
    with pytest.raises(ValueError, match=r"data\.valid_data_path is empty"):
        next(data.valid_batches(1))


def share_of(dataset, letter, samples):
    return sum(ord(letter) in dataset[i]["tokens"].tolist() for i in range(samples)) / samples


@pytest.mark.usefixtures("one_rank")
def test_a_blend_follows_its_weights_and_without_weights_the_sizes(tmp_path):
    small, large = prepared(tmp_path, "a", ["a" * 50] * 10), prepared(tmp_path, "b", ["b" * 50] * 40)
    weighted, _ = datasets(run_config(tmp_path, ["3", small, "1", large]), train_samples=200)
    assert share_of(weighted, "a", 200) == pytest.approx(0.75, abs=0.01)
    by_size, _ = datasets(run_config(tmp_path, [small, large]), train_samples=200)
    assert share_of(by_size, "a", 200) == pytest.approx(0.2, abs=0.01)


@pytest.mark.usefixtures("one_rank")
def test_a_blend_of_many_sets_can_be_built_for_a_few_samples(tmp_path):
    blend = [part for i in range(12) for part in (str(100 if i == 0 else 1), prepared(tmp_path, f"s{i}", ["x" * 16]))]
    for samples in (1, 7, 40, 200):
        train, _ = datasets(run_config(tmp_path, blend), train_samples=samples)
        assert len(train) >= samples
        assert [train[i]["tokens"].shape for i in range(len(train))] == [(16,)] * len(train)


@pytest.mark.usefixtures("one_rank")
def test_a_set_prepared_anew_under_its_old_name_is_not_read_with_its_old_indices(tmp_path):
    prefix = prepared(tmp_path, "corpus", ["a" * 100] * 10)
    config = run_config(tmp_path, [prefix])
    datasets(config)
    prepared(tmp_path, "corpus", ["b" * 30] * 20, overwrite=True)
    train, _ = datasets(config)
    assert {token for i in range(24) for token in train[i]["tokens"].tolist()} == {ord("b"), ord("\n"), EOD}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_ids_that_the_model_does_not_know_are_found_when_they_are_read(tmp_path, corpus, num_workers):
    """Metadata vouch for the tokenizer, not for bytes that were overwritten later."""
    path = Path(f"{corpus}.bin")
    path.write_bytes(b"\xff" * path.stat().st_size)
    config = run_config(tmp_path, [corpus], [corpus], num_workers=num_workers)
    check_data(config, TOKENIZER)
    data = TrainingData(config, TOKENIZER, find_data(config), RunLength(config.training), 0)
    for batches, field in ((data.train_batches(1), "train"), (data.valid_batches(1), "valid")):
        with pytest.raises(ValueError, match=rf"data\.{field}_data_path: holds the id 65535, but .* ids 0 to 258"):
            next(batches)


@pytest.mark.usefixtures("one_rank")
def test_indices_that_point_beyond_the_data_are_named_when_they_are_read(tmp_path, corpus):
    config = run_config(tmp_path, [corpus])
    all_tokens(config, 0, 1)
    (index,) = Path(config.data.data_cache_path).glob("*document_index.npy")
    documents = np.load(index)
    np.save(index, np.full_like(documents, 10_000))
    with pytest.raises(ValueError, match=r"data\.train_data_path: cannot be read \(.*10000.*/cache, are damaged"):
        all_tokens(config, 0, 1)


@pytest.mark.usefixtures("one_rank")
def test_an_index_with_a_damaged_header_is_built_again(tmp_path, corpus):
    """NumPy's parser of headers raises whatever Python's tokenizer does, here no ValueError."""
    config = run_config(tmp_path, [corpus])
    before = all_tokens(config, 0, 24)
    for index in Path(config.data.data_cache_path).glob("*.npy"):
        content = index.read_bytes()
        index.write_bytes(content.replace(b"}", b" ", 1))
        assert all_tokens(config, 0, 24) == before


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("left", [0, 60, 200])
def test_an_index_that_a_killed_run_left_half_written_is_built_again(tmp_path, corpus, left):
    config = run_config(tmp_path, [corpus])
    before = all_tokens(config, 0, 24)
    for index in Path(config.data.data_cache_path).glob("*.npy"):
        index.write_bytes(index.read_bytes()[:left])
        assert all_tokens(config, 0, 24) == before


def read_on_rank(folder, corpus):
    """The rows that this rank reads first: as one of two replicas, and as one of two tensor-parallel ranks."""
    config = run_config(Path(folder), [corpus], train_iters=6)
    with model_parallel():
        replica = all_tokens(config, 4, 6)
    with model_parallel(tp=2):
        tensor = all_tokens(config, 4, 6)
    return replica, tensor


@pytest.mark.slow
def test_two_replicas_share_the_rows_and_two_tensor_parallel_ranks_read_the_same(tmp_path, corpus):
    (first, tensor_first), (second, tensor_second) = run_distributed(read_on_rank, 2, str(tmp_path), corpus)
    assert tensor_first == tensor_second
    together = [microbatch for pair in zip(first, second, strict=True) for microbatch in pair]
    assert together[:6] == tensor_first
    assert first != second


def test_weights_are_read_as_megatron_reads_them(tmp_path, corpus):
    other = prepared(tmp_path, "other", ["x", "y"])
    blend = parse_blend(["0.3", corpus, "7e-1", other], "f")
    assert ([dataset.prefix for dataset in blend.datasets], blend.weights) == ([corpus, other], [0.3, 0.7])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["0.5", "{0}", "0.5"], "give a weight before every prefix"),
        (["{0}", "0.5"], "give a weight before every prefix"),
        (["1", "{0}", "{0}"], "give a weight before every prefix"),
        (["0", "{0}"], "weight 0.0 is not a positive number"),
        (["nan", "{0}"], "weight nan is not a positive number"),
        (["-1", "{0}"], "weight -1.0 is not a positive number"),
        (["{0}", "{0}"], "named more than once"),
        (["{0}.bin"], r"give the prefix without \.bin or \.idx"),
        (["nowhere"], r"nowhere\.idx does not exist"),
    ],
)
def test_malformed_blends_are_refused_by_field(corpus, paths, message):
    with pytest.raises(ValueError, match=rf"data\.train_data_path.*{message}"):
        parse_blend([path.format(corpus) for path in paths], "data.train_data_path")


def test_sound_data_pass_the_check(tmp_path, corpus):
    check_data(run_config(tmp_path, ["2", corpus], [corpus]), TOKENIZER)
    check_data(run_config(tmp_path, [written(tmp_path, "raw", range(259))]), TOKENIZER)


def test_a_truncated_set_is_refused_by_field_and_file(tmp_path, corpus):
    path = Path(f"{corpus}.bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data\.valid_data_path: .*corpus_train\.bin: cut short or damaged"):
        check_data(run_config(tmp_path, [], [corpus]), TOKENIZER)


def test_a_set_too_short_for_one_sample_is_refused(tmp_path, corpus):
    tokens = parse_blend([corpus], "f").datasets[0].tokens
    check_data(run_config(tmp_path, [corpus], seq_length=tokens - 1), TOKENIZER)
    with pytest.raises(
        ValueError, match=rf"has {tokens} tokens; a sample of model.seq_length = {tokens} needs {tokens + 1}"
    ):
        check_data(run_config(tmp_path, [corpus], seq_length=tokens), TOKENIZER)


def test_a_set_of_another_tokenizer_is_refused(tmp_path, corpus):
    class Other(ByteTokenizer):
        name = "other"

        def fingerprint(self):
            return "0"

    with pytest.raises(ValueError, match=r"prepared with tokenizer 'byte', which encodes differently.*'other'"):
        check_data(run_config(tmp_path, [corpus]), Other())


def test_metadata_of_another_set_are_refused(tmp_path, corpus):
    path = tmp_path / "corpus.json"
    good = path.read_text()
    tokens = parse_blend([corpus], "f").datasets[0].tokens
    path.write_text(good.replace(f'"tokens": {tokens}', '"tokens": 1'))
    with pytest.raises(ValueError, match="different data sets; prepare it again"):
        check_data(run_config(tmp_path, [corpus]), TOKENIZER)
    path.write_text(good.replace('"fingerprint"', '"print"'))
    with pytest.raises(ValueError, match="lack 'fingerprint'; prepare it again"):
        check_data(run_config(tmp_path, [corpus]), TOKENIZER)


@pytest.mark.parametrize("bad", [259, -1])
def test_ids_beyond_the_vocabulary_are_found_without_metadata(tmp_path, bad):
    prefix = written(tmp_path, "raw", [*range(200), bad])
    with pytest.raises(ValueError, match=rf"holds the id {bad}, but data.tokenizer = 'byte' has ids 0 to 258"):
        check_data(run_config(tmp_path, [prefix]), TOKENIZER)
