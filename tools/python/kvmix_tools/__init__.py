"""kvmix's programs in Python, kvmix-dump (dump) and kvmix-report (report), and what they share."""
import contextlib
import os
import pathlib
import sys
import tempfile


class InputError(Exception):
    """What is wrong, in one line."""


def progress(text):
    """Shows how far a program is, on a terminal only; '' takes it away."""
    if sys.stderr.isatty():
        print(f'\r\033[K{text}', end='', file=sys.stderr, flush=True)


@contextlib.contextmanager
def written_whole(path):
    """A file to write to, in a folder PATH.*.part of its own: in the end it becomes PATH, or, on an
    error, it is gone. (A NamedTemporaryFile would be for its owner only, whatever the umask.)"""
    path = pathlib.Path(path)
    with tempfile.TemporaryDirectory('.part', f'{path.name}.', path.parent) as folder:
        part = pathlib.Path(folder) / path.name
        with open(part, 'wb') as file:
            yield file
        os.replace(part, path)
