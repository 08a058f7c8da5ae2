"""Data: documents, tokens, rows, references and the order in which they are seen."""

from jaxlab.data.packing import Chunks, Rows, chunks, pack, pack_by_document
from jaxlab.data.pipeline import RandomAccess, TextSamples, training_iterator
from jaxlab.data.references import (
    References,
    first_allowed,
    load_neighbours,
    neighbours,
    overlap,
    save_neighbours,
    split_references,
)
from jaxlab.data.sources import Document, corpus_hash, load_documents, split_documents
from jaxlab.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "Chunks",
    "Document",
    "RandomAccess",
    "References",
    "Rows",
    "TextSamples",
    "Tokenizer",
    "chunks",
    "corpus_hash",
    "first_allowed",
    "load_documents",
    "load_neighbours",
    "neighbours",
    "overlap",
    "pack",
    "pack_by_document",
    "save_neighbours",
    "split_documents",
    "split_references",
    "train_tokenizer",
    "training_iterator",
]
