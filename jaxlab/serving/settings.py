"""What a server allows, and who may do what."""

import dataclasses
import hmac
import ipaddress
import os

from jaxlab.errors import ConfigError

# The environment variable that holds the key: a secret has no place on a command line.
KEY_VARIABLE = "JAXLAB_API_KEY"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits of a server; ``api_key`` None: nobody may add to the bank.

    Every ``reload_seconds`` what others did to the bank is taken over; 0: never.
    ``hosts`` are the names under which it may be asked, without a port; None: any.

    Raises ConfigError for a key that no client could send.
    """

    body_bytes: int = 1 << 20
    max_waiting: int = 64
    request_seconds: float = 300.0
    drain_seconds: float = 30.0
    reload_seconds: float = 5.0
    require_key: bool = False
    hosts: frozenset[str] | None = None
    api_key: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        key = self.api_key or ""
        if not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ConfigError(
                f"{KEY_VARIABLE} cannot be sent in a header: give a key of ASCII letters, digits "
                "and signs, without spaces or line breaks around it"
            )

    @classmethod
    def from_environment(cls, **limits) -> "Settings":
        """With the key of ``JAXLAB_API_KEY``, if there is one."""
        return cls(api_key=os.environ.get(KEY_VARIABLE) or None, **limits)

    def is_key(self, given: str) -> bool:
        """Whether ``given`` is the key; takes as long for a near miss as for any other."""
        return self.api_key is not None and hmac.compare_digest(
            given.encode("utf-8", "replace"), self.api_key.encode()
        )


def hosts_of(address: str) -> frozenset[str] | None:
    """The names of a server that listens at ``address``: those of this machine alone, or any.

    A page from elsewhere can give its own name this machine's address, and would then be let by the
    browser to ask the server there and read the answers.
    """
    try:
        local = ipaddress.ip_address(address).is_loopback
    except ValueError:
        local = address == "localhost"
    if not local:
        return None
    own = f"[{address}]" if ":" in address else address
    return frozenset({"localhost", "127.0.0.1", "[::1]", own})
