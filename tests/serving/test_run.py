"""Laws of the process: where it listens, and how it ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from jaxlab.errors import ConfigError
from jaxlab.serving.run import listen
from tests.serving.fakes import BODY, SECONDS, said, until


def test_a_port_that_is_taken_is_one_clear_error():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{port} .*--port"):
            listen("127.0.0.1", port)


SERVE = """
import sys
from jaxlab.serving.app import create_app
from jaxlab.serving.run import listen, run_app
from jaxlab.serving.settings import Settings
from tests.serving.fakes import FakeEngine
engine = FakeEngine()
if sys.argv[2:] == ["endless"]:
    engine.gate.clear()
listener = listen("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
run_app(create_app(engine, Settings(drain_seconds=float(sys.argv[1]))), listener)
print("ended", flush=True)
"""


@contextlib.contextmanager
def served_by_a_child(*arguments):
    """The process, and a client of it; at the end it has ended by itself and said nothing else."""
    child = subprocess.Popen(
        [sys.executable, "-c", SERVE, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{int(child.stdout.readline())}"
        with httpx.Client(base_url=url, timeout=SECONDS) as http:
            yield child, http
        said = child.communicate(timeout=SECONDS)
        assert (said, child.returncode) == (("ended\n", ""), 0)
    finally:
        child.kill()
        child.communicate()


def test_a_signal_lets_what_runs_end_and_the_process_with_0():
    body = BODY | {"stream": True, "max_tokens": 400}
    with (
        served_by_a_child("30") as (child, http),
        http.stream("POST", "/v1/completions", json=body) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        child.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-2] == "data: [DONE]" and '"length"' in rest[-4]


def test_who_is_cut_off_by_the_end_is_told_so():
    with served_by_a_child("0.2", "endless") as (child, http), ThreadPoolExecutor(2) as clients:
        asked = [
            clients.submit(http.post, "/v1/completions", json=BODY | {"stream": stream})
            for stream in (False, True)
        ]
        until(lambda: "jaxlab_engine_running 2.0" in http.get("/metrics").text)
        child.send_signal(signal.SIGTERM)
        whole, stream = (one.result() for one in asked)
    assert whole.status_code == 503 and "going down" in said(whole)["message"]
    *_, error, done, rest = stream.text.split("\n\n")
    assert "going down" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert (done, rest) == ("data: [DONE]", "")
