"""What the entry points share: flags read by argparse whose mistakes are one line, and how a mistake ends."""

import argparse
import difflib
import sys

SHOWN = 8  # most values of a default that --help lists


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default in ("", (), []):
            return action.help
        if isinstance(default, tuple | list):  # as they are typed; a long list is said in words by the help
            return f"{action.help} (default: {','.join(map(str, default))})" if len(default) <= SHOWN else action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; a mistake is a ValueError that names the flag, and the nearest one for a
    typo.
    """

    def __init__(self, **options):
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **options})

    def error(self, message):
        raise ValueError(message.removeprefix("argument "))

    def parse(self, argv):
        """The arguments; raises ValueError in one line."""
        known = [name for action in self._actions for name in action.option_strings]
        given = [argument.partition("=")[0] for argument in argv if argument.startswith("--")]
        for index, flag in enumerate(given):
            if flag in given[:index]:
                raise ValueError(f"{flag}: given twice")
            if flag not in known:
                nearest = difflib.get_close_matches(flag, known, 1, 0)[0]
                raise ValueError(f"{flag}: unknown flag, did you mean {nearest}?")
        return self.parse_args(argv)


def refuse(error, code=2):
    """Prints `error: ...` on stderr in one line and returns the exit code."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return code
