"""Whether the model hub can be asked at all."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit


def hub_is_unreachable() -> bool:
    """True if the hub's host has no address here; asking it anyway costs half a minute of retries.

    Behind a proxy the proxy resolves names, so nothing is known and the answer is False.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return True
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False
