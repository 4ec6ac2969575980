"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Input that makes no sense, in one sentence: what was given, what is wrong, what to do.

    The command line prints the sentence and exits with status 2.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a GPU's (torch.OutOfMemoryError), or torch's on a CPU, a RuntimeError."""
    said = isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory"))
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
