"""Laws of the OpenAI protocol, asked by its own client."""

import json
import re

import openai
import pytest

from jaxlab.inference.requests import Event, Request, TokenLogprob
from jaxlab.inference.sequences import Sequence
from jaxlab.serving.answers import CHAT, COMPLETION, Answer
from tests.inference.small import small_tokenizer
from tests.serving.fakes import KEY, TEXTS, FakeEngine, served

HELLO = "one two three"


@pytest.fixture(scope="module")
def engine():
    return FakeEngine()


@pytest.fixture(scope="module")
def client(engine):
    with (
        served(engine) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client


def complete(client, **options):
    given = {"model": "echo", "prompt": HELLO, "max_tokens": 5, **options}
    return client.completions.create(**given)


def chat(client, **options):
    given = {"model": "echo", "messages": [{"role": "user", "content": "hi you"}], **options}
    return client.chat.completions.create(**{"max_tokens": 3, **given})


def test_a_completion_has_text_usage_reason_and_citations(client):
    found = complete(client)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason) == (" one two three one two", "length")
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 5, 8)
    assert (found.object, found.model) == ("text_completion", "echo")
    assert [one["text"] for one in choice.citations] == TEXTS
    assert choice.citations[1] == {
        "chunk": 0, "reference": 1, "score": 0.5, "source": "source 1", "text": TEXTS[1]
    }  # fmt: skip


def test_a_stream_says_the_same_in_pieces(client):
    pieces = list(complete(client, stream=True, stream_options={"include_usage": True}))
    *said, last = pieces
    assert "".join(piece.choices[0].text for piece in said) == " one two three one two"
    assert [piece.choices[0].finish_reason for piece in said] == [None] * 5 + ["length"]
    assert [one["text"] for one in said[0].choices[0].citations] == TEXTS
    assert not last.choices and last.usage.total_tokens == 8
    assert len({piece.id for piece in pieces}) == 1
    assert all(piece.usage is None for piece in complete(client, stream=True))


def test_stop_strings_end_an_answer(client, engine):
    for stop in ("three", ["x", "three"]):
        choice = complete(client, stop=stop).choices[0]
        assert (choice.text, choice.finish_reason) == (" one two", "stop")
    assert engine.requests[-1].stop == ("x", "three")


def test_log_probabilities_in_the_form_of_each_endpoint(client):
    half = "bytes:\\xc3"  # what OpenAI says of a token that is a part of a character
    found = complete(client, logprobs=2, max_tokens=2).choices[0].logprobs
    assert found.tokens == [" one", " two"] and found.token_logprobs == [-0.5, -0.5]
    assert found.top_logprobs == [{" one": -0.5, half: -1.5}, {" two": -0.5, half: -1.5}]
    assert found.text_offset == [0, 4]
    said = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [one.token for one in said] == [" Question:", " hi", " you"]
    assert [(one.token, one.bytes) for one in said[0].top_logprobs][1] == (half, [0xC3])
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


def test_log_probabilities_of_parts_of_characters_make_up_the_text():
    parts = [b" caf", b"\xc3", b"\xa9", b"!", b"?", b"stop"]
    answer = Answer(COMPLETION, "m", 1)
    for place, part in enumerate(parts):
        text = {0: " caf", 2: "é", 3: "!"}.get(place, "")
        finish = "stop" if part == b"stop" else None
        answer.add(Event(text, (1,), place + 1, (TokenLogprob(1, part, -1.0),), finish=finish))
    choice = answer.whole()["choices"][0]
    # A stop string that begins with "?" cut off two tokens.
    assert choice["text"] == " café!"
    assert choice["logprobs"]["tokens"] == [" caf", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert choice["logprobs"]["text_offset"] == [0, 4, 4, 5]


@pytest.mark.parametrize("form", [COMPLETION, CHAT])
@pytest.mark.parametrize(
    ("text", "stop", "most", "pieces"),
    [
        ("abé!", (), 9, ["a", "b", "", "Ã©", "!", ""]),
        ("abxa|", ("xy",), 9, ["a", "b", "", "xa", ""]),
        ("abxya", ("xy",), 9, ["a", "b", "", ""]),
        ("abx|", ("xy",), 9, ["a", "b", "", "x"]),
        ("abx", ("xy",), 3, ["a", "b", "x"]),
        ("aéx", ("éx",), 9, ["a", "", "", ""]),
        ("aé", (), 2, ["a", "Ã"]),
    ],
)  # fmt: skip
def test_a_stream_has_each_log_probability_with_the_text_of_its_token(
    form, text, stop, most, pieces
):
    """Those of the pieces, a character for each byte, are together those of the whole answer."""
    tokenizer, answer, events, found = small_tokenizer(), Answer(form, "m", 1), [], []

    def tokens(choice):
        said = choice["logprobs"] or {"tokens": [], "content": []}
        names = [one["token"] for one in said["content"]] if form.chat else said["tokens"]
        parts = [re.sub(r"^bytes:\\x", "", name) for name in names]
        return [bytes.fromhex(part) if len(part) == 2 else part.encode() for part in parts]

    request = Request("", max_tokens=most, stop=stop, logprobs=0)
    sequence = Sequence(request, [], events.append, tokenizer, chunk=4, reads=False)
    said, end, _ = text.partition("|")
    for number in [*tokenizer.encode(said), tokenizer.eos_id]:
        logprob = TokenLogprob(number, tokenizer.bytes_of(number), -1.0)
        if finish := sequence.accept(number, None if number == tokenizer.eos_id else logprob):
            sequence.end(finish)
            break
    for event in events:
        answer.add(event)
        (choice,) = json.loads(answer.piece().removeprefix("data: "))["choices"]
        found.append(tokens(choice))
    assert [b"".join(one).decode("latin-1") for one in found] == pieces
    assert sum(found, []) == tokens(answer.whole()["choices"][0])


@pytest.mark.parametrize("most", [2, 3])
def test_a_token_without_text_keeps_its_log_probability_however_the_answer_ends(most):
    tokenizer, answer, events = small_tokenizer(), Answer(COMPLETION, "m", 1), []
    request = Request("", max_tokens=most, stop=("xy",), logprobs=0)
    sequence = Sequence(request, [], events.append, tokenizer, chunk=4, reads=False)
    (letter,) = tokenizer.encode("a")
    for number in (letter, tokenizer.bos_id, tokenizer.eos_id):
        logprob = TokenLogprob(number, tokenizer.bytes_of(number), -1.0)
        if finish := sequence.accept(number, None if number == tokenizer.eos_id else logprob):
            sequence.end(finish)
            break
    assert finish == ("length" if most == 2 else "stop")
    for event in events:
        answer.add(event)
    (choice,) = answer.whole()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-1.0, -1.0]


def test_a_conversation_becomes_one_text(client, engine):
    messages = [
        {"role": "system", "content": "Facts follow."},
        {"role": "user", "content": [{"type": "text", "text": one} for one in ("Who ", "?")]},
        {"role": "assistant", "content": "Nobody."},
        {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    found = chat(client, messages=messages, stop="!", max_tokens=1)
    asked = engine.requests[-1]
    assert (
        asked.prompt == "Facts follow.\nQuestion: Who ?\nAnswer: Nobody.\nQuestion: Why?\nAnswer:"
    )
    assert asked.stop == ("\nQuestion:", "!")
    assert (found.choices[0].message.role, found.choices[0].message.content) == (
        "assistant",
        " Facts",
    )


def test_a_streamed_conversation_begins_with_the_role(client):
    pieces = list(chat(client, stream=True, max_completion_tokens=2))
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == " Question: hi"
    assert pieces[-1].choices[0].finish_reason == "length"
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}


def test_what_is_asked_reaches_the_engine(client, engine):
    more = {"top_k": 4, "memory": "shuffled"}
    complete(client, temperature=0.5, top_p=0.25, seed=-3, extra_body=more, user="me")
    asked = engine.requests[-1]
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 4, 0.25)
    assert (sampling.seed, asked.memory, asked.max_tokens) == (-3, "shuffled", 5)
    complete(client)
    assert engine.requests[-1].sampling.temperature == 1.0  # the protocol's default
    assert not complete(client, extra_body={"memory": "off"}).choices[0].citations


def test_without_a_seed_each_request_has_one_of_its_own(client, engine):
    for more in ({}, {}, {"seed": None}, {"seed": 0}):
        complete(client, **more)
    *drawn, given = [request.sampling.seed for request in engine.requests[-4:]]
    assert len(set(drawn)) == 3 and given == 0


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").id == "echo"
    with pytest.raises(openai.NotFoundError, match="no model 'other/one' here"):
        client.models.retrieve("other/one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_tokens=0), "max_tokens: Input should be greater than or equal to 1"),
        (dict(max_tokens=998), "the prompt has 3 tokens: shorten it"),
        (dict(n=2), "n is not supported"),
        (dict(echo=True), "echo is not supported"),
        (dict(best_of=3), "best_of is not supported"),
        (dict(suffix="x"), "suffix is not supported"),
        (dict(logit_bias={"5": 1}), "logit_bias is not supported"),
        (dict(presence_penalty=0.5), "presence_penalty is not supported"),
        (dict(temperature=-1), "temperature: Input should be greater"),
        (dict(top_p=0), "top_p: Input should be greater"),
        (dict(logprobs=99), "logprobs: Input should be less"),
        (dict(stop=["a"] * 5), "stop: List should have at most 4 items"),
        (dict(stop="a" * 257), "stop: String should have at most 256 characters"),
        (dict(stop=["a", "b" * 257]), "stop.1: String should have at most 256 characters"),
        (dict(stop=[""]), "stop.0: String should have at least 1 character"),
        (dict(prompt=["a", "b"]), "prompt: a prompt is text, one in each request"),
        (dict(prompt=[[1, 2]]), "prompt: a prompt is text"),
        (dict(prompt=[1, 2, 3]), "ids of tokens are not taken"),
        (dict(extra_body={"memory": "loud"}), "memory: Input should be 'on', 'off'"),
        (dict(extra_body={"repetition_penalty": 1.3}), "repetition_penalty is not supported"),
        (dict(extra_body={"min_p": 0.1}), "min_p is not supported"),
        (dict(extra_body={"min_tokens": 9}), "min_tokens is not supported"),
        (dict(extra_body={"ignore_eos": True}), "ignore_eos is not supported"),
        (dict(extra_body={"stop_token_ids": [5]}), "stop_token_ids is not supported"),
        (dict(extra_body={"guided_regex": "a"}), "'guided_regex' is not a field"),
        (dict(extra_body={"memroy": "off"}), "'memroy' is not a field that this server knows"),
        (dict(extra_body={"\n" * 99: 1}), "is not a field"),
        (dict(stream_options={"usage": True}), "stream_options: 'usage' is not a field"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        complete(client, **options)


def test_a_field_that_is_not_supported_is_named(client):
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, n=2)
    said = error.value.body
    assert (said["param"], said["message"]) == ("n", "n is not supported by this server")
    messages = [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, messages=messages)
    assert error.value.param == "messages.0.tool_calls"


def test_alternatives_to_tokens_that_are_not_asked_for_are_refused(client):
    for more in ({}, {"logprobs": False}, {"logprobs": None}):
        with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs") as error:
            chat(client, top_logprobs=2, **more)
        assert error.value.param == "top_logprobs"
        assert chat(client, top_logprobs=0, **more).choices[0].logprobs is None


def test_values_that_change_nothing_are_taken(client):
    of_others = {"repetition_penalty": 1.0, "min_p": 0, "stop_token_ids": [], "audio": None}
    found = complete(client, n=1, echo=False, presence_penalty=0, logit_bias={}, best_of=1,
                     user="me", extra_body=of_others)  # fmt: skip
    assert found.choices[0].text


def test_what_a_conversation_has_beside_its_text_is_taken(client):
    said = chat(client).choices[0].message
    found = chat(client, messages=[{"role": "user", "content": "hi", "name": "Ann"}, said,
                                   said.model_dump() | {"tool_calls": []}],
                 metadata={"a": "b"}, store=True, service_tier="flex", safety_identifier="x",
                 prompt_cache_key="y", parallel_tool_calls=False, verbosity="medium",
                 reasoning_effort="none", stream_options={"include_obfuscation": False},
                 prediction={"type": "content", "content": "z"})  # fmt: skip
    assert found.choices[0].message.content


@pytest.mark.parametrize(
    "options",
    [
        dict(tools=[{"type": "function", "function": {"name": "f"}}]),
        dict(response_format={"type": "json_object"}),
        dict(messages=[]),
        dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        dict(messages=[{"role": "robot", "content": "x"}]),
        dict(messages=[{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]),
        dict(reasoning_effort="high"),
        dict(web_search_options={}),
    ],
)
def test_what_a_conversation_cannot_have_is_refused(client, options):
    with pytest.raises(openai.BadRequestError):
        chat(client, **options)


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as error:
        complete(client, model="gpt")
    assert error.value.code == "model_not_found" and error.value.param == "model"


def test_a_server_with_a_key_asks_for_it(engine):
    with served(engine, api_key=KEY, require_key=True) as (url, _):
        for key, right in (("wrong", False), (KEY, True)):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                if right:
                    assert complete(client).choices[0].text
                else:
                    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                        complete(client)
