"""The service against what its own schema allows and forbids: never a failure of the service."""

import hypothesis
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

LOCAL = {"host": "localhost"}
#: They take nothing, so that nothing can be wrong with it.
BARE = {"POST /v1/reload", "GET /healthz", "GET /readyz", "GET /metrics"}
settings = hypothesis.settings(
    max_examples=12,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_call_that_the_schema_allows_or_forbids_breaks_the_service(serve, mode):
    app = serve(max_body=200_000)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=LOCAL)
    seen = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode == "NEGATIVE" and operation.label in BARE:
            continue
        codes = seen[operation.label] = set()

        @settings
        @hypothesis.given(operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
        def check(case):
            response = case.call(headers=LOCAL)
            assert response.status_code < 500, response.text
            assert "Traceback" not in response.text
            if response.headers["content-type"] == ["application/json"]:
                response.json()
            codes.add(response.status_code)  # noqa: B023  # it runs before the loop goes on

        check()
    assert len(seen) == (15 if mode == "POSITIVE" else 11)
    assert set().union(*seen.values()) >= ({200, 404, 422} if mode == "POSITIVE" else {422})
