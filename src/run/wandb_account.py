"""Whether a run could upload to W&B: an account on this machine, and a server that answers."""

import netrc
import os
import urllib.error
import urllib.request


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
