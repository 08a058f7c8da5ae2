"""One small tokenizer and its corpus, shared by the tests of this folder."""

import pytest

from jaxlab.data.tokenizer import train_tokenizer

TEXT = "the array axis returns a value of memory layers and reference chunks for every model"
WORDS = TEXT.split()


def sentences(count):
    """Plain English without a download: word salad with indentation, digits and é."""
    lines = (
        " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 9)) for i in range(1, count + 1)
    )
    return [f"{line} {i * 37}é.\n    {line[::-1]}\n" for i, line in enumerate(lines)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    return train_tokenizer(sentences(60), vocab_size=400, path=path)
