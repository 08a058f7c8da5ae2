"""``jaxlab serve``."""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from jaxlab.errors import ConfigError


def add_commands(
    commands: Any, command: Callable[..., argparse.ArgumentParser], positive: Callable[[str], int]
) -> None:
    """Add the parser; ``command(group, name, call, text)`` makes it."""
    text = "serve a model, reading a bank, to clients of the OpenAI protocol"
    serve = command(commands, "serve", _serve, text)
    serve.add_argument("--run", required=True, metavar="DIR", help="a run, or RUN@STAGE")
    serve.add_argument("--bank", metavar="BANK", help="what to read; none: nothing")
    serve.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free (8000)")
    rows = "sequences decoded at once (8)"
    serve.add_argument("--rows", type=positive, default=8, metavar="N", help=rows)
    context = "tokens of a sequence, prompt and answer (what the model allows)"
    serve.add_argument("--context", type=positive, metavar="N", help=context)
    cache = "memories read lately that are kept in RAM (%(default)s)"
    serve.add_argument("--cache-bytes", type=int, default=1 << 28, metavar="N", help=cache)
    body = "length of a request's body (%(default)s)"
    serve.add_argument("--body-bytes", type=positive, default=1 << 20, metavar="N", help=body)
    waiting = "requests of one kind that wait; more are turned away (64)"
    serve.add_argument("--max-waiting", type=positive, default=64, metavar="N", help=waiting)
    seconds = "time that a request may take (300)"
    serve.add_argument("--request-seconds", type=float, default=300.0, metavar="S", help=seconds)
    drain = "time that running requests get when the server is stopped (30)"
    serve.add_argument("--drain-seconds", type=float, default=30.0, metavar="S", help=drain)
    reload = "time between two looks at what others did to the bank; 0: never (5)"
    serve.add_argument("--reload-seconds", type=_seconds, default=5.0, metavar="S", help=reload)
    key = "let only those generate and search who have the key of JAXLAB_API_KEY"
    serve.add_argument("--require-key", action="store_true", help=key)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time: give seconds, or 0")
    return value


def _serve(arguments: argparse.Namespace) -> None:
    try:
        from jaxlab.serving.app import create_app
        from jaxlab.serving.run import listen, run_app
        from jaxlab.serving.settings import KEY_VARIABLE, Settings, hosts_of
    except ImportError as error:
        raise ConfigError(
            f"serving needs the package {error.name}: pip install 'jaxlab[serve]'"
        ) from error
    from jaxlab.inference.engine import open_engine

    settings = Settings.from_environment(
        body_bytes=arguments.body_bytes,
        max_waiting=arguments.max_waiting,
        request_seconds=arguments.request_seconds,
        drain_seconds=arguments.drain_seconds,
        reload_seconds=arguments.reload_seconds,
        require_key=arguments.require_key,
        hosts=hosts_of(arguments.host),
    )
    if settings.require_key and settings.api_key is None:
        raise ConfigError(f"--require-key: set the key in the environment variable {KEY_VARIABLE}")
    with contextlib.closing(listen(arguments.host, arguments.port)) as listener:
        engine = open_engine(
            arguments.run,
            arguments.bank,
            rows=arguments.rows,
            context=arguments.context,
            cache_bytes=arguments.cache_bytes,
            grows=settings.api_key is not None,
        )
        engine.warm()
        engine.start()
        try:
            host, port = listener.getsockname()[:2]
            where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            print(f"{engine.model.config.name} at {where}", flush=True)
            run_app(create_app(engine, settings), listener)
        finally:
            engine.close(drain_seconds=0.0)
