"""A vLLM engine on a CPU in this process, with the attention of this package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
ENVIRONMENT = {
    "SAFFRON_VLLM": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def environment() -> Iterator[None]:
    """Within it vLLM's processes, this one included, find our attention."""
    from saffron.integrations import vllm

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        vllm.register()
        yield


@contextmanager
def policy(path: Path, **options: Any) -> Iterator[Any]:
    """A `VllmPolicy`."""
    from saffron.integrations.vllm import VllmPolicy

    with environment():
        made = VllmPolicy.from_pretrained(path, **{"max_model_len": 256, **options})
        yield made
        made.close()


def environment_of_a_process() -> dict[str, str]:
    return os.environ | ENVIRONMENT
