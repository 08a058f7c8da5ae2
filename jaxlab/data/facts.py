"""Statements about invented people, drawn fresh from a seed: knowledge that no parameter can hold.

A fact is (person, relation, value). Its statement goes into the knowledge base, its question is
asked of the model. Names are put together from syllables for each seed, values are drawn
independently, so a model can answer above chance only by reading the statement.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlab.data.sources import Document
from jaxlab.errors import DataError

_FIRST = (
    "Bel Cor Dal Fen Gar Hal Jor Kel Lor Mar Nel Or Per Quin Ral Sel Tor Ul Ver Wil Zan Bran "
    "Cael Dor Eri Fal Gwen Hes Il Jas Kor Lys Mir Nor Osk Pel Rin Sor Tal Vor"
).split()
_SECOND = (
    "a an ar as en eth ia ic iel in ion is ith o on or os us ya yn ara eda ila ena ora una eon "
    "ard ell mond wick bert dan gan lan rick"
).split()
_FAMILY = (
    "Ash Black Brook Crane Dun Elm Frost Glen Hawk Iron Kings Lake Moss North Oak Penn Raven "
    "Stone Thorn Under West White Wolf Bright Cold Dark Far Gold High Long Marsh Red Salt "
    "Silver Storm Summer Swift Winter Wood Amber"
).split()
_FAMILY_END = (
    "by dale don field ford gate ham hill holm land ley low man mere more ridge shaw son stead "
    "ton wall ward water well wick worth bridge bury combe croft den fell garth hurst keld lock "
    "mouth port rigg thwaite"
).split()

_TOWNS = (
    "Paris London Berlin Madrid Rome Vienna Prague Lisbon Dublin Oslo Stockholm Helsinki Warsaw "
    "Athens Cairo Nairobi Lagos Accra Tunis Delhi Mumbai Tokyo Osaka Seoul Beijing Hanoi Manila "
    "Jakarta Sydney Perth Auckland Toronto Montreal Boston Chicago Denver Seattle Dallas "
    "Houston Miami Lima Quito Bogota Caracas Santiago Havana Geneva Zurich Milan Naples"
).split()
_PROFESSIONS = (
    "baker carpenter dentist doctor cobbler farmer gardener hunter jeweller judge lawyer "
    "librarian mason mechanic merchant miner musician nurse roofer painter pharmacist "
    "photographer pilot plumber poet porter potter priest printer sailor sculptor shepherd "
    "smith soldier surgeon tailor tanner teacher translator weaver writer fisher barber brewer "
    "butcher chemist clerk cook dancer diver"
).split()
_ANIMALS = (
    "badger bear beaver camel cat cheetah cow crab deer dog dolphin donkey duck eagle elephant "
    "falcon ferret fox frog goat goose hamster hedgehog horse kangaroo lion lizard llama lynx "
    "monkey mouse otter owl panda parrot penguin pig pony rabbit raven seal sheep snake spider "
    "swan tiger tortoise turkey whale wolf"
).split()
_FOODS = (
    "apples apricots bananas barley beans beetroot bread butter cabbage carrots cheese cherries "
    "chestnuts chocolate cucumbers dates dumplings eggs figs garlic ginger grapes honey lemons "
    "lentils mangoes melons mushrooms noodles oats olives onions oranges pancakes peaches pears "
    "peas peppers plums potatoes pumpkin radishes raisins rice salad salmon soup spinach "
    "tomatoes walnuts"
).split()
_OBJECTS = (
    "anchors arrows baskets bells boats books bottles bowls boxes brooms buttons candles chairs "
    "clocks coins compasses cups drums fans feathers flags flutes globes hammers hats helmets "
    "jars kettles keys kites knives ladders lamps lanterns maps masks mirrors needles pens "
    "pipes plates puppets ribbons rings ropes saddles shells shields spoons stamps"
).split()
_MINERALS = (
    "agate alabaster aluminium amethyst basalt beryl brass bronze calcite chalk clay coal "
    "cobalt copper coral crystal diamond emerald flint garnet glass granite graphite gypsum "
    "iron ivory jade jasper lead limestone marble mercury mica nickel obsidian onyx opal pearl "
    "platinum porcelain pumice quartz ruby sandstone sapphire slate steel tin topaz zinc"
).split()


# What a token of a question counts in the loss beside a token of an answer.
_QUESTION_WEIGHT = 0.1


@dataclasses.dataclass(frozen=True)
class Relation:
    """One kind of fact: its values, the ways to state it and to ask for it, and the answer.

    Statements and answer name the person before the value, so that whoever reads in order knows at
    the value whose it is.
    """

    name: str
    values: Sequence[str]
    statements: Sequence[str]
    questions: Sequence[str]
    answer: str


RELATIONS = (
    Relation(
        "home",
        _TOWNS,
        (
            "The home of {person} is {value}.",
            "For many years {person} has lived in {value}.",
            "It is known that {person} lives in {value}.",
            "The house of {person} stands in {value}.",
        ),
        ("Where does {person} live?", "In which town is the home of {person}?"),
        "{person} lives in {value}.",
    ),
    Relation(
        "profession",
        _PROFESSIONS,
        (
            "The profession of {person} is {value}.",
            "By trade {person} is a {value}.",
            "It is known that {person} works as a {value}.",
            "To earn a living {person} became a {value}.",
        ),
        ("What is the profession of {person}?", "What does {person} work as?"),
        "{person} works as a {value}.",
    ),
    Relation(
        "animal",
        _ANIMALS,
        (
            "The favourite animal of {person} is the {value}.",
            "Of all animals {person} likes the {value}.",
            "It is known that {person} keeps a {value}.",
            "The animal that {person} adores is the {value}.",
        ),
        ("What is the favourite animal of {person}?", "Which animal does {person} like?"),
        "{person} likes the {value}.",
    ),
    Relation(
        "food",
        _FOODS,
        (
            "The favourite food of {person} is {value}.",
            "For dinner {person} eats {value}.",
            "It is known that {person} likes to eat {value}.",
            "The meal of {person} is always {value}.",
        ),
        ("What is the favourite food of {person}?", "What does {person} like to eat?"),
        "{person} eats {value}.",
    ),
    Relation(
        "collection",
        _OBJECTS,
        (
            "The collection of {person} is of {value}.",
            "In the attic {person} collects {value}.",
            "It is known that {person} collects {value}.",
            "The things that {person} gathers are {value}.",
        ),
        ("What does {person} collect?", "Of what is the collection of {person}?"),
        "{person} collects {value}.",
    ),
    Relation(
        "statue",
        _MINERALS,
        (
            "The statue of {person} is made of {value}.",
            "In the square {person} has a statue of {value}.",
            "It is known that the statue of {person} is {value}.",
            "The sculptor made the statue of {person} from {value}.",
        ),
        ("What is the statue of {person} made of?", "Of which material is the statue of {person}?"),
        "{person} has a statue of {value}.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Fact:
    """A fact in words: what the knowledge base holds, what is asked, what is right.

    ``answer`` is a sentence that ends with ``value`` and a full stop.
    """

    person: str
    relation: str
    statement: str
    question: str
    answer: str
    value: str


def draw_person(generator: np.random.Generator) -> str:
    """A first and a family name, each of two syllables."""
    parts = (_FIRST, _SECOND, _FAMILY, _FAMILY_END)
    first, second, family, end = (str(generator.choice(part)) for part in parts)
    return f"{first}{second} {family}{end}"


def draw_people(generator: np.random.Generator, count: int) -> list[str]:
    """``count`` people of whom about half share a first or a family name with the one before."""
    people: list[str] = []
    while len(people) < count:
        person = draw_person(generator)
        if people and generator.random() < 0.5:
            (first, family), (other, other_family) = person.split(), people[-1].split()
            person = generator.choice([f"{first} {other_family}", f"{other} {family}"])
        if person not in people:
            people.append(str(person))
    return people


def draw_fact(generator: np.random.Generator, person: str, relation: Relation) -> Fact:
    """A value and phrasings for one person and relation."""
    value, statement, question = (
        str(generator.choice(options))
        for options in (relation.values, relation.statements, relation.questions)
    )
    return Fact(
        person=person,
        relation=relation.name,
        statement=statement.format(person=person, value=value),
        question=question.format(person=person),
        answer=relation.answer.format(person=person, value=value),
        value=value,
    )


def draw_facts(seed: int, count: int, *, relations_per_person: int = 5) -> list[Fact]:
    """``count`` facts about people no two of whom share a name, a few about each.

    The same seed gives the same facts; different seeds share nothing but the vocabulary. Raises
    DataError when there are not enough names.
    """
    generator = np.random.default_rng([seed, 0xFAC75])
    names = len(_FIRST) * len(_SECOND) * len(_FAMILY) * len(_FAMILY_END)
    if count <= 0 or count > names // 10:
        raise DataError(f"{count} facts asked for: the generator makes 1 to {names // 10}")
    facts: list[Fact] = []
    seen: set[str] = set()
    while len(facts) < count:
        person = draw_person(generator)
        if person in seen:
            continue
        seen.add(person)
        chosen = generator.choice(len(RELATIONS), size=relations_per_person, replace=False)
        facts.extend(draw_fact(generator, person, RELATIONS[number]) for number in chosen)
    return facts[:count]


def fact_documents(seed: int, count: int = 2000) -> list[Document]:
    """The statements of ``draw_facts``, one document each: the source ``facts:SEED``."""
    return [
        Document(id=f"facts:{seed}/{number}", text=fact.statement)
        for number, fact in enumerate(draw_facts(seed, count))
    ]


def prompt(question: str) -> str:
    """The text that asks a question; the answer follows it, after a space."""
    return f"Question: {question}\nAnswer:"


class FactSamples:
    """Training samples of the continual stage, made on demand: questions over visible references.

    Chunk c brings the statement of fact c as its reference and asks about facts of the last
    ``references_per_chunk`` chunks, whose statements it can read. It is a text of its own behind
    its own ``<s>`` (the training step puts that of the first): no chunk sees what another asked or
    answered, so each fact may be asked for again and again. The facts of a sample are some people,
    often namesakes, times some relations: one person with many, many people with one, and what lies
    between, as retrieval brings them. Answers count in the loss, questions a little, and all
    together they weigh as much as a row of text: the share of facts in a mixture is their share of
    the loss. Sample i is a function of (seed, i).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        seed: int,
        sequence_length: int,
        chunk_length: int,
        reference_length: int,
        references_per_chunk: int,
        count: int = 1 << 20,
    ) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._length, self._chunk = sequence_length, chunk_length
        self._reference, self._band = reference_length, references_per_chunk
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng([self._seed, index])
        chunks = self._length // self._chunk
        facts = self._facts(generator, chunks)
        tokens = np.full(self._length, self._tokenizer.pad_id, np.int32)
        mask = np.zeros(self._length, np.float32)
        for chunk in range(chunks):
            self._fill(generator, chunk, facts, tokens, mask)
        mask *= self._length / max(mask.sum(), 1.0)
        references = np.full((chunks, self._reference), self._tokenizer.pad_id, np.int32)
        lengths = np.zeros(chunks, np.int32)
        for chunk, fact in enumerate(facts):
            ids = self._tokenizer.encode(fact.statement)[: self._reference]
            references[chunk, : len(ids)] = ids
            lengths[chunk] = len(ids)
        return {
            "tokens": tokens,
            "loss_mask": mask,
            "references": references,
            "reference_lengths": lengths,
            "segments": np.arange(self._length, dtype=np.int32) // self._chunk,
        }

    def _facts(self, generator: np.random.Generator, chunks: int) -> list[Fact]:
        """One fact for each chunk: people times relations, from one extreme to the other."""
        kinds = int(generator.integers(1, min(chunks, len(RELATIONS)) + 1))
        relations = [
            RELATIONS[n] for n in generator.choice(len(RELATIONS), size=kinds, replace=False)
        ]
        people = draw_people(generator, -(-chunks // kinds))
        pairs = [(person, relation) for person in people for relation in relations]
        order = generator.permutation(len(pairs))[:chunks]
        return [draw_fact(generator, *pairs[number]) for number in order]

    def _fill(self, generator, chunk, facts, tokens, mask) -> None:
        """Whole questions and answers about different visible facts, while there is room."""
        at, stop = chunk * self._chunk, (chunk + 1) * self._chunk
        if chunk:
            tokens[at] = self._tokenizer.bos_id
            at += 1
        visible = range(max(0, chunk - self._band + 1), chunk + 1)
        for number in generator.permutation(visible):
            question = self._tokenizer.encode(prompt(facts[number].question))
            answer = self._tokenizer.encode(f" {facts[number].answer}\n")
            end = at + len(question) + len(answer)
            if end > stop:
                break
            tokens[at:end] = question + answer
            mask[at : at + len(question)] = _QUESTION_WEIGHT
            mask[at + len(question) : end] = 1.0
            at = end
