"""Signals that are heard while the main thread compiles: Python's own handlers wait for it to come back."""

import contextlib
import os
import signal
import sys
import threading


def watch(act, *numbers):
    """Calls act(number) in a thread of its own for each of these signals that comes; returns what ends that."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    descriptor = signal.set_wakeup_fd(write)  # the byte in the pipe is what counts

    def listen():
        while got := os.read(read, 1):
            if got[0] in numbers:
                act(got[0])
        os.close(read)

    def end():
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)

    threading.Thread(target=listen, daemon=True).start()
    return end


@contextlib.contextmanager
def last_words(line):
    """Within it, SIGTERM prints line() on stderr and ends the process with 143, as a shell says of that signal."""

    def act(number):
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # which a live line hides
        print(f"{cursor}{signal.Signals(number).name}: {line()}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    end = watch(act, signal.SIGTERM)
    try:
        yield
    finally:
        end()
