"""Looking after a bank that others change while it is served."""

import asyncio
import logging
from typing import Any

from jaxlab.errors import BankError, RewrittenError
from jaxlab.serving.errors import REWRITTEN

log = logging.getLogger(__name__)


class BankWatch:
    """Takes over what others delete and append; ``problem`` says why the bank is of no more use."""

    def __init__(self, reader: Any, seconds: float):
        self._reader, self._seconds = reader, seconds
        self.problem: str | None = None
        self._told = ""

    async def run(self) -> None:
        """Look every so many seconds (0: never), until the bank is of no more use."""
        if self._reader is None or not self._seconds:
            return
        while self.problem is None:
            await asyncio.sleep(self._seconds)
            await self.look()

    async def look(self) -> None:
        """Look now."""
        await asyncio.to_thread(self._look)

    def _look(self) -> None:
        try:
            self._reader.refresh()
            self._told = ""
        except RewrittenError as error:
            log.error("%s", error)
            self.problem = REWRITTEN
        except Exception as error:  # a bank that cannot be reached now may be there the next time
            if self._told != str(error):
                self._told = str(error)
                exc_info = None if isinstance(error, BankError) else error
                log.error("the bank could not be looked at: %s", error, exc_info=exc_info)
