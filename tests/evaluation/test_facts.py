"""Laws of the recall of facts, with engines that answer by rule instead of by a model."""

import dataclasses

import pytest

from jaxlab.data.facts import draw_facts, prompt
from jaxlab.errors import ConfigError
from jaxlab.evaluation import facts as evaluation
from jaxlab.evaluation.facts import evaluate_facts
from jaxlab.inference.engine import Citation, Engine, Generation
from jaxlab.memory import pipeline
from jaxlab.memory.pipeline import ReferenceEncoder
from jaxlab.memory.store import Bank
from tests.inference.small import small_model, without_memory_layers

SEED, QUESTIONS, FACTS = 11, 70, 90


class RuleEngine(Engine):
    """Answers right when it reads its bank unshuffled; without, every tenth, or every fifth."""

    calls: list = []
    asked: set = set()

    def __init__(self, model, reader=None, *, rows):
        self.reader = reader
        facts = draw_facts(SEED, FACTS)
        self.answers = {prompt(fact.question): (n, fact) for n, fact in enumerate(facts)}

    def generate(self, prompts, *, max_tokens, stop, memory):
        self.calls.append(len(prompts))
        self.asked.update(self.answers[one][0] for one in prompts)
        assert stop == "\n" and max_tokens == evaluation.ANSWER_TOKENS
        return [self._answer(*self.answers[one], memory) for one in prompts]

    def _answer(self, number, fact, memory):
        citations = []
        if self.reader is not None and memory != "off":
            right = memory == "on"
            search = self.reader.search([prompt(fact.question)], 5)
            for hit, score in zip(search.ids[0].tolist(), search.scores[0].tolist(), strict=True):
                found = self.reader.bank.reference(hit)
                citations.append(Citation(0, hit, score, found.source, found.text))
            # A wrong answer that begins like the right one is wrong.
            text = f" {fact.answer}" if right else f" {fact.answer}s"
        else:
            text = f" {fact.answer}" if number % (10 if self.reader else 5) == 0 else ""
        return Generation([], text, citations, True)


@pytest.fixture(scope="module")
def model():
    """References long enough for a statement at one letter a token."""
    model = small_model()
    memory = dataclasses.replace(model.config.memory, reference_length=96, embedder="lsa")
    return dataclasses.replace(model, config=dataclasses.replace(model.config, memory=memory))


@pytest.fixture(scope="module", autouse=True)
def one_encoder(model):
    encoder = ReferenceEncoder(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "ReferenceEncoder", lambda model: encoder)
        patch.setattr(evaluation, "Engine", RuleEngine)
        yield


def test_shares_are_of_exact_answers_and_of_the_better_way_to_be_without_memory(model, tmp_path):
    RuleEngine.calls.clear()
    RuleEngine.asked.clear()
    recall = evaluate_facts(
        model, seed=SEED, questions=QUESTIONS, bank_facts=FACTS, folder=tmp_path, report=list
    )
    assert recall.n == QUESTIONS and recall.memory == 1.0 and recall.shuffled == 0.0
    facts = draw_facts(SEED, FACTS)
    fifths = sum(number % 5 == 0 for number in RuleEngine.asked)
    assert len(RuleEngine.asked) == QUESTIONS and recall.off == pytest.approx(fifths / QUESTIONS)
    # Every fact is in the bank, one reference each; the statements are found by their questions.
    bank = Bank.open(str(tmp_path / "facts_bank"), identity=model.identity)
    assert [r.text for r in bank.references(range(len(bank)))] == [f.statement for f in facts]
    assert recall.retrieved > 0.9
    assert RuleEngine.calls == [QUESTIONS] * 4


def test_the_same_seed_asks_the_same(model):
    one, same = (
        evaluate_facts(model, seed=SEED, questions=20, bank_facts=FACTS, report=list)
        for _ in range(2)
    )
    assert one == same and one.n == 20


def test_a_model_without_memory_layers_is_refused(model):
    with pytest.raises(ConfigError, match="no memory layers"):
        evaluate_facts(without_memory_layers(model), seed=SEED)
