"""What Google Cloud and GKE call the kinds of TPU."""

import dataclasses

from jaxlab.errors import ConfigError
from jaxlab.preflight.chips import CHIPS_PER_HOST, Topology, topology
from launch.plan import LaunchError


@dataclasses.dataclass(frozen=True)
class Names:
    """accelerator: the beginning of an accelerator type; counts: what its number counts a chip.

    runtime: the image of a TPU VM. gke: the label of its nodes.
    """

    accelerator: str
    counts: int
    runtime: str
    gke: str


NAMES = {
    "v5e": Names("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    # Named by TensorCores: v5p-128 are 64 chips.
    "v5p": Names("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Names("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
}

# Eight chips of these kinds are rented as one virtual machine, more of them in machines of four.
_WHOLE_MACHINE = {"v5e": 8, "v6e": 8}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """The chips of a run, in one slice or several."""

    where: Topology

    @property
    def names(self) -> Names:
        """What its kind is called."""
        return NAMES[self.where.kind]

    @property
    def type(self) -> str:
        """As gcloud calls one slice: v5p-128."""
        chips = self.where.chips // self.where.slices
        return f"{self.names.accelerator}-{chips * self.names.counts}"

    @property
    def options(self) -> tuple[str, ...]:
        """What gcloud is asked for: the type, or kind and shape where the type is another shape."""
        if topology(self.type).sides == self.where.sides:
            return (f"--accelerator-type={self.type}",)
        return (f"--type={self.names.accelerator}", f"--topology={self.shape}")

    @property
    def hosts(self) -> int:
        """Virtual machines of one slice."""
        return self.where.chips // self.where.slices // self.chips_of_a_host

    @property
    def chips_of_a_host(self) -> int:
        """Chips of one virtual machine: four, but all of a slice that is one whole machine."""
        chips = self.where.chips // self.where.slices
        whole = _WHOLE_MACHINE.get(self.where.kind, CHIPS_PER_HOST)
        return chips if chips <= whole else CHIPS_PER_HOST

    @property
    def shape(self) -> str:
        """As GKE labels it: 4x4x4."""
        return "x".join(map(str, self.where.sides))


def accelerator(text: str, slices: int = 1) -> Accelerator:
    """Read ``v5p-128`` or ``v5p:4x4x4``. Raises LaunchError listing those known."""
    try:
        return Accelerator(topology(text, slices))
    except ConfigError as error:
        raise LaunchError(str(error).replace("--topology", "--accelerator")) from None
