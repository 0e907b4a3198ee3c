"""A defended model behind the API of OpenAI: `saffron serve`, or `create_app` for a server of one's own.

The HTTP layer is asyncio and knows no model; one thread of the engine takes the steps of all searches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saffron.lazy import attach

if TYPE_CHECKING:
    from saffron.serving.app import create_app
    from saffron.serving.service import Service
    from saffron.serving.settings import Settings

__getattr__, __dir__, __all__ = attach(__name__, {"Service": "service", "Settings": "settings", "create_app": "app"})
