"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Input that makes no sense, in one sentence: what was given, what is wrong, what to do.

    The command line prints the sentence and exits with status 2.
    """
