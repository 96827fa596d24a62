"""Errors whose message is the one line that the user sees."""


class StorageError(ValueError):
    """One line that names the URL or key and the fix."""


class WorkError(ValueError):
    """What showed after work had started: another exit code than a mistake in the command line."""
