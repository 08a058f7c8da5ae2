"""A stage's program says beforehand what the loop will give it."""

import random

import jax
import pytest

from jaxlab.config import MeshConfig, load_config
from jaxlab.data.pipeline import training_iterator
from jaxlab.sharding.mesh import make_mesh
from jaxlab.training.corpus import prepare_corpus, prepare_neighbourhood, stage_sources
from jaxlab.training.program import TrainProgram, resolve_model, sequence_format
from jaxlab.training.state import fresh_state
from tests.integration.tiny_run import CONFIG, pages


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    (folder / "corpus.jsonl").write_text(pages(random.Random(0)))
    (folder / "tiny.yaml").write_text(CONFIG.replace("CORPUS", str(folder / "corpus.jsonl")))
    config = load_config(folder / "tiny.yaml")
    corpus = prepare_corpus(config, folder, report=lambda _: None)
    neighbourhood = prepare_neighbourhood(config, corpus, report=lambda _: None)
    return resolve_model(config, corpus.tokenizer.vocab_size), corpus, neighbourhood


@pytest.mark.parametrize("name", ["warmup", "continual"])
def test_the_shapes_of_state_and_batch_are_those_of_a_run(prepared, name):
    config, corpus, neighbourhood = prepared
    stage = config.stages.named()[name]
    form = sequence_format(config, corpus.tokenizer, memory=stage.memory)
    program = TrainProgram(config, name, make_mesh(MeshConfig()), form)
    sources, weights = stage_sources(
        config, corpus, memory=stage.memory, neighbourhood=neighbourhood
    )
    batch = next(training_iterator(sources, weights, batch_size=stage.batch_size, seed=0))
    assert kinds(program.batch) == kinds(batch)
    assert kinds(program.state) == kinds(fresh_state(config.model, program.optimizer, seed=0))
    state, metrics = jax.eval_shape(program.step, program.state, program.batch)
    assert kinds(state) == kinds(program.state) and metrics["loss"].shape == ()


def kinds(tree) -> dict[str, tuple]:
    """Shape and dtype of each leaf by its path."""
    return {
        jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
