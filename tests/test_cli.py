"""What goes wrong on the command line is one line on stderr, exit code 1, and nothing half done."""

import json
import re
import shutil

import pytest

from jaxlab.cli import main
from jaxlab.training.guards import NotFiniteError
from jaxlab.training.loop import TrainResult
from jaxlab.workloads import demo
from tests.integration import tiny_run
from tests.integration.tiny_run import files_of


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return tiny_run.tiny(tmp_path_factory)


@pytest.fixture
def small_config(tmp_path):
    """A configuration file whose corpus lies beside it."""
    text = tiny_run.CONFIG.replace("CORPUS", str(tmp_path / "corpus.jsonl"))
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return path


# Configuration


@pytest.mark.parametrize(
    "change, expected",
    [
        ("stages.warmup.learning_rat=1", "unknown key; did you mean stages.warmup.learning_rate?"),
        ("learning_rate=1", "unknown key; did you mean optimizer.learning_rate?"),
        ("seed=banana", "--set seed=banana: seed: expected an integer, got 'banana'"),
        ("seed", "--set seed: expected KEY=VALUE"),
        ("optimizer.name=adam", "must be one of adamw, sgd, muon, lite-muon; got 'adam'"),
        ("data.sequence_length=100", "100 is not a multiple of memory.chunk_length (64)"),
        ("model.memory_layers=0", "reading memory needs model.memory_layers > 0"),
    ],
)
def test_a_value_that_cannot_be_is_named_before_anything_is_made(
    fails, small_config, tmp_path, change, expected
):
    line = fails("train", small_config, "--set", change, "--out", tmp_path / "run")
    assert expected in line and change.partition("=")[0].rpartition(".")[2] in line
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_in_the_file_names_file_key_and_the_nearest(fails, small_config, tmp_path):
    small_config.write_text(small_config.read_text().replace("vocab_size", "vocabsize"))
    line = fails("train", small_config, "--out", tmp_path / "run")
    assert line == (
        f"{small_config}: tokenizer.vocabsize: unknown key; did you mean tokenizer.vocab_size?"
    )


def test_a_missing_configuration_is_named(fails, tmp_path):
    line = fails("train", tmp_path / "no.yaml", "--out", tmp_path / "run")
    assert line.startswith(
        f"{tmp_path / 'no.yaml'}: no such configuration file; there are configs/"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("memory3-2b", "configs/memory3_2b.yaml"),
        ("memory3-0.9b", "configs/memory3_0_9b.yaml"),
        ("configs/dem.yaml", "configs/demo.yaml"),
    ],
)
def test_a_configuration_that_is_nearly_named_is_proposed(fails, tmp_path, given, meant):
    line = fails("train", given, "--out", tmp_path / "run")
    assert line == f"{given}: no such configuration file; did you mean {meant}?"


def test_where_there_is_no_configuration_it_is_said_where_some_are(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails("train", "no.yaml", "--out", tmp_path / "run")
    assert line == (
        "no.yaml: no such configuration file; give the path of a YAML file, such as one of "
        "configs/ in a checkout"
    )


# Corpus and tokenizer

CORPORA = {
    "missing": (None, "corpus '{path}': no such file or folder"),
    "empty": (b" \n", "corpus '{path}' holds no text"),
    "not UTF-8": (b'{"text": "fine"}\n{"text": "\xff"}\n', "{path}: not UTF-8 at byte 27"),
    "broken JSON": (b'{"text": "fine"}\n\n{"text": "x"\n', "{path}, line 3: broken JSON"),
    "no text": (b'{"text": "fine"}\n{"txt": "x"}\n', "{path}, line 2: 'text' is missing"),
}


@pytest.mark.parametrize("command", ["train", "tokenizer", "bank"])
@pytest.mark.parametrize("kind", CORPORA)
def test_a_corpus_that_cannot_be_read_is_named_and_nothing_is_made(
    fails, request, small_config, tmp_path, kind, command
):
    content, expected = CORPORA[kind]
    path, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    if command == "train":
        line = fails("train", small_config, "--out", out)
    elif command == "tokenizer":
        line = fails("tokenizer", "train", "--data", path, "--vocab", 400, "--out", out)
    else:
        run = request.getfixturevalue("tiny").run
        line = fails("memory", "write", "--run", run, "--data", path, "--bank", out)
    assert line.startswith(expected.format(path=path))
    assert not out.exists()


@pytest.mark.parametrize(
    "change, expected",
    [
        ("data.facts_fraction=0 tokenizer.vocab_size=4000", "cannot fill vocab_size=4000"),
        ("tokenizer.vocab_size=200", "vocab_size is 200: the smallest that can be is"),
        ("data.validation_fraction=0.000001", "falls on the validation side"),
        ("init_from=NOWHERE", "NOWHERE: is not a run directory"),
        ("tokenizer.path=NO.model", "tokenizer NO.model: cannot be read"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing_behind(fails, tiny, tmp_path, change, expected):
    line = fails("train", tiny.config, "--set", *change.split(), "--out", tmp_path / "run")
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(fails, tiny, tmp_path):
    path = tiny.run / "data" / "tokenizer.model"
    change = (f"tokenizer.path={path}", "model.vocab_size=300")
    line = fails("train", tiny.config, "--set", *change, "--out", tmp_path / "run")
    assert line.startswith(f"tokenizer {path} has 400 pieces but model.vocab_size is 300: ")
    assert not (tmp_path / "run").exists()


def test_the_tokenizer_of_another_model_is_refused(fails, tiny, tmp_path):
    run = tiny.copy_run(tmp_path)
    config = run / "config.yaml"
    small = "vocab_size: 300"
    config.write_text(config.read_text().replace("vocab_size: 400", small, 2))
    line = fails("generate", "--run", run, "--prompt", "the")
    assert line.startswith(f"{run}: the tokenizer has 400 pieces but the model's vocabulary is 300")


# Runs


def test_a_run_of_another_configuration_is_refused_by_hashes_and_keys(fails, tiny, tmp_path):
    run = tiny.copy_run(tmp_path)
    change = ("optimizer.weight_decay=0.5", "stages.continual.steps=9")
    line = fails("train", tiny.config, "--set", *change, "--out", run)
    hashes = r"belongs to configuration [0-9a-f]{12}, this run has [0-9a-f]{12}"
    assert re.search(hashes, line)
    assert "(they differ in optimizer.weight_decay, stages.continual.steps)" in line
    assert files_of(run) == files_of(tiny.run)


def test_a_corpus_that_changed_since_the_run_began_is_refused(fails, tiny, tmp_path):
    run, corpus = tiny.copy_run(tmp_path), tiny.folder / "corpus.jsonl"
    record = json.loads((run / "data" / "corpus.json").read_text())
    (run / "data" / "corpus.json").write_text(json.dumps({**record, "hash": "0" * 64}))
    before = files_of(run)
    line = fails("train", tiny.config, "--out", run)
    assert line.startswith(f"corpus '{corpus}' has changed since {run} was begun (000000000000 ")
    assert files_of(run) == before


@pytest.mark.parametrize(
    "change", ["memory.reference_length=8", "tokenizer.vocab_size=390", "data.references=facts:1:9"]
)
def test_what_was_prepared_for_another_configuration_is_not_used(fails, tiny, tmp_path, change):
    """Also where no checkpoint knows better: the run was killed before its first save."""
    run = tiny.copy_run(tmp_path)
    shutil.rmtree(run / "checkpoints")
    before = files_of(run)
    line = fails("train", tiny.config, "--set", change, "--out", run)
    key = change.partition("=")[0]
    assert line.startswith(f"{run} was begun with another configuration (they differ in {key}); ")
    assert files_of(run) == before


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_that_diverges_says_what_can_be_done_from_where_it_is(tiny, tmp_path, capsys, saves):
    changes = ["stages.continual=null", "data.facts_fraction=0", "optimizer.ire.kappa=1"]
    changes += ["stages.warmup.learning_rate=1e38", f"training.save_every={int(saves)}"]
    words = ["train", str(tiny.config), "--set", *changes, "--out", str(tmp_path / "run")]
    assert main(words) == NotFiniteError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert "with a lower optimizer.ire.kappa, a lower stages.warmup.learning_rate, " in line
    assert line.endswith("; init_from set to this directory keeps its last weights") == saves


@pytest.mark.parametrize(
    "words",
    [
        ("memory", "search", "--bank", "b", "--query", "q", "--top", "-1"),
        ("memory", "search", "--bank", "b", "--query", "q", "--top", "0"),
        ("eval", "facts", "--run", "r", "--json", "f", "--seed", "-1"),
        ("eval", "facts", "--run", "r", "--json", "f", "--seed", "1", "--questions", "0"),
        ("generate", "--run", "r", "--prompt", "p", "--max-tokens", "many"),
    ],
)
def test_a_number_that_cannot_be_is_refused_with_its_flag(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    *_, flag, value = words
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and f"argument {flag}: '{value}' is not a whole number" in last


def test_what_is_no_run_and_a_stage_that_is_not_there_are_named(fails, tiny, tmp_path):
    line = fails("generate", "--run", tmp_path, "--prompt", "the")
    assert line.startswith(f"{tmp_path}: is not a run directory")
    line = fails("generate", "--run", f"{tiny.run}@end", "--prompt", "the")
    assert "labelled 'end' (labels there: continual, warmup)" in line


def test_a_demo_that_is_interrupted_ends_as_other_commands_do(tmp_path, monkeypatch, capsys):
    stopped = TrainResult(7, "warmup", interrupted=True, validation_loss=None)
    monkeypatch.setattr(demo, "train", lambda config, out: stopped)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    line = "interrupted: step 7 is done; the same command goes on from there\n"
    assert capsys.readouterr().err == line


# Reading and evaluating


def test_a_prompt_longer_than_the_context_is_refused(tiny, capsys):
    assert main(["generate", "--run", str(tiny.run), "--prompt", "the array " * 200]) == 1
    said = capsys.readouterr()
    assert "the context holds 192: shorten the prompt" in said.err and said.out == ""


@pytest.mark.parametrize("mode", ["on", "shuffled"])
def test_evaluating_with_memory_needs_a_bank(fails, tiny, tmp_path, mode):
    words = ("--run", tiny.run, "--data", tiny.notes, "--json", tmp_path / "out.json")
    line = fails("eval", "perplexity", *words, "--memory", mode)
    assert line == f"--memory {mode} needs --bank BANK"
    assert not list(tmp_path.iterdir())


def test_a_bank_of_another_model_is_refused_by_both_hashes(fails, tiny):
    # The weights of an earlier stage are another model.
    run = f"{tiny.run}@warmup"
    line = fails("generate", "--run", run, "--bank", tiny.bank, "--prompt", "the")
    hashes = re.search(r"the model of the bank is (\w{64}), yours is (\w{64});", line)
    assert hashes and hashes[1] != hashes[2]
    line = fails("memory", "write", "--run", run, "--data", tiny.notes, "--bank", tiny.bank)
    assert hashes[1] in line and hashes[2] in line


# What goes well


def test_a_whole_bank_is_verified_counted_and_searched(tiny, capsys):
    bank = str(tiny.bank)
    assert main(["memory", "verify", "--bank", bank]) == 0
    assert f"{bank}: whole, " in capsys.readouterr().out
    assert main(["memory", "stats", "--bank", bank]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] > 3
    assert main(["memory", "search", "--bank", bank, "--query", "Note 7", "--top", "2"]) == 0
    hits = capsys.readouterr().out.splitlines()
    assert len(hits) == 2 and all(re.match(r"\d\.\d{4}  \[\d+\] \d\.txt: ", hit) for hit in hits)
    assert main(["memory", "search", "--bank", bank, "--query", ""]) == 0
    assert capsys.readouterr().out == "no reference has anything of the query\n"


def test_a_prompt_is_continued_with_citations(tiny, tmp_path):
    words = ("--prompt", "the array axis", "--max-tokens", 3)
    ended = tiny.child(
        tmp_path, "generate", "--run", tiny.run, "--bank", tiny.bank, *words, "--cite"
    )
    assert ended.code == 0 and ended.err == ""
    text, *cited = ended.out.splitlines()
    assert text.startswith("the array axis")
    assert any(re.match(r"chunk 0  \d\.\d{4}  \[\d+\] \d\.txt: ", line) for line in cited)


def test_doctor_reports(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr()
    assert "jaxlab " in printed.out and printed.err == ""


def test_an_estimate_is_words_and_its_numbers_go_to_the_file_that_is_asked_for(capsys, tmp_path):
    file = tmp_path / "bank.json"
    assert main(["estimate", "bank", "--refs", "1e6"]) == 0
    said = capsys.readouterr().out
    assert "{" not in said
    assert main(["estimate", "bank", "--refs", "1e6", "--json", str(file)]) == 0
    assert capsys.readouterr().out == said
    assert json.loads(file.read_text())["references"] == 1_000_000


def test_a_launched_run_is_gone_on_with_by_the_launcher(capsys, monkeypatch):
    """What starts one worker would miss the others."""
    from jaxlab import workloads

    stopped = TrainResult(step=3, stage="warmup", interrupted=True, validation_loss=None)
    monkeypatch.setattr(workloads, "trainer", lambda _: lambda *_: stopped)
    words = ["train", "configs/demo.yaml", "--out", "r"]
    for launched in (False, True):
        if launched:
            monkeypatch.setenv("JAXLAB_AGAIN", "python -m launch.pod local -- jaxlab train")
        assert main(words) == 130
        again = "python -m launch.pod local -- jaxlab train" if launched else "jaxlab train configs"
        assert f"saved at step 3 (warmup); resume with: {again}" in capsys.readouterr().out
