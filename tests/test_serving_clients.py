"""Clients that people use against `poolwise serve`: OpenAI's, LangChain's, LlamaIndex's; and generated requests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

import poolwise
from poolwise.encoding.server import ROUTE, Server
from served import running, small_model
from tiny import SENTENCES

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with running(folder, names=["own", "text-embedding-3-small"], token=KEY) as made:
        yield made


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    return np.asarray(poolwise.load(folder).encode([*SENTENCES]))


@pytest.fixture
def place(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Where OpenAI's clients find the server, and nothing else."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return {"base_url": f"http://127.0.0.1:{server.port}/v1", "api_key": KEY, "max_retries": 0}


def far(found: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.array(found) - expected).max())


def test_openai(place: dict[str, Any], expected: np.ndarray) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(**place) as client:
        for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):  # base64 if none is given
            answer = client.embeddings.create(model="own", input=[*SENTENCES], **form)
            if form.get("encoding_format") != "base64":
                assert far([each.embedding for each in answer.data], expected) < 1e-5
        assert answer.usage.prompt_tokens > 0
        short = client.embeddings.create(model="own", input="a text", dimensions=8)
        assert len(short.data[0].embedding) == 8
        assert [each.id for each in client.models.list()] == ["own", "text-embedding-3-small"]
        assert client.models.retrieve("own").owned_by == "poolwise"
        with pytest.raises(openai.UnprocessableEntityError, match=r"input\[1\] is empty") as refused:
            client.embeddings.create(model="own", input=["a", ""])
        assert refused.value.param == "input[1]"
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.embeddings.create(model="gpt", input="a")
    with openai.OpenAI(**{**place, "api_key": "another"}) as client, pytest.raises(openai.AuthenticationError):
        client.embeddings.create(model="own", input="a")


def test_langchain(place: dict[str, Any], expected: np.ndarray) -> None:
    embeddings = pytest.importorskip("langchain_openai").OpenAIEmbeddings
    made = embeddings(model="own", check_embedding_ctx_length=False, **place)
    assert far(made.embed_documents([*SENTENCES]), expected) < 1e-5
    assert far(made.embed_query(SENTENCES[0]), expected[0]) < 1e-5
    assert len(embeddings(model="own", check_embedding_ctx_length=False, dimensions=8, **place).embed_query("a")) == 8


def test_langchain_with_its_default_sends_ids_that_are_refused(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer comes from the network; here one that counts from 100,000 takes its place."""
    embeddings = pytest.importorskip("langchain_openai").OpenAIEmbeddings
    openai, tiktoken = pytest.importorskip("openai"), pytest.importorskip("tiktoken")

    class Words:
        def encode(self, text: str, **_: Any) -> list[int]:
            return [100_000 + ord(c) for c in text]

        encode_ordinary = encode

    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: Words())
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _: Words())
    with pytest.raises(openai.UnprocessableEntityError, match="check_embedding_ctx_length=False"):
        embeddings(model="own", **place).embed_documents([*SENTENCES])


def test_llama_index(place: dict[str, Any], expected: np.ndarray) -> None:
    module = pytest.importorskip("llama_index.embeddings.openai")
    where = {"api_base": place["base_url"], "api_key": KEY, "max_retries": 0}
    made = module.OpenAIEmbedding(model_name="own", **where)
    assert far(made.get_text_embedding_batch([*SENTENCES]), expected) < 1e-5
    assert far(made.get_query_embedding(SENTENCES[0]), expected[0]) < 1e-5
    alias = module.OpenAIEmbedding(model="text-embedding-3-small", dimensions=8, **where)
    assert len(alias.get_text_embedding("a")) == 8


def test_generated_requests_are_answered_as_the_schema_says(server: Server) -> None:
    """Valid and invalid requests made from the OpenAPI page: no 5xx, no status or content that the page does not list.

    POOLWISE_EXAMPLES: how many for each route, 60 by default.
    """
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        schemathesis.checks.not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    headers = {"Authorization": f"Bearer {KEY}"}
    page = f"http://127.0.0.1:{server.port}/openapi.json"
    schema = schemathesis.openapi.from_url(page, headers=headers, wait_for_schema=10)
    answers: dict[str, list[int]] = {"POSITIVE": [], "NEGATIVE": []}
    settings = hypothesis.settings(
        max_examples=int(os.environ.get("POOLWISE_EXAMPLES", "60")),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def send(cases: Any, found: list[int]) -> None:
        @settings
        @hypothesis.given(case=cases)
        def call(case: Any) -> None:
            response = case.call(headers=headers)
            case.validate_response(response, checks=checks)
            if case.path == ROUTE:
                found.append(response.status_code)

        call()

    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in ("POSITIVE", "NEGATIVE") if operation.path == ROUTE else ("POSITIVE",):
            cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])
            send(cases, answers[mode])
    assert {*answers["POSITIVE"]} >= {200}
    assert {*answers["NEGATIVE"]} & {400, 422}
