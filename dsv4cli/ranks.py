"""One program in several processes (torchrun): rank 0 is the command, the others follow its model and say nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def run_ranked(command: Callable[[], object]) -> None:
    """Run ``command`` on rank 0 and follow it on the others, until it ends."""
    from dsv4_engine.following import dismiss, follow
    from dsv4_engine.ranks import join, launched, leave
    from dsv4cli.errors import reported

    ranks = launched()
    if ranks.rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; rank 0 decides what it means
        with reported():
            join(ranks)
            follow(ranks)
        leave()
        return
    try:
        command()
    except SystemExit as ended:
        if ended.code:  # the others may be in the middle of a sum that never comes: torchrun ends them
            sys.stdout.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        raise
    finally:
        join(ranks)
        dismiss(ranks)
        leave()
