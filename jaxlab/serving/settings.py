"""What a server allows, and who may do what."""

import dataclasses
import hmac
import os

from jaxlab.errors import ConfigError

# The environment variable that holds the key: a secret has no place on a command line.
KEY_VARIABLE = "JAXLAB_API_KEY"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits of a server; ``api_key`` None: nobody may add to the bank.

    Raises ConfigError for a key that no client could send.
    """

    body_bytes: int = 1 << 20
    max_waiting: int = 64
    request_seconds: float = 300.0
    drain_seconds: float = 30.0
    require_key: bool = False
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
