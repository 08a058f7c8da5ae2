"""What is installed here, on which devices it runs, and how to get what is missing."""

import os
import platform
import sys
from importlib import metadata

import jaxlab
from jaxlab.tools.output import cores

REQUIRED = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorstore",
    "tensorflow-datasets",
    "sentencepiece",
    "faiss-cpu",
    "scikit-learn",
    "numpy",
)

# Package → what it is for, and the extra that installs it.
OPTIONAL = {
    "tensorboardX": ("metrics in TensorBoard", "eval"),
    "sentence-transformers": ("retrieval with outside embedders", "eval"),
    "safetensors": ("weights to and from Hugging Face", "eval"),
    "libtpu": ("running on TPUs, and compiling for them without one", "tpu"),
    "jax-cuda13-plugin": ("running on NVIDIA GPUs", "gpu"),
    "beartype": ("checked array shapes in the tests", "dev"),
}


def doctor() -> list[str]:
    """One line per fact: versions, devices, cores and memory, optional packages.

    A line that starts with ``missing`` ends with the pip command that mends it. Raises nothing:
    what fails is reported.
    """
    lines = [
        f"jaxlab {jaxlab.__version__}",
        f"python {platform.python_version()} ({sys.executable})",
        f"platform {platform.platform()}",
        f"cores {cores()}, memory {_memory()}",
    ]
    for package in REQUIRED:
        version = _version(package)
        lines.append(
            f"{package} {version}" if version else f"missing {package}: pip install {package}"
        )
    lines += _devices()
    for package, (use, extra) in OPTIONAL.items():
        version = _version(package)
        found = f"{package} {version}: {use}"
        absent = f"missing {package} (optional: {use}): pip install -e '.[{extra}]'"
        lines.append(found if version else absent)
    return lines


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a broken driver or plugin: that is what doctor is asked about
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [f"devices: none can be used: {text}"]
    kinds: dict[str, int] = {}
    for device in devices:
        name = f"{device.platform} {device.device_kind}"
        kinds[name] = kinds.get(name, 0) + 1
    counted = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    lines = [f"devices: {counted}{processes}"]
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return [*lines, f"memory per device: {limit / 2**30:.1f} GiB"] if limit else lines


def _memory() -> str:
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{size / 2**30:.1f} GiB"
