"""Law of every endpoint: whatever comes, it answers as its OpenAPI description says, never 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from jaxlab.serving import schemas
from jaxlab.serving.app import create_app
from jaxlab.serving.settings import Settings
from tests.serving.fakes import KEY, FakeEngine

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
# One context for all requests: the engine of the tests says any number of tokens up to it.
app = create_app(FakeEngine(context=50), Settings(api_key=KEY, body_bytes=20_000))
schema = schemathesis.openapi.from_asgi("/openapi.json", app)


@schema.parametrize()
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_comes_is_answered_as_described(case):
    headers = {"Authorization": f"Bearer {KEY}"} if case.path == "/memory/add" else None
    case.call_and_validate(checks=CHECKS, headers=headers)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", schemas.CompletionBody),
        ("/v1/chat/completions", schemas.ChatBody),
        ("/memory/search", schemas.SearchBody),
        ("/memory/add", schemas.AddBody),
    ],
)
@given(data=st.data())
@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # making an example smaller takes minutes
    suppress_health_check=list(HealthCheck),
)
def test_what_the_description_allows_is_taken(path, body, data):
    body.model_validate(data.draw(schema[path]["POST"].as_strategy()).body)


def test_the_description_has_every_endpoint():
    paths = set(schema.raw_schema["paths"])
    assert {"/v1/completions", "/v1/chat/completions", "/memory/search", "/memory/add"} <= paths
