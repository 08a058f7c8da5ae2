"""The command line: parse, resolve, call one function. Errors for the user are one line."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlab.errors import ConfigError, Interrupted, JaxlabError, Preempted
from jaxlab.memory import command as memory
from jaxlab.preflight import command as preflight
from jaxlab.serving import command as serving
from jaxlab.tools.interrupts import interruptible
from jaxlab.tools.output import print_citations, write_json
from kernels_pallas.without_tpu import choose_cpu


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    choose_cpu()  # The commands import jax, which then looks for its devices.
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(argv)
    # A launcher says how the run is started again: its workers alone would lack each other.
    arguments.again = os.environ.get("JAXLAB_AGAIN") or shlex.join(["jaxlab", *argv])
    if not arguments.together:
        return _run(arguments)
    from jaxlab.sharding.multihost import joined, leave

    return leave(lambda: _run(arguments, joined))


def _run(arguments: argparse.Namespace, joined=contextlib.nullcontext) -> int:
    """Call the command; what it raises for the user becomes one line and an exit code."""
    try:
        with interruptible(), joined():
            return arguments.call(arguments) or 0
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        return stop.exit_code
    except JaxlabError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return Interrupted.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxlab",
        description="Language models with explicit memory, and IRE: train, sweep, write, read.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    source = "installed-docs, a path (folder, .txt, .jsonl[.gz|.xz|.zst]), facts:SEED or tfds:NAME"
    _training_commands(commands, source)
    memory.add_commands(commands, _command, _positive, source)
    _generate_command(commands)
    _evaluation_commands(commands, source)
    preflight.add_commands(commands, _command, _positive)
    serving.add_commands(commands, _command, _positive)
    _command(commands, "doctor", _doctor, "versions, devices, what is installed, what is missing")
    return parser


def _command(
    group, name: str, call, text: str, *, together: bool = False
) -> argparse.ArgumentParser:
    """A command; ``together``: several processes may run it as one (sharding/multihost.py)."""
    added = group.add_parser(name, help=text, description=text)
    added.set_defaults(call=call, together=together)
    return added


def _say(text: str) -> None:
    """Print what processes that run together have to say once."""
    from jaxlab.sharding.processes import leads

    if leads():
        print(text)


def _training_commands(commands, source: str) -> None:
    demo = _command(
        commands, "demo", _demo, "train, write a bank, evaluate and ask: all in minutes"
    )
    demo.add_argument("--out", required=True, metavar="DIR")

    tokenizer = commands.add_parser("tokenizer", help="tokenizers").add_subparsers(
        required=True, metavar="COMMAND"
    )
    train_tokenizer = _command(tokenizer, "train", _tokenizer_train, "train a sentencepiece model")
    train_tokenizer.add_argument("--data", required=True, metavar="SRC", help=source)
    train_tokenizer.add_argument("--vocab", required=True, type=_positive, metavar="N")
    train_tokenizer.add_argument("--out", required=True, metavar="FILE")

    text = "run a configuration's stages; resumes by itself"
    train = _command(commands, "train", _train, text, together=True)
    train.add_argument("--out", required=True, metavar="DIR")
    text = "train every combination of some values, one after the other; resumable"
    sweep = _command(commands, "sweep", _sweep, text)
    for each in (train, sweep):
        each.add_argument("config", metavar="CONFIG", help="a YAML file, see docs/howto/train.md")
    for each in (demo, train, sweep):
        change = "change a value of the file, such as seed=1 or stages.continual.steps=100"
        each.add_argument(
            "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=change
        )
    several = (
        "values of a key, such as seed=0,1 or optimizer.ire='null,{kappa: 2}'; several: a grid"
    )
    sweep.add_argument("--over", action="append", required=True, metavar="KEY=a,b,c", help=several)
    sweep.add_argument("--json", required=True, metavar="FILE", help="results; a plot goes beside")
    sweep.add_argument("--out", metavar="DIR", help="the runs (FILE without its ending)")
    text = "runs at once, each with its share of the cores (%(default)s)"
    sweep.add_argument("--workers", type=_positive, default=1, metavar="N", help=text)


def _generate_command(commands) -> None:
    generate = _command(commands, "generate", _generate, "continue a prompt, reading a bank")
    generate.add_argument("--run", required=True, metavar="DIR", help="a run, or RUN@STAGE")
    generate.add_argument("--bank", metavar="BANK", help="what to read; none: nothing")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    text = "read references as text before the prompt, not as memories: the baseline"
    generate.add_argument("--augment", choices=("text",), help=text)
    generate.add_argument("--cite", action="store_true", help="print the references that were read")
    generate.add_argument("--max-tokens", type=_positive, default=64, metavar="N", help="(64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest (0)")
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=_seed, default=0)
    generate.add_argument("--stop", metavar="TEXT", help="end before this text")


def _evaluation_commands(commands, source: str) -> None:
    evaluate = commands.add_parser("eval", help="evaluation").add_subparsers(
        required=True, metavar="COMMAND"
    )
    text = "bits per byte of documents"
    perplexity = _command(evaluate, "perplexity", _eval_perplexity, text, together=True)
    perplexity.add_argument("--run", required=True, metavar="DIR", help="a run, or RUN@STAGE")
    perplexity.add_argument("--data", required=True, metavar="SRC", help=source)
    perplexity.add_argument("--bank", metavar="BANK", help="for --memory on and shuffled")
    modes = ("on", "off", "shuffled", "plain")
    perplexity.add_argument("--memory", required=True, choices=modes)
    lag = "whose references a chunk reads: 1, the last one's, or 0, its own (1)"
    perplexity.add_argument("--lag", type=int, choices=(0, 1), default=1, help=lag)
    perplexity.add_argument(
        "--limit-bytes", type=_positive, metavar="N", help="read so much of SRC"
    )
    perplexity.add_argument("--json", required=True, metavar="FILE")
    facts = _command(evaluate, "facts", _eval_facts, "recall of facts that only the bank holds")
    facts.add_argument("--run", required=True, metavar="DIR", help="a run, or RUN@STAGE")
    facts.add_argument("--seed", required=True, type=_seed, metavar="N", help="of the facts")
    facts.add_argument("--questions", type=_positive, default=500, metavar="N", help="(500)")
    facts.add_argument("--json", required=True, metavar="FILE")

    text = "trace of Fisher matrix and Hessian, top eigenvalues, of the training loss"
    sharpness = _command(evaluate, "sharpness", _eval_sharpness, text)
    sharpness.add_argument("--run", required=True, metavar="DIR", help="a run, or RUN@STAGE")
    rows = "training rows or images to look at (64 rows, 512 images)"
    sharpness.add_argument("--examples", type=_positive, metavar="N", help=rows)
    sharpness.add_argument("--draws", type=_positive, default=8, metavar="N", help="(8)")
    sharpness.add_argument("--eigenvalues", type=_positive, default=1, metavar="K", help="(1)")
    sharpness.add_argument("--iterations", type=_positive, default=20, metavar="N", help="(20)")
    sharpness.add_argument("--seed", type=_seed, default=0)
    sharpness.add_argument("--json", required=True, metavar="FILE")


def _positive(text: str) -> int:
    return _at_least(1, text)


def _seed(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return number


def _demo(arguments: argparse.Namespace) -> None:
    from jaxlab.workloads.demo import run_demo

    run_demo(Path(arguments.out), arguments.set)


def _tokenizer_train(arguments: argparse.Namespace) -> None:
    from jaxlab.data.sources import load_documents
    from jaxlab.data.tokenizer import train_tokenizer

    documents = load_documents(arguments.data)
    texts = [document.text for document in documents]
    tokenizer = train_tokenizer(texts, vocab_size=arguments.vocab, path=arguments.out)
    print(f"{arguments.out}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.hash}")


def _train(arguments: argparse.Namespace) -> int:
    from jaxlab.config import load_config

    config = load_config(arguments.config, arguments.set)
    from jaxlab.workloads import trainer

    result = trainer(config.workload)(config, arguments.out)
    if result.interrupted:
        saved = f"saved at step {result.step} ({result.stage}); resume with"
        saved = saved if result.step else "no step was done yet; start again with"
        how = Preempted if result.preempted else Interrupted
        _say(f"{how.__name__.lower()}: {saved}: {arguments.again}")
        return how.exit_code
    steps = f"step {result.step}, " if result.step else ""  # a workload may have none
    _say(f"done: {steps}run {arguments.out}")
    return 0


def _sweep(arguments: argparse.Namespace) -> None:
    from jaxlab.tools.sweep import run_sweep

    try:
        run_sweep(
            arguments.config,
            arguments.over,
            json_file=Path(arguments.json),
            out=arguments.out and Path(arguments.out),
            overrides=arguments.set,
            workers=arguments.workers,
        )
    except Interrupted as stop:
        raise Interrupted(f"{stop}; go on with: {arguments.again}") from None


def _generate(arguments: argparse.Namespace) -> None:
    from jaxlab.inference.engine import Engine
    from jaxlab.inference.sampling import Sampling

    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    model, reader = _model_and_reader(arguments)

    @functools.cache
    def begin():  # with the first token: an error before it has a line of its own
        print(arguments.prompt, end="", flush=True)

    def say(_: int, text: str) -> None:
        begin()
        print(text, end="", flush=True)

    (answer,) = Engine(model, reader, rows=1).generate(
        [arguments.prompt],
        max_tokens=arguments.max_tokens,
        sampling=sampling,
        stop=arguments.stop,
        memory=arguments.augment or "on",
        on_token=say,
    )
    begin()
    print()
    if arguments.cite:
        print_citations(answer.citations)


def _model_and_reader(arguments: argparse.Namespace):
    """The model of --run and, with --bank, a reader of that bank."""
    from jaxlab.training.load import load_model

    model = load_model(arguments.run)
    if arguments.bank is None:
        return model, None
    from jaxlab.memory.library import open_reader

    return model, open_reader(model, arguments.bank)


def _eval_perplexity(arguments: argparse.Namespace) -> None:
    if arguments.memory in ("on", "shuffled") and arguments.bank is None:
        raise ConfigError(f"--memory {arguments.memory} needs --bank BANK")
    from jaxlab.data.sources import load_documents
    from jaxlab.evaluation.perplexity import score_documents
    from jaxlab.sharding.processes import leads

    documents = load_documents(arguments.data, limit_bytes=arguments.limit_bytes)
    model, reader = _model_and_reader(arguments)
    scores = score_documents(
        model, documents, memory=arguments.memory, lag=arguments.lag, reader=reader
    )
    result = {
        "bpb": scores.bits_per_byte,
        "bytes": int(scores.bytes.sum()),
        "documents": len(documents),
        "lag": arguments.lag,
        "memory": arguments.memory,
    }
    if leads():
        write_json(arguments.json, result)
    _say(json.dumps(result))


def _eval_facts(arguments: argparse.Namespace) -> None:
    from jaxlab.evaluation.facts import evaluate_facts
    from jaxlab.training.load import load_model

    recall = evaluate_facts(
        load_model(arguments.run), seed=arguments.seed, questions=arguments.questions
    )
    result = dataclasses.asdict(recall)
    write_json(arguments.json, result)
    print(json.dumps(result))


def _eval_sharpness(arguments: argparse.Namespace) -> None:
    from jaxlab.evaluation.sharpness import evaluate_sharpness

    found = evaluate_sharpness(
        arguments.run,
        examples=arguments.examples,
        draws=arguments.draws,
        eigenvalues=arguments.eigenvalues,
        iterations=arguments.iterations,
        seed=arguments.seed,
    )
    result = dataclasses.asdict(found)
    write_json(arguments.json, result)
    print(json.dumps(result))


def _doctor(_: argparse.Namespace) -> None:
    from jaxlab.tools.doctor import doctor

    print("\n".join(doctor()))


if __name__ == "__main__":
    sys.exit(main())
