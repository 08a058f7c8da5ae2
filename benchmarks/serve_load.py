"""Streaming clients for minutes: errors, the server's RAM, times between tokens, clients that go.

    python benchmarks/serve_load.py --run runs/demo --bank BANK --json FILE

`jaxlab serve` runs in a process of its own; the clients are OpenAI's, each with one request open at
any time and no retries. Prompts are the beginnings of references and questions about facts, of any
length; one request in ten is greedy and repeated, and has to give the same answer whatever else
is decoded; one in twenty vanishes in mid-answer. RAM is compared between the second minute and the
last.
"""

import argparse
import asyncio
import dataclasses
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from jaxlab.data.facts import draw_facts, prompt
from jaxlab.memory.store import Bank
from jaxlab.tools.output import machine, percentiles, script_command, write_json

PACKAGES = ("jax", "jaxlib", "fastapi", "uvicorn", "openai")
GREEDY, VANISHES = 0.1, 0.05
_REPEATED = 20


@dataclasses.dataclass
class Tally:
    """What the clients saw; times in seconds."""

    answers: int = 0
    vanished: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)
    greedy: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    repeats: int = 0


class Client:
    """Asks one thing after another until the time is over."""

    def __init__(self, url: str, model: str, prompts: list[str], tally: Tally, seed: int):
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        self._model, self._prompts, self._tally = model, prompts, tally
        self._draws = random.Random(seed)

    async def run(self, end: float) -> None:
        """Requests until ``end`` (of time.monotonic)."""
        async with self._openai:
            while time.monotonic() < end:
                try:
                    await self._ask()
                except Exception as error:  # each is a figure of the report
                    self._tally.errors.append(f"{type(error).__name__}: {error}")
                    await asyncio.sleep(1)

    async def _ask(self) -> None:
        draws, kind = self._draws, self._draws.random()
        greedy = kind < GREEDY
        asked = draws.choice(self._prompts[:_REPEATED] if greedy else self._prompts)
        length = 48 if greedy else draws.randint(16, 128)
        leaves_at = draws.randint(1, length) if kind > 1 - VANISHES else None
        memory = "on" if greedy else draws.choice(["on", "on", "on", "off", "shuffled"])
        last = time.perf_counter()
        stream = await self._openai.completions.create(
            model=self._model,
            prompt=asked,
            max_tokens=length,
            temperature=0.0 if greedy else 0.8,
            stream=True,
            extra_body={"memory": memory},
        )
        text, seen = "", 0
        async for chunk in stream:
            if not chunk.choices or not chunk.choices[0].text:
                continue
            now = time.perf_counter()
            (self._tally.between if seen else self._tally.first).append(now - last)
            last, seen = now, seen + 1
            text += chunk.choices[0].text
            if leaves_at is not None and seen >= leaves_at:
                await stream.close()
                self._tally.vanished += 1
                return
        self._tally.answers += 1
        if greedy:
            known = self._tally.greedy.setdefault(asked, set())
            self._tally.repeats += bool(known)
            known.add(text)


def _prompts(bank: Bank, count: int = 500) -> list[str]:
    draws = np.random.default_rng(0)
    texts = [one.text for one in bank.references(draws.choice(bank.rows, count // 2))]
    beginnings = [text[: draws.integers(10, 400)] for text in texts]
    questions = [prompt(fact.question) for fact in draw_facts(1, count // 2)]
    mixed = [one for pair in zip(beginnings, questions, strict=True) for one in pair]
    return [one for one in mixed if one.strip()]


def _figures(url: str) -> dict[str, float]:
    """The engine's own figures."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    return {
        one.name.removeprefix("jaxlab_engine_").removesuffix("_total"): one.value
        for one in samples
        if one.name.startswith("jaxlab_engine_")
    }


async def _watch(process: psutil.Process, end: float) -> list[tuple[int, int]]:
    """RSS of the server once a second, whole and without files that are mapped (the index is)."""
    found = []
    while time.monotonic() < end:
        memory = process.memory_info()
        found.append((memory.rss, memory.rss - memory.shared))
        await asyncio.sleep(1)
    return found


def _by_minute(figures: list[int], minutes: float) -> list[float]:
    medians = [float(np.median(figures[at : at + 60])) for at in range(0, len(figures), 60)]
    return medians[: max(1, int(minutes))]


def _growth(by_minute: list[float]) -> float:
    """From the second minute to the last: in the first one compiles."""
    return by_minute[-1] / by_minute[min(1, len(by_minute) - 1)] - 1


async def _load(args, url: str, model: str, prompts: list[str], server: psutil.Process):
    tally, end = Tally(), time.monotonic() + 60 * args.minutes
    clients = [Client(url, model, prompts, tally, seed).run(end) for seed in range(args.clients)]
    rss, *_ = await asyncio.gather(_watch(server, end), *clients)
    return tally, rss


def _start(args) -> tuple[subprocess.Popen, str, str]:
    command = [sys.executable, "-m", "jaxlab.cli", "serve", "--run", args.run, "--bank", args.bank]
    command += ["--port", "0", "--rows", str(args.rows), "--max-waiting", str(args.clients)]
    command += ["--cache-bytes", str(args.cache_bytes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if " at http" not in line:
        raise SystemExit(f"the server did not start: {line}")
    model, url = line.strip().split(" at ")
    return process, model, url


def _free(url: str) -> dict[str, float]:
    """The engine's figures when nothing is under way, or after ten seconds."""
    for _ in range(100):
        figures = _figures(url)
        if not figures["running"] + figures["waiting"]:
            break
        time.sleep(0.1)
    return figures


def _summary(
    tally: Tally,
    rss: list[tuple[int, int]],
    before: dict[str, float],
    after: dict[str, float],
    args,
) -> dict:
    minutes, tokens = args.minutes, after["generated_tokens"] - before["generated_tokens"]
    whole, own = (_by_minute(list(each), minutes) for each in zip(*rss, strict=True))
    hits, misses = after["cache_hits"], after["cache_misses"]
    return {
        "answers": tally.answers,
        "errors": len(tally.errors),
        "first_errors": tally.errors[:5],
        "vanished": tally.vanished,
        "running_after": after["running"],
        "waiting_after": after["waiting"],
        "repeated_greedy_answers": tally.repeats,
        "greedy_prompts_with_two_answers": sum(len(one) > 1 for one in tally.greedy.values()),
        "tokens_per_second": tokens / after["seconds"],
        "seconds_to_first_token": {**percentiles(tally.first), "max": max(tally.first)},
        "seconds_between_tokens": {**percentiles(tally.between), "max": max(tally.between)},
        "rss_bytes_by_minute": whole,
        "rss_growth_from_second_minute": _growth(whole),
        "rss_without_mapped_files_by_minute": own,
        "rss_without_mapped_files_growth": _growth(own),
        "cache_hit_share": hits / max(1.0, hits + misses),
    }


def main() -> int:
    """Start a server, load it, tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--bank", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--cache-bytes", type=int, default=64 << 20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bank = Bank.open(args.bank)
    process, model, url = _start(args)
    try:
        server = psutil.Process(process.pid)
        before, begin = _figures(url), time.monotonic()
        tally, rss = asyncio.run(_load(args, url, model, _prompts(bank), server))
        after = _free(url) | {"seconds": time.monotonic() - begin}
        summary = _summary(tally, rss, before, after, args)
    finally:
        process.terminate()
        code = process.wait(60)
    report = {
        "machine": machine(PACKAGES),
        "command": script_command(),
        "references": bank.rows,
        "clients": args.clients,
        "rows": args.rows,
        "minutes": args.minutes,
        "cache_bytes": args.cache_bytes,
        "exit_code_after_sigterm": code,
        **summary,
    }
    for key, value in report.items():
        print(f"{key:34} {value}")
    if args.json:
        write_json(args.json, report)
    return 1 if summary["errors"] or summary["greedy_prompts_with_two_answers"] else 0


if __name__ == "__main__":
    sys.exit(main())
