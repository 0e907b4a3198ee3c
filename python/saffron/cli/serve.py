"""`saffron serve`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from saffron.cli.options import (
    Commands,
    above_zero,
    add_engine_options,
    add_model_options,
    add_search_options,
    check_engine,
    check_models,
    engine,
    name,
    path,
    positive,
    search_config,
    whole,
)
from saffron.errors import ConfigError, MissingDependencyError, outside
from saffron.storage.text import read_bytes

if TYPE_CHECKING:
    from saffron.serving.settings import Settings


def add(commands: Commands) -> None:
    serve = commands.add_parser("serve", help="serve a defended model behind the API of OpenAI")
    add = serve.add_argument
    add("--host", type=name, default="127.0.0.1", help="address to listen at")
    add("--port", type=whole(0, 65535), default=8000, help="port; 0: any that is free")
    add("--name", type=name, metavar="NAME", help="of the defended model (default: that of the policy's folder)")
    add("--expose-undefended", action="store_true", help="also serve the policy alone, as NAME-undefended")
    add(
        "--expose-best-of-n", type=positive, metavar="N", dest="best_of_n",
        help="also serve Best-of-N with N samples, as NAME-best-of-n",
    )  # fmt: skip
    add(
        "--adaptive", type=path, metavar="STATE",
        help="also serve Saffron search with the widths of this file (docs/adaptive-width.md), as NAME-adaptive; "
        "it learns from the guard, and writes the file every minute and at its end; servers may share it",
    )  # fmt: skip
    add("--no-prefill", dest="prefill", action="store_false", help="refuse requests that begin the answer: production")
    add("--no-guard", dest="guard", action="store_false", help="load no guard; answers have no verdict")
    add("--api-key-file", type=path, metavar="FILE", help="API keys, one per line (default: those of SAFFRON_API_KEY)")
    add("--ssl-certfile", type=path, metavar="FILE", help="certificate, for TLS")
    add("--ssl-keyfile", type=path, metavar="FILE", help="its private key")
    add("--threads", type=whole(1, 4096), metavar="N", help="CPU threads of the models (default: PyTorch's)")
    add("--quiet", action="store_true", help="log errors only")
    limits = serve.add_argument_group("limits")
    add = limits.add_argument
    add("--max-width", type=positive, default=64, metavar="N", help="largest width of a request")
    add("--max-tokens", type=positive, default=1024, metavar="N", help="largest max_tokens of a request")
    add("--max-beam-tokens", type=positive, default=16384, metavar="N", help="largest width times max_tokens")
    add("--max-batch", type=positive, default=32, metavar="N", help="requests that run at once")
    add("--queue", type=positive, default=256, metavar="N", help="requests that may wait; beyond them: 429")
    add("--cache-tokens", type=positive, metavar="N", help="slots of each K/V cache (default: what searches need)")
    add("--prefill-tokens", type=positive, default=512, metavar="N", help="prompt tokens read between two steps")
    add("--timeout", type=above_zero, default=600.0, metavar="SECONDS", help="longest wait for an answer")
    add("--drain", type=above_zero, default=120.0, metavar="SECONDS", help="longest wait for answers at SIGTERM")
    add("--max-body", type=positive, default=1 << 20, metavar="BYTES", help="largest request")
    group = serve.add_argument_group("models")
    add_model_options(group, "policy", "mrm", "base", "prm")
    add_engine_options(group)
    add_search_options(serve)
    serve.set_defaults(run=run, max_new_tokens=128)


def run(options: argparse.Namespace) -> int:
    for module in ("starlette", "uvicorn", "prometheus_client"):
        try:
            __import__(module)
        except ImportError as error:
            raise MissingDependencyError(module.replace("_", "-"), "serve") from error
    settings = _settings(options)
    if bool(options.ssl_keyfile) != bool(options.ssl_certfile):
        raise ConfigError("--ssl-certfile and --ssl-keyfile: TLS needs both")
    for option in ("ssl_keyfile", "ssl_certfile"):
        if (file := getattr(options, option)) is not None:
            read_bytes(Path(file))
    check_engine(options)
    check_models(options)
    return _serve(options, settings)


def _serve(options: argparse.Namespace, settings: Settings) -> int:
    import logging

    import torch
    import uvicorn

    from saffron.models.files import ModelFiles
    from saffron.serving import create_app
    from saffron.serving.checkpoints import load_models
    from saffron.serving.run import Server

    if options.threads:
        torch.set_num_threads(options.threads)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("saffron.serving").setLevel("ERROR" if options.quiet else "INFO")
    files = ModelFiles(options.policy, options.mrm, options.base, options.prm, options.device, **engine(options))
    app = create_app(lambda: load_models(files, options.guard), settings)
    with outside("--ssl-certfile, --ssl-keyfile: cannot be used"):
        config = uvicorn.Config(
            app, host=options.host, port=options.port, log_config=None, access_log=False, lifespan="on",
            ssl_keyfile=options.ssl_keyfile, ssl_certfile=options.ssl_certfile, timeout_graceful_shutdown=5,
            server_header=False,
        )  # fmt: skip
        config.load()
    server = Server(config, options.drain)
    if not options.quiet:
        kind = "https" if options.ssl_certfile else "http"
        print(f"saffron: {settings.name} at {kind}://{options.host}:{options.port}/v1", file=sys.stderr)
    try:
        server.run()
    except SystemExit as stopped:  # uvicorn has logged that it cannot listen
        raise ConfigError(f"--host, --port: cannot listen at {options.host}:{options.port}") from stopped
    if server.service.failure is not None:
        raise server.service.failure
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    from saffron.serving.settings import Settings

    same = ("best_of_n", "adaptive", "prefill", "max_width", "max_tokens", "max_beam_tokens", "max_batch", "queue",
            "cache_tokens", "prefill_tokens", "timeout", "max_body")  # fmt: skip
    return Settings(
        name=options.name or (Path(options.policy).name if options.policy else "saffron-bundled"),
        config=search_config(options),
        undefended=options.expose_undefended,
        api_keys=_keys(options.api_key_file),
        **{name: getattr(options, name) for name in same},
    )


def _keys(file: Path | None) -> tuple[str, ...]:
    """Keys of the file, else of the environment (with commas between them)."""
    if file is None:
        return tuple(key for key in os.environ.get("SAFFRON_API_KEY", "").split(",") if key)
    with outside(f"{file}: cannot be read"):
        keys = tuple(line.strip() for line in read_bytes(file).decode().splitlines() if line.strip())
    if not keys:
        raise ConfigError(f"{file}: holds no API key")
    return keys
