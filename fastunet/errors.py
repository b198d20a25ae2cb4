"""The base of the errors that the command line shows as one sentence."""


class UserError(ValueError):
    """Something the user can put right; the message is one sentence: what was expected, what came, what to do."""
