"""``jaxlab preflight`` and ``jaxlab estimate bank``."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

from jaxlab.errors import ConfigError
from jaxlab.tools.output import write_json
from kernels_pallas.without_tpu import ENVIRONMENT


def add_commands(
    commands: Any, command: Callable[..., argparse.ArgumentParser], positive: Callable[[str], int]
) -> None:
    """Add the parsers; ``command(group, name, call, text)`` makes one."""
    text = "compile a run's step for a pod that need not be there: memory, collectives, bounds"
    preflight = command(commands, "preflight", _preflight, text)
    preflight.add_argument("config", metavar="CONFIG")
    topology = "v5p:8x8x8, or an accelerator such as v5e-256"
    preflight.add_argument("--topology", required=True, metavar="KIND:SHAPE", help=topology)
    preflight.add_argument("--slices", type=positive, default=1, metavar="N", help="of it (1)")
    modes = ("train", "decode", "write")
    preflight.add_argument("--mode", choices=modes, default="train", help="(train)")
    preflight.add_argument("--stage", metavar="NAME", help="of --mode train (the last)")
    rows = "sequences to decode or references to write at once (32 a group of devices)"
    preflight.add_argument("--rows", type=positive, metavar="N", help=rows)
    change = "as for jaxlab train"
    preflight.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=change
    )
    prices = "{date: 2026-11-01, currency: USD, per_chip_hour: {v5p: 4.2}}, for the run's cost"
    preflight.add_argument("--prices", metavar="FILE", help=prices)
    search = "try meshes, remat policies and micro-batches, and rank those that fit"
    preflight.add_argument("--search", action="store_true", help=search)
    minutes = "begin no further compilation of a search after so long (10)"
    preflight.add_argument("--minutes", type=float, default=10.0, metavar="M", help=minutes)
    preflight.add_argument("--json", metavar="FILE")

    estimate = commands.add_parser("estimate", help="estimates").add_subparsers(
        required=True, metavar="WHAT"
    )
    bank = command(estimate, "bank", _estimate_bank, "bytes, index, time and bandwidth of a bank")
    bank.add_argument("--refs", type=_count, required=True, metavar="N", help="such as 1.1e8")
    bank.add_argument("--config", metavar="CONFIG", help="whose model (the preset memory3-2b)")
    bank.add_argument("--topology", metavar="KIND:SHAPE", help="that writes it")
    bank.add_argument("--mfu", type=float, default=0.4, help="of writing, a share of peak (0.4)")
    dimension = "of the vectors that are searched (1024)"
    bank.add_argument("--dimension", type=positive, default=1024, metavar="D", help=dimension)
    tokens = "that one host decodes (1131, the paper's without memory)"
    bank.add_argument("--tokens-per-second", type=float, default=1131.0, metavar="T", help=tokens)
    bank.add_argument("--json", metavar="FILE")


def _count(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of references, such as 1.1e8")
    return int(number)


def _preflight(arguments: argparse.Namespace) -> int:
    # Before JAX is imported: what compiles here is a compiler for chips that are not here.
    os.environ.update(ENVIRONMENT)
    from jaxlab.config import ExperimentConfig, load_config
    from jaxlab.preflight import report
    from jaxlab.preflight.analysis import analyse
    from jaxlab.preflight.chips import devices, topology
    from jaxlab.preflight.programs import stage_of
    from jaxlab.preflight.roofline import read_prices
    from jaxlab.preflight.search import cures, search
    from jaxlab.training.program import resolve_model

    config = load_config(arguments.config, arguments.set)
    if not isinstance(config, ExperimentConfig):
        raise ConfigError(f"{arguments.config}: preflight compiles language models")
    config = resolve_model(config, config.tokenizer.vocab_size)
    where = topology(arguments.topology, arguments.slices)
    prices = arguments.prices and read_prices(arguments.prices)
    stage = stage_of(config, arguments.stage)
    chips = devices(where)
    given = {"mode": arguments.mode, "stage": stage, "rows": arguments.rows}
    found = analyse(config, where, chips, **given)
    report.show(found, where, prices)
    result = report.as_json(found, where, prices)
    if arguments.mode == "train":
        options = {"minutes": arguments.minutes}
        if arguments.search:
            tried = search(config, where, chips, stage, **options)
            report.show_tried("meshes and policies that fit", tried)
            result["search"] = report.tried_as_json(tried)
        elif not found.memory.fits:
            tried = cures(config, where, chips, stage, **options)
            report.show_tried("the cheapest changes that make it fit", tried)
            result["cures"] = report.tried_as_json(tried)
    if arguments.json:
        write_json(arguments.json, result)
    return 0 if found.memory.fits else 1


def _estimate_bank(arguments: argparse.Namespace) -> None:
    from jaxlab.config import ExperimentConfig, MemoryConfig, ModelConfig, load_config
    from jaxlab.models.presets import PRESETS
    from jaxlab.preflight.bank import estimate_bank, in_words
    from jaxlab.preflight.chips import topology

    model, memory = ModelConfig(**PRESETS["memory3-2b"]), MemoryConfig()
    if arguments.config:
        config = load_config(arguments.config)
        if not isinstance(config, ExperimentConfig):
            raise ConfigError(f"{arguments.config}: is of no language model, which banks belong to")
        model, memory = config.model, config.memory
    found = estimate_bank(
        model,
        memory,
        references=arguments.refs,
        dimension=arguments.dimension,
        tokens_per_second=arguments.tokens_per_second,
        where=arguments.topology and topology(arguments.topology),
        mfu=arguments.mfu,
    )
    print("\n".join(in_words(found)))
    if arguments.json:
        write_json(arguments.json, dataclasses.asdict(found))
