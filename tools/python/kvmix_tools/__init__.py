"""kvmix's programs in Python, kvmix-dump (dump) and kvmix-report (report), and what they share."""
import sys


class InputError(Exception):
    """What is wrong, in one line."""


def progress(text):
    """Shows how far a program is, on a terminal only; '' takes it away."""
    if sys.stderr.isatty():
        print(f'\r\033[K{text}', end='', file=sys.stderr, flush=True)
