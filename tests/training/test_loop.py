"""Laws of the training step and of what the loop gives it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.config import IREConfig, OptimizerConfig, StageConfig, load_config
from jaxlab.data.facts import FactSamples
from jaxlab.data.packing import Rows
from jaxlab.data.pipeline import TextSamples
from jaxlab.data.tokenizer import Tokenizer
from jaxlab.errors import CheckpointError
from jaxlab.memory.write import as_slots, encode_references
from jaxlab.models.attention import Slots
from jaxlab.models.decoder import context_start, encode_preface
from jaxlab.optim.factory import make_optimizer
from jaxlab.sharding.mesh import make_mesh
from jaxlab.training.corpus import Corpus, stage_sources
from jaxlab.training.curvature import batch_curvature
from jaxlab.training.loop import load_run
from jaxlab.training.program import TrainProgram, resolve_model, sequence_format
from jaxlab.training.state import start_state
from jaxlab.training.step import SequenceFormat, compile_train_step
from tests.inference.small import small_tokenizer
from tests.models.tiny import random_tokens, tiny_config, tiny_decoder, tiny_memory

ROWS, LENGTH = 4, 8
SMALL = tiny_config(layers=1, memory_layers=0)
CONFIG = """
name: tiny
model: {layers: 2, heads: 2, kv_heads: 1, head_dim: 8, ffn_width: 16, memory_layers: 1}
memory: {chunk_length: 4}
data: {source: facts:0, sequence_length: 8, facts_fraction: FACTS}
stages:
  continual: {steps: 1, batch_size: 2, learning_rate: 1e-2, memory: true}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("FACTS", "0.5"))
    return load_config(tmp_path / "tiny.yaml")


def uneven_batch():
    """Rows of which one counts in full, one in part, one hardly and one not at all."""
    counted = np.array([8, 5, 1, 0])
    mask = jnp.asarray(np.arange(LENGTH) < counted[:, None], jnp.float32)
    return {"tokens": random_tokens(1, ROWS, LENGTH), "loss_mask": mask}


def one_step(form, batch, *, accumulation):
    """New parameters and numbers after a step of gradient descent from the tiny decoder."""
    graphdef, params = nnx.split(tiny_decoder(SMALL))
    params = jax.tree.map(jnp.copy, params)  # the step takes its state over
    optimizer = optax.sgd(0.1)
    step = compile_train_step(
        graphdef=graphdef, form=form, optimizer=optimizer, accumulation=accumulation
    )
    state, numbers = step(start_state(params, optimizer, seed=0), batch)
    return state, {name: float(number) for name, number in numbers.items()}


def test_micro_batches_add_up_to_the_whole_batch():
    form, batch = SequenceFormat(bos_id=1), uneven_batch()
    whole, numbers = one_step(form, batch, accumulation=1)
    # Two rows a part: the parts hold 13 and 1 tokens that count, and weigh accordingly.
    parts, numbers_of_parts = one_step(form, batch, accumulation=2)
    assert numbers == pytest.approx(numbers_of_parts, rel=1e-5)
    assert int(whole.step) == int(parts.step) == 1
    before = nnx.split(tiny_decoder(SMALL))[1]
    moved = jax.tree.map(lambda new, old: np.asarray(new - old), whole.params, before)
    moved_by_parts = jax.tree.map(lambda new, old: np.asarray(new - old), parts.params, before)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), moved, moved_by_parts
    )
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(moved))


def test_a_stage_without_memory_reads_plain_text(config, tmp_path):
    tokenizer = Tokenizer(
        300, bos_id=1, eos_id=2, pad_id=0, hash="", byte_lengths=np.ones(300, np.int32)
    )
    form = sequence_format(config, tokenizer, memory=False)
    assert form == SequenceFormat(bos_id=1)
    rows = Rows(np.ones((3, 8), np.int32), np.ones((3, 8), bool))
    corpus = Corpus(tmp_path, tokenizer, [], [], rows, rows)
    (source,), weights = stage_sources(config, corpus, memory=False, neighbourhood=None)
    assert isinstance(source, TextSamples) and weights == [1.0]
    assert source[0].keys() == {"tokens", "loss_mask"}


def test_a_stage_with_memory_reads_behind_the_preface(config):
    tokenizer = small_tokenizer()
    form = sequence_format(config, tokenizer, memory=True)
    assert form == SequenceFormat(tokenizer.bos_id, tokenizer.preface_ids, config.memory)


def test_every_text_of_a_fact_sample_is_read_as_inference_reads_it():
    """Behind its own ``<s>``, from the first position, with the references of its own chunk."""
    tokenizer, length, chunks, band = small_tokenizer(), 128, 3, 2
    sample = FactSamples(
        tokenizer,
        seed=3,
        sequence_length=chunks * length,
        chunk_length=length,
        reference_length=64,
        references_per_chunk=band,
    )[0]
    memory = tiny_memory(chunk_length=length, reference_length=64, references_per_chunk=band)
    graphdef, params = nnx.split(tiny_decoder(tiny_config(vocab_size=tokenizer.vocab_size)))
    decoder = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))
    form = SequenceFormat(tokenizer.bos_id, tokenizer.preface_ids, memory)
    batch = {name: jnp.asarray(array)[None] for name, array in sample.items()}
    packed = decoder.logits(form.hidden(decoder, batch))[0]
    preface = encode_preface(decoder, jnp.asarray(tokenizer.preface_ids))
    references, lengths = (jnp.asarray(sample[k]) for k in ("references", "reference_lengths"))
    memories = encode_references(decoder, references, lengths, preface=preface, memory=memory)
    slots = as_slots(memories, batch=1)
    for chunk in range(chunks):
        begin = chunk * length + (chunk > 0)
        text = sample["tokens"][begin : (chunk + 1) * length]
        assert sample["loss_mask"][begin : (chunk + 1) * length].any()
        seen = range(max(0, chunk - band + 1), chunk + 1)
        keys, values = (
            jnp.concatenate([rows[:, :, c] for c in seen], axis=2)[:, :, None]
            for rows in (slots.keys, slots.values)
        )
        valid = jnp.concatenate([slots.valid[:, c] for c in seen], axis=1)[:, None]
        alone, _ = decoder(
            form.inputs(jnp.asarray(text)[None]),
            preface=preface,
            slots=Slots(keys, values, valid),
            start=context_start(preface.length, memory.reference_length),
        )
        np.testing.assert_allclose(
            packed[begin : (chunk + 1) * length], decoder.logits(alone)[0], atol=2e-4
        )


def test_the_vocabulary_is_the_tokenizers_unless_the_model_names_one(config):
    assert resolve_model(config, 5000).model.vocab_size == 5000
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=6000))
    assert resolve_model(wide, 5000) == wide


def test_what_is_no_run_directory_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a run directory \(it has no config.yaml\)"):
        load_run(tmp_path)


def test_each_stage_and_each_seed_draws_labels_of_its_own_for_ire():
    keys = set()
    for seed in (0, 1):
        config = load_config("configs/demo.yaml", ["optimizer.ire={kappa: 1.0}", f"seed={seed}"])
        for stage in config.stages.named():
            program = TrainProgram(config, stage, make_mesh(config.mesh), SequenceFormat(bos_id=1))
            state = program.optimizer.init({"embedding": jnp.ones((2, 3))})
            keys.add(optax.tree.get(state, "curvature_key").tobytes())
    assert len(keys) == 4


def test_a_skipped_step_changes_nothing_but_the_count():
    config = tiny_config(layers=1, memory_layers=0)
    graphdef, params = nnx.split(tiny_decoder(config))
    parts = {"graphdef": graphdef, "form": SequenceFormat(bos_id=1)}
    ire = IREConfig(kappa=1.0, start_step=0, update_interval=1, curvature_decay=0.5)
    stage = StageConfig(steps=5, batch_size=2, learning_rate=0.1)
    optimizer = make_optimizer(OptimizerConfig(ire=ire), stage)
    step = compile_train_step(
        optimizer=optimizer,
        curvature=batch_curvature(ire, **parts),
        skip_nonfinite=True,
        **parts,
    )
    state = start_state(jax.tree.map(jnp.asarray, nnx.to_pure_dict(params)), optimizer, seed=0)
    batch = {"tokens": random_tokens(0, 2, 8), "loss_mask": jnp.ones((2, 8))}
    state, numbers = step(state, batch)
    assert numbers["skipped"] == 0
    before = jax.device_get(state.replace(key=jax.random.key_data(state.key)))
    spoilt = {**batch, "loss_mask": batch["loss_mask"] * jnp.nan}
    after, numbers = step(state, spoilt)
    assert numbers["skipped"] == 1 and not np.isfinite(numbers["loss"])
    after = after.replace(key=jax.random.key_data(after.key))
    assert after.step == before.step + 1
    same = after.replace(step=before.step)
    for left, right in zip(jax.tree.leaves(same), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(left, right)
