"""Whether a run could upload to W&B: an account on this machine, and a server that answers."""

import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


def problem() -> str | None:
    """Why no run could upload, and what to do; None if it could."""
    if not wandb_key():
        return "no W&B account is set up on this machine; run `wandb login`, or set WANDB_API_KEY"
    unreachable = out_of_reach()
    return unreachable and f"{unreachable}; connect this machine"


def wandb_key() -> str | None:
    """The W&B key from WANDB_API_KEY or from the netrc file that `wandb login` writes, without asking for it."""
    try:
        file = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return os.environ.get("WANDB_API_KEY")
    login = file.authenticators("api.wandb.ai")
    return os.environ.get("WANDB_API_KEY") or (login and login[2])


def out_of_reach(seconds: float = 5) -> str | None:
    """Why the W&B server does not answer; None if it does, whatever it answers."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        urllib.request.urlopen(server, timeout=seconds).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"W&B cannot be reached at {server} ({getattr(error, 'reason', error)})"
    return None


@contextmanager
def same_mode() -> Iterator[None]:
    """Set WANDB_MODE back at the end: WandbLogger(offline=True) sets it for the whole process."""
    mode = os.environ.get("WANDB_MODE")
    try:
        yield
    finally:
        os.environ.pop("WANDB_MODE", None)
        if mode is not None:
            os.environ["WANDB_MODE"] = mode
