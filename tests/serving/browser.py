"""The browser for the tests of the page; as a program it says whether this machine has one."""

import shutil
import sys

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def installed_browser() -> str | None:
    """The path of a Chromium on PATH."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


if __name__ == "__main__":
    sys.exit(installed_browser() is None)
