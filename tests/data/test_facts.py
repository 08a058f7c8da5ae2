"""Laws of invented facts: fresh from each seed, asked only where their statement can be read."""

import itertools
import re

import numpy as np
import pytest

from jaxlab.data.facts import (
    RELATIONS,
    FactSamples,
    draw_facts,
    draw_people,
    fact_documents,
    prompt,
)
from jaxlab.data.tokenizer import train_tokenizer
from jaxlab.errors import DataError

CHUNKS, REFERENCE, BAND = 8, 48, 3
# Room for a question and its answer or two in each chunk, and for one at best.
LENGTHS = [96, 40]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"{f.statement}\n{prompt(f.question)} {f.answer}\n" for f in draw_facts(9, 600)]
    path = tmp_path_factory.mktemp("facts") / "facts.model"
    return train_tokenizer(texts, vocab_size=700, path=path)


@pytest.fixture(scope="module", params=LENGTHS)
def chunk_length(request):
    return request.param


@pytest.fixture(scope="module")
def samples(tokenizer, chunk_length):
    return made(tokenizer, chunk_length)


def made(tokenizer, chunk_length, **changes):
    settings = dict(
        seed=5,
        sequence_length=CHUNKS * chunk_length,
        chunk_length=chunk_length,
        reference_length=REFERENCE,
        references_per_chunk=BAND,
        count=1000,
    )
    return FactSamples(tokenizer, **{**settings, **changes})


def statements(sample, tokenizer):
    rows = zip(sample["references"], sample["reference_lengths"], strict=True)
    return [tokenizer.decode(row[:length]) for row, length in rows]


ASKED = re.compile(r"Question: (?P<question>[^\n]+)\nAnswer: (?P<answer>[^\n]+)\n")


def asked(sample, tokenizer):
    """(chunk, question, answer) of everything asked; fails on a part of a question."""
    found = []
    for chunk, tokens in enumerate(sample["tokens"].reshape(CHUNKS, -1)):
        text = tokenizer.decode(tokens)
        whole = list(ASKED.finditer(text))
        assert "".join(match.group(0) for match in whole) == text
        found += [(chunk, match["question"], match["answer"]) for match in whole]
    return found


def statement_answers(statement, question):
    """Whether this statement is the one that answers, judged from the two texts alone."""
    for relation in RELATIONS:
        for form in relation.questions:
            before, after = form.split("{person}")
            if question.startswith(before) and question.endswith(after):
                person = question[len(before) : len(question) - len(after)]
                if any(
                    statement == said.format(person=person, value=value)
                    for said in relation.statements
                    for value in relation.values
                ):
                    return True
    return False


# ---------------------------------------------------------------------------- facts


def test_the_same_seed_gives_the_same_facts_and_another_seed_others():
    facts = draw_facts(1, 300)
    assert draw_facts(1, 300) == facts and len(facts) == 300
    assert draw_facts(1, 100) == facts[:100]
    ours, theirs = ({f.person for f in draw_facts(seed, 300)} for seed in (1, 2))
    assert not ours & theirs


def test_no_two_people_share_a_name_and_no_person_a_relation():
    facts = draw_facts(3, 3000)
    people = {fact.person for fact in facts}
    assert len(people) == 600
    assert len({(fact.person, fact.relation) for fact in facts}) == 3000


def test_a_statement_names_the_person_before_the_value_and_the_question_never_tells():
    relations = {relation.name: relation for relation in RELATIONS}
    for fact in draw_facts(4, 2000):
        relation = relations[fact.relation]
        assert fact.value in relation.values
        person = fact.statement.index(fact.person) + len(fact.person)
        assert fact.value in fact.statement[person:]
        assert fact.person in fact.question
        assert fact.value not in fact.question.replace(fact.person, "")
        assert fact.answer.startswith(fact.person) and fact.answer.endswith(f" {fact.value}.")


def test_every_relation_and_phrasing_puts_the_person_first():
    for relation in RELATIONS:
        assert len(set(relation.values)) == len(relation.values) >= 45
        for form in relation.statements:
            assert 0 <= form.index("{person}") < form.index("{value}")
        assert all("{person}" in form and "{value}" not in form for form in relation.questions)


def test_values_say_nothing_about_the_rest():
    """Knowing the relation, the most frequent value is right in a few percent of the cases."""
    facts = draw_facts(6, 6000)
    for relation in RELATIONS:
        values = [fact.value for fact in facts if fact.relation == relation.name]
        most = max(values.count(value) for value in relation.values)
        assert 800 < len(values) < 1200 and most / len(values) < 0.05


@pytest.mark.parametrize("count", [0, -1, 10**9])
def test_more_facts_than_there_are_names_for_is_an_error(count):
    with pytest.raises(DataError, match=f"{count} facts asked for: the generator makes 1 to"):
        draw_facts(0, count)


def test_documents_are_the_statements():
    documents = fact_documents(7, 20)
    assert [d.text for d in documents] == [f.statement for f in draw_facts(7, 20)]
    assert documents[3].id == "facts:7/3"


# ---------------------------------------------------------------------------- samples


def test_a_sample_has_the_shapes_of_the_continual_stage(samples, tokenizer, chunk_length):
    sample = samples[0]
    length = sample["references"].shape[0] * chunk_length
    assert sample["tokens"].shape == sample["loss_mask"].shape == (length,)
    assert sample["references"].shape == (CHUNKS, REFERENCE)
    assert sample["reference_lengths"].shape == (CHUNKS,)
    kinds = {name: array.dtype for name, array in sample.items()}
    assert kinds.pop("loss_mask") == np.float32 and set(kinds.values()) == {np.dtype(np.int32)}
    for row, length in zip(sample["references"], sample["reference_lengths"], strict=True):
        assert 0 < length <= REFERENCE and (row[length:] == tokenizer.pad_id).all()


def test_a_sample_is_a_function_of_seed_and_number_alone(samples, tokenizer, chunk_length):
    one, again = samples[17], made(tokenizer, chunk_length)[17]
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
    for other in (samples[18], made(tokenizer, chunk_length, seed=6)[17]):
        assert (other["tokens"] != one["tokens"]).any()
    assert len(samples) == 1000


def test_only_what_can_be_read_is_asked_and_each_fact_once_a_chunk(samples, tokenizer):
    """The statement is among the references of the last chunks: the band of the training mask."""
    distances = []
    for number in range(30):
        said = statements(samples[number], tokenizer)
        found = asked(samples[number], tokenizer)
        for chunk, question, answer in found:
            answering = [c for c, text in enumerate(said) if statement_answers(text, question)]
            assert len(answering) == 1 and chunk - BAND < answering[0] <= chunk
            assert answer.rstrip(".").split()[-1] in said[answering[0]]
            distances.append(chunk - answering[0])
        questions = [(chunk, question) for chunk, question, _ in found]
        assert len(set(questions)) == len(questions)
    counts = np.bincount(distances, minlength=BAND) / len(distances)
    # Of the visible statements none is asked for more often than chance and the first chunks say.
    assert len(distances) > 30 * CHUNKS // 2 and len(counts) == BAND and counts.min() > 0.2


def test_every_chunk_of_a_sample_is_a_text_of_its_own(samples, chunk_length):
    for number in range(3):
        segments = samples[number]["segments"].reshape(CHUNKS, chunk_length)
        assert (segments == np.arange(CHUNKS)[:, None]).all()


def test_every_text_of_a_sample_but_the_first_brings_its_separator(
    samples, tokenizer, chunk_length
):
    """The step puts ``<s>`` before the row; nobody is asked to predict one."""
    for number in range(3):
        found = samples[number]["tokens"] == tokenizer.bos_id
        begins = np.arange(1, CHUNKS) * chunk_length
        np.testing.assert_array_equal(np.nonzero(found)[0], begins)
        assert not samples[number]["loss_mask"][found].any()


def test_people_share_relations_and_relations_share_people(samples, tokenizer):
    """Over many samples neither the name alone nor the relation alone decides."""
    same_person = same_family = 0
    for number in range(30):
        names = [
            name
            for text in statements(samples[number], tokenizer)
            for name in re.findall(r"[A-Z]\w+ [A-Z]\w+", text)
        ]
        assert len(names) == CHUNKS
        same_person += len(names) - len(set(names))
        families = {name: name.split()[1] for name in names}
        same_family += len(families) - len(set(families.values()))
    assert same_person > 30
    assert same_family > 10


def test_people_of_a_sample_are_different_and_often_namesakes():
    people = draw_people(np.random.default_rng(0), 200)
    assert len(set(people)) == 200
    shared = sum(bool(set(a.split()) & set(b.split())) for a, b in itertools.pairwise(people))
    assert 70 < shared < 130


def test_answers_count_questions_a_little_and_all_like_a_row_of_text(
    samples, tokenizer, chunk_length
):
    for number in range(10):
        sample, mask = samples[number], samples[number]["loss_mask"]
        counted = mask > 0.5 * mask.max()
        answers = "".join(f" {answer}\n" for _, _, answer in asked(sample, tokenizer))
        assert tokenizer.decode(sample["tokens"][counted]) == answers
        assert not mask[sample["tokens"] == tokenizer.pad_id].any()
        if not counted.any():  # no question had room
            continue
        assert len(set(mask[counted].tolist())) == 1
        little = set(mask[~counted & (mask > 0)].tolist())
        assert len(little) == 1 and little.pop() == pytest.approx(0.1 * mask.max())
        assert mask.sum() == pytest.approx(CHUNKS * chunk_length, rel=1e-5)


def test_a_question_is_spelt_as_it_will_be_asked(samples, tokenizer, chunk_length):
    """The tokens of a question are those of the prompt alone, and the answer follows them."""
    sample = next(one for one in map(samples.__getitem__, range(9)) if asked(one, tokenizer))
    chunk, question, answer = asked(sample, tokenizer)[0]
    ids = tokenizer.encode(prompt(question)) + tokenizer.encode(f" {answer}\n")
    begin = chunk * chunk_length + (chunk > 0)
    assert sample["tokens"][begin:][: len(ids)].tolist() == ids


def test_chunks_too_short_for_any_question_ask_nothing(tokenizer):
    sample = made(tokenizer, 4)[0]
    said = set(sample["tokens"].tolist()) - {tokenizer.pad_id, tokenizer.bos_id}
    assert not sample["loss_mask"].any() and not said
