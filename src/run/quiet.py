"""What libraries say of themselves, and a user need not read."""

import logging
import warnings


def silence_libraries() -> None:
    """What the header and the summary say better, and warnings that are not for the user."""
    import lightning.pytorch  # noqa: F401  (takes seconds, and sets the level of its logger itself)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"  # without a line of code
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning 2.6 uses a name torch 2.13 renames
    warnings.filterwarnings("ignore", message=".ModelCheckpoint.* could not find the monitored key")  # `run` says so
    warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")  # that of a resumed run never is
