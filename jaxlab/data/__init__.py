"""Data: documents, tokens, rows, references and the order in which they are seen."""

from jaxlab.data.packing import Chunks, Rows, chunks, pack, pack_by_document
from jaxlab.data.sources import Document, corpus_hash, load_documents, split_documents
from jaxlab.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "Chunks",
    "Document",
    "Rows",
    "Tokenizer",
    "chunks",
    "corpus_hash",
    "load_documents",
    "pack",
    "pack_by_document",
    "split_documents",
    "train_tokenizer",
]
