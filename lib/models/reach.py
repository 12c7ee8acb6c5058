"""Whether the hub can be reached, known within seconds: its client tries for half a minute."""

from __future__ import annotations

import functools
import threading

LONGEST_S = 8.0  # for a name, a connection and an answer together; they take a second or two


@functools.cache
def hub_answers() -> bool:
    """Whether the hub answers at all, through the client that will fetch from it, with its proxies.

    Asked once in a process. False where HF_HUB_OFFLINE is set, and where it takes too long: then
    what the local cache holds must do.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []
    # A name that nobody resolves holds a thread for as long as the system likes.
    asking = threading.Thread(target=lambda: answers.append(_ask(constants.ENDPOINT)), daemon=True)
    asking.start()
    asking.join(LONGEST_S)
    return any(answers)


def _ask(address: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(address, timeout=LONGEST_S)
    except Exception:  # of the network, or of an address or a proxy that is none
        return False
    return True
