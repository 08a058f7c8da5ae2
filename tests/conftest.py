"""The tests run on the CPU, with every shape and type annotation of the packages checked."""

import os

from kernels_pallas.without_tpu import ENVIRONMENT

# Before anything imports jax. A machine with an accelerator runs the same tests, and the compiler
# for TPUs does not look for one.
os.environ.update(ENVIRONMENT)
# Compiling is most of what the tests do, and equalities hold for unoptimized programs too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"

import jax
import jaxtyping
import pytest

# Kept for the whole session: modules imported from here on are checked by beartype.
jaxtyping.install_import_hook(["jaxlab", "kernels_pallas"], "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden files under tests/golden anew instead of comparing with them",
    )


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test compiles the next one finds again, in a folder new in each call of pytest.

    A folder of this worker alone, and not told to processes that tests start: JAX's cache writes
    in place, and whoever reads what another writes, or was killed over, is warned.
    """
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--update-golden")


@pytest.fixture
def fails(capsys):
    """Run a command that must fail; returns its one line."""
    from jaxlab.cli import main

    def run(*words) -> str:
        assert main([str(word) for word in words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run
