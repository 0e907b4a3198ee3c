"""The page at `/`: a chat with the defended model next to the undefended one, and the tree of the last search."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, select_autoescape
from starlette.requests import Request
from starlette.responses import HTMLResponse

from saffron.serving.service import Service

# The page needs nothing but this server; the drawn search stands in a frame of no origin.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-src 'self'"
)


async def page(request: Request) -> HTMLResponse:
    """GET /"""
    service: Service = request.app.state.service
    settings = service.settings
    environment = Environment(loader=PackageLoader("saffron"), autoescape=select_autoescape())
    text = environment.get_template("chat.html").render(settings=settings)
    return HTMLResponse(text, headers={"content-security-policy": POLICY, "x-content-type-options": "nosniff"})
