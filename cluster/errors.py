"""What a job says with another exit code than a mistake in its command line."""


class WorkError(ValueError):
    """One line about data, a store or numbers that showed after work had started."""
