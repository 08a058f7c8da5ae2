"""The application: completions, chat, the bank, health and figures, and a page to try it out."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from jaxlab import __version__
from jaxlab.data.sources import Document
from jaxlab.errors import JaxlabError, RewrittenError
from jaxlab.inference.retrieval import on_one_bank
from jaxlab.memory.retrieve import lacking
from jaxlab.serving.answers import CHAT, COMPLETION, Answer, Form, error_piece
from jaxlab.serving.errors import RESPONSES, ApiError, handle_errors
from jaxlab.serving.limits import CheckHost, CountRequests, LimitBody
from jaxlab.serving.metrics import Metrics
from jaxlab.serving.requests import ClientGone, Runner, Running
from jaxlab.serving.schemas import AddBody, ChatBody, CompletionBody, SearchBody
from jaxlab.serving.settings import KEY_VARIABLE, Settings
from jaxlab.serving.threads import Threads
from jaxlab.serving.watch import BankWatch

# What the client of a request that it gave up would be answered.
_GONE = Response(status_code=499)


class Server:
    """An engine, the limits of what is asked of it, and whether it is going down."""

    def __init__(self, engine: Any, settings: Settings):
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        self.runner = Runner(engine, settings, self.metrics)
        self.watch = BankWatch(engine.reader, settings.reload_seconds)
        self.draining = False

    @property
    def name(self) -> str:
        """The model's name."""
        return self.engine.model.config.name

    def problem(self) -> str | None:
        """Why it takes no requests, or None."""
        if self.draining:
            return "the server is going down"
        if not self.engine.alive:
            return f"the engine has stopped: {self.engine.failure!r}"
        return None

    def require_open(self) -> None:
        """Raise ApiError when no more requests are taken."""
        if (problem := self.problem()) is not None:
            raise ApiError(503, problem)

    def require_bank(self) -> None:
        """Raise ApiError when the bank is of no more use."""
        if self.watch.problem is not None:
            raise ApiError(503, self.watch.problem)

    def require_model(self, name: str) -> None:
        """Raise ApiError for another model than this one."""
        if name != self.name:
            message = f"there is no model {name!r} here; there is {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def require_reader(self) -> Any:
        """The reader; raises ApiError where the server has no bank, or one of no more use."""
        if self.engine.reader is None:
            raise ApiError(400, "this server was started without a bank")
        self.require_bank()
        return self.engine.reader

    async def told(self, error: JaxlabError) -> ApiError:
        """What of an error its client is told."""
        if isinstance(error, RewrittenError):
            await self.watch.look()  # it may be of use again, once what was repaired is taken over
            if self.watch.problem is not None:
                return ApiError(503, self.watch.problem)
        return ApiError.of(error)

    def check_key(self, given: str | None) -> None:
        """Raise ApiError unless this is the key."""
        if self.settings.api_key is None:
            raise ApiError(
                403, f"the server was started without a key: set {KEY_VARIABLE} to allow this"
            )
        if given is None or not self.settings.is_key(given.removeprefix("Bearer ")):
            raise ApiError(401, "the key is missing or wrong: Authorization: Bearer KEY")


def create_app(engine: Any, settings: Settings) -> FastAPI:
    """The application over an engine that runs; ``app.state.server`` is its :class:`Server`."""

    @contextlib.asynccontextmanager
    async def watching(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(server.watch.run())
        try:
            yield
        finally:
            task.cancel()

    server = Server(engine, settings)
    app = FastAPI(
        lifespan=watching,
        title="jaxlab",
        version=__version__,
        description="Language models that read explicit memory, with citations.",
        responses=RESPONSES,
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = server
    handle_errors(app, server.told)
    app.add_middleware(LimitBody, limit=settings.body_bytes)
    app.add_middleware(CheckHost, hosts=settings.hosts)
    app.add_middleware(
        CountRequests, counter=server.metrics.requests, routes=lambda: app.router.routes
    )

    Key = Annotated[str | None, Header(alias="Authorization")]

    def anyone_or_key(authorization: Key = None) -> None:
        if settings.require_key:
            server.check_key(authorization)

    def key(authorization: Key = None) -> None:
        server.check_key(authorization)

    _add_generation(app, server, Depends(anyone_or_key))
    _add_memory(app, server, Depends(anyone_or_key), Depends(key))
    _add_pages(app, server)
    return app


def _add_generation(app: FastAPI, server: Server, allowed: Any) -> None:
    streams = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}

    @app.post("/v1/completions", dependencies=[allowed], responses=streams, response_model=None)
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        """Continue a text."""
        return await _answer(server, COMPLETION, body, http)

    @app.post("/v1/chat/completions", dependencies=[allowed], responses=streams,
              response_model=None)  # fmt: skip
    async def chat(body: ChatBody, http: HttpRequest) -> Response:
        """Continue a conversation."""
        return await _answer(server, CHAT, body, http)

    def model() -> dict[str, Any]:
        return {"id": server.name, "object": "model", "created": 0, "owned_by": "jaxlab"}

    @app.get("/v1/models", dependencies=[allowed])
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}", dependencies=[allowed])
    async def one_model(name: str) -> dict[str, Any]:
        """The model, by its name."""
        server.require_model(name)
        return model()


async def _answer(server: Server, form: Form, body: Any, http: HttpRequest) -> Response:
    server.require_open()
    server.require_model(body.model)
    if body.memory != "off":
        server.require_bank()
    running = await server.runner.start(body.request())
    answer = Answer(form, server.name, running.ticket.prompt_tokens)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return _Stream(running, _pieces(server, running, answer, usage=usage))
    try:
        async for event in running.events(http):
            answer.add(event)
    except ClientGone:
        return _GONE
    return JSONResponse(answer.whole())


class _Stream(StreamingResponse):
    """A stream whose request is cancelled with it, even before its first piece was asked for."""

    def __init__(self, running: Running, pieces: AsyncIterator[str]):
        super().__init__(pieces, media_type="text/event-stream")
        self._running = running

    async def __call__(self, *call: Any) -> None:
        try:
            await super().__call__(*call)
        finally:
            self._running.ticket.cancel()


async def _pieces(
    server: Server, running: Running, answer: Answer, *, usage: bool
) -> AsyncIterator[str]:
    if (first := answer.first()) is not None:
        yield first
    try:
        async for event in running.events():
            answer.add(event)
            yield answer.piece()
    except (ApiError, JaxlabError) as error:
        told = error if isinstance(error, ApiError) else await server.told(error)
        yield error_piece(told.body())
        return
    yield answer.last(usage=usage)


def _add_memory(app: FastAPI, server: Server, allowed: Any, with_key: Any) -> None:
    waiting = server.settings.max_waiting
    searching, adding = Threads(server.engine.rows, waiting), Threads(1, waiting)

    @app.post("/memory/search", dependencies=[allowed])
    async def search(body: SearchBody) -> dict[str, Any]:
        """The references nearest to a text."""
        reader = server.require_reader()
        return await searching.run(on_one_bank, reader, lambda: _search(reader, body))

    @app.post("/memory/add", dependencies=[with_key])
    async def add(body: AddBody) -> dict[str, Any]:
        """Add texts to the bank; each is encoded when it is first read."""
        server.require_open()
        reader = server.require_reader()
        documents = [Document(id=each.source, text=each.text) for each in body.references]
        rows = await adding.run(reader.add, documents)
        return {"added": list(rows), "references": len(reader.bank)}


def _search(reader: Any, body: SearchBody) -> dict[str, Any]:
    if (lacks := lacking(reader.bank, body.sources or ())) is not None:
        raise ApiError(400, f"the bank has {lacks}", param="sources")
    hits = reader.search([body.query], body.top, sources=body.sources)
    rows = [row for row in hits.ids[0].tolist() if row >= 0]
    found = zip(rows, hits.scores[0].tolist(), reader.bank.references(rows), strict=False)
    return {
        "references": [
            {"reference": row, "score": score, "source": stored.source, "text": stored.text}
            for row, score, stored in found
        ]
    }


def _add_pages(app: FastAPI, server: Server) -> None:
    page: Callable[[], str] = (resources.files(__package__) / "page.html").read_text

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are taken and the bank is of use, and why not."""
        problem, reader = server.problem() or server.watch.problem, server.engine.reader
        body = {
            "status": "ok" if problem is None else "unavailable",
            "model": server.name,
            "references": 0 if reader is None else len(reader.bank),
            "reason": problem,
        }
        return JSONResponse(body, 200 if problem is None else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures in the format of Prometheus."""
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """A page that streams an answer beside the references that are read."""
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page().replace("NONCE", nonce), headers=headers)
