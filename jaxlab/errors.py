"""Errors whose message is written for the user: what was wrong, where, and what to do."""


class JaxlabError(Exception):
    """Base of every error that the command line prints as one line and turns into an exit code."""

    exit_code = 1


class ConfigError(JaxlabError):
    """A configuration file or a ``--set`` override is wrong."""


class DataError(JaxlabError):
    """A corpus, a tokenizer or a prompt cannot be used."""


class ClosedError(DataError):
    """A request cannot be taken, whatever it is: the engine is being closed."""


class BankError(JaxlabError):
    """A memory bank is damaged, incomplete, or belongs to another model."""


class RewrittenError(BankError):
    """A bank was compacted or repaired: what was opened before does not hold any more."""


class CheckpointError(JaxlabError):
    """A run directory or a checkpoint cannot be used."""


class Interrupted(JaxlabError):
    """The user stopped the work; the message says what is done and how it goes on."""

    exit_code = 130


class Preempted(JaxlabError):
    """The machine is being taken away and all is saved: start the same command again."""

    exit_code = 75


class WorkerError(JaxlabError):
    """Another process of the run is missing or has failed: starting all of them again may do."""

    exit_code = 77
