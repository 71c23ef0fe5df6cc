"""The two kinds of failure: a user's mistake ends the command, a bad item becomes a row.

Broken invariants are asserts.
"""

from functools import partial

from clipmill.base.credentials import strip_credentials


class UserError(Exception):
    """A mistake of the user (exit code 2). The message names the setting or argument and its allowed values."""


class ItemError(Exception):
    """One item (video, clip) cannot be processed: it becomes a row of `failures`, and other items continue.

    error_class  one short kebab-case word for `GROUP BY`, e.g. "not-found", "timeout", "not-a-video"
    message      the original message of the failure, without credentials (cut to 2,000 characters)
    transient    True if a later attempt may succeed (network, rate limit); the next build retries only those
    """

    def __init__(self, error_class: str, message: str, *, transient: bool = False):
        super().__init__(error_class, message)
        self.error_class = error_class
        self.message = strip_credentials(str(message)[:100_000])[:2000]
        self.transient = transient

    def __str__(self) -> str:
        return f"{self.error_class}: {self.message}"

    def __reduce__(self):  # keyword-only arguments do not survive the default pickling
        return partial(ItemError, transient=self.transient), (self.error_class, self.message)
