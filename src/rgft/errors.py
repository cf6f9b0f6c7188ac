"""The exceptions that users meet."""

TABLES_NEED = "tables need pandas and pyarrow, which are not installed: pip install 'rgft[train]'"


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: what arrived, what is allowed, what to do. The command line prints it
    without a traceback and exits with code 2.
    """


class EngagementError(RuntimeError):
    """A plan was not carried out: something outside the library defeated freezing or truncation."""
