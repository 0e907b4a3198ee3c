"""Tree attention inside vLLM: requests that share a prefix read its K and V once.

`register` is an entry point of vLLM (`vllm.general_plugins`): with this package installed nothing else has to be done.

`SAFFRON_VLLM=1 vllm serve MODEL` uses it on CPUs. On GPUs `--attention-backend SAFFRON` chooses it, which nobody has
tried: its kernels never ran on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
from typing import TYPE_CHECKING

from saffron.lazy import attach

if TYPE_CHECKING:
    from saffron.integrations.vllm.guidance import MrmGuidance as MrmGuidance
    from saffron.integrations.vllm.policy import VllmPolicy as VllmPolicy

__getattr__, __dir__, __all__ = attach(__name__, {"MrmGuidance": "guidance", "VllmPolicy": "policy"})

VERSIONS = ("0.32",)  # minor versions of vLLM that the tests ran with
NAME = "SAFFRON"
BACKEND = "saffron.integrations.vllm.backend.SaffronAttentionBackend"


def why_not(version: str) -> str | None:
    """Why this version of vLLM is not served; None if it is."""
    if version.startswith(tuple(f"{minor}." for minor in VERSIONS)) or os.environ.get("SAFFRON_VLLM") == "force":
        return None
    return (
        f"vLLM {version} is not one of the versions that were tested ({', '.join(VERSIONS)}); "
        "SAFFRON_VLLM=force uses it nevertheless"
    )


def describe() -> str:
    """One line: whether vLLM is installed, which version, and what is served there. vLLM is not imported."""
    if importlib.util.find_spec("vllm") is None:
        return "not installed"
    names = importlib.metadata.packages_distributions().get("vllm", [])
    if not names:
        return "a module without a distribution: its version is unknown"
    version = importlib.metadata.version(names[0])
    reason = why_not(version)
    if reason is not None:
        return f"{version}, not served: {reason}"
    try:
        asked = _asked()
    except ValueError as error:
        return f"{version}, does not start: {error}"
    use = "off, SAFFRON_VLLM=1 switches it on" if asked == "0" else f"on, SAFFRON_VLLM={asked}"
    return f"{version}; attention of causal decoders on CPUs in fp32, bf16, fp16 ({use}); no GPU"


def _asked() -> str:
    """The value of `SAFFRON_VLLM`; empty is unset."""
    asked = os.environ.get("SAFFRON_VLLM") or "0"
    if asked not in ("0", "1", "force"):
        raise ValueError(f"SAFFRON_VLLM: got {asked!r}, expected 0, 1 or force")
    return asked


def register() -> None:
    """Makes the attention backend known to vLLM. Called in each of its processes, more than once.

    Raises:
        ValueError: `SAFFRON_VLLM` has another value than 0, 1 or force.
        RuntimeError: `SAFFRON_VLLM=1`, and this version of vLLM is not served.
    """
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    asked = _asked()
    reason = why_not(vllm.__version__)
    if reason is not None:
        if asked == "1":
            raise RuntimeError(reason)
        logging.getLogger(__name__).info("the attention backend %s is not offered: %s", NAME, reason)
        return
    register_backend(AttentionBackendEnum.__members__.get(NAME, NAME), BACKEND)  # a name can be added once
    if asked != "0" and current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
    elif asked != "0":
        logging.getLogger(f"vllm.{__name__}").warning(
            "SAFFRON_VLLM=%s changes nothing on %s: %s serves CPUs", asked, current_platform.device_type, NAME
        )
