"""A bank as its model uses it: read, encoded where it is cold, added to."""

import functools
from collections.abc import Sequence

from jaxlab.data.sources import Document
from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.pipeline import append_to_bank, reference_encoder
from jaxlab.memory.read import CACHE_BYTES, MemoryReader
from jaxlab.memory.store import Bank
from jaxlab.training.load import LoadedModel


def open_reader(
    model: LoadedModel, url: str, *, grows: bool = False, cache_bytes: int = CACHE_BYTES
) -> MemoryReader:
    """A reader of the bank at ``url`` that encodes what nobody has read yet, and stores it.

    With ``grows`` documents can be added. Raises BankError when it is not this model's bank.
    """

    @functools.cache
    def encoder():
        return reference_encoder(model)  # compiles: only if there is something to encode

    def append(documents: Sequence[Document]) -> range:
        try:
            return append_to_bank(model, documents, url, cold=True, report=lambda _: None)
        except ConfigError as error:  # not the fault of whoever gave the documents
            raise BankError(str(error)) from error

    return MemoryReader.open(
        Bank.open(url, identity=model.identity),
        model_embed=model.embed_texts,
        encode=lambda references: encoder()(references),
        append=append if grows else None,
        cache_bytes=cache_bytes,
    )
