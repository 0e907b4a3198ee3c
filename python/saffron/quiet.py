"""What other libraries print by themselves is not for a person at the command line."""

from __future__ import annotations

import warnings


def quiet_transformers() -> None:
    """No progress bars and no advice of transformers, in this process."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
