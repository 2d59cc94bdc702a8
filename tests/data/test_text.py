import collections
import gzip
import itertools
import math
import random

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from hf_dl.data import text
from hf_dl.data.text import CHANCES, TOPICS, TokenStream, build_tokenizer, encode, floor_perplexity, load


@pytest.fixture(scope="module")
def documents():
    return load("test", num_rows=300)


# --- the synthetic language ------------------------------------------------------------------------------------------


def kinds():
    """Return the kind, form and rank of each word of the language."""
    found = {}
    for kind, lemmas in text.vocabulary().items():
        for rank, forms in enumerate(lemmas):
            for form, word in enumerate(forms):
                assert word not in found
                found[word] = (kind, form, rank)
    return found


class Parser:
    """Derives the probability of a document from its words alone, by recursive descent, for each topic."""

    def __init__(self, words, kinds):
        self.words, self.at, self.kinds = words, 0, kinds
        self.log_probs = [-math.log(TOPICS)] * TOPICS

    def next(self):
        return self.words[self.at] if self.at < len(self.words) else None

    def kind(self):
        return self.kinds.get(self.next(), (None,))[0]

    def add(self, probability):
        self.log_probs = [value + math.log(probability) for value in self.log_probs]

    def coin(self, name, yes):
        self.add(CHANCES[name] if yes else 1 - CHANCES[name])
        return yes

    def take(self, expected=None):
        word = self.words[self.at]
        assert expected is None or word == expected
        self.at += 1
        return word

    def closed(self, words):
        self.add(text.frequencies(len(words))[words.index(self.take())])

    def word(self, kind, form=0):
        found, its_form, rank = self.kinds[self.take()]
        assert (found, its_form) == (kind, form)
        shares = text.frequencies(len(text.vocabulary()[kind]))
        for topic in range(TOPICS):
            share = shares[rank]
            if kind in ("noun", "verb"):
                own = shares[rank] / sum(shares[topic::TOPICS]) if rank % TOPICS == topic else 0.0
                share = CHANCES["topic"] * own + (1 - CHANCES["topic"]) * share
            self.log_probs[topic] += math.log(share)

    def noun_phrase(self, inner=False):
        if self.coin("name", self.kind() == "name"):
            self.word("name")
            return 0, True
        noun = next(self.kinds[word] for word in self.words[self.at :] if self.kinds.get(word, "?")[0] == "noun")
        number = noun[1]
        self.coin("singular", number == 0)
        self.closed(text.DETERMINERS["plural" if number else "singular"])
        if self.coin("adjective", self.kind() == "adjective"):
            self.word("adjective")
        self.word("noun", number)
        if not inner and self.coin("preposition", self.next() in text.PREPOSITIONS):
            self.closed(text.PREPOSITIONS)
            self.noun_phrase(inner=True)
        return number, False

    def verb_phrase(self, number, inner=False):
        self.word("verb", number)
        if self.coin("object", self.kind() not in ("verb", "adverb") and self.next() != "."):
            self.noun_phrase(inner)

    def document(self):
        for count in itertools.count(1):
            number, is_name = self.noun_phrase()
            if not is_name and self.coin("relative", self.next() == "that"):
                self.take("that")
                self.verb_phrase(number, inner=True)
            self.verb_phrase(number)
            if self.coin("adverb", self.kind() == "adverb"):
                self.word("adverb")
            self.take(".")
            if count >= 3 and self.coin("stop", self.next() is None):
                return math.log(sum(math.exp(value - max(self.log_probs)) for value in self.log_probs)) + max(
                    self.log_probs
                )


def test_a_document_parses_and_its_probability_is_that_of_its_derivations(documents):
    known = kinds()
    for row in documents.select(range(60)):
        assert Parser(row["text"].split(), known).document() == pytest.approx(row["log_prob"], abs=1e-8)


def test_probabilities_add_up():
    for lemmas in text.vocabulary().values():
        shares = text.frequencies(len(lemmas))
        assert sum(shares) == pytest.approx(1) and list(shares) == sorted(shares, reverse=True)


def test_it_has_more_than_ten_thousand_words():
    closed = {word for words in text.DETERMINERS.values() for word in words} | {*text.PREPOSITIONS, "that", "."}
    assert not closed & kinds().keys()
    assert len(closed | kinds().keys()) == 10_226


def test_documents_have_topics(documents):
    known, share = kinds(), []
    for row in documents.select(range(100)):
        counts = collections.Counter(
            known[word][2] % TOPICS for word in row["text"].split() if known.get(word, "?")[0] in ("noun", "verb")
        )
        share.append(counts.most_common(1)[0][1] / counts.total())
    assert 0.45 < sum(share) / len(share) < 0.75


def test_splits_are_disjoint_and_the_same_each_time():
    first = {split: load(split, num_rows=50)["text"][:] for split in text.SPLITS}
    assert len({row for rows in first.values() for row in rows}) == 150
    assert load("test", num_rows=20)["text"][:] == first["test"][:20]
    assert not set(load("test", num_rows=50, seed=1)["text"]) & set(first["test"])
    stream = load("test", num_rows=20, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert [row["text"] for row in stream] == first["test"][:20]


def test_the_floor_is_the_grammar_s_own_perplexity(documents):
    tokenizer = build_tokenizer(documents)
    tokens = sum(len(row.split()) + 1 for row in documents["text"])
    floor = floor_perplexity(documents, tokenizer)
    assert floor == pytest.approx(math.exp(-sum(documents["log_prob"][:]) / tokens))
    assert 30 < floor < 200
    counts = collections.Counter(encode(documents, tokenizer).tolist())
    unigram = math.exp(-sum(count / tokens * math.log(count / tokens) for count in counts.values()))
    assert floor < unigram  # although that one has seen the documents
    assert floor_perplexity(documents, build_tokenizer(documents, min_count=2)) is None  # a word is not known
    assert floor_perplexity(documents, build_tokenizer(documents, level="char")) is None
    assert floor_perplexity(documents.remove_columns("log_prob"), tokenizer) is None


@pytest.mark.slow
def test_the_training_documents_have_every_word():
    assert len(build_tokenizer(load("train"))) == 10_228


# --- files and folders -----------------------------------------------------------------------------------------------


def test_a_file_is_cut_into_splits_in_its_order(tmp_path):
    lines = [f"line  {number} of\tthe text" for number in range(50)]
    (tmp_path / "book.txt").write_text("\n\n".join(lines) + "\n")
    (tmp_path / "book2.txt.gz").write_bytes(gzip.compress("\n\n".join(lines).encode()))
    expected = [f"line {number} of the text" for number in range(50)]
    for name in ("book.txt", "book2.txt.gz"):
        found = {split: load(split, tmp_path / name)["text"][:] for split in text.SPLITS}
        assert [len(found[split]) for split in text.SPLITS] == [40, 5, 5]
        assert [row for rows in found.values() for row in rows] == expected
    stream = load("test", tmp_path / "book.txt", streaming=True)
    assert [row["text"] for row in stream] == expected[-5:]
    assert load("train", tmp_path / "book.txt", num_rows=3)["text"][:] == expected[:3]


def test_characters_keep_their_spaces_and_empty_lines(tmp_path):
    (tmp_path / "play.txt").write_text("A  b\n\nC:\n" * 10)
    assert load("train", tmp_path / "play.txt", level="char")["text"][:4] == ["A  b", "", "C:", "A  b"]


def test_characters_are_held_out_also_from_a_single_line(tmp_path):
    (tmp_path / "line.txt").write_text("0123456789" * 2)
    (tmp_path / "lines.txt").write_text("ab\ncd\nef\ngh\n")
    for name, expected in (("line", ["0123456789012345", "67", "89"]), ("lines", ["ab\ncd\nef\n", "g", "h"])):
        parts = [
            "\n".join(load(split, tmp_path / f"{name}.txt", level="char", holdout=0.1)["text"])
            for split in text.SPLITS
        ]
        assert parts == expected
    (tmp_path / "line.txt").write_text("")
    with pytest.raises(ValueError, match="split='train' of .*line.txt' has no text"):
        load("train", tmp_path / "line.txt", level="char")


def test_a_folder_s_files_are_named_after_their_split(tmp_path):
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"):
        (tmp_path / name).write_text(f"in {name}\n" * 4)
    (tmp_path / "README.md").write_text("no text")
    for split, part in (("train", "train"), ("validation", "valid"), ("test", "test")):
        assert load(split, tmp_path)["text"][:] == [f"in wiki.{part}.tokens"] * 4
    (tmp_path / "wiki.valid.tokens").unlink()
    assert len(load("train", tmp_path, holdout=0.25)) == 3 and len(load("validation", tmp_path, holdout=0.25)) == 1
    (tmp_path / "other.txt").write_text("more")
    with pytest.raises(ValueError, match=r"has other\.txt without a split in its name"):
        load("train", tmp_path)


def test_a_folder_of_books_is_one_text(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 3 + "\n" + "more\n" * 4)
    rows = [row for split in text.SPLITS for row in load(split, tmp_path)["text"]]
    assert rows == ["a a a", *["more"] * 4, "b b b", *["more"] * 4]


def test_parquet_and_saved_datasets_have_a_column_of_text(tmp_path):
    data = datasets.Dataset.from_dict({"number": [1, 2, 3], "line": ["a b", "", "c  d"]})
    data.to_parquet(tmp_path / "part" / "train.parquet")
    datasets.DatasetDict(train=data, validation=data).save_to_disk(tmp_path / "saved")
    assert load("validation", tmp_path / "part" / "train.parquet", holdout=0.4)["text"][:] == ["a b"]
    assert load("validation", tmp_path / "saved")["text"][:] == ["a b", "c d"]
    with pytest.raises(ValueError, match="text_column='number' is not a text column"):
        load("validation", tmp_path / "saved", text_column="number")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"split": "val"}, "split='val' is unknown; choose one of train"),
        ({"level": "byte"}, "level='byte' is unknown; choose one of word, char"),
        ({"num_rows": 0}, "num_rows=0 must be at least 1"),
        ({"holdout": 0.5}, "holdout=0.5 must be above 0"),
    ],
)
def test_arguments_are_checked(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(**arguments)


def test_sources_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist. Expected a text file"):
        load("train", "/no/such/text.txt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load("train", "shakespeare.txt")
    with pytest.raises(ValueError, match="has no text. Expected parquet files, or files that end in .txt"):
        load("train", tmp_path)
    (tmp_path / "valid.txt").write_text("a\n")
    with pytest.raises(ValueError, match="has no train split. Its splits: validation"):
        load("train", tmp_path)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8 text"):
        load("train", tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="has no text"):
        load("train", tmp_path / "empty.txt")


def test_a_hub_dataset_streams_without_its_missing_splits(monkeypatch):
    rows = {"text": ["a  b", "", " c"]}
    stream = datasets.Dataset.from_dict(rows).to_iterable_dataset()
    calls = []
    found = {"train": stream, "validation": stream}
    monkeypatch.setattr(
        text.datasets, "load_dataset", lambda *given, **options: calls.append((given, options)) or found
    )
    assert [row["text"] for row in load("validation", "a/b", config="c", streaming=True)] == ["a b", "c"]
    assert calls == [(("a/b", "c"), {"streaming": True})]
    with pytest.raises(ValueError, match="'a/b' has no test split to stream"):
        load("train", "a/b", streaming=True)


# --- tokens ----------------------------------------------------------------------------------------------------------


def rows_of(*lines):
    return datasets.Dataset.from_dict({"text": list(lines)})


def test_datasets_that_the_user_already_has():
    data = rows_of(*(f"row {number}" for number in range(10)))
    parts = [load(split, data)["text"][:] for split in ("train", "validation", "test")]
    assert [row for part in parts for row in part] == data["text"][:] and list(map(len, parts)) == [8, 1, 1]
    assert len(load("train", datasets.DatasetDict(train=data, dev=data))) == 9
    stream = load("train", data.to_iterable_dataset(), num_rows=3)
    assert [row["text"] for row in stream] == ["row 0", "row 1", "row 2"]
    assert len(list(load("train", data, streaming=True))) == 10
    with pytest.raises(ValueError, match="'IterableDataset' has no test split to stream"):
        load("test", data.to_iterable_dataset())


def test_words_are_numbered_by_frequency(tmp_path):
    data = rows_of("b a b", "b <unk> a c", "d")
    tokenizer = build_tokenizer(data)
    assert tokenizer.convert_ids_to_tokens(range(6)) == ["<unk>", "<eos>", "b", "a", "c", "d"]
    assert encode(data, tokenizer).tolist() == [2, 3, 2, 1, 2, 0, 3, 4, 1, 5, 1]
    assert len(build_tokenizer(data, max_tokens=4)) == 4 and len(build_tokenizer(data, min_count=2)) == 4
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("b zebra\n a")["input_ids"] == [2, 0, 3]
    assert loaded.decode([2, 3, 1]) == " b a <eos>" and loaded.unk_token_id == 0
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.padding_side) == (1, 1, 1, "left")


def test_characters_are_tokens_and_line_breaks_end_rows(tmp_path):
    data = rows_of("ab  a", "", "b\ta")
    tokenizer = build_tokenizer(data, level="char")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, loaded):
        ids = encode(data, each)
        assert each.decode(ids) == "ab  a\n\nb\ta\n"
        assert len(ids) == 11 and int((ids == each.eos_token_id).sum()) == 3
    assert loaded("aé")["input_ids"] == [loaded.convert_tokens_to_ids("a"), 0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"level": "byte"}, "level='byte' is unknown"),
        ({"min_count": 0}, "min_count=0 must be at least 1"),
        ({"max_tokens": 2}, "max_tokens=2 must be at least 3"),
        ({"min_count": 3}, "No token of the 1 rows occurs 3 times"),
    ],
)
def test_a_tokenizer_s_arguments_are_checked(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_tokenizer(rows_of("a b a"), **arguments)


def test_windows_go_on_where_the_former_ended():
    ids = torch.arange(10, 33)
    stream = TokenStream(ids, rows=3, length=4, first=1)
    batches = list(stream.batches())
    assert stream.windows == len(batches) == 2 and [batch["input_ids"].shape[1] for batch in batches] == [4, 4]
    inputs, labels = (torch.cat([batch[name] for batch in batches], dim=1) for name in ("input_ids", "shift_labels"))
    assert inputs.flatten().tolist() == [1, *range(10, 32), 1]
    assert labels.flatten().tolist() == [*range(10, 33), -100]
    assert [batch["begins"].tolist() for batch in batches] == [[True] * 3, [False] * 3]
    examples = list(stream)
    for number, batch in enumerate(batches):
        for row in range(3):
            assert torch.equal(examples[3 * number + row]["input_ids"], batch["input_ids"][row])


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 5, 100])
def test_each_token_is_predicted_once_from_the_one_before(rows, length):
    ids = torch.tensor(random.Random(0).choices(range(2, 50), k=30))
    stream = TokenStream(ids, rows=rows, length=length)
    found = []
    for row in range(rows):
        for batch in stream.batches():
            found += list(zip(batch["input_ids"][row].tolist(), batch["shift_labels"][row].tolist(), strict=True))
    counted = [pair for pair in found if pair[1] != -100]
    assert counted == list(zip([1, *ids[:-1].tolist()], ids.tolist(), strict=True))
    dropped = TokenStream(ids, rows=rows, length=length, drop_rest=True)
    assert sum(batch["shift_labels"].numel() for batch in dropped.batches()) == 30 - 30 % rows
    assert all((batch["shift_labels"] >= 0).all() for batch in dropped.batches())


def test_a_stream_s_arguments_are_checked():
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        TokenStream(torch.arange(5), rows=2, length=0)
    with pytest.raises(ValueError, match="The text has 5 tokens, fewer than rows=6"):
        TokenStream(torch.arange(5), rows=6, length=1)
